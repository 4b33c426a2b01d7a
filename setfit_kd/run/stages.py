"""Stages of a run: augment, train and score the teachers, train the students, evaluate."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.augment.edits import augment, drop_uncertain, load_texts, save_texts
from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import SignalsConfig, StudentConfig, TeacherConfig
from setfit_kd.config.values import CROSS_VALIDATED, parse_weights
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.measure import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.memory.backoff import move_model
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, content_hash, family_of
from setfit_kd.models.heads import save_head, set_head
from setfit_kd.models.io import BUNDLE, load_folder, replace_head, save_model, with_saved_head
from setfit_kd.run.inputs import RunData, RunInputs
from setfit_kd.run.stage_cache import Artifact, StageCache
from setfit_kd.run_folder.names import (
    AUGMENTED,
    EVALUATION,
    SIGNALS,
    TEACHER,
    TEACHER_ACCURACIES,
    TEACHER_SIGNALS,
    TEACHERS,
    baseline_path,
)
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import labels_only_config, rows_without_signals, train_student
from setfit_kd.student.kinds import PreparedStudent, folder_names
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.teacher.train import cross_validated_accuracy, steps_and_batch_size, train_teacher
from setfit_kd.utils.arrays import iter_chunks
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import fingerprint, hash_parts, read_json

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

_ACCURACY = "accuracy.json"
_TRAINED_HEAD, _HEAD = "trained_head", "head"
"""Subfolder of the teacher with its head before refinement, and subfolder of the signals with the refined head."""


@dataclass(frozen=True)
class Teachers:
    """Result of the teacher stages.

    Attributes:
        signals: Signals of the teacher, or the weighted average of several.
        key: Fingerprint of the signals' inputs.
        first: The teacher, or the first of several if a student is made from it.
        shares: With several teachers, the weight of each by its name; the weights sum to 1.
        evaluations: Evaluation of each teacher and, with several, of the ensemble, by path in the run folder.
    """

    signals: TeacherSignals
    key: str
    first: SetFitModel | None = None
    shares: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


class Stages:
    """Stages of a run. Each returns its result, on the CPU, or loads it if it was run before on the same inputs.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run.
        cache: Cache of stage results.
    """

    def __init__(self, config: RunConfig, data: RunData, cache: StageCache) -> None:
        self.config, self.data, self.cache = config, data, cache
        self.device = resolve_device(config.device)
        self._exact = ["exact"] if config.exact else []  # not in the key of a training
        self._labeled_key, self._evaluation_key = _labeled_key(data.labeled), _labeled_key(data.evaluation)

    def augment(self, fill_mask: Path | None) -> list[str]:
        """Augment the pool; texts of the evaluation set are never created.

        Args:
            fill_mask: Folder of a masked language model that replaces words; None to use the other edits only.
        """
        data, config, n = self.data, self.config, self.config.augment
        if n is None:
            return []

        def run() -> list[str]:
            forbidden = data.evaluation.texts if data.evaluation else ()
            batch_size = config.encode_batch_size or 32
            model = None if fill_mask is None else FillMask(fill_mask, device=self.device, batch_size=batch_size)
            return augment([*data.pool, *data.labeled.texts], n, seed=config.seed, forbidden=forbidden, fill=model)

        model_hash = fill_mask and hash_parts(
            file.read_bytes() for file in sorted(fill_mask.iterdir()) if file.is_file()
        )
        key = fingerprint(self._labeled_key, data.pool, self._evaluation_key, n, model_hash, config.seed)
        return self.cache.run_or_load(AUGMENTED, key, Artifact(save_texts, load_texts), run)

    def run_teachers(self, inputs: RunInputs, augmented: Sequence[str]) -> Teachers:
        """Train, score and evaluate all teachers, one at a time, and average the signals of several."""
        config, several = self.config, len(inputs.teachers) > 1
        pool = [*self.data.pool, *augmented]
        pool_key = fingerprint(pool)
        keep_first = not several or any(student.source_body is None for student in inputs.students)
        first: SetFitModel | None = None
        all_signals: list[TeacherSignals] = []
        keys: list[str] = []
        accuracies: list[float | None] = []
        evaluations: dict[str, Evaluation] = {}
        for (name, source), folder in zip(inputs.teachers.items(), folder_names(config.teacher), strict=True):
            path = f"{TEACHERS}/{folder}" if several else TEACHER
            signals_path = f"{TEACHER_SIGNALS}/{folder}" if several else SIGNALS
            body = inputs.bodies.pop(name, None) or inputs.load_body(name, config.seed)
            key = fingerprint(self._labeled_key, content_hash(body), TeacherConfig.fingerprint_inputs(config))
            signals_key = fingerprint(key, pool_key, SignalsConfig.fingerprint_inputs(config), *self._exact)
            teacher = self._train_teacher(path, key, source, body)
            del body  # frees memory if the teacher was loaded
            teacher, signals = self._score(path, signals_path, signals_key, teacher, pool, name)
            all_signals.append(signals)
            keys.append(signals_key)
            if self.data.evaluation:
                evaluations[path] = self.evaluate(path, teacher, signals_key, "" if several else signals_key)
            if keep_first and first is None:
                first = teacher
            del teacher
            if several and config.teacher_weights == CROSS_VALIDATED:
                load = partial(inputs.load_body, name, config.seed)
                run = partial(cross_validated_accuracy, self.data.labeled, load, config=config)
                accuracies.append(self.cache.run_or_load(f"{TEACHER_ACCURACIES}/{folder}", key, _ACCURACY_FILE, run))
        signals, key, shares = all_signals[0], keys[0], {}
        if several:
            weights = _normalize_weights(config, accuracies)
            shares = dict(zip(config.teacher, weights, strict=True))
            logger.info("Weights of the teachers: %s.", ", ".join(f"{n} {share:.1%}" for n, share in shares.items()))
            signals, key = TeacherSignals.average(all_signals, weights), fingerprint(keys, weights)
            if self.data.evaluation:
                temperatures = [signals.temperature for signals in all_signals]
                evaluations[TEACHER] = self.cache.run_or_load(
                    f"{EVALUATION}/{TEACHER}",
                    fingerprint(key, self._evaluation_key, temperatures, signals.temperature),
                    Artifact(Evaluation.save, Evaluation.load),
                    partial(evaluate_ensemble, list(evaluations.values()), weights, temperatures, signals.temperature),
                )
        if augmented:
            rows = range(len(self.data.pool), len(pool))
            signals = drop_uncertain(signals, rows, min_confidence=config.augment_confidence)
            key = fingerprint(key, signals.texts)
        return Teachers(signals, key, first, shares, evaluations)

    def _train_teacher(self, path: str, key: str, source: BodySource, body: SentenceTransformer) -> SetFitModel:
        """Train a teacher on the labels."""
        labeled, config = self.data.labeled, self.config
        _, batch_size = steps_and_batch_size(config, labeled, family=source.family, device=self.device)
        checkpoints = self.cache.checkpoint_folder(path, fingerprint(key, batch_size))

        def save(teacher: SetFitModel, folder: Path) -> None:
            save_model(teacher, folder, title="Teacher")
            _save_head(teacher, folder / _TRAINED_HEAD)

        def load(folder: Path) -> SetFitModel:
            return with_saved_head(load_folder(folder), folder / _TRAINED_HEAD)

        def run() -> SetFitModel:
            return _on_cpu(train_teacher(labeled, body, config=config, checkpoints=checkpoints))

        return self.cache.run_or_load(path, key, Artifact(save, load), run)

    def _score(
        self, path: str, signals_path: str, key: str, teacher: SetFitModel, pool: list[str], origin: str
    ) -> tuple[SetFitModel, TeacherSignals]:
        """Refine a teacher's head on the pool, and score the pool and the labeled texts."""

        def run() -> tuple[SetFitModel, TeacherSignals]:
            with _on_device(teacher, self.device, "Scoring pool"):
                return refine_and_score(teacher, self.data.labeled, pool, config=self.config, origin=origin)

        def save(result: tuple[SetFitModel, TeacherSignals], folder: Path) -> None:
            model, signals = result
            signals.save(folder)
            _save_head(model, folder / _HEAD)

        def load(folder: Path) -> tuple[SetFitModel, TeacherSignals]:
            return with_saved_head(teacher, folder / _HEAD), TeacherSignals.load(folder)

        refined, signals = self.cache.run_or_load(signals_path, key, Artifact(save, load), run)
        if family_of(refined.model_body) == "transformer":
            set_head(refined.model_head, refined.model_body)  # the last layer, which a student may copy
        if self.cache.folder is not None:
            replace_head(refined, self.cache.folder.path / path)
        return refined, signals

    def run_student(
        self, path: str, name: str, prepared: PreparedStudent, teachers: Teachers
    ) -> dict[str, SetFitModel]:
        """Distil a student and, if there is an evaluation set, train its baseline: the same without distillation.

        Args:
            path: Path of the student in the run folder.
            name: Name of the student in the settings.
            prepared: The student before training.
            teachers: Result of the teacher stages.

        Returns:
            The models by path: the baseline, if any, and the student.
        """
        config, data, signals = self.config, self.data, teachers.signals
        origin = teachers.key if prepared.source_body is None else content_hash(prepared.source_body)
        body_key = fingerprint(name, origin, fingerprint(data.pool) if prepared.needs_texts else "")
        teacher = None if teachers.first is None else teachers.first.model_body
        # Created only if one of the two is trained.
        body = cache(partial(prepared.create_body, teacher, data.pool, self.device))
        settings = StudentConfig.fingerprint_inputs(config)
        key = fingerprint(teachers.key, self._labeled_key, body_key, settings)
        train = partial(train_student, signals, labeled=data.labeled, config=config)
        models = {}

        def run(key: str, path: str, train: Callable[..., SetFitModel], title: str) -> SetFitModel:
            def save(model: SetFitModel, folder: Path) -> None:
                def add_bundle(part: Path) -> None:
                    if title == "Student" and config.bundle:
                        from setfit_kd.export.bundle import keep_bundle

                        keep_bundle(model, part / BUNDLE, texts=signals.texts)

                save_model(model, folder, title=title, add_files=add_bundle)

            checkpoints, files = self.cache.checkpoint_folder(path, key), Artifact(save, load_folder)
            return self.cache.run_or_load(
                path, key, files, lambda: _on_cpu(train(copy.deepcopy(body()), checkpoints=checkpoints))
            )

        student = run(key, path, train, "Student")
        if config.baseline and data.evaluation and len(data.labeled):
            if prepared.family == "transformer":
                config = labels_only_config(config, len(signals), len(rows_without_signals(signals, data.labeled)))
            key = fingerprint(self._labeled_key, body_key, TeacherConfig.fingerprint_inputs(config))
            train = partial(train_teacher, data.labeled, config=config, description="Training baseline")
            models[baseline_path(path)] = run(key, baseline_path(path), train, "Baseline")
        return {**models, path: student}

    def evaluate(
        self, path: str, model: SetFitModel, signals_key: str, key: str, teacher: Evaluation | None = None
    ) -> Evaluation:
        """Evaluate a model, including its size and speed.

        Args:
            path: Path of the model in the run folder.
            model: The model.
            signals_key, key: Fingerprints of the inputs of the signals and of the model.
            teacher: Evaluation of the teacher; None if the model is a teacher or there is no teacher.
        """
        assert self.data.evaluation is not None
        data, description = self.data.evaluation, f"Evaluating {path}"
        folder = None if self.cache.folder is None else self.cache.folder.path / path

        def run() -> Evaluation:
            with _on_device(model, self.device, description):
                return evaluate(
                    model,
                    data,
                    teacher=teacher,
                    encode_batch_size=self.config.encode_batch_size,
                    exact=self.config.exact,
                    folder=folder,
                    description=description,
                )

        key = fingerprint(signals_key, key, self._evaluation_key, *self._exact)
        return self.cache.run_or_load(f"{EVALUATION}/{path}", key, Artifact(Evaluation.save, Evaluation.load), run)


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


def fingerprint_signals(signals: TeacherSignals) -> str:
    """Fingerprint everything in signals that affects the training of a student; their origin does not."""
    content = [np.ascontiguousarray(signals.probabilities).tobytes()]
    if signals.embeddings is not None:
        content += [np.ascontiguousarray(part).tobytes() for part in iter_chunks(signals.embeddings)]
    return fingerprint(signals.texts, list(signals.label_names), signals.temperature, hash_parts(content))


def _labeled_key(data: LabeledSet | None) -> str:
    """Fingerprint labeled texts; the empty string for None."""
    return "" if data is None else fingerprint(data.texts, data.labels.tolist(), list(data.label_names))


def _on_cpu(model: SetFitModel) -> SetFitModel:
    model.model_body.to("cpu")
    return model


@contextmanager
def _on_device(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Context manager that moves a model to a device, and back to the CPU to free the device's memory."""
    move_model(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        _on_cpu(model)


def _save_head(model: SetFitModel, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        save_head(model.model_head, temporary)


def _save_accuracy(accuracy: float | None, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / _ACCURACY).write_text(json.dumps(accuracy), encoding="utf-8")


def _load_accuracy(folder: Path) -> float | None:
    try:
        accuracy = read_json(folder / _ACCURACY)
        return None if accuracy is None else float(accuracy)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"Cannot read the accuracy of a teacher from {folder}: {error}.") from None


_ACCURACY_FILE = Artifact(_save_accuracy, _load_accuracy)
