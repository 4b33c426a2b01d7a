"""Accuracy, F1, confusion matrix and agreement of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassQuality:
    """Precision, recall and F1 of one class, from 0 to 1, and its number of gold texts."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Quality:
    """Quality of predictions on gold labels.

    Attributes:
        accuracy: Fraction of correctly labeled texts.
        macro_f1: Unweighted mean of the F1 scores of the classes.
        classes: Quality per class, by class name.
        confusion: (n_classes, n_classes) counts, with gold classes as rows and predicted classes as columns.
        agreement: Fraction of texts with the same label as the teacher's; None without a teacher.
    """

    accuracy: float
    macro_f1: float
    classes: dict[str, ClassQuality]
    confusion: list[list[int]]
    agreement: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy and F1 by metric name.

        ``accuracy``, ``f1-macro``, ``f1-weighted`` (weighted by support) and, for two classes, ``f1-binary``: the F1 of
        the second class, as in scikit-learn.
        """
        classes = list(self.classes.values())
        n_texts = sum(quality.support for quality in classes)
        scores = {
            "accuracy": self.accuracy,
            "f1-macro": self.macro_f1,
            "f1-weighted": sum(quality.f1 * quality.support for quality in classes) / n_texts,
        }
        return {**scores, "f1-binary": classes[1].f1} if len(classes) == 2 else scores


def measure_quality(
    predicted: npt.NDArray[np.int64],
    gold: npt.NDArray[np.int64],
    label_names: Sequence[str],
    reference: npt.NDArray[np.int64] | None = None,
) -> Quality:
    """Compare predicted classes with gold classes and, if passed, with the teacher's predictions as ``reference``.

    All arrays have shape (n,), with n >= 1. A class that is never predicted has precision 0; a class without gold texts
    has recall 0. Macro-F1 is averaged over the classes that occur in the gold labels.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = range(len(label_names))
    columns = precision_recall_fscore_support(gold, predicted, labels=labels, zero_division=0)
    _, _, f1, support = columns
    return Quality(
        accuracy=float((predicted == gold).mean()),
        macro_f1=float(f1[support > 0].mean()),
        classes={
            name: ClassQuality(float(p), float(r), float(f), int(n))
            for name, p, r, f, n in zip(label_names, *columns, strict=True)
        },
        confusion=confusion_matrix(gold, predicted, labels=labels).tolist(),
        agreement=None if reference is None else float((predicted == reference).mean()),
    )
