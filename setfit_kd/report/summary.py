"""What there is to tell of a run, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.config import RunConfig, read_config
from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation import Evaluation, OperatingPoint, OverSeeds, coverage_curve, over_seeds, read_texts
from setfit_kd.run_folder import (
    BASELINES,
    CONFIG,
    EVALUATION,
    RUN,
    SCORED,
    SEEDS,
    STUDENTS,
    TEACHER,
    TEACHERS,
    WEIGHED,
    Manifest,
    reference_models,
)

MAX_TEXTS = 20
TARGETS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class ExamplePrediction:
    """A text with its gold label and what student and teacher say of it; without a teacher, it says nothing."""

    text: str
    gold: str
    student: str
    confidence: float
    teacher: str
    teacher_confidence: float


@dataclass(frozen=True)
class StudentSummary:
    """What there is to tell of one student.

    Attributes:
        name: What the table calls it.
        source: What the settings call it.
        evaluation: How good it is.
        against: Differences to the teacher and the baseline, by name and figure.
        thresholds: For each accuracy of `TARGETS`, the threshold that gives it, where one does.
        disagreements: Texts on which it is furthest from the teacher.
        errors: Texts that it is most confidently wrong about.
    """

    name: str
    source: str
    evaluation: Evaluation
    against: dict[str, dict[str, Any]]
    thresholds: dict[float, OperatingPoint | None]
    disagreements: list[ExamplePrediction]
    errors: list[ExamplePrediction]


@dataclass(frozen=True)
class RunSummary:
    """All that a report tells.

    Attributes:
        folder: The run's folder.
        config: Its settings.
        about: Its ``run.json``.
        evaluations: By the name that the table gives to each model; empty without an evaluation set.
        labels: Names of the classes.
        students: One a student that was evaluated.
        losses: Loss by step, of each training.
        over_seeds: What each model comes to over the seeds that it was made with; empty for a single one.
    """

    folder: Path
    config: RunConfig
    about: Manifest
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    students: list[StudentSummary] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    over_seeds: dict[str, OverSeeds] = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, Evaluation]:
        """The evaluations of the teacher and the students, without the baselines."""
        students = {student.name: student.evaluation for student in self.students}
        return {name: of for name, of in self.evaluations.items() if name == TEACHER or name in students}

    @property
    def teacher(self) -> Evaluation | None:
        """The teacher's evaluation; of several, all together's. None where signals came from elsewhere."""
        return self.evaluations.get(TEACHER)


def read_summary(folder: str | Path) -> RunSummary:
    """Read the folder of a finished run.

    Raises:
        DataError: It is none, or what it holds cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / RUN).is_file():
        raise DataError(f"There is no run in {folder}.", hint="Name the folder of a run.")
    config = RunConfig.of(**read_config(folder / CONFIG))
    about = Manifest.read(folder)
    losses = {
        display_name(name): told.losses
        for name, told in about.stages.items()
        if told.losses and not name.startswith(f"{WEIGHED}/")  # several trainings, one after the other
    }
    evaluations = {name: Evaluation.load(folder / EVALUATION / name) for name in about.evaluated}
    if not evaluations:
        return RunSummary(folder, config, about, losses=losses)
    data = read_texts(folder / EVALUATION)
    for name, of in evaluations.items():
        if list(of.quality.classes) != list(data.label_names) or not np.array_equal(of.gold, data.labels):
            raise DataError(
                f"{folder / EVALUATION / name} was measured on other texts than those beside it.",
                hint=f"Evaluate again: setfit-kd run --resume {folder}",
            )
    has_teacher = TEACHER in evaluations or config.signals is not None
    if not has_teacher or not about.students or not set(about.students.values()) <= set(evaluations):
        raise DataError(f"{folder / RUN} does not tell of every model.", hint="Run anew.")
    targets = sorted({*TARGETS, *([] if config.target_accuracy is None else [config.target_accuracy])})
    students = [_student(place, source, evaluations, data, targets) for source, place in about.students.items()]
    return RunSummary(
        folder,
        config,
        about,
        {display_name(name): of for name, of in evaluations.items()},
        data.label_names,
        students,
        losses,
        _over_seeds(folder, about, evaluations),
    )


def _over_seeds(folder: Path, about: Manifest, evaluations: dict[str, Evaluation]) -> dict[str, OverSeeds]:
    if not about.seeds:
        return {}
    try:
        others = [
            {name: Evaluation.load(folder / SEEDS / str(seed) / EVALUATION / name) for name in evaluations}
            for seed in about.seeds[1:]
        ]
    except DataError as error:
        raise DataError(error.message, hint=f"Go on: setfit-kd run --resume {folder}") from None
    one = next(iter(evaluations))
    if any(not np.array_equal(of[one].gold, evaluations[one].gold) for of in others):
        raise DataError(
            f"The seeds in {folder} were not evaluated on the same texts.", hint=f"Run: setfit-kd run --resume {folder}"
        )
    compared = {name: reference_models(name, evaluations) for name in about.students.values()}
    return {display_name(name): of for name, of in over_seeds([evaluations, *others], compared).items()}


def display_name(name: str) -> str:
    """What the table calls a model or a training; of several students, their names alone."""
    group, _, slug = name.partition("/")
    student = f"{slug} (student)" if slug == TEACHER else slug
    kinds = {TEACHERS: f"{slug} (teacher)", SCORED: f"{slug} (teacher)", BASELINES: f"{slug} (baseline)"}
    return {**kinds, STUDENTS: student}.get(group, name)


def _student(
    name: str, source: str, evaluations: dict[str, Evaluation], data: LabeledSet, targets: list[float]
) -> StudentSummary:
    student = evaluations[name]
    teacher = evaluations.get(TEACHER, student)
    against = {
        called: student.against(evaluations[other]) for called, other in reference_models(name, evaluations).items()
    }
    confidence = student.probabilities.max(axis=1)
    distance = np.abs(student.probabilities - teacher.probabilities).sum(axis=1)
    distance[student.predicted == teacher.predicted] = 0
    furthest = np.argsort(-distance, kind="stable")[:MAX_TEXTS]
    wrong = np.where(student.predicted != data.labels, confidence, 0)
    worst = np.argsort(-wrong, kind="stable")[:MAX_TEXTS]

    def told(row: int) -> ExamplePrediction:
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
        against,
        {target: student.operating_point(target) for target in targets},
        [told(int(row)) for row in furthest if distance[row] > 0],
        [told(int(row)) for row in worst if wrong[row] > 0],
    )


def curves(account: RunSummary) -> dict[str, Any]:
    """Coverage and accuracy at every threshold, of each model."""
    return {name: coverage_curve(of.probabilities, of.gold) for name, of in account.compared.items()}
