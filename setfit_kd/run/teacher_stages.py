"""Stages of the teachers: train each one, score the pool, evaluate, and average the signals of several."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import SignalsConfig, TeacherConfig
from setfit_kd.config.values import CROSS_VALIDATED, parse_weights
from setfit_kd.errors import DataError
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, family_of
from setfit_kd.models.fingerprint import content_hash
from setfit_kd.models.heads import save_head
from setfit_kd.models.io import load_folder, replace_head, save_model, with_saved_head
from setfit_kd.models.transformer_head import set_head
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.student_stages import StudentStages, fingerprint_labeled, on_device
from setfit_kd.run_folder.names import SIGNALS, TEACHER, TEACHER_ACCURACIES, TEACHER_SIGNALS, TEACHERS
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.kinds import folder_names
from setfit_kd.teacher.ensemble import cross_validated_accuracy
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.teacher.steps import resolve_teacher_batch_size
from setfit_kd.teacher.train import train_teacher
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

_ACCURACY = "accuracy.json"
_TRAINED_HEAD, _HEAD = "trained_head", "head"
"""Subfolder of the teacher with its head before refinement, and subfolder of the signals with the refined head."""


@dataclass
class PreparedTeacher:
    """A teacher before training.

    Attributes:
        name: Name of the teacher in the settings.
        source: Source of its body.
        label_names: Names of the classes.
        seed: Random seed for weights that a transformer lacks.
        body: The pretrained body, if it is loaded.
    """

    name: str
    source: BodySource
    label_names: tuple[str, ...]
    seed: int
    body: SentenceTransformer | None = None

    def load(self) -> SentenceTransformer:
        """Load the pretrained body."""
        return self.source.load(self.label_names, seed=self.seed)


class TeacherStages:
    """Stages of one teacher: training, scoring and cross-validation.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run.
        prepared: The teacher before training.
        folder_name: Name of its folder among those of several teachers; None for a single teacher.
        stage_cache: Cache of stage results.

    Attributes:
        name: Path of the teacher in the run folder.
        signals_fingerprint: Fingerprint of the signals' inputs.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        prepared: PreparedTeacher,
        folder_name: str | None,
        stage_cache: StageCache,
    ) -> None:
        self.config = config
        self.data = data
        self.prepared = prepared
        self.stage_cache = stage_cache
        self.device = resolve_device(config.device)
        groups = (TEACHERS, TEACHER_SIGNALS, TEACHER_ACCURACIES)
        paths = [TEACHER, SIGNALS, ""] if folder_name is None else [f"{group}/{folder_name}" for group in groups]
        self.name, self._signals_path, self._accuracy_path = paths
        prepared.body = prepared.body or prepared.load()
        labeled, pool, body = fingerprint_labeled(data.labeled), fingerprint(data.pool), content_hash(prepared.body)
        self._fingerprint = fingerprint(labeled, body, TeacherConfig.fingerprint_inputs(config))
        self.signals_fingerprint = fingerprint(self._fingerprint, pool, SignalsConfig.fingerprint_inputs(config))

    def train(self) -> SetFitModel:
        """Train the teacher on the labels, or load it; return it on the CPU."""

        def save(teacher: SetFitModel, folder: Path) -> None:
            save_model(teacher, folder, title="Teacher")
            _save_head(teacher, folder / _TRAINED_HEAD)

        def run() -> SetFitModel:
            labeled, family = self.data.labeled, self.prepared.source.family
            batch_size = resolve_teacher_batch_size(self.config, labeled, family=family, device=self.device)
            teacher = train_teacher(
                labeled,
                self.prepared.body or self.prepared.load(),
                config=self.config,
                checkpoints=self.stage_cache.checkpoint_folder(self.name, fingerprint(self._fingerprint, batch_size)),
            )
            teacher.model_body.to("cpu")
            return teacher

        def load(folder: Path) -> SetFitModel:
            return with_saved_head(load_folder(folder), folder / _TRAINED_HEAD)

        teacher = self.stage_cache.run_or_load(self.name, self._fingerprint, run=run, save=save, load=load)
        self.prepared.body = None  # no longer needed; frees memory if the teacher was loaded
        return teacher

    def score(self, teacher: SetFitModel) -> tuple[SetFitModel, TeacherSignals]:
        """Refine the teacher's head on the pool, and score the pool and the labeled texts.

        Returns:
            The teacher with the refined head, and its signals.
        """

        def run() -> tuple[SetFitModel, TeacherSignals]:
            with on_device(teacher, self.device, "Scoring pool"):
                return refine_and_score(
                    teacher, self.data.labeled, self.data.pool, config=self.config, origin=self.prepared.name
                )

        def save(result: tuple[SetFitModel, TeacherSignals], folder: Path) -> None:
            model, signals = result
            signals.save(folder)
            _save_head(model, folder / _HEAD)

        def load(folder: Path) -> tuple[SetFitModel, TeacherSignals]:
            return with_saved_head(teacher, folder / _HEAD), TeacherSignals.load(folder)

        refined, signals = self.stage_cache.run_or_load(
            self._signals_path, self.signals_fingerprint, run=run, save=save, load=load
        )
        if family_of(refined.model_body) == "transformer":
            set_head(refined.model_head, refined.model_body)  # the last layer, which a student may copy
        if self.stage_cache.folder is not None:
            replace_head(refined, self.stage_cache.folder.path / self.name)
        return refined, signals

    def cross_validate(self) -> float | None:
        """Measure the accuracy on held-out labels; see `cross_validated_accuracy`."""

        def save(accuracy: float | None, folder: Path) -> None:
            with atomic_folder(folder) as temporary:
                (temporary / _ACCURACY).write_text(json.dumps(accuracy), encoding="utf-8")

        def load(folder: Path) -> float | None:
            try:
                accuracy = read_json(folder / _ACCURACY)
                return None if accuracy is None else float(accuracy)
            except (OSError, ValueError, TypeError) as error:
                message = f"Cannot read the accuracy of a teacher from {folder}: {error}."
                raise DataError(message, hint="Run the stage again.") from None

        run = partial(cross_validated_accuracy, self.data.labeled, self.prepared.load, config=self.config)
        return self.stage_cache.run_or_load(self._accuracy_path, self._fingerprint, run=run, save=save, load=load)


@dataclass(frozen=True)
class TeachersResult:
    """Result of the teacher stages.

    Attributes:
        signals: Signals of the teacher, or the weighted average of several.
        fingerprint: Fingerprint of the signals' inputs.
        first: The teacher, or the first of several if a student is made from it.
        shares: With several teachers, the weight of each by its name; the weights sum to 1.
        evaluations: Evaluation of each teacher and, with several, of the ensemble, by path in the run folder.
    """

    signals: TeacherSignals
    fingerprint: str
    first: SetFitModel | None = None
    shares: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def run_teachers(
    config: RunConfig,
    data: RunData,
    teachers: Sequence[PreparedTeacher],
    stage_cache: StageCache,
    *,
    keep_first: bool,
) -> TeachersResult:
    """Run the stages of all teachers, one teacher at a time.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run.
        teachers: The teachers before training.
        stage_cache: Cache of stage results.
        keep_first: Whether to return the first of several teachers; the others are not kept in memory.
    """
    several = len(teachers) > 1
    all_signals: list[TeacherSignals] = []
    accuracies: list[float | None] = []
    fingerprints: list[str] = []
    evaluations: dict[str, Evaluation] = {}
    first: SetFitModel | None = None
    for prepared, folder_name in zip(teachers, folder_names(config.teacher), strict=True):
        stages = TeacherStages(config, data, prepared, folder_name if several else None, stage_cache)
        teacher, signals = stages.score(stages.train())
        all_signals.append(signals)
        fingerprints.append(stages.signals_fingerprint)
        if data.evaluation:
            evaluation_stages = StudentStages(config, data, stages.signals_fingerprint, stage_cache)
            evaluations[stages.name] = evaluation_stages.evaluate(stages.name, teacher, data.evaluation, None)
        if len(all_signals) == 1 and (keep_first or not several):
            first = teacher
        del teacher
        if several and config.teacher_weights == CROSS_VALIDATED:
            accuracies.append(stages.cross_validate())
        del stages
    if not several:
        return TeachersResult(all_signals[0], fingerprints[0], first, evaluations=evaluations)
    shares = _normalize_weights(config, accuracies)
    ensemble_fingerprint = fingerprint(fingerprints, shares)
    for name, share in zip(config.teacher, shares, strict=True):
        logger.info("Teacher %s: weight %.1f%%.", name, 100 * share)
    average = TeacherSignals.average(all_signals, shares)
    if data.evaluation:
        temperatures = [signals.temperature for signals in all_signals]
        evaluation_stages = StudentStages(config, data, ensemble_fingerprint, stage_cache)
        evaluations[TEACHER] = evaluation_stages.evaluate_ensemble(
            list(evaluations.values()), shares, temperatures, average.temperature
        )
    shares_by_name = dict(zip(config.teacher, shares, strict=True))
    return TeachersResult(average, ensemble_fingerprint, first, shares_by_name, evaluations)


def _normalize_weights(config: RunConfig, accuracies: Sequence[float | None]) -> list[float]:
    """Return the weights of the teachers, which sum to 1."""
    weights = [1.0] * len(config.teacher)
    if config.teacher_weights == CROSS_VALIDATED:
        if any(not accuracy for accuracy in accuracies):
            logger.warning("There are too few labels to cross-validate the teachers: they are weighted equally.")
        else:
            weights = [accuracy or 0.0 for accuracy in accuracies]
    elif config.teacher_weights is not None:
        weights = parse_weights(config.teacher_weights)
    return [weight / sum(weights) for weight in weights]


def _save_head(model: SetFitModel, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        save_head(model.model_head, temporary)
