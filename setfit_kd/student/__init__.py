"""Which bodies a student may have, and training one from a teacher's signals."""

from setfit_kd.student.bodies import locate_student, student_body
from setfit_kd.student.checks import check_pool
from setfit_kd.student.steps import student_passes
from setfit_kd.student.train import train_student

__all__ = ["check_pool", "locate_student", "student_body", "student_passes", "train_student"]
