"""The stages of the teachers: each is trained, scores the pool, and is measured; several are averaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.config import CROSS_VALIDATED, RunConfig, SignalsConfig, TeacherConfig, parse_weights
from setfit_kd.errors import DataError
from setfit_kd.evaluation import Evaluation
from setfit_kd.memory import resolve_device
from setfit_kd.models import (
    BodySource,
    content_hash,
    family_of,
    load_folder,
    replace_head,
    save_head,
    save_model,
    set_head,
    with_saved_head,
)
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.student_stages import StudentStages, labeled_key, on_device
from setfit_kd.run_folder import SCORED, SIGNALS, TEACHER, TEACHERS, WEIGHED
from setfit_kd.signals import TeacherSignals
from setfit_kd.student import folder_names
from setfit_kd.teacher import cross_validated_accuracy, refine_and_score, resolve_teacher_batch_size, train_teacher
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

_ACCURACY = "accuracy.json"
_TRAINED_HEAD, _HEAD = "trained_head", "head"
"""Where a teacher's folder keeps the head that it had before the pool refined it, and where its signals' keeps the one
that made them."""


@dataclass
class PreparedTeacher:
    """A teacher that only has to be trained.

    Attributes:
        name: What the settings call it.
        source: Where its body comes from.
        label_names: Names of the classes.
        seed: Of what a transformer has no weights for.
        body: The body as it comes, where it is at hand.
    """

    name: str
    source: BodySource
    label_names: tuple[str, ...]
    seed: int
    body: SentenceTransformer | None = None

    def load(self) -> SentenceTransformer:
        """The body as it comes, a new one."""
        return self.source.load(self.label_names, seed=self.seed)


class TeacherStages:
    """Goes through one teacher's stages.

    Args:
        config: The settings, device and precision settled.
        data: What it works on.
        prepared: The teacher.
        slug: Its folder's name among several; None where it is the only one.
        stage_cache: What has been gone through.

    Attributes:
        name: What the run's folder calls it.
        signals_key: Fingerprint of what its signals are made from.
    """

    def __init__(
        self, config: RunConfig, data: RunData, prepared: PreparedTeacher, slug: str | None, stage_cache: StageCache
    ) -> None:
        self.config = config
        self.data = data
        self.prepared = prepared
        self.stage_cache = stage_cache
        self.device = resolve_device(config.device)
        self.name, self._scored, self._weighed = (
            (TEACHER, SIGNALS, "") if slug is None else (f"{TEACHERS}/{slug}", f"{SCORED}/{slug}", f"{WEIGHED}/{slug}")
        )
        prepared.body = prepared.body or prepared.load()
        self._key = fingerprint(
            labeled_key(data.labeled), content_hash(prepared.body), TeacherConfig.fingerprinted(config)
        )
        self.signals_key = fingerprint(self._key, fingerprint(data.pool), SignalsConfig.fingerprinted(config))

    def teacher(self) -> SetFitModel:
        """The teacher as it is trained on the labels, on the CPU."""

        def save(teacher: SetFitModel, folder: Path) -> None:
            save_model(teacher, folder, title="Teacher")
            _save_head(teacher, folder / _TRAINED_HEAD)

        def make() -> SetFitModel:
            labeled, family = self.data.labeled, self.prepared.source.family
            size = resolve_teacher_batch_size(self.config, labeled, family=family, device=self.device)
            teacher = train_teacher(
                labeled,
                self.prepared.body or self.prepared.load(),
                config=self.config,
                checkpoints=self.stage_cache.checkpoints(self.name, fingerprint(self._key, size)),
            )
            teacher.model_body.to("cpu")
            return teacher

        def restore(folder: Path) -> SetFitModel:
            return with_saved_head(load_folder(folder), folder / _TRAINED_HEAD)

        teacher = self.stage_cache.run_or_load(self.name, self._key, make=make, save=save, load=restore)
        self.prepared.body = None  # of a teacher that was trained before, it is not needed
        return teacher

    def signals(self, teacher: SetFitModel) -> tuple[SetFitModel, TeacherSignals]:
        """The teacher with its head refined on the pool, and what it says of the pool and the labeled texts."""

        def make() -> tuple[SetFitModel, TeacherSignals]:
            with on_device(teacher, self.device, "Scoring pool"):
                return refine_and_score(
                    teacher, self.data.labeled, self.data.pool, config=self.config, origin=self.prepared.name
                )

        def save(made: tuple[SetFitModel, TeacherSignals], folder: Path) -> None:
            made[1].save(folder)
            _save_head(made[0], folder / _HEAD)

        def restore(folder: Path) -> tuple[SetFitModel, TeacherSignals]:
            return with_saved_head(teacher, folder / _HEAD), TeacherSignals.load(folder)

        refined, signals = self.stage_cache.run_or_load(
            self._scored, self.signals_key, make=make, save=save, load=restore
        )
        if family_of(refined.model_body) == "transformer":
            set_head(refined.model_head, refined.model_body)  # a student that copies its layers copies this one too
        if self.stage_cache.folder is not None:
            replace_head(refined, self.stage_cache.folder.path / self.name)
        return refined, signals

    def accuracy(self) -> float | None:
        """How often it is right on labels held out from it; see `cross_validated_accuracy`."""

        def save(found: float | None, folder: Path) -> None:
            with atomic_folder(folder) as part:
                (part / _ACCURACY).write_text(json.dumps(found), encoding="utf-8")

        def restore(folder: Path) -> float | None:
            try:
                found = read_json(folder / _ACCURACY)
                return None if found is None else float(found)
            except (OSError, ValueError, TypeError) as error:
                raise DataError(f"{folder} holds no accuracy ({error}).", hint="Weigh the teacher again.") from None

        make = partial(cross_validated_accuracy, self.data.labeled, self.prepared.load, config=self.config)
        return self.stage_cache.run_or_load(self._weighed, self._key, make=make, save=save, load=restore)


@dataclass(frozen=True)
class TeachersResult:
    """What comes out of the teachers.

    Attributes:
        signals: What they say, on average.
        key: Fingerprint of what that was made from.
        first: The first of them, where a student is made of it.
        shares: Of several, each one's weight by its name.
        evaluations: Each teacher's and, of several, that of all together, by the name in the run's folder.
    """

    signals: TeacherSignals
    key: str
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
    """Go through the teachers' stages, one teacher after the other.

    Args:
        config: The settings, device and precision settled.
        data: What they work on.
        teachers: One or several.
        stage_cache: What has been gone through.
        keep_first: Whether the first of several is handed over, too: the others are held one at a time.
    """
    several = len(teachers) > 1
    said: list[TeacherSignals] = []
    weights: list[float | None] = []
    keys: list[str] = []
    evaluations: dict[str, Evaluation] = {}
    first: SetFitModel | None = None
    for prepared, slug in zip(teachers, folder_names(config.teacher), strict=True):
        stages = TeacherStages(config, data, prepared, slug if several else None, stage_cache)
        teacher, signals = stages.signals(stages.teacher())
        said.append(signals)
        keys.append(stages.signals_key)
        if data.evaluation:
            measuring = StudentStages(config, data, stages.signals_key, stage_cache)
            evaluations[stages.name] = measuring.evaluation(stages.name, teacher, data.evaluation, None)
        if len(said) == 1 and (keep_first or not several):
            first = teacher
        del teacher
        if several and config.teacher_weights == CROSS_VALIDATED:
            weights.append(stages.accuracy())
        del stages
    if not several:
        return TeachersResult(said[0], keys[0], first, evaluations=evaluations)
    shares = _shares(config, weights)
    key = fingerprint(keys, shares)
    for name, share in zip(config.teacher, shares, strict=True):
        logger.info("Teacher %s has a share of %.1f %%.", name, 100 * share)
    average = TeacherSignals.average(said, shares)
    if data.evaluation:
        alone, temperatures = list(evaluations.values()), [signals.temperature for signals in said]
        measuring = StudentStages(config, data, key, stage_cache)
        evaluations[TEACHER] = measuring.evaluation_together(alone, shares, temperatures, average.temperature)
    by_name = dict(zip(config.teacher, shares, strict=True))
    return TeachersResult(average, key, first, by_name, evaluations)


def _shares(config: RunConfig, accuracies: Sequence[float | None]) -> list[float]:
    """The teachers' weights, which sum to 1."""
    weights = [1.0] * len(config.teacher)
    if config.teacher_weights == CROSS_VALIDATED:
        if any(not accuracy for accuracy in accuracies):
            logger.warning("There are too few labels to weigh the teachers by: they count alike.")
        else:
            weights = [accuracy or 0.0 for accuracy in accuracies]
    elif config.teacher_weights is not None:
        weights = parse_weights(config.teacher_weights)
    return [weight / sum(weights) for weight in weights]


def _save_head(model: SetFitModel, folder: Path) -> None:
    with atomic_folder(folder) as part:
        save_head(model.model_head, part)
