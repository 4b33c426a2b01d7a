"""What a run would go through, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from setfit_kd.config import CROSS_VALIDATED, RunConfig
from setfit_kd.memory import resolve_device
from setfit_kd.student import on_labels_alone, student_passes
from setfit_kd.teacher import teacher_passes, weighing_passes

if TYPE_CHECKING:
    from setfit_kd.pipeline import RunInputs


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would go through, with the texts that would pass forward through a model."""

    stage: str
    texts: int
    forward_passes: int


def plan(config: RunConfig, inputs: RunInputs) -> list[PlannedStage]:
    """The stages of a run with their forward passes, a pass being one text through one model."""
    data, report = inputs.data, inputs.data.report
    n_students = len(config.student)
    with_baseline = config.baseline and report.labeled > 0
    n_models = len(inputs.teachers) + n_students * (2 if with_baseline else 1)
    n_texts = report.pool + (config.augment or 0) + (0 if data.signals else report.labeled)
    split = [config.model_copy(update={"micro_batch_size": None}) if s.is_static else config for s in inputs.students]
    with_own = list(zip(inputs.students, split, strict=True))
    student = sum(s.passes + student_passes(c, n_texts, report.labeled, family=s.family) for s, c in with_own)
    device = resolve_device(config.device)
    teachers = [teacher_passes(config, data.labeled, family=t.source.family, device=device) for t in inputs.teachers]
    if len(teachers) > 1 and config.teacher_weights == CROSS_VALIDATED:
        teachers += [
            weighing_passes(config, data.labeled, family=t.source.family, device=device) for t in inputs.teachers
        ]
    stages = [PlannedStage("student", n_texts, student)]
    if teachers:
        trained = PlannedStage("teacher", report.labeled, sum(teachers))
        stages = [trained, PlannedStage("signals", n_texts, len(inputs.teachers) * n_texts), *stages]
    if data.evaluation:
        if with_baseline:
            baselines = [
                teacher_passes(
                    on_labels_alone(c, n_texts) if s.family == "transformer" else c,
                    data.labeled,
                    family=s.family,
                    device=device,
                )
                for s, c in with_own
            ]
            stages.append(PlannedStage("baseline", report.labeled, sum(baselines)))
        stages.append(PlannedStage("evaluation", report.evaluation, n_models * report.evaluation))
    return stages
