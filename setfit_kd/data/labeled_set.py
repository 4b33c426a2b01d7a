"""Labeled sets, and drawing a few shots from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from setfit_kd.data.sources import Rows
from setfit_kd.errors import DataError


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """n texts with gold labels.

    Attributes:
        texts: n texts.
        labels: (n,) int64, indices into ``label_names``.
        label_names: Names of the classes.
        origin: What to call the set in a message.
    """

    texts: list[str]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    origin: str = "the labeled set"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(n_classes,) int64, texts of each class."""
        return np.bincount(self.labels, minlength=len(self.label_names))

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> LabeledSet:
        """The rows at ``indices``, in that order."""
        return LabeledSet([self.texts[i] for i in indices], self.labels[indices], self.label_names, self.origin)


def encode_labels(rows: Rows, label_names: Sequence[str] | None = None) -> LabeledSet:
    """Rows to a `LabeledSet`, over the given classes or, without them, over the rows' own.

    Raises:
        DataError: A label is not among ``label_names``.
    """
    if rows.labels is None:
        raise DataError(f"{rows.origin} has no labels.", hint="Name the label column by --label-column.")
    present = set(rows.labels)
    names = tuple(label_names) if label_names is not None else tuple(n for n in rows.label_names if n in present)
    strangers = sorted(present - set(names))
    if strangers:
        shown = ", ".join(map(repr, strangers[:5])) + (", ..." if len(strangers) > 5 else "")
        raise DataError(
            f"{rows.origin} has labels that the training set lacks: {shown}; known: {', '.join(map(repr, names))}.",
            hint="Give labeled texts of every class, or remove those rows.",
        )
    index = {name: i for i, name in enumerate(names)}
    return LabeledSet(rows.texts, np.array([index[label] for label in rows.labels], np.int64), names, rows.origin)


def draw_shots(data: LabeledSet, shots: int | None, *, seed: int) -> LabeledSet:
    """Draw ``shots`` texts of each class without replacement; a class that has fewer gives all it has.

    Args:
        data: At least two classes, each with two texts or more.
        shots: Texts a class; None keeps everything.
        seed: Same seed, same draw.

    Returns:
        The drawn texts, classes interleaved in the source's order.

    Raises:
        DataError: There is one class only, or a class has a single text.
    """
    check_classes(data)
    if shots is None:
        return data
    rng = np.random.default_rng([seed, 0])
    chosen = []
    for label in range(len(data.label_names)):
        rows = np.flatnonzero(data.labels == label)
        chosen.append(rng.permutation(rows)[:shots])
    return data.take(np.sort(np.concatenate(chosen)))


def check_classes(data: LabeledSet) -> None:
    """Refuse a set that no contrast can be drawn from.

    Raises:
        DataError: There is one class only, or a class has fewer than two texts.
    """
    if len(data.label_names) < 2:
        raise DataError(
            f"{data.origin} has one class only: {', '.join(map(repr, data.label_names))}.",
            hint="A classifier needs at least two; check --label-column.",
        )
    for name, count in zip(data.label_names, data.counts, strict=True):
        if count < 2:
            times = "once" if count == 1 else "in no text"
            raise DataError(
                f"{data.origin}: label {name!r} occurs {times}.",
                hint="Contrastive fine-tuning needs two texts a class or more: add some, or remove the class.",
            )
