"""Storage of the evaluation set of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.utils.atomic_io import atomic_file, raise_output_errors
from setfit_kd.utils.files import read_json_lines

_TEXTS = "texts.jsonl"


def write_texts(data: LabeledSet, folder: Path) -> None:
    """Write the texts and labels to ``texts.jsonl``; its first line holds the label names and the origin.

    Raises:
        OutputError: If the file cannot be written.
    """
    with raise_output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = {"label_names": list(data.label_names), "origin": data.origin, "texts": len(data)}
    with atomic_file(folder / _TEXTS) as file:
        rows = ({"text": text, "label": int(label)} for text, label in zip(data.texts, data.labels, strict=True))
        for row in (header, *rows):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_texts(folder: Path) -> LabeledSet:
    """Read the evaluation set that `write_texts` wrote.

    Raises:
        DataError: If the file is missing or incomplete.
    """
    try:
        header, *rows = read_json_lines(folder / _TEXTS)
        names, texts = header["label_names"], [row["text"] for row in rows]
        if not isinstance(names, list) or not all(isinstance(text, str) for text in [*names, *texts]):
            raise ValueError("texts and label names must be strings")
        if len(texts) != header["texts"]:
            raise ValueError(f"expected {header['texts']} texts, got {len(texts)}")
        labels = class_indices([row["label"] for row in rows], len(names))
        return LabeledSet(texts, labels, tuple(names), str(header["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Cannot read {folder / _TEXTS} ({error}).", hint="Evaluate the run again.") from None


def class_indices(values: object, n_classes: int) -> npt.NDArray[np.int64]:
    """Convert a list of class indices from 0 to ``n_classes`` - 1 to an array.

    Raises:
        ValueError: If ``values`` is not such a list.
    """
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < n_classes for value in values):
        raise ValueError(f"labels must be integers from 0 to {n_classes - 1}")
    return np.array(values, np.int64)
