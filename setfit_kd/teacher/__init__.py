"""Train a teacher on a few labels and score a pool with it."""

from setfit_kd.teacher.ensemble import cross_validated_accuracy, cross_validation_steps
from setfit_kd.teacher.scoring import refine_and_score, score
from setfit_kd.teacher.steps import resolve_teacher_batch_size, training_steps
from setfit_kd.teacher.train import train_teacher

__all__ = [
    "cross_validated_accuracy",
    "cross_validation_steps",
    "refine_and_score",
    "resolve_teacher_batch_size",
    "score",
    "train_teacher",
    "training_steps",
]
