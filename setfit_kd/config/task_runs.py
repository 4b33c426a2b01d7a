"""Configs of runs that distil question answering and masked language models."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from setfit_kd.config.base import OutputConfig, StageConfig
from setfit_kd.config.mlm import MlmConfig
from setfit_kd.config.questions import QuestionConfig
from setfit_kd.config.values import Columns, Name, One


class TaskRunConfig(OutputConfig):
    """Settings of a run with one teacher and one student, which share the settings of training."""

    teacher: One
    """Teacher: hub name, folder, or demo:all-MiniLM-L6-v2."""
    student: One = "layers:3"
    """Student: as for --teacher; layers:3 or layers:0,2,5 to copy layers of the teacher; or blank:CONFIG for an
    untrained transformer."""
    eval: One | None = None
    """Evaluation data; never used for training."""
    baseline: bool = True
    """Also train a baseline: the same student without distillation."""


class QuestionRunConfig(QuestionConfig, TaskRunConfig):
    """All settings of a run that distils extractive question answering."""

    task: Literal["qa"] = "qa"
    labeled: Name
    """Questions with answers: file (JSON in SQuAD format, JSONL, Parquet), datasets folder, or hub name."""
    unlabeled: Name | None = None
    """Further questions with contexts, which the teacher answers."""
    validation: Name | None = None
    """Questions, some without an answer, on which the threshold for giving no answer is chosen for each model."""


class MlmRunConfig(MlmConfig, TaskRunConfig):
    """All settings of a run that distils a masked language model."""

    task: Literal["mlm"] = "mlm"
    unlabeled: Name
    """Training texts: file (CSV, TSV, JSONL, Parquet, or text with one text per line), datasets folder, or hub name."""
    text_column: Columns = ("text",)
    """Text column. Several, separated by commas, are joined by a space."""


DISTILLATION_SETTINGS = ("temperature", "alpha", "cosine_weight")
"""Settings that only affect training with a teacher."""


def training_settings(config: StageConfig) -> dict[str, Any]:
    """Return the settings that determine a training of a task; those of heads and labels do not apply."""
    settings = type(config).fingerprint_inputs(config)
    return {name: value for name, value in settings.items() if name not in ("head_c", "balance", "thresholds")}


TaskRun: TypeAlias = QuestionRunConfig | MlmRunConfig
TASK_RUNS: dict[str, type[QuestionRunConfig] | type[MlmRunConfig]] = {"qa": QuestionRunConfig, "mlm": MlmRunConfig}
"""Configs of the runs by the name of their task."""
