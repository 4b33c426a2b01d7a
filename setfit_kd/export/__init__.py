"""From a classifier to a bundle: one folder that runs without torch."""

from setfit_kd.export.bundle import Bundle, export_bundle
from setfit_kd.export.publication import prepare_publication, publish

__all__ = [
    "Bundle",
    "export_bundle",
    "prepare_publication",
    "publish",
]
