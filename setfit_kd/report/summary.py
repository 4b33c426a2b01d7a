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
from setfit_kd.evaluation.calibration import OperatingPoint
from setfit_kd.evaluation.intervals import Interval
from setfit_kd.evaluation.measure import Evaluation, read_texts
from setfit_kd.evaluation.seeds import SeedSummary, summarize_seeds
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
from setfit_kd.utils.escape import short_class_name

MAX_EXAMPLES = 20
TARGET_ACCURACIES = (0.9, 0.95, 0.99)

Example = tuple[str, ...]
"""A text, its gold class, and the predictions of the student and, if there is one, of the teacher."""


@dataclass(frozen=True)
class StudentSummary:
    """Results of one student.

    ``source`` is the student's name in the config, such as ``static:256``. ``differences`` are those to ``teacher`` and
    ``baseline``, by metric. ``thresholds`` contains the operating point for each target accuracy; None if no threshold
    reaches it. ``disagreements`` (with the teacher) and ``errors`` list the most confident ones first.
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

    Attributes:
        folder: The run folder.
        config: The config of the run.
        manifest: The content of ``run.json``.
        losses: Training loss by step, for each training.
        evaluations: Evaluation of each model, by `display_name`; empty without an evaluation set.
        label_names: Names of the classes.
        students: Results of each evaluated student.
        seed_summaries: Metrics of each model over the seeds; empty for a run with one seed.
    """

    folder: Path
    config: RunConfig
    manifest: Manifest
    losses: dict[str, list[float]]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    students: list[StudentSummary] = field(default_factory=list)
    seed_summaries: dict[str, SeedSummary] = field(default_factory=dict)

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
    if not manifest.evaluated:
        return RunSummary(folder, config, manifest, losses)
    data = read_texts(folder / EVALUATION)
    folders = [folder, *(folder / SEEDS / str(seed) for seed in manifest.seeds[1:])]
    try:
        by_seed = [
            {name: _load_evaluation(path / EVALUATION / name, data) for name in manifest.evaluated} for path in folders
        ]
    except DataError as error:
        hint = f"Run `setfit-kd run --resume {shlex.quote(str(folder))}` to evaluate again."
        raise DataError(error.message, hint=hint) from None
    evaluations, paths = by_seed[0], manifest.students.values()
    if (TEACHER not in evaluations and config.signals is None) or not paths or not set(paths) <= set(evaluations):
        raise DataError(
            f"{folder / RUN_FILE} does not list all models.", hint="Start a new run in another --output-dir."
        )
    seed_summaries = {}
    if manifest.seeds:
        seed_summaries = summarize_seeds(by_seed, {path: reference_models(path, evaluations) for path in paths})
    targets = sorted({*TARGET_ACCURACIES, *([] if config.target_accuracy is None else [config.target_accuracy])})
    return RunSummary(
        folder,
        config,
        manifest,
        losses,
        {display_name(name): evaluation for name, evaluation in evaluations.items()},
        data.label_names,
        [_summarize_student(source, path, evaluations, data, targets) for source, path in manifest.students.items()],
        {display_name(name): summary for name, summary in seed_summaries.items()},
    )


def display_name(name: str) -> str:
    """Name of a model or training in the report: ``x`` for ``students/x``, ``x (baseline)`` for ``baselines/x``."""
    group, _, slug = name.partition("/")
    student = f"{slug} (student)" if slug == TEACHER else slug
    kinds = {TEACHERS: f"{slug} (teacher)", TEACHER_SIGNALS: f"{slug} (teacher)", BASELINES: f"{slug} (baseline)"}
    return {**kinds, STUDENTS: student}.get(group, name)


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
    predictions = [(model.predicted, model.probabilities.max(axis=1)) for model in models]
    predicted, confidence = predictions[0]

    def examples(weights: npt.NDArray[np.floating]) -> list[Example]:
        """Return the texts with the highest weights above 0."""
        return [
            (
                data.texts[row],
                short_class_name(data.label_names[data.labels[row]]),
                *(f"{short_class_name(data.label_names[p[row]])} {c[row]:.0%}" for p, c in predictions),
            )
            for row in np.argsort(-weights, kind="stable")[:MAX_EXAMPLES]
            if weights[row] > 0
        ]

    references = reference_models(path, evaluations).items()
    differences = {role: student.difference_to(evaluations[reference]) for role, reference in references}
    distances = np.abs(student.probabilities - models[-1].probabilities).sum(axis=1)
    return StudentSummary(
        display_name(path),
        source,
        student,
        differences,
        {target: student.operating_point(target) for target in targets},
        examples(distances * (predicted != models[-1].predicted)),
        examples(confidence * (predicted != data.labels)),
    )
