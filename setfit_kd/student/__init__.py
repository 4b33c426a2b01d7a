"""Which bodies a student may have, and training one from a teacher's signals."""

from setfit_kd.student.bodies import student_body
from setfit_kd.student.train import check_pool, train_student

__all__ = ["check_pool", "student_body", "train_student"]
