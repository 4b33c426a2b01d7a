"""Training losses, one per file, as modules that the trainer of sentence-transformers can call."""

from setfit_kd.losses.base import Objective, Options
from setfit_kd.losses.contrastive import ContrastiveObjective, balanced_batches
from setfit_kd.losses.cross_entropy import GoldLabelsObjective
from setfit_kd.losses.embedding import EmbeddingObjective
from setfit_kd.losses.pairs import PairsObjective, draw_pairs
from setfit_kd.losses.similarity import SimilarityObjective
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelsObjective
from setfit_kd.losses.weighted_sum import WeightedSum

__all__ = [
    "NO_GOLD",
    "ContrastiveObjective",
    "EmbeddingObjective",
    "GoldLabelsObjective",
    "Objective",
    "Options",
    "PairsObjective",
    "SimilarityObjective",
    "SoftLabelsObjective",
    "WeightedSum",
    "balanced_batches",
    "draw_pairs",
]
