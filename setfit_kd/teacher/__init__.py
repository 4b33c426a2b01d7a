"""Training a teacher on the few labels, and scoring a pool with it."""

from setfit_kd.teacher.scoring import score
from setfit_kd.teacher.steps import teacher_passes
from setfit_kd.teacher.train import train_teacher

__all__ = ["score", "teacher_passes", "train_teacher"]
