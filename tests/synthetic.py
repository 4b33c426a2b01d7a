"""Synthetic data: texts of four classes, labels and signals of a teacher that separates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd import TeacherSignals
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.tasks.classification import SINGLE_LABEL, Task

if TYPE_CHECKING:
    import pytest
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

LABEL_NAMES = ("sports", "business", "politics", "computing")
WORDS = ("match goal team coach", "bank shares market profit", "minister vote talks law", "software phone data chip")
POOL_SIZE = 33
BATCH_SIZE = 16
QUICK: dict[str, Any] = {
    "objective": "similarity",
    "freeze_embeddings": False,
    "device": "cpu",
    "precision": "fp32",
    "batch_size": BATCH_SIZE,
    "epochs": 1,
    "num_iterations": 1,
    "learning_rate": 1e-2,
}
"""Settings with which a tiny student is trained in a fraction of a second."""


def texts_and_labels(n: int, classes: int = len(LABEL_NAMES)) -> tuple[list[str], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return [f"{' '.join(rng.permutation(WORDS[label].split())[:3])} {i}" for i, label in enumerate(labels)], labels


def pool_signals(n: int = POOL_SIZE, classes: int = len(LABEL_NAMES)) -> TeacherSignals:
    """Return signals whose embeddings have one direction per class, plus noise, in twice as many dimensions."""
    texts, labels = texts_and_labels(n, classes)
    rng = np.random.default_rng(1)
    embeddings = np.concatenate([np.eye(4)[labels], np.zeros((n, 4))], axis=1) + 0.3 * rng.normal(size=(n, 8))
    probabilities = 0.6 * np.eye(classes)[labels] + 0.4 * rng.dirichlet(np.ones(classes), size=n)
    return TeacherSignals(texts, probabilities.astype(np.float32), LABEL_NAMES[:classes], embeddings.astype(np.float32))


def few_labels(n: int = 16) -> LabeledSet:
    """Return the first n texts of `pool_signals` with their labels."""
    return LabeledSet(*texts_and_labels(n), LABEL_NAMES)


def random_classifier(
    body: SentenceTransformer,
    labels: Sequence[str],
    texts: Sequence[str],
    *,
    normalize: bool = False,
    task: Task = SINGLE_LABEL,
) -> Any:
    """Return a classifier whose random head predicts every label for some of the texts."""
    from setfit_kd.models.encode import embed
    from setfit_kd.models.heads import create_head
    from setfit_kd.models.io import new_model

    model: Any = new_model(body, labels, task)
    model.normalize_embeddings = normalize
    embeddings = embed(body, texts, normalize=normalize)
    rows, width = (1 if len(labels) == 2 else len(labels)), embeddings.shape[1]
    coef = 2 * np.random.default_rng(0).normal(size=(rows, width)) / (embeddings.std(axis=0) + 1e-9)
    coef /= np.sqrt(width)
    model.model_head = create_head(np.arange(len(labels)), coef, -coef @ embeddings.mean(axis=0), task)
    return model


def weights(model: SetFitModel) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.model_body.state_dict().values()]


def equal_weights(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def weight_distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Return the Euclidean distance between the weights of two models."""
    return float(sum((a - b).double().square().sum() for a, b in zip(left, right, strict=True)) ** 0.5)


def raise_at_step(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Raise an error at the beginning of a training step, counted from 1 over all trainings."""
    from transformers import Trainer

    original, steps = Trainer.training_step, 0

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == step:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
