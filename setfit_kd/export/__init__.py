"""From a classifier to a bundle: one folder that runs without torch."""

from setfit_kd.export.bundle import Bundle, export_bundle

__all__ = ["Bundle", "export_bundle"]
