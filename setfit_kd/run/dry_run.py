"""List the stages of a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from setfit_kd.config.run import RunConfig
from setfit_kd.memory.devices import resolve_device
from setfit_kd.student.distil import labels_only_config, rows_without_signals, student_steps
from setfit_kd.teacher.cross_fitting import cross_fit_steps
from setfit_kd.teacher.train import steps_and_batch_size

if TYPE_CHECKING:
    from setfit_kd.run.inputs import RunInputs


@dataclass(frozen=True)
class PlannedStage:
    """A stage, its number of texts, and the training steps of all its models; 0 if it trains no model."""

    name: str
    texts: int
    steps: int = 0


def plan(config: RunConfig, inputs: RunInputs) -> list[PlannedStage]:
    """List the stages of a run."""
    data, report = inputs.data, inputs.data.report
    device, labeled = resolve_device(config.device), inputs.data.labeled
    n_texts = report.pool + (0 if data.signals else report.labeled)
    n_texts += config.n_augmented(n_texts)
    families = [source.family for source in inputs.teachers.values()]
    stages: list[PlannedStage] = []
    if config.search:  # an approximation: with the initial settings
        initial = [] if data.signals else [cross_fit_steps(config, labeled, family=families[0], device=device)]
        initial.append(student_steps(config, inputs.students[0].family, n_texts, n_labeled=len(labeled)))
        stages.append(PlannedStage("search", n_texts, config.search * sum(initial)))
    if families:
        steps = sum(steps_and_batch_size(config, labeled, family=family, device=device)[0] for family in families)
        stages.append(PlannedStage("teacher", report.labeled, steps))
        cross_fitted = [family for family in families if config.cross_fits(family)]
        if cross_fitted:
            steps = sum(cross_fit_steps(config, labeled, family=family, device=device) for family in cross_fitted)
            stages.append(PlannedStage("calibration", report.labeled, steps))
        stages.append(PlannedStage("signals", n_texts))
    students = [student.family for student in inputs.students]
    n_without_signals = len(rows_without_signals(data.signals, labeled)) if data.signals else 0
    counts: Any = {"pool_size": n_texts, "n_without_signals": n_without_signals, "n_labeled": len(labeled)}
    steps = sum(student_steps(config, family, **counts) for family in students)
    stages.append(PlannedStage("student", n_texts, steps))
    if data.evaluation and config.baseline and report.labeled:
        configs = {"setfit": config, "transformer": labels_only_config(config, **counts)}
        steps = sum(
            steps_and_batch_size(configs[family], labeled, family=family, device=device)[0] for family in students
        )
        stages.append(PlannedStage("baseline", report.labeled, steps))
    if data.evaluation:
        stages.append(PlannedStage("evaluation", report.evaluation))
    return stages
