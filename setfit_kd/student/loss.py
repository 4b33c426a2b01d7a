"""Create the loss that a student is trained with from its config and the signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.data.splits import normalize
from setfit_kd.losses.base import BatchLoss
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss
from setfit_kd.models.bodies import family_of
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import fit_head, last_layer, linear_weights
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.tasks.classification import MULTI_LABEL

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_INIT_TEXTS = 256
"""Maximum number of pool texts to fit a loss's initial weights on, before they are trained with the body."""


@dataclass(frozen=True)
class LossInputs:
    """Inputs of every loss.

    ``rows`` are those of the signals to train on; ``gold`` is the row of each text in ``labeled``, or `NO_GOLD`.
    """

    body: SentenceTransformer
    signals: TeacherSignals
    rows: npt.NDArray[np.int64]
    gold: npt.NDArray[np.int64]
    labeled: LabeledSet | None
    config: StudentConfig

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every loss."""
        return {"dropout": resolved(self.config.dropout), "micro_batch_size": self.config.micro_batch_size}

    @property
    def teacher_embeddings(self) -> npt.NDArray[np.floating]:
        """(n, d) embeddings of the teacher."""
        assert self.signals.embeddings is not None
        return self.signals.embeddings

    @cached_property
    def initial_embeddings(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """A sample of the training rows, and the untrained student's embeddings of their texts."""
        rng = np.random.default_rng([self.config.seed, 5])
        rows = np.sort(rng.permutation(self.rows)[:MAX_INIT_TEXTS])
        texts, size = [self.signals.texts[row] for row in rows], self.config.encode_batch_size
        return rows, embed(self.body, texts, batch_size=size, description="Initializing loss")

    @property
    def dimension(self) -> int:
        """Length of the student's embeddings."""
        return self.body.get_embedding_dimension() or len(self.body.encode("a", show_progress_bar=False))


def _embedding(inputs: LossInputs) -> BatchLoss:
    loss = EmbeddingLoss(inputs.body, inputs.teacher_embeddings, dimension=inputs.dimension, **inputs.options)
    if inputs.dimension != inputs.teacher_embeddings.shape[1]:
        rows, embeddings = inputs.initial_embeddings
        loss.init_projection(embeddings, inputs.teacher_embeddings[rows])
    return loss


def _soft_labels(inputs: LossInputs) -> BatchLoss:
    signals, config = inputs.signals, inputs.config
    loss = SoftLabelLoss(
        inputs.body,
        signals.probabilities,
        dimension=inputs.dimension,
        gold=inputs.gold if (inputs.gold != NO_GOLD).any() else None,
        gold_targets=None if inputs.labeled is None else inputs.labeled.targets,
        is_multi_label=signals.task is MULTI_LABEL,
        temperature=resolved(config.temperature),
        alpha=config.alpha,
        **inputs.options,
    )
    if family_of(inputs.body) == "transformer":
        loss.head = last_layer(inputs.body)
        return loss
    rows, embeddings = inputs.initial_embeddings
    head = fit_head(embeddings, signals.probabilities[rows], task=signals.task, C=config.soft_labels_c)
    loss.init_head(*linear_weights(head))
    return loss


_LOSSES: dict[str, Callable[[LossInputs], BatchLoss]] = {
    "similarity": lambda inputs: SimilarityLoss(inputs.body, inputs.teacher_embeddings, **inputs.options),
    "embedding": _embedding,
    "soft-labels": _soft_labels,
}


def create_loss(inputs: LossInputs) -> BatchLoss:
    """Create the loss of the config's objective, on the body's device; its labels are rows of the signals."""
    weights = parse_objectives(resolved(inputs.config.objective))
    parts = [(weight, _LOSSES[name](inputs)) for name, weight in weights.items()]
    (first_weight, first), *others = parts
    loss = first if first_weight == 1 and not others else WeightedSumLoss(inputs.body, parts, **inputs.options)
    return loss.to(inputs.body.device)


def match_labeled_texts(signals: TeacherSignals, labeled: LabeledSet) -> npt.NDArray[np.int64]:
    """Find the (n,) row in ``labeled`` of each text of the signals; `NO_GOLD` if none is equal by `normalize`."""
    row_of = {normalize(text): row for row, text in enumerate(labeled.texts)}
    return np.array([row_of.get(normalize(text), NO_GOLD) for text in signals.texts], np.int64)
