"""Labeled sets, and a few labeled texts per class drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from setfit_kd.data.sources import Rows
from setfit_kd.errors import DataError


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """n texts with gold labels: (n,) int64 indices into ``label_names``; ``origin`` names the set in messages."""

    texts: list[str]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    origin: str = "the labeled set"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(n_classes,) int64, number of texts per class."""
        return np.bincount(self.labels, minlength=len(self.label_names))

    @property
    def one_hot(self) -> npt.NDArray[np.float32]:
        """(n, n_classes) float32, 1 for the class of each text and 0 for the others."""
        return np.eye(len(self.label_names), dtype=np.float32)[self.labels]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> LabeledSet:
        """Select the rows at ``indices``, in that order."""
        return LabeledSet([self.texts[i] for i in indices], self.labels[indices], self.label_names, self.origin)


def encode_labels(rows: Rows, label_names: Sequence[str] | None = None) -> LabeledSet:
    """Convert rows to a `LabeledSet` with the classes ``label_names``; None uses those that occur in the rows.

    Raises:
        DataError: If the rows have no labels, or a label is not in ``label_names``.
    """
    if rows.labels is None:
        raise DataError(f"{rows.origin} has no labels.", hint="Name the label column with --label-column.")
    present = set(rows.labels)
    names = tuple(name for name in rows.label_names if name in present) if label_names is None else tuple(label_names)
    unknown = sorted(present - set(names))
    if unknown:
        listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        expected = ", ".join(map(repr, names))
        message = f"{rows.origin} has labels that are not in the training set: {listed}; expected one of {expected}."
        hint = "Add labeled texts of these classes to the training set, or remove these rows."
        raise DataError(message, hint=hint)
    index = {name: i for i, name in enumerate(names)}
    return LabeledSet(rows.texts, np.array([index[label] for label in rows.labels], np.int64), names, rows.origin)


def draw_shots(data: LabeledSet, shots: int | None, *, seed: int) -> LabeledSet:
    """Draw ``shots`` texts per class, or all if it has fewer, in the order of ``data``; raises as `check_classes`."""
    check_classes(data)
    if shots is None:
        return data
    rng = np.random.default_rng([seed, 0])
    rows_by_class = [np.flatnonzero(data.labels == label) for label in range(len(data.label_names))]
    return data.take(np.sort(np.concatenate([rng.permutation(rows)[:shots] for rows in rows_by_class])))


def check_classes(data: LabeledSet) -> None:
    """Raise a `DataError` if a set has only one class or a class has fewer than two texts, too few for pairs."""
    if len(data.label_names) < 2:
        message = f"{data.origin} has only one class: {', '.join(map(repr, data.label_names))}."
        raise DataError(message, hint="Use labeled texts of at least two classes, and check --label-column.")
    for name, count in zip(data.label_names, data.counts, strict=True):
        if count < 2:
            message = f"{data.origin}: expected at least two texts with the label {name!r}, got {count}."
            raise DataError(message, hint="Add texts of this class for contrastive fine-tuning, or remove the class.")
