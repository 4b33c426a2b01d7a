"""Summary of a finished run, read from its folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from setfit_kd.config.presets import read_config
from setfit_kd.config.run import RunConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.estimates import Estimate
from setfit_kd.evaluation.measure import Evaluation, SeedSummary, read_texts, summarize_seeds
from setfit_kd.evaluation.metrics import Interval, OperatingPoint, main_metric
from setfit_kd.run_folder import names as run_names
from setfit_kd.run_folder.manifest import Manifest
from setfit_kd.run_folder.names import CONFIG_FILE, EVALUATION, RUN_FILE, TEACHER, reference_models
from setfit_kd.tasks.classification import SINGLE_LABEL, TASKS, Labels, Task, is_equal
from setfit_kd.utils.console import short_class_name

MAX_EXAMPLES = 20
TARGET_ACCURACIES = (0.9, 0.95, 0.99)

_TASK_RUNS = {"qa": "question answering", "mlm": "a masked language model"}

Example = tuple[str, ...]  # a text, its gold labels, and the predictions of the student and, if any, of the teacher


@dataclass(frozen=True)
class StudentSummary:
    """Results of one student.

    ``source`` is the student's name in the config, such as ``static:256``. ``differences`` are those to ``teacher`` and
    ``baseline``, by metric. ``thresholds`` contains the operating point for each target accuracy (not for multi-label);
    None if no threshold reaches it. ``disagreements`` (with the teacher) and ``errors`` list the most confident first.
    """

    name: str
    source: str
    evaluation: Evaluation
    differences: dict[str, dict[str, Interval]]
    thresholds: dict[float, OperatingPoint | None]
    disagreements: list[Example]
    errors: list[Example]


@dataclass(frozen=True)
class RunSummary:
    """Results of a run, from which its report is written.

    ``losses`` has the training loss by step, for each training. ``evaluations`` (empty without an evaluation set),
    ``estimates`` (empty with one) and ``seed_summaries`` (empty for a run with one seed) are by `display_name`.
    ``more_evaluations`` are those on other sets than the main one, by the name of the set.
    """

    folder: Path
    config: RunConfig
    manifest: Manifest
    losses: dict[str, list[float]]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    more_evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    students: list[StudentSummary] = field(default_factory=list)
    seed_summaries: dict[str, SeedSummary] = field(default_factory=dict)

    @property
    def teacher(self) -> Evaluation | None:
        """Evaluation of the teacher or ensemble; None if the run started from signals."""
        return self.evaluations.get(TEACHER)

    @property
    def task(self) -> Task:
        """The task of the models; single-label if there are no results."""
        estimated = [TASKS[estimate.task] for estimate in self.estimates.values()]
        return next(iter([evaluation.task for evaluation in self.evaluations.values()] + estimated), SINGLE_LABEL)


def read_summary(folder: str | Path) -> RunSummary:
    """Read the results of a finished run; raise a `DataError` if there is none, or its files cannot be read."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / RUN_FILE).is_file():
        raise DataError(f"Found no run in {folder}.", hint="Pass the folder of a finished run.")
    settings = read_config(folder / CONFIG_FILE)
    if (task := _TASK_RUNS.get(str(settings.get("task")))) is not None:
        hint = f"`setfit-kd report {shlex.quote(str(folder))}` shows its results."
        raise DataError(f"The run in {folder} distils {task}; only runs of classification can be compared.", hint=hint)
    config = RunConfig.of(**settings)
    manifest = Manifest.read(folder)
    losses = {display_name(name): stage.losses for name, stage in manifest.stages.items() if stage.losses}
    if not manifest.evaluated:
        estimates = {display_name(name): Estimate.load(folder / EVALUATION / name) for name in manifest.estimated}
        return RunSummary(folder, config, manifest, losses, estimates=estimates)
    data = read_texts(folder / EVALUATION)
    folders = [folder, *(folder / run_names.SEEDS / str(seed) for seed in manifest.seeds[1:])]
    try:
        names, sets = manifest.evaluated, dict.fromkeys(path.partition("@")[2] for path in manifest.stages)
        more = {
            each: {display_name(name): Evaluation.load(folder / EVALUATION / f"{name}@{each}") for name in names}
            for each in filter(None, sets)
        }
        by_seed = [{name: _load_evaluation(path / EVALUATION / name, data) for name in names} for path in folders]
    except DataError as error:
        hint = f"Run `setfit-kd run --resume {shlex.quote(str(folder))}` to evaluate again."
        raise DataError(error.message, hint=hint) from None
    evaluations, paths = by_seed[0], manifest.students.values()
    if (TEACHER not in evaluations and config.signals is None) or not paths or not set(paths) <= set(evaluations):
        message = f"{folder / RUN_FILE} does not list all models."
        raise DataError(message, hint="Start a new run in another --output-dir.")
    references = {path: reference_models(path, evaluations) for path in paths}
    seed_summaries = summarize_seeds(by_seed, references) if manifest.seeds else {}
    targets = sorted({*TARGET_ACCURACIES, *([] if config.target_accuracy is None else [config.target_accuracy])})
    targets = targets if data.task is SINGLE_LABEL else []
    students = manifest.students.items()
    summaries = [_summarize_student(source, path, evaluations, data, targets) for source, path in students]
    by_name = {display_name(name): evaluation for name, evaluation in evaluations.items()}
    over_seeds = {display_name(name): summary for name, summary in seed_summaries.items()}
    results: dict[str, Any] = {"students": summaries, "seed_summaries": over_seeds, "label_names": data.label_names}
    return RunSummary(folder, config, manifest, losses, by_name, more, **results)


def display_name(name: str) -> str:
    """Name of a model or training in the report: ``x`` for ``students/x``, ``x (baseline)`` for ``baselines/x``."""
    group, _, slug = name.partition("/")
    kinds = {run_names.BASELINES: f"{slug} (baseline)", run_names.STUDENTS: slug}
    kinds |= dict.fromkeys((run_names.TEACHERS, run_names.TEACHER_SIGNALS), f"{slug} (teacher)")
    return f"{slug} (student)" if name == f"{run_names.STUDENTS}/{TEACHER}" else kinds.get(group, name)


def _load_evaluation(folder: Path, data: LabeledSet) -> Evaluation:
    evaluation = Evaluation.load(folder)
    if tuple(evaluation.quality.classes) != data.label_names or not np.array_equal(evaluation.gold, data.labels):
        raise DataError(f"The evaluation in {folder} does not match the evaluation texts of the run.")
    return evaluation


def _summarize_student(
    source: str, path: str, evaluations: dict[str, Evaluation], data: LabeledSet, targets: list[float]
) -> StudentSummary:
    student, teacher = evaluations[path], evaluations.get(TEACHER)
    models = [student] if teacher is None else [student, teacher]
    predictions = [(model.predicted, model.confidence) for model in models]
    predicted, confidence = predictions[0]
    names = list(map(short_class_name, data.label_names))

    def show(labels: Labels, row: int) -> str:
        [targets] = data.task.targets(labels[[row]], len(names))
        return ", ".join(names[label] for label in np.flatnonzero(targets)) or "none"

    def examples(weights: npt.NDArray[np.floating]) -> list[Example]:
        """Return the texts with the highest weights above 0."""
        rows = [row for row in np.argsort(-weights, kind="stable")[:MAX_EXAMPLES] if weights[row] > 0]
        cells = [[f"{show(p, row)} {c[row]:.0%}" for p, c in predictions] for row in rows]
        return [(data.texts[row], show(data.labels, row), *c) for row, c in zip(rows, cells, strict=True)]

    references = reference_models(path, evaluations).items()
    differences = {role: student.difference_to(evaluations[reference]) for role, reference in references}
    distances = np.abs(student.probabilities - models[-1].probabilities).sum(axis=1)
    thresholds = {target: student.operating_point(target) for target in targets}
    disagreements = examples(distances * ~is_equal(predicted, models[-1].predicted))
    errors = examples(confidence * ~is_equal(predicted, data.labels))
    return StudentSummary(display_name(path), source, student, differences, thresholds, disagreements, errors)


class ComparedModel(NamedTuple):
    """A model of one of the compared runs, with the difference in the main metric to the first run's first student.

    The difference is None for that student itself, and if the two were evaluated on different texts.
    """

    run: Path
    name: str
    evaluation: Evaluation
    difference: Interval | None


def compare(runs: Sequence[str | Path]) -> list[ComparedModel]:
    """Compare the models of several runs in order; raise a `DataError` if one is not finished or was not evaluated."""
    compared: list[ComparedModel] = []
    reference: tuple[Evaluation, LabeledSet] | None = None
    for summary in map(read_summary, runs):
        if not summary.students:
            hint = "Compare runs with an evaluation set (--eval)."
            raise DataError(f"The run in {summary.folder} was not evaluated.", hint=hint)
        data = read_texts(summary.folder / EVALUATION)
        reference = reference or (summary.students[0].evaluation, data)
        for name, evaluation in summary.evaluations.items():
            difference = None if evaluation is reference[0] else _difference(evaluation, data, *reference)
            compared.append(ComparedModel(summary.folder, name, evaluation, difference))
    return compared


def _difference(evaluation: Evaluation, data: LabeledSet, first: Evaluation, first_data: LabeledSet) -> Interval | None:
    """Return the difference in the main metric to ``first``; None if the texts, classes or gold labels differ."""
    names, first_names = data.label_names, first_data.label_names
    if data.texts != first_data.texts or sorted(names) != sorted(first_names) or data.task is not first_data.task:
        return None
    order = [names.index(name) for name in first_names]
    if not np.array_equal(data.targets[:, order], first_data.targets):
        return None
    thresholds = None if evaluation.thresholds is None else evaluation.thresholds[order]
    probabilities = evaluation.probabilities[:, order]
    reordered = replace(evaluation, probabilities=probabilities, gold=first.gold, thresholds=thresholds)
    return reordered.difference_to(first)[main_metric(data.task)[0]]
