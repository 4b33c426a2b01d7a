"""The texts that a run is evaluated on, kept beside what was measured on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.utils.atomic_io import atomic_file, write_errors
from setfit_kd.utils.files import read_json_lines

_TEXTS = "texts.jsonl"


def write_texts(data: LabeledSet, folder: Path) -> None:
    """Write the texts with their labels, after a line with the names of the classes.

    Raises:
        OutputError: They cannot be written.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    about = {"label_names": list(data.label_names), "origin": data.origin, "texts": len(data)}
    with atomic_file(folder / _TEXTS) as file:
        rows = ({"text": text, "label": int(label)} for text, label in zip(data.texts, data.labels, strict=True))
        for row in (about, *rows):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_texts(folder: Path) -> LabeledSet:
    """Read what `write_texts` wrote.

    Raises:
        DataError: It is not there, or not whole.
    """
    try:
        about, *rows = read_json_lines(folder / _TEXTS)
        names, texts = about["label_names"], [row["text"] for row in rows]
        if not isinstance(names, list) or not all(isinstance(text, str) for text in [*names, *texts]):
            raise ValueError("a text or a name is none")
        if len(texts) != about["texts"]:
            raise ValueError(f"it holds {len(texts)} texts of {about['texts']}")
        labels = class_indices([row["label"] for row in rows], len(names))
        return LabeledSet(texts, labels, tuple(names), str(about["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _TEXTS} cannot be read ({error}).", hint="Evaluate the run again.") from None


def class_indices(values: object, n_classes: int) -> npt.NDArray[np.int64]:
    """A list of whole numbers from 0 to ``n_classes`` - 1 as an array.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < n_classes for value in values):
        raise ValueError("its labels are no classes")
    return np.array(values, np.int64)
