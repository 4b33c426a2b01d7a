"""Labeled sets and pools: reading, cleaning, sampling, and the leak guard."""

from setfit_kd.data.labeled_set import LabeledSet, check_classes, draw_shots, encode_labels
from setfit_kd.data.readers import LINE_NUMBERED, column_types, read_records
from setfit_kd.data.sources import Problems, Source, read, stream_in_step, stream_texts, text_of, texts_in_step
from setfit_kd.data.splits import DataSplits, normalise, prepare, without_leaks

__all__ = [
    "LINE_NUMBERED",
    "DataSplits",
    "LabeledSet",
    "Problems",
    "Source",
    "check_classes",
    "column_types",
    "draw_shots",
    "encode_labels",
    "normalise",
    "prepare",
    "read",
    "read_records",
    "stream_in_step",
    "stream_texts",
    "text_of",
    "texts_in_step",
    "without_leaks",
]
