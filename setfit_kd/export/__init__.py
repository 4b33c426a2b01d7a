"""Export a classifier as a bundle, one folder that runs without torch, or publish it on the hub."""

from setfit_kd.export.bundle import Bundle, export_bundle
from setfit_kd.export.publication import prepare_publication, publish

__all__ = [
    "Bundle",
    "export_bundle",
    "prepare_publication",
    "publish",
]
