"""Training losses for the trainer of sentence-transformers, one per module."""

from setfit_kd.losses.base import BatchLoss, LossOptions
from setfit_kd.losses.contrastive import ContrastiveLoss, balanced_batches
from setfit_kd.losses.cross_entropy import CrossEntropyLoss
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.pairs import PairSimilarityLoss, draw_pairs
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss

__all__ = [
    "NO_GOLD",
    "BatchLoss",
    "ContrastiveLoss",
    "CrossEntropyLoss",
    "EmbeddingLoss",
    "LossOptions",
    "PairSimilarityLoss",
    "SimilarityLoss",
    "SoftLabelLoss",
    "WeightedSumLoss",
    "balanced_batches",
    "draw_pairs",
]
