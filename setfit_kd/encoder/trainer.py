"""Trainer of sentence encoders."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from setfit_kd.config.base import resolved
from setfit_kd.config.encoder import EncoderConfig
from setfit_kd.encoder.train import TrainingRows
from setfit_kd.losses.base import BatchLoss
from setfit_kd.losses.cross_entropy import CrossEntropyLoss
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.ranking import RankingLoss
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss
from setfit_kd.models.encode import embed
from setfit_kd.training.loop import BodyTrainer
from setfit_kd.training.loss_trainer import TokenDataset
from setfit_kd.utils.arrays import Floats, sample_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LEARNING_RATE, DISTILLATION_LEARNING_RATE = 1e-4, 3e-4
_MAX_INIT_TEXTS = 256  # to fit the projection to the teacher's dimension on


def create_trainer(
    body: SentenceTransformer,
    rows: TrainingRows,
    batches: list[list[int]],
    teacher_embeddings: Floats | None,
    *arguments: Any,
) -> BodyTrainer:
    """Create a trainer of a sentence encoder; ``arguments`` are those of ``make_trainer``, see `train`."""
    dataset = TokenDataset(body, rows.texts, rows.labels, rows.columns)
    create_loss = partial(_create_loss, body, rows, teacher_embeddings)
    rate = LEARNING_RATE if teacher_embeddings is None else DISTILLATION_LEARNING_RATE
    return BodyTrainer(body, body, dataset, create_loss, *arguments, batches=batches, learning_rate=rate)


def _create_loss(
    body: SentenceTransformer, rows: TrainingRows, teacher_embeddings: Floats | None, config: EncoderConfig
) -> BatchLoss:
    """Create the weighted sum of the losses of the objectives."""

    def create(name: str) -> BatchLoss:
        if name == "ranking":
            return RankingLoss(body)
        if name == "similarity":
            return SimilarityLoss(body, resolved(teacher_embeddings))
        sample = sample_rows(np.arange(len(rows.texts)), _MAX_INIT_TEXTS, seed=[config.seed, 5])
        texts, size = [rows.texts[row] for row in sample], config.encode_batch_size
        embeddings = embed(body, texts, batch_size=size, description="Initializing loss")
        if name == "softmax":
            n_classes = int(rows.labels.max()) + 1
            return CrossEntropyLoss(body, torch.nn.Linear(3 * embeddings.shape[1], n_classes))
        target = resolved(teacher_embeddings)
        loss = EmbeddingLoss(body, target, dimension=embeddings.shape[1])
        if embeddings.shape[1] != target.shape[1]:
            loss.init_projection(embeddings, target[sample])
        return loss

    parts = [(weight, create(name)) for name, weight in rows.objectives.items()]
    return WeightedSumLoss(body, parts, micro_batch_size=config.micro_batch_size)
