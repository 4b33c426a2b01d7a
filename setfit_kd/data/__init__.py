"""Read labeled sets and pools, clean them, draw samples and guard against leaks."""

from setfit_kd.data.labeled_set import LabeledSet, check_classes, draw_shots, encode_labels
from setfit_kd.data.readers import LINE_NUMBERED, column_types, read_records
from setfit_kd.data.sources import RowErrors, Source, check_texts, get_text, read, stream_rows, stream_texts
from setfit_kd.data.splits import DataSplits, normalize, remove_leaks, split_data

__all__ = [
    "LINE_NUMBERED",
    "DataSplits",
    "LabeledSet",
    "RowErrors",
    "Source",
    "check_classes",
    "check_texts",
    "column_types",
    "draw_shots",
    "encode_labels",
    "get_text",
    "normalize",
    "read",
    "read_records",
    "remove_leaks",
    "split_data",
    "stream_rows",
    "stream_texts",
]
