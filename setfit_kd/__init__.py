"""Distil a SetFit teacher, trained on a few labels, into a small and fast text classifier.

The public names below are imported on first use, so that ``import setfit_kd`` is fast and does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from setfit_kd.config import RunConfig as RunConfig
    from setfit_kd.evaluation import evaluate as evaluate
    from setfit_kd.models import load as load
    from setfit_kd.run import RunResult as RunResult
    from setfit_kd.run import distill as distill
    from setfit_kd.signals import TeacherSignals as TeacherSignals
    from setfit_kd.student import train_student as train_student
    from setfit_kd.teacher import score as score
    from setfit_kd.teacher import train_teacher as train_teacher

_LAZY_IMPORTS = {
    "RunConfig": "setfit_kd.config",
    "RunResult": "setfit_kd.run",
    "TeacherSignals": "setfit_kd.signals",
    "distill": "setfit_kd.run",
    "evaluate": "setfit_kd.evaluation",
    "load": "setfit_kd.models",
    "score": "setfit_kd.teacher",
    "train_student": "setfit_kd.student",
    "train_teacher": "setfit_kd.teacher",
}

__all__ = [
    "RunConfig",
    "RunResult",
    "TeacherSignals",
    "distill",
    "evaluate",
    "load",
    "score",
    "train_student",
    "train_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'setfit_kd' has no attribute {name!r}")
    return getattr(import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_IMPORTS])
