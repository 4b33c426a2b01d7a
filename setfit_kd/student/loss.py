"""From a config and signals to what a student is trained on, and by which objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.config import StudentConfig, parse_objectives, resolved
from setfit_kd.data import normalise
from setfit_kd.losses import (
    NO_GOLD,
    BatchLoss,
    EmbeddingLoss,
    LossOptions,
    SimilarityLoss,
    SoftLabelLoss,
    WeightedSumLoss,
)
from setfit_kd.models import embed, family_of, fit_head, last_layer, resolve_c, softmax_weights
from setfit_kd.signals import TeacherSignals
from setfit_kd.student.checks import check_embeddings
from setfit_kd.student.steps import START_TEXTS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class LossInputs:
    """All that an in-batch objective may be made of; ``rows`` of the signals are trained on, ``gold`` is of all."""

    body: SentenceTransformer
    signals: TeacherSignals
    rows: npt.NDArray[np.int64]
    gold: npt.NDArray[np.int64]
    config: StudentConfig

    @property
    def options(self) -> LossOptions:
        """How objectives pass texts through the body."""
        return {"dropout": resolved(self.config.dropout), "micro_batch_size": self.config.micro_batch_size}

    @property
    def teacher_embeddings(self) -> npt.NDArray[np.floating]:
        """(n, d) of the teacher.

        Raises:
            DataError: The signals hold none.
        """
        check_embeddings(self.signals, self.config)
        assert self.signals.embeddings is not None
        return self.signals.embeddings

    @cached_property
    def start(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """Some rows of the signals, and the untrained student's embeddings of their texts."""
        rng = np.random.default_rng([self.config.seed, 5])
        rows = np.sort(rng.permutation(self.rows)[:START_TEXTS])
        texts = [self.signals.texts[row] for row in rows]
        batch_size = self.config.encode_batch_size
        return rows, embed(self.body, texts, batch_size=batch_size, description="Starting head")

    @property
    def dimension(self) -> int:
        """Length of the student's embeddings."""
        dimension = self.body.get_embedding_dimension()
        return dimension or len(self.body.encode("a", show_progress_bar=False))


def _similarity(given: LossInputs) -> BatchLoss:
    return SimilarityLoss(given.body, given.teacher_embeddings, **given.options)


def _embedding(given: LossInputs) -> BatchLoss:
    objective = EmbeddingLoss(given.body, given.teacher_embeddings, dimension=given.dimension, **given.options)
    if given.dimension != given.teacher_embeddings.shape[1]:
        rows, embeddings = given.start
        objective.start_from(embeddings, given.teacher_embeddings[rows])
    return objective


def _soft_labels(given: LossInputs) -> BatchLoss:
    signals, config = given.signals, given.config
    objective = SoftLabelLoss(
        given.body,
        signals.probabilities,
        dimension=given.dimension,
        gold=given.gold if (given.gold != NO_GOLD).any() else None,
        temperature=resolved(config.temperature),
        alpha=config.alpha,
        **given.options,
    )
    if family_of(given.body) == "transformer":
        objective.head = last_layer(given.body)
        return objective
    rows, embeddings = given.start
    head = fit_head(embeddings, signals.probabilities[rows], C=resolve_c(config.head_c), balance=config.balance)
    objective.start_from(*softmax_weights(head))
    return objective


_LOSSES: dict[str, Callable[[LossInputs], BatchLoss]] = {
    "similarity": _similarity,
    "embedding": _embedding,
    "soft-labels": _soft_labels,
}


def create_loss(given: LossInputs) -> BatchLoss:
    """The objective that the config names, on the body's device; labels are rows of the signals."""
    weights = parse_objectives(resolved(given.config.objective))
    parts = [(weight, _LOSSES[name](given)) for name, weight in weights.items()]
    (first_weight, first), *others = parts
    objective = first if first_weight == 1 and not others else WeightedSumLoss(given.body, parts, **given.options)
    return objective.to(given.body.device)


def match_gold_labels(
    signals: TeacherSignals, texts: list[str], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """(n,) gold class of each of the signals' texts, `NO_GOLD` where no labeled text is the same (see `normalise`)."""
    label_of = dict(zip(map(normalise, texts), labels.tolist(), strict=True))
    return np.array([label_of.get(normalise(text), NO_GOLD) for text in signals.texts], np.int64)
