"""Augment the pool with edited copies of the pool texts and labeled texts."""

from setfit_kd.augment.edits import augment
from setfit_kd.augment.fill_mask import load_fill_mask
from setfit_kd.augment.stage import drop_uncertain, load_texts, save_texts

__all__ = [
    "augment",
    "drop_uncertain",
    "load_fill_mask",
    "load_texts",
    "save_texts",
]
