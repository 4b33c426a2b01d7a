"""Summary of a finished run, read from its folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from setfit_kd.config.presets import read_config
from setfit_kd.config.run import RunConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.calibration import OperatingPoint, coverage_curve
from setfit_kd.evaluation.intervals import Interval
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.seeds import SeedSummary, summarize_seeds
from setfit_kd.evaluation.texts import read_texts
from setfit_kd.run_folder.manifest import Manifest
from setfit_kd.run_folder.names import (
    BASELINES,
    CONFIG_FILE,
    EVALUATION,
    RUN_FILE,
    SEEDS,
    STUDENTS,
    TEACHER,
    TEACHER_ACCURACIES,
    TEACHER_SIGNALS,
    TEACHERS,
    reference_models,
)

MAX_EXAMPLES = 20
TARGET_ACCURACIES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class ExamplePrediction:
    """A text with its gold label and the predictions of student and teacher; ``teacher`` is empty without a teacher."""

    text: str
    gold: str
    student: str
    confidence: float
    teacher: str
    teacher_confidence: float


@dataclass(frozen=True)
class StudentSummary:
    """Results of one student.

    Attributes:
        name: Name of the student in the report.
        source: The student as named in the config, such as ``static:256``.
        evaluation: Its evaluation.
        differences: Differences to ``teacher`` and ``baseline``, by metric.
        thresholds: Operating point for each target accuracy; None if no threshold reaches it.
        disagreements: Texts with the largest disagreements with the teacher.
        errors: Errors with the highest confidence.
    """

    name: str
    source: str
    evaluation: Evaluation
    differences: dict[str, dict[str, Interval]]
    thresholds: dict[float, OperatingPoint | None]
    disagreements: list[ExamplePrediction]
    errors: list[ExamplePrediction]


@dataclass(frozen=True)
class RunSummary:
    """Results of a run, from which its report is written.

    Attributes:
        folder: The run folder.
        config: The config of the run.
        manifest: The content of ``run.json``.
        evaluations: Evaluation of each model, by `display_name`; empty without an evaluation set.
        label_names: Names of the classes.
        students: Results of each evaluated student.
        losses: Training loss by step, for each training.
        seed_summaries: Metrics of each model over the seeds; empty for a run with one seed.
    """

    folder: Path
    config: RunConfig
    manifest: Manifest
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    students: list[StudentSummary] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seed_summaries: dict[str, SeedSummary] = field(default_factory=dict)

    @property
    def without_baselines(self) -> dict[str, Evaluation]:
        """Evaluations of the teacher and the students."""
        names = {TEACHER, *(student.name for student in self.students)}
        return {name: evaluation for name, evaluation in self.evaluations.items() if name in names}

    @property
    def teacher(self) -> Evaluation | None:
        """Evaluation of the teacher or of the ensemble of teachers; None if the run started from signals."""
        return self.evaluations.get(TEACHER)


def read_summary(folder: str | Path) -> RunSummary:
    """Read the results of a finished run.

    Raises:
        DataError: If the folder contains no finished run, or if its files cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / RUN_FILE).is_file():
        raise DataError(f"Found no run in {folder}.", hint="Pass the folder of a finished run.")
    config = RunConfig.of(**read_config(folder / CONFIG_FILE))
    manifest = Manifest.read(folder)
    losses = {
        display_name(name): stage.losses
        for name, stage in manifest.stages.items()
        if stage.losses and not name.startswith(f"{TEACHER_ACCURACIES}/")  # losses of several consecutive trainings
    }
    evaluations = {name: Evaluation.load(folder / EVALUATION / name) for name in manifest.evaluated}
    if not evaluations:
        return RunSummary(folder, config, manifest, losses=losses)
    data = read_texts(folder / EVALUATION)
    for name, evaluation in evaluations.items():
        same_classes = list(evaluation.quality.classes) == list(data.label_names)
        if not same_classes or not np.array_equal(evaluation.gold, data.labels):
            raise DataError(
                f"The evaluation in {folder / EVALUATION / name} does not match the texts in {folder / EVALUATION}.",
                hint=f"Run `setfit-kd run --resume {shlex.quote(str(folder))}` to evaluate again.",
            )
    has_teacher = TEACHER in evaluations or config.signals is not None
    if not has_teacher or not manifest.students or not set(manifest.students.values()) <= set(evaluations):
        raise DataError(
            f"{folder / RUN_FILE} does not list all models.", hint="Start a new run in another --output-dir."
        )
    targets = sorted({*TARGET_ACCURACIES, *([] if config.target_accuracy is None else [config.target_accuracy])})
    students = [
        _summarize_student(path, source, evaluations, data, targets) for source, path in manifest.students.items()
    ]
    return RunSummary(
        folder,
        config,
        manifest,
        {display_name(name): evaluation for name, evaluation in evaluations.items()},
        data.label_names,
        students,
        losses,
        _summarize_seeds(folder, manifest, evaluations),
    )


def _summarize_seeds(folder: Path, manifest: Manifest, evaluations: dict[str, Evaluation]) -> dict[str, SeedSummary]:
    if not manifest.seeds:
        return {}
    hint = f"Run `setfit-kd run --resume {shlex.quote(str(folder))}` to evaluate again."
    try:
        further_seeds = [
            {name: Evaluation.load(folder / SEEDS / str(seed) / EVALUATION / name) for name in evaluations}
            for seed in manifest.seeds[1:]
        ]
    except DataError as error:
        raise DataError(error.message, hint=hint) from None
    first = next(iter(evaluations))
    if any(not np.array_equal(seed[first].gold, evaluations[first].gold) for seed in further_seeds):
        raise DataError(f"The seeds in {folder} were not evaluated on the same texts.", hint=hint)
    references = {name: reference_models(name, evaluations) for name in manifest.students.values()}
    summaries = summarize_seeds([evaluations, *further_seeds], references)
    return {display_name(name): summary for name, summary in summaries.items()}


def display_name(name: str) -> str:
    """Name of a model or training in the report: ``x`` for ``students/x``, ``x (baseline)`` for ``baselines/x``."""
    group, _, slug = name.partition("/")
    student = f"{slug} (student)" if slug == TEACHER else slug
    kinds = {TEACHERS: f"{slug} (teacher)", TEACHER_SIGNALS: f"{slug} (teacher)", BASELINES: f"{slug} (baseline)"}
    return {**kinds, STUDENTS: student}.get(group, name)


def _summarize_student(
    name: str, source: str, evaluations: dict[str, Evaluation], data: LabeledSet, targets: list[float]
) -> StudentSummary:
    student = evaluations[name]
    teacher = evaluations.get(TEACHER, student)
    references = reference_models(name, evaluations)
    differences = {role: student.difference_to(evaluations[path]) for role, path in references.items()}
    confidence = student.probabilities.max(axis=1)
    distance = np.abs(student.probabilities - teacher.probabilities).sum(axis=1)
    distance[student.predicted == teacher.predicted] = 0
    disagreements = np.argsort(-distance, kind="stable")[:MAX_EXAMPLES]
    error_confidence = np.where(student.predicted != data.labels, confidence, 0)
    errors = np.argsort(-error_confidence, kind="stable")[:MAX_EXAMPLES]

    def example(row: int) -> ExamplePrediction:
        labels = data.label_names
        return ExamplePrediction(
            data.texts[row],
            labels[data.labels[row]],
            labels[student.predicted[row]],
            float(confidence[row]),
            labels[teacher.predicted[row]] if TEACHER in evaluations else "",
            float(teacher.probabilities[row].max()),
        )

    return StudentSummary(
        display_name(name),
        source,
        student,
        differences,
        {target: student.operating_point(target) for target in targets},
        [example(int(row)) for row in disagreements if distance[row] > 0],
        [example(int(row)) for row in errors if error_confidence[row] > 0],
    )


def coverage_curves(summary: RunSummary) -> dict[str, npt.NDArray[np.float64]]:
    """Compute the `coverage_curve` of the teacher and of each student."""
    return {name: coverage_curve(e.probabilities, e.gold) for name, e in summary.without_baselines.items()}
