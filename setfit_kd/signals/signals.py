"""`TeacherSignals`, the narrow waist: everything a student learns from, and all that it ever sees of a teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import DataError
from setfit_kd.models import at_temperature, fit_temperature, log_probabilities
from setfit_kd.utils.arrays import iter_chunks, large_array, load_rows, normalise_rows, sample_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json, read_json_lines

_FORMAT = 2
_MAX_TEXTS = 10_000
"""Texts that a temperature is fitted on; one number needs no more."""
_PROBABILITIES, _EMBEDDINGS, _TEXTS, _METADATA = "probabilities.npy", "embeddings.npy", "texts.jsonl", "signals.json"


@dataclass(frozen=True, eq=False)
class TeacherSignals:
    """What a teacher says about n pool texts.

    Attributes:
        texts: n texts.
        probabilities: (n, n_classes) float32, rows summing to 1: the soft labels.
        label_names: Names of the classes.
        embeddings: (n, d), or None for teachers that have none. float32; for large pools float16, mapped from disk.
        origin: Where the signals came from.
        temperature: At which the probabilities mean what they say: softmax(log p / temperature); 1 is as they are.

    Raises:
        DataError: The parts do not fit together, or a row is no distribution.
    """

    texts: list[str]
    probabilities: npt.NDArray[np.float32]
    label_names: tuple[str, ...]
    embeddings: npt.NDArray[np.floating] | None = None
    origin: str = "a teacher"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        as_given = object.__setattr__  # the class is frozen
        as_given(self, "texts", list(self.texts))
        as_given(self, "label_names", tuple(self.label_names))
        as_given(self, "probabilities", np.asarray(self.probabilities, np.float32))
        if self.embeddings is not None and getattr(self.embeddings, "dtype", None) != np.float16:
            as_given(self, "embeddings", np.asarray(self.embeddings, np.float32))
        if not 0 < self.temperature < float("inf"):
            raise DataError(f"Signals of temperature {self.temperature}.", hint="It must be above 0; 1 is none.")
        if len(set(self.label_names)) < len(self.label_names):
            raise DataError("A label name stands twice.", hint=f"Got {', '.join(map(str, self.label_names))}.")
        n, c = len(self.texts), len(self.label_names)
        if self.probabilities.shape != (n, c):
            raise DataError(
                f"Signals of {n} texts and {c} classes need probabilities of shape ({n}, {c}), "
                f"not {self.probabilities.shape}.",
                hint="Give one row a text and one column a class.",
            )
        if self.embeddings is not None and (self.embeddings.ndim != 2 or len(self.embeddings) != n):
            raise DataError(
                f"Signals of {n} texts need embeddings of shape ({n}, d), not {self.embeddings.shape}.",
                hint="Give one row a text.",
            )
        in_range = np.all((self.probabilities >= 0) & (self.probabilities <= 1.001), axis=1, keepdims=True)
        sums = np.where(in_range, self.probabilities, 0).sum(axis=1, dtype=np.float64)
        wrong = np.flatnonzero(~in_range[:, 0] | (np.abs(sums - 1) >= 1e-3))
        if len(wrong):
            raise DataError(
                f"Signals, row {wrong[0] + 1}: the probabilities {self.probabilities[wrong[0]].tolist()} are no "
                f"distribution ({len(wrong)} such rows).",
                hint="Each row must be non-negative and sum to 1.",
            )
        if self.embeddings is not None:
            finite = [np.isfinite(part).all(axis=1) for part in iter_chunks(self.embeddings)]
            broken = np.flatnonzero(~np.concatenate([*finite, np.empty(0, bool)]))
            if len(broken):
                raise DataError(
                    f"Signals, row {broken[0] + 1}: the embedding is not finite.", hint="Train the teacher again."
                )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: npt.NDArray[np.int64]) -> TeacherSignals:
        """The signals of the texts at ``rows``, in that order."""
        embeddings = None if self.embeddings is None else self.embeddings[rows]
        texts = [self.texts[row] for row in rows]
        return replace(self, texts=texts, probabilities=self.probabilities[rows], embeddings=embeddings)

    @classmethod
    def average(cls, signals: Sequence[TeacherSignals], weights: Sequence[float] | None = None) -> TeacherSignals:
        """Several teachers' signals on the same texts as one.

        Probabilities are averaged; their temperature is the one that brings them closest to the average of what the
        teachers mean, each at its own. Embeddings are scaled to unit length, weighted by the root of their teacher's
        share and laid side by side: the cosine of two such rows is the weighted mean of the teachers' cosines,
        whatever their dimensions.

        Args:
            signals: Signals of the same texts and classes, one a teacher.
            weights: One a teacher, positive; None weighs all alike.

        Raises:
            DataError: The signals are of different texts or classes.
        """
        if not signals:
            raise DataError("There are no signals to average.", hint="Give one a teacher.")
        first = signals[0]
        for other in signals[1:]:
            if other.texts != first.texts or other.label_names != first.label_names:
                raise DataError(
                    "The signals are of different texts or classes.", hint="Score one pool by all teachers."
                )
        shares = np.ones(len(signals)) if weights is None else np.asarray(weights, np.float64)
        if shares.shape != (len(signals),) or not ((shares > 0) & np.isfinite(shares)).all():
            raise DataError(f"{len(signals)} teachers need as many positive weights.", hint="Check the weights.")
        shares = shares / shares.sum()
        probabilities = np.average([s.probabilities for s in signals], axis=0, weights=shares)
        embeddings = None
        if all(s.embeddings is not None for s in signals):
            embeddings = _concatenate_embeddings(
                [s.embeddings for s in signals if s.embeddings is not None], np.sqrt(shares)
            )
        return cls(
            first.texts,
            np.asarray(probabilities, np.float32),
            first.label_names,
            embeddings,
            " + ".join(s.origin for s in signals),
            _common_temperature(signals, shares, probabilities),
        )

    def save(self, folder: str | Path) -> None:
        """Write the signals to a folder, whole or not at all.

        Raises:
            OutputError: The folder exists already or cannot be written.
        """
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            if self.embeddings is not None:
                save_rows(self.embeddings, part / _EMBEDDINGS)
            with (part / _TEXTS).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in self.texts)
            about = {
                "format": _FORMAT,
                "label_names": list(self.label_names),
                "origin": self.origin,
                "temperature": self.temperature,
                "embeddings": self.embeddings is not None,
            }
            (part / _METADATA).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TeacherSignals:
        """Read signals that `save` wrote.

        Raises:
            DataError: The folder holds no whole signals.
        """
        folder = Path(folder)
        try:
            about = read_json(folder / _METADATA)
            texts = list(read_json_lines(folder / _TEXTS))
            if about["format"] != _FORMAT:
                raise DataError(
                    f"The signals in {folder} are of format {about['format']}, this version reads {_FORMAT}.",
                    hint="Score the pool again, or take the version that wrote them.",
                )
            probabilities = load_rows(folder / _PROBABILITIES)
            embeddings = load_rows(folder / _EMBEDDINGS) if about["embeddings"] else None
            if not all(isinstance(text, str) for text in texts) or not isinstance(about["label_names"], list):
                raise DataError(f"The signals in {folder} hold no texts or no labels.", hint="Score the pool again.")
            temperature = float(about.get("temperature", 1.0))
            return cls(texts, probabilities, tuple(about["label_names"]), embeddings, about["origin"], temperature)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} holds no whole signals ({error}).", hint="Score the pool again.") from None


def _common_temperature(
    signals: Sequence[TeacherSignals], shares: npt.NDArray[np.float64], averaged: npt.NDArray[np.floating]
) -> float:
    """The temperature at which averaged probabilities (n, n_classes) come closest to the average of what is meant.

    Where teachers differ, averaging has made the probabilities flatter already, so that it lies below their own.
    """
    if all(of.temperature == 1 for of in signals):
        return 1.0
    rows = sample_rows(np.arange(len(averaged)), _MAX_TEXTS, seed=[14])
    meant = [at_temperature(of.probabilities[rows], of.temperature) for of in signals]
    return fit_temperature(log_probabilities(averaged[rows]), np.average(meant, axis=0, weights=shares))


def _concatenate_embeddings(
    arrays: Sequence[npt.NDArray[np.floating]], factors: npt.NDArray[np.floating]
) -> npt.NDArray[np.floating]:
    """Arrays of n unit rows each, times their factors, as one of n rows."""
    joined = large_array((len(arrays[0]), sum(array.shape[1] for array in arrays)))
    column = 0
    for array, factor in zip(arrays, factors, strict=True):
        row = 0
        for part in iter_chunks(array):
            joined[row : row + len(part), column : column + part.shape[1]] = factor * normalise_rows(part)
            row += len(part)
        column += array.shape[1]
    return joined
