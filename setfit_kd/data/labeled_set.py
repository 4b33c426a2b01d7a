"""Labeled sets, and a few labeled texts per class drawn from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.data.sources import Rows
from setfit_kd.errors import DataError
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Labels, Task, task_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """n texts with gold labels; ``origin`` names the set in messages.

    ``labels`` are (n,) int64 indices into ``label_names`` or, in a multi-label set, (n, n_classes) bool.
    """

    texts: list[str]
    labels: Labels
    label_names: tuple[str, ...]
    origin: str = "the labeled set"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(n_classes,) int64, number of texts per class."""
        if self.task is SINGLE_LABEL:
            return np.bincount(self.labels, minlength=len(self.label_names))
        return np.asarray(self.labels.sum(axis=0, dtype=np.int64))

    @property
    def task(self) -> Task:
        """The task that the labels are for."""
        return task_of(self.labels)

    @property
    def targets(self) -> npt.NDArray[np.float32]:
        """(n, n_classes) float32, 1 for the labels of each text and 0 for the others."""
        return self.task.targets(self.labels, len(self.label_names))

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> LabeledSet:
        """Select the rows at ``indices``, in that order."""
        return LabeledSet([self.texts[i] for i in indices], self.labels[indices], self.label_names, self.origin)


def encode_labels(rows: Rows, label_names: Sequence[str] | None = None, task: Task | None = None) -> LabeledSet:
    """Convert rows to a `LabeledSet` with the classes ``label_names``; None uses those that occur in the rows.

    Raises:
        DataError: If the rows have no labels or are for another ``task``, or a label is not in ``label_names``.
    """
    if rows.labels is None:
        raise DataError(f"{rows.origin} has no labels.", hint="Name the label column with --label-column.")
    labels: Any = rows.labels
    rows_task = MULTI_LABEL if isinstance(next(iter(labels), ""), tuple) else SINGLE_LABEL
    if task is not None and task is not rows_task:
        message = f"{rows.origin} is {rows_task.name}; expected {task.name}, as for training."
        hint = "Lists of labels are multi-label, and so are labels read with --label-separator or --label-columns."
        raise DataError(message, hint=hint)
    present = rows.used_labels
    names = tuple(name for name in rows.label_names if name in present) if label_names is None else tuple(label_names)
    unknown = sorted(present - set(names))
    if unknown:
        listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        expected = ", ".join(map(repr, names))
        message = f"{rows.origin} has labels that are not in the training set: {listed}; expected one of {expected}."
        hint = "Add labeled texts of these classes to the training set, or remove these rows."
        raise DataError(message, hint=hint)
    index = {name: i for i, name in enumerate(names)}
    if rows_task is SINGLE_LABEL:
        return LabeledSet(rows.texts, np.array([index[label] for label in labels], np.int64), names, rows.origin)
    encoded = np.zeros((len(rows.texts), len(names)), bool)
    for row, names_in_row in enumerate(labels):
        encoded[row, [index[name] for name in names_in_row]] = True
    sizes = encoded.sum(axis=1)
    listed = ", ".join(names[:10]) + ", ..." * (len(names) > 10)
    message = "Multi-label: %d labels (%s), %.1f per text, %d texts without labels in %s."
    logger.info(message, len(names), listed, sizes.mean(), (sizes == 0).sum(), rows.origin)
    return LabeledSet(rows.texts, encoded, names, rows.origin)


def draw_shots(data: LabeledSet, shots: int | None, *, seed: int) -> LabeledSet:
    """Draw ``shots`` texts per class, or all if it has fewer, in the order of ``data``; raises as `check_classes`.

    Texts without labels are drawn like a class of their own. A text counts for all of its labels: the rarest label is
    drawn first, and those already drawn are not replaced.
    """
    check_classes(data)
    if shots is None:
        return data
    rng = np.random.default_rng([seed, 0])
    if data.task is SINGLE_LABEL:
        masks: Any = (data.labels == label for label in range(len(data.label_names)))
    else:
        masks = (*data.labels.T, ~data.labels.any(axis=1))
    rows_by_class = [rng.permutation(np.flatnonzero(mask)) for mask in masks]
    drawn = np.zeros(len(data), bool)
    for rows in sorted(rows_by_class, key=len):
        n_missing = max(0, shots - np.count_nonzero(drawn[rows]))
        drawn[rows[~drawn[rows]][:n_missing]] = True
    sample = data.take(np.flatnonzero(drawn))
    check_classes(sample)
    return sample


def check_classes(data: LabeledSet) -> None:
    """Raise a `DataError` if a set has only one class or a class has fewer than two texts, too few for pairs.

    The same if, in a multi-label set, no text has a label or all texts have the same one.
    """
    is_multi_label, counts = data.task is MULTI_LABEL, data.counts
    if is_multi_label and not counts.any():
        hint = "Check --label-column, --label-separator and --label-columns."
        raise DataError(f"{data.origin}: no text has a label.", hint=hint)
    if len(data.label_names) < 2:
        kind, hint = "class", "Use labeled texts of at least two classes, and check --label-column."
        if is_multi_label:
            kind, hint = "label", "Use at least two labels. For a single one, use a label column with yes and no."
        raise DataError(f"{data.origin} has only one {kind}: {', '.join(map(repr, data.label_names))}.", hint=hint)
    for name, count in zip(data.label_names, counts, strict=True):
        if count < 2:
            message = f"{data.origin}: expected at least two texts with the label {name!r}, got {count}."
            hint = "Add texts of this class for contrastive fine-tuning, or remove the class."
            raise DataError(
                message, hint=hint + " Are these several labels? Pass --label-separator." * (not is_multi_label)
            )
        if is_multi_label and count == len(data):
            message = f"{data.origin}: all texts have the label {name!r}, so that it cannot be learned."
            raise DataError(message, hint="Remove this label, or add texts without it.")
