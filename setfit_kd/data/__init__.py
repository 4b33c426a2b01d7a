"""Labeled sets and pools: reading, cleaning, sampling, and the leak guard."""

from setfit_kd.data.augmentation import augment
from setfit_kd.data.files import column_types
from setfit_kd.data.prepare import DataReport, RunData, load_run_data, normalise, prepare, without_leaks
from setfit_kd.data.sets import LabeledSet, check_classes, draw_shots, encode_labels
from setfit_kd.data.signals import read_signals
from setfit_kd.data.sources import Rows, Source, read, stream_in_step, stream_texts, texts_in_step

__all__ = [
    "DataReport",
    "LabeledSet",
    "Rows",
    "RunData",
    "Source",
    "augment",
    "check_classes",
    "column_types",
    "draw_shots",
    "encode_labels",
    "load_run_data",
    "normalise",
    "prepare",
    "read",
    "read_signals",
    "stream_in_step",
    "stream_texts",
    "texts_in_step",
    "without_leaks",
]
