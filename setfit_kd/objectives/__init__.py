"""Training objectives, one a file. Each is a loss module that sentence-transformers' trainer can call."""

from setfit_kd.objectives.base import Objective
from setfit_kd.objectives.contrastive import ContrastiveObjective, balanced_batches
from setfit_kd.objectives.pairs import PairsObjective, draw_pairs
from setfit_kd.objectives.similarity import SimilarityObjective

__all__ = [
    "ContrastiveObjective",
    "Objective",
    "PairsObjective",
    "SimilarityObjective",
    "balanced_batches",
    "draw_pairs",
]
