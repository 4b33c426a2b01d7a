"""`TeacherSignals`: the teacher outputs that a student is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import DataError
from setfit_kd.models.temperature import at_temperature, fit_temperature, log_probabilities
from setfit_kd.utils.arrays import allocate_array, iter_chunks, load_rows, normalize_rows, sample_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json, read_json_lines

_FORMAT = 2
_MAX_TEXTS = 10_000
"""Maximum number of texts that a temperature is fitted on; more would not improve the fit of one number."""
_PROBABILITIES, _EMBEDDINGS, _TEXTS, _METADATA = "probabilities.npy", "embeddings.npy", "texts.jsonl", "signals.json"


@dataclass(frozen=True, eq=False)
class TeacherSignals:
    """Soft labels and embeddings of n pool texts, computed by a teacher.

    Attributes:
        texts: n texts.
        probabilities: (n, n_classes) float32, soft labels; each row sums to 1.
        label_names: Names of the classes.
        embeddings: (n, d), or None if the teacher has no embeddings. float32; for large pools memory-mapped float16.
        origin: Name of the source in messages.
        temperature: Temperature that calibrates the probabilities: softmax(log p / temperature). 1 leaves them
            unchanged.

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

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the class is frozen
        set_field(self, "texts", list(self.texts))
        set_field(self, "label_names", tuple(self.label_names))
        set_field(self, "probabilities", np.asarray(self.probabilities, np.float32))
        if self.embeddings is not None and getattr(self.embeddings, "dtype", None) != np.float16:
            set_field(self, "embeddings", np.asarray(self.embeddings, np.float32))
        if not 0 < self.temperature < float("inf"):
            raise DataError(
                f"The temperature must be positive and finite, got {self.temperature}.", hint="Use 1 for no scaling."
            )
        if len(set(self.label_names)) < len(self.label_names):
            raise DataError(f"Label names must be distinct, got {self.label_names}.", hint="Rename the duplicates.")
        n, c = len(self.texts), len(self.label_names)
        if self.probabilities.shape != (n, c):
            raise DataError(
                f"Expected probabilities of shape ({n}, {c}) for {n} texts and {c} classes, "
                f"got {self.probabilities.shape}.",
                hint="Use one row per text and one column per class.",
            )
        if self.embeddings is not None and (self.embeddings.ndim != 2 or len(self.embeddings) != n):
            raise DataError(
                f"Expected embeddings of shape ({n}, d) for {n} texts, got {self.embeddings.shape}.",
                hint="Use one row per text.",
            )
        in_range = np.all((self.probabilities >= 0) & (self.probabilities <= 1.001), axis=1, keepdims=True)
        sums = np.where(in_range, self.probabilities, 0).sum(axis=1, dtype=np.float64)
        invalid = np.flatnonzero(~in_range[:, 0] | (np.abs(sums - 1) >= 1e-3))
        if len(invalid):
            raise DataError(
                f"Row {invalid[0] + 1} of the probabilities is not a distribution: "
                f"{self.probabilities[invalid[0]].tolist()} ({len(invalid)} such rows).",
                hint="Make each row non-negative with a sum of 1.",
            )
        if self.embeddings is not None:
            finite = [np.isfinite(part).all(axis=1) for part in iter_chunks(self.embeddings)]
            invalid = np.flatnonzero(~np.concatenate([*finite, np.empty(0, bool)]))
            if len(invalid):
                raise DataError(
                    f"Row {invalid[0] + 1} of the embeddings is not finite.", hint="Train the teacher again."
                )

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
        for other in signals[1:]:
            if other.texts != first.texts or other.label_names != first.label_names:
                raise DataError(
                    "The signals have different texts or classes.", hint="Score the same pool with all teachers."
                )
        shares = np.ones(len(signals)) if weights is None else np.asarray(weights, np.float64)
        if shares.shape != (len(signals),) or not ((shares > 0) & np.isfinite(shares)).all():
            raise DataError(f"Expected {len(signals)} positive weights, one per teacher.", hint="Check the weights.")
        shares = shares / shares.sum()
        probabilities = np.average([s.probabilities for s in signals], axis=0, weights=shares)
        embeddings = None
        if all(s.embeddings is not None for s in signals):
            embeddings = _concatenate([s.embeddings for s in signals if s.embeddings is not None], np.sqrt(shares))
        return cls(
            first.texts,
            np.asarray(probabilities, np.float32),
            first.label_names,
            embeddings,
            " + ".join(s.origin for s in signals),
            _common_temperature(signals, shares, probabilities),
        )

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
            metadata = {
                "format": _FORMAT,
                "label_names": list(self.label_names),
                "origin": self.origin,
                "temperature": self.temperature,
                "embeddings": self.embeddings is not None,
            }
            (part / _METADATA).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TeacherSignals:
        """Read signals written by `save`.

        Raises:
            DataError: If the folder does not contain complete signals.
        """
        folder = Path(folder)
        try:
            metadata = read_json(folder / _METADATA)
            texts = list(read_json_lines(folder / _TEXTS))
            if metadata["format"] != _FORMAT:
                raise DataError(
                    f"Expected signals of format {_FORMAT} in {folder}, got format {metadata['format']}.",
                    hint="Score the pool again, or use the version that wrote them.",
                )
            probabilities = load_rows(folder / _PROBABILITIES)
            embeddings = load_rows(folder / _EMBEDDINGS) if metadata["embeddings"] else None
            names = metadata["label_names"]
            if not all(isinstance(text, str) for text in texts) or not isinstance(names, list):
                raise DataError(f"The signals in {folder} have no texts or no labels.", hint="Score the pool again.")
            temperature = float(metadata.get("temperature", 1.0))
            return cls(texts, probabilities, tuple(names), embeddings, metadata["origin"], temperature)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"Cannot read the signals in {folder} ({error}).", hint="Score the pool again.") from None


def _common_temperature(
    signals: Sequence[TeacherSignals], shares: npt.NDArray[np.float64], averaged: npt.NDArray[np.floating]
) -> float:
    """Fit the temperature at which the average (n, n_classes) comes closest to the average of calibrated probabilities.

    If teachers disagree, averaging already flattens the probabilities, so this temperature is below the teachers' own.
    """
    if all(teacher.temperature == 1 for teacher in signals):
        return 1.0
    rows = sample_rows(np.arange(len(averaged)), _MAX_TEXTS, seed=[14])
    calibrated = [at_temperature(teacher.probabilities[rows], teacher.temperature) for teacher in signals]
    return fit_temperature(log_probabilities(averaged[rows]), np.average(calibrated, axis=0, weights=shares))


def _concatenate(
    arrays: Sequence[npt.NDArray[np.floating]], factors: npt.NDArray[np.floating]
) -> npt.NDArray[np.floating]:
    """Normalize the rows of each (n, d) array, multiply them by the array's factor and concatenate them."""
    joined = allocate_array((len(arrays[0]), sum(array.shape[1] for array in arrays)))
    column = 0
    for array, factor in zip(arrays, factors, strict=True):
        row = 0
        for part in iter_chunks(array):
            joined[row : row + len(part), column : column + part.shape[1]] = factor * normalize_rows(part)
            row += len(part)
        column += array.shape[1]
    return joined
