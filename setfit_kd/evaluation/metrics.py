"""How right predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ClassQuality:
    """Quality on one class: fractions from 0 to 1, and how many gold texts it has."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Quality:
    """Quality on n gold texts.

    Attributes:
        accuracy: Fraction of texts labeled right.
        macro_f1: Mean of the classes' F1, each class counting alike.
        classes: Quality a class, by name.
        confusion: (n_classes, n_classes) counts, gold in rows and predicted in columns.
        agreement: Fraction of texts labeled as the teacher does, where there is one to compare with.
    """

    accuracy: float
    macro_f1: float
    classes: dict[str, ClassQuality]
    confusion: list[list[int]]
    agreement: float | None = None

    @property
    def scores(self) -> dict[str, float]:
        """``accuracy`` and F1 as ``f1-macro``, ``f1-weighted`` by the classes' texts and, of two, ``f1-binary``.

        The last is the second class's, as scikit-learn has it.
        """
        classes = list(self.classes.values())
        total = sum(of.support for of in classes)
        found = {
            "accuracy": self.accuracy,
            "f1-macro": self.macro_f1,
            "f1-weighted": sum(of.f1 * of.support for of in classes) / total,
        }
        return {**found, "f1-binary": classes[1].f1} if len(classes) == 2 else found


def measure_quality(
    predicted: npt.NDArray[np.int64],
    gold: npt.NDArray[np.int64],
    label_names: Sequence[str],
    reference: npt.NDArray[np.int64] | None = None,
) -> Quality:
    """Compare predicted classes with gold ones, and with a teacher's where given; all are (n,), n at least 1.

    A class that is never predicted has precision 0, one without gold texts recall 0. The macro mean is over the
    classes that occur among the gold texts.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    indices = list(range(len(label_names)))
    precision, recall, f1, support = precision_recall_fscore_support(gold, predicted, labels=indices, zero_division=0)
    classes = {
        name: ClassQuality(float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
        for i, name in enumerate(label_names)
    }
    return Quality(
        accuracy=float((predicted == gold).mean()),
        macro_f1=float(f1[support > 0].mean()),
        classes=classes,
        confusion=confusion_matrix(gold, predicted, labels=indices).tolist(),
        agreement=None if reference is None else float((predicted == reference).mean()),
    )
