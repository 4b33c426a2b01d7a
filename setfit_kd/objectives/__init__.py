"""Training objectives, one a file. Each is a loss module that sentence-transformers' trainer can call."""

from setfit_kd.objectives.base import Objective, Options
from setfit_kd.objectives.contrastive import ContrastiveObjective, balanced_batches
from setfit_kd.objectives.embedding import EmbeddingObjective
from setfit_kd.objectives.gold_labels import GoldLabelsObjective
from setfit_kd.objectives.pairs import PairsObjective, draw_pairs
from setfit_kd.objectives.similarity import SimilarityObjective
from setfit_kd.objectives.soft_labels import NO_GOLD, SoftLabelsObjective
from setfit_kd.objectives.weighted_sum import WeightedSum

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
