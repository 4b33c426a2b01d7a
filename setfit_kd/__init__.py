"""Distil a SetFit teacher, trained on a few labels, into a small and fast text classifier.

The public names below are imported on first use, so that ``import setfit_kd`` is fast and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from setfit_kd.config.run import RunConfig as RunConfig
    from setfit_kd.evaluation.measure import evaluate as evaluate
    from setfit_kd.models.io import load as load
    from setfit_kd.run.pipeline import RunResult as RunResult
    from setfit_kd.run.pipeline import distill as distill
    from setfit_kd.signals.signals import TeacherSignals as TeacherSignals
    from setfit_kd.student.distil import train_student as train_student
    from setfit_kd.teacher.scoring import score as score
    from setfit_kd.teacher.train import train_teacher as train_teacher

_MODULES = {
    "RunConfig": "config.run",
    "RunResult": "run.pipeline",
    "TeacherSignals": "signals.signals",
    "distill": "run.pipeline",
    "evaluate": "evaluation.measure",
    "load": "models.io",
    "score": "teacher.scoring",
    "train_student": "student.distil",
    "train_teacher": "teacher.train",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'setfit_kd' has no attribute {name!r}")
    return getattr(import_module(f"setfit_kd.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
