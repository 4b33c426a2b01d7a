"""Which bodies a student may have, and training one from a teacher's signals."""

from setfit_kd.student.checks import check_pool
from setfit_kd.student.distil import train_student, unseen_rows
from setfit_kd.student.kinds import PreparedStudent, locate_student, slugs, student_body
from setfit_kd.student.steps import on_labels_alone, student_steps, trains_on_unseen

__all__ = [
    "PreparedStudent",
    "check_pool",
    "locate_student",
    "on_labels_alone",
    "slugs",
    "student_body",
    "student_steps",
    "train_student",
    "trains_on_unseen",
    "unseen_rows",
]
