"""`TeacherSignals`: the teacher outputs that a student is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import DataError
from setfit_kd.models.heads import at_temperature, fit_temperature
from setfit_kd.tasks.classification import SINGLE_LABEL, TASKS, Task
from setfit_kd.utils.arrays import (
    Floats,
    allocate_array,
    iter_chunks,
    load_rows,
    normalize_rows,
    sample_rows,
    save_rows,
)
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json, read_json_lines

_FORMAT = 2
_MAX_TEXTS = 10_000  # that a temperature is fitted on; more would not improve the fit of one number
_PROBABILITIES, _EMBEDDINGS, _TEXTS, _METADATA = "probabilities.npy", "embeddings.npy", "texts.jsonl", "signals.json"


@dataclass(frozen=True, eq=False)
class TeacherSignals:
    """Soft labels and embeddings of n pool texts, computed by a teacher.

    Attributes:
        texts: n texts.
        probabilities: (n, n_classes) float32, soft labels; each row sums to 1, unless the task is multi-label.
        label_names: Names of the classes.
        embeddings: (n, d), or None if the teacher has no embeddings. float32; for large pools memory-mapped float16.
        origin: Name of the source in messages.
        temperature: Temperature that calibrates the probabilities, see `at_temperature`. 1 leaves them unchanged.
        task: The task.

    Raises:
        DataError: If the shapes do not match, a row of ``probabilities`` is not a distribution, or an embedding is not
            finite.
    """

    texts: list[str]
    probabilities: npt.NDArray[np.float32]
    label_names: tuple[str, ...]
    embeddings: npt.NDArray[np.floating] | None = None
    origin: str = "a teacher"
    temperature: float = 1.0
    task: Task = SINGLE_LABEL

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the class is frozen
        set_field(self, "texts", list(self.texts))
        set_field(self, "label_names", tuple(self.label_names))
        set_field(self, "probabilities", np.asarray(self.probabilities, np.float32))
        if self.embeddings is not None and getattr(self.embeddings, "dtype", None) != np.float16:
            set_field(self, "embeddings", np.asarray(self.embeddings, np.float32))
        n, c, shape = len(self.texts), len(self.label_names), self.probabilities.shape
        message = f"The temperature must be positive and finite, got {self.temperature}."
        _check(0 < self.temperature < float("inf"), message, "Use 1 for no scaling.")
        distinct = len(set(self.label_names)) == c
        _check(distinct, f"Label names must be distinct, got {self.label_names}.", "Rename the duplicates.")
        message = f"Expected probabilities of shape ({n}, {c}) for {n} texts and {c} classes, got {shape}."
        _check(shape == (n, c), message)
        in_range = np.all((self.probabilities >= 0) & (self.probabilities <= 1.001), axis=1, keepdims=True)
        sums = np.where(in_range, self.probabilities, 0).sum(axis=1, dtype=np.float64)
        sums_to_one = (np.abs(sums - 1) < 1e-3) | (self.task is not SINGLE_LABEL)
        invalid = np.flatnonzero(~in_range[:, 0] | ~sums_to_one)
        for row in invalid[:1]:
            values, count = self.probabilities[row].tolist(), len(invalid)
            message = f"Row {row + 1} of the probabilities is not a distribution: {values} ({count} such rows)."
            hint = "Make each row non-negative with a sum of 1, or pass multi-label signals as such."
            _check(False, message, hint)
        if self.embeddings is not None:
            matches = self.embeddings.ndim == 2 and len(self.embeddings) == n
            _check(matches, f"Expected embeddings of shape ({n}, d) for {n} texts, got {self.embeddings.shape}.")
            finite = [np.isfinite(part).all(axis=1) for part in iter_chunks(self.embeddings)]
            for row in np.flatnonzero(~np.concatenate([*finite, np.empty(0, bool)]))[:1]:
                _check(False, f"Row {row + 1} of the embeddings is not finite.", "Train the teacher again.")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: npt.NDArray[np.int64]) -> TeacherSignals:
        """Select the signals of the texts at ``rows``, in that order."""
        embeddings = None if self.embeddings is None else self.embeddings[rows]
        texts = [self.texts[row] for row in rows]
        return replace(self, texts=texts, probabilities=self.probabilities[rows], embeddings=embeddings)

    @classmethod
    def average(cls, signals: Sequence[TeacherSignals], weights: Sequence[float] | None = None) -> TeacherSignals:
        """Average the signals of several teachers on the same texts.

        The probabilities are averaged. Their temperature is fitted so that they come closest to the average of the
        teachers' calibrated probabilities. The embeddings are scaled to unit length, multiplied by the square root of
        the teacher's weight and concatenated: the cosine similarity of two rows is then the weighted mean of the
        teachers' cosine similarities, whatever their dimensions.

        Args:
            signals: Signals of each teacher, for the same texts and classes.
            weights: Positive weight per teacher; None weights all teachers equally.

        Raises:
            DataError: If there are no signals, their texts or classes differ, or the weights are invalid.
        """
        if not signals:
            raise DataError("Cannot average an empty list of signals.", hint="Pass the signals of each teacher.")
        first = signals[0]
        if any((s.texts, s.label_names, s.task) != (first.texts, first.label_names, first.task) for s in signals):
            raise DataError("The signals have different texts or classes.", hint="Score one pool with all teachers.")
        shares = np.ones(len(signals)) if weights is None else np.asarray(weights, np.float64)
        if shares.shape != (len(signals),) or not ((shares > 0) & np.isfinite(shares)).all():
            raise DataError(f"Expected {len(signals)} positive weights, one per teacher.", hint="Check the weights.")
        shares = shares / shares.sum()
        probabilities = np.average([s.probabilities for s in signals], axis=0, weights=shares)
        arrays = [s.embeddings for s in signals if s.embeddings is not None]
        embeddings = _concatenate(arrays, np.sqrt(shares)) if len(arrays) == len(signals) else None
        temperature = 1.0
        if any(teacher.temperature != 1 for teacher in signals):
            # If teachers disagree, averaging already flattens the probabilities, so the result is below their own.
            rows = sample_rows(np.arange(len(probabilities)), _MAX_TEXTS, seed=[14])
            calibrated = [at_temperature(s.probabilities[rows], s.temperature, s.task) for s in signals]
            target = np.average(calibrated, axis=0, weights=shares)
            temperature = fit_temperature(first.task.to_logits(probabilities[rows]), target, task=first.task)
        origin = " + ".join(s.origin for s in signals)
        return cls(first.texts, probabilities, first.label_names, embeddings, origin, temperature, first.task)

    @property
    def calibrated(self) -> npt.NDArray[np.floating]:
        """(n, n_classes) probabilities at the temperature."""
        return at_temperature(self.probabilities, self.temperature, self.task)

    def save(self, folder: str | Path) -> None:
        """Write the signals to a new folder, atomically.

        Raises:
            OutputError: If the folder exists or cannot be written.
        """
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            if self.embeddings is not None:
                save_rows(self.embeddings, part / _EMBEDDINGS)
            with (part / _TEXTS).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in self.texts)
            metadata = {"format": _FORMAT, "label_names": list(self.label_names), "origin": self.origin}
            metadata |= {"temperature": self.temperature, "embeddings": self.embeddings is not None}
            metadata |= {"task": self.task.name}
            (part / _METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TeacherSignals:
        """Read signals written by `save`.

        Raises:
            DataError: If the folder does not contain complete signals.
        """
        folder, hint = Path(folder), "Score the pool again, or use the version that wrote them."
        try:
            metadata = read_json(folder / _METADATA)
            texts, names = list(read_json_lines(folder / _TEXTS)), metadata["label_names"]
            if metadata["format"] != _FORMAT:
                raise ValueError(f"expected format {_FORMAT}, got {metadata['format']}")
            if not all(isinstance(text, str) for text in texts) or not isinstance(names, list):
                raise ValueError("they have no texts or no labels")
            probabilities = load_rows(folder / _PROBABILITIES)
            embeddings = load_rows(folder / _EMBEDDINGS) if metadata["embeddings"] else None
            temperature, task = float(metadata["temperature"]), TASKS[metadata["task"]]
            return cls(texts, probabilities, tuple(names), embeddings, metadata["origin"], temperature, task)
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"Cannot read the signals in {folder} ({error}).", hint=hint) from None


def _check(condition: bool, message: str, hint: str = "Use one row per text and one column per class.") -> None:
    if not condition:
        raise DataError(message, hint=hint)


def _concatenate(arrays: Sequence[Floats], factors: Floats) -> Floats:
    """Normalize the rows of each (n, d) array, multiply them by the array's factor and concatenate them."""
    joined = allocate_array((len(arrays[0]), sum(array.shape[1] for array in arrays)))
    stop = 0
    for array, factor in zip(arrays, factors, strict=True):
        row, start, stop = 0, stop, stop + array.shape[1]
        for part in iter_chunks(array):
            joined[row : row + len(part), start:stop] = factor * normalize_rows(part)
            row += len(part)
    return joined
