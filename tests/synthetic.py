"""Signals and labels made up: four classes of texts, and a teacher who tells them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd import TeacherSignals
from setfit_kd.data import LabeledSet

if TYPE_CHECKING:
    import pytest
    import torch
    from setfit import SetFitModel

NAMES = ("sports", "business", "politics", "computing")
WORDS = ("match goal team coach", "bank shares market profit", "minister vote talks law", "software phone data chip")
POOL = 33
BATCH = 16
QUICK: dict[str, Any] = {
    "objective": "similarity",
    "freeze_embeddings": False,
    "device": "cpu",
    "precision": "fp32",
    "batch_size": BATCH,
    "epochs": 1,
    "num_iterations": 1,
    "learning_rate": 1e-2,
}
"""Settings under which a tiny student is trained in a blink."""


def texts_and_labels(n: int, classes: int = len(NAMES)) -> tuple[list[str], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return [f"{' '.join(rng.permutation(WORDS[label].split())[:3])} {i}" for i, label in enumerate(labels)], labels


def pool_signals(n: int = POOL, classes: int = len(NAMES)) -> TeacherSignals:
    """Signals of a teacher with a wide-open geometry: a direction a class, and noise in twice the dimensions."""
    texts, labels = texts_and_labels(n, classes)
    rng = np.random.default_rng(1)
    embeddings = np.concatenate([np.eye(4)[labels], np.zeros((n, 4))], axis=1) + 0.3 * rng.normal(size=(n, 8))
    probabilities = 0.6 * np.eye(classes)[labels] + 0.4 * rng.dirichlet(np.ones(classes), size=n)
    return TeacherSignals(texts, probabilities.astype(np.float32), NAMES[:classes], embeddings.astype(np.float32))


def few_labels(n: int = 16) -> LabeledSet:
    """The first n texts of `pool_signals` with their labels."""
    return LabeledSet(*texts_and_labels(n), NAMES)


def weights(model: SetFitModel) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.model_body.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Euclidean distance of two models' weights."""
    return float(sum((here - there).double().square().sum() for here, there in zip(one, other, strict=True)) ** 0.5)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
    """Let trainings end by this error at the beginning of their step of this number."""
    from transformers import Trainer

    plain, steps = Trainer.training_step, 0

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == step:
            raise error
        return plain(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
