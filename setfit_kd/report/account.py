"""What there is to tell of a run, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.config import RunConfig, read_config
from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation import Abstaining, Evaluation, abstaining_curve, read_texts
from setfit_kd.runfolder import BASELINE, BASELINES, CONFIG, EVALUATION, RUN, STUDENTS, TEACHER

MOST_TEXTS = 20
TARGETS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Told:
    """A text with its gold label and what two classifiers, or one, say of it."""

    text: str
    gold: str
    student: str
    confidence: float
    teacher: str | None = None
    teacher_confidence: float | None = None


@dataclass(frozen=True)
class StudentAccount:
    """What there is to tell of one student.

    Attributes:
        name: What the table calls it.
        source: What the settings call it.
        folder: Where it is, in the run's folder.
        evaluation: How good it is.
        against: Differences to the teacher and the baseline, by name and figure.
        thresholds: For each accuracy of `TARGETS`, the threshold that gives it, where one does.
        disagreements: Texts on which it is furthest from the teacher.
        errors: Texts that it is most confidently wrong about.
    """

    name: str
    source: str
    folder: str
    evaluation: Evaluation
    against: dict[str, dict[str, Any]]
    thresholds: dict[float, Abstaining | None]
    disagreements: list[Told]
    errors: list[Told]


@dataclass(frozen=True)
class Account:
    """All that a report tells.

    Attributes:
        folder: The run's folder.
        config: Its settings.
        about: Its ``run.json``.
        evaluations: By the name that the table gives to each model; empty without an evaluation set.
        labels: Names of the classes.
        students: One a student that was evaluated.
        losses: Loss by step, of each training.
        places: Where each student is in the run's folder, by the name that the settings give it.
    """

    folder: Path
    config: RunConfig
    about: dict[str, Any]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    students: list[StudentAccount] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, Evaluation]:
        """The evaluations of the teacher and the students, without the baselines."""
        students = {student.name: student.evaluation for student in self.students}
        return {name: of for name, of in self.evaluations.items() if name == TEACHER or name in students}


def read_account(folder: str | Path) -> Account:
    """Read the folder of a finished run.

    Raises:
        DataError: It is none, or what it holds cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / RUN).is_file():
        raise DataError(f"There is no run in {folder}.", hint="Name the folder of a run.")
    config = RunConfig.of(**read_config(folder / CONFIG))
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
        stages: dict[str, Any] = about["stages"]
        finished, places = about["finished"], about.get("students", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / RUN} cannot be read ({error!r}).", hint="Run anew.") from None
    if not finished:
        raise DataError(f"The run in {folder} has not come to its end.", hint=f"Go on: setfit-kd run --resume {folder}")
    losses = {shown(name): told["losses"] for name, told in stages.items() if told["losses"]}
    evaluations = {name: Evaluation.load(folder / EVALUATION / name) for name in about["evaluated"]}
    if not evaluations:
        return Account(folder, config, about, losses=losses, places=places)
    data = read_texts(folder / EVALUATION)
    targets = sorted({*TARGETS, *([] if config.target_accuracy is None else [config.target_accuracy])})
    students = [_student(place, source, evaluations, data, targets) for source, place in places.items()]
    return Account(
        folder,
        config,
        about,
        {shown(name): of for name, of in evaluations.items()},
        data.label_names,
        students,
        losses,
        places,
    )


def shown(name: str) -> str:
    """What the table calls a model or a training; of several students, their names alone."""
    group, _, slug = name.partition("/")
    return {BASELINES: f"{slug} (baseline)", STUDENTS: slug}.get(group, name)


def _student(
    name: str, source: str, evaluations: dict[str, Evaluation], data: LabeledSet, targets: list[float]
) -> StudentAccount:
    teacher, student = evaluations[TEACHER], evaluations[name]
    baseline = evaluations.get(name.replace(STUDENTS, BASELINES, 1) if "/" in name else BASELINE)
    against = {"teacher": student.against(teacher)}
    if baseline is not None:
        against["baseline"] = student.against(baseline)
    confidence = student.probabilities.max(axis=1)
    distance = np.abs(student.probabilities - teacher.probabilities).sum(axis=1)
    distance[student.predicted == teacher.predicted] = 0
    furthest = np.argsort(-distance, kind="stable")[:MOST_TEXTS]
    wrong = np.where(student.predicted != data.labels, confidence, 0)
    worst = np.argsort(-wrong, kind="stable")[:MOST_TEXTS]

    def told(row: int) -> Told:
        labels = data.label_names
        return Told(
            data.texts[row],
            labels[data.labels[row]],
            labels[student.predicted[row]],
            float(confidence[row]),
            labels[teacher.predicted[row]],
            float(teacher.probabilities[row].max()),
        )

    return StudentAccount(
        shown(name),
        source,
        name,
        student,
        against,
        {target: student.answering(target) for target in targets},
        [told(int(row)) for row in furthest if distance[row] > 0],
        [told(int(row)) for row in worst if wrong[row] > 0],
    )


def curves(account: Account) -> dict[str, Any]:
    """Coverage and accuracy at every threshold, of each model."""
    return {name: abstaining_curve(of.probabilities, of.gold) for name, of in account.compared.items()}
