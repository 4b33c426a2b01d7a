"""Build a student's body and train it on a teacher's signals."""

from setfit_kd.student.checks import check_pool
from setfit_kd.student.distil import rows_without_signals, train_student
from setfit_kd.student.kinds import PreparedStudent, build_student_body, folder_names, locate_student
from setfit_kd.student.steps import labels_only_config, student_steps, trains_on_labeled_texts

__all__ = [
    "PreparedStudent",
    "build_student_body",
    "check_pool",
    "folder_names",
    "labels_only_config",
    "locate_student",
    "rows_without_signals",
    "student_steps",
    "train_student",
    "trains_on_labeled_texts",
]
