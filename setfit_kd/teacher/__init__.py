"""Training a teacher on the few labels, and scoring a pool with it."""

from setfit_kd.teacher.ensemble import held_out_accuracy, weighing_steps
from setfit_kd.teacher.scoring import refine_and_score, score
from setfit_kd.teacher.steps import settled_batch_size, training_steps
from setfit_kd.teacher.train import train_teacher

__all__ = [
    "held_out_accuracy",
    "refine_and_score",
    "score",
    "settled_batch_size",
    "train_teacher",
    "training_steps",
    "weighing_steps",
]
