"""Stages after the signals: train students and baselines, and evaluate models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import StudentConfig, TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.measure import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.memory.backoff import move_model
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.fingerprint import content_hash
from setfit_kd.models.io import load_folder, save_model
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run_folder.names import EVALUATION, TEACHER
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import rows_without_signals, train_student
from setfit_kd.student.kinds import PreparedStudent
from setfit_kd.student.steps import labels_only_config
from setfit_kd.teacher.train import train_teacher
from setfit_kd.utils.arrays import iter_chunks
from setfit_kd.utils.hashing import fingerprint, hash_parts

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel


def fingerprint_signals(signals: TeacherSignals) -> str:
    """Fingerprint everything in signals that affects the training of a student; their origin does not."""
    content = [np.ascontiguousarray(signals.probabilities).tobytes()]
    if signals.embeddings is not None:
        content += [np.ascontiguousarray(part).tobytes() for part in iter_chunks(signals.embeddings)]
    return fingerprint(signals.texts, list(signals.label_names), signals.temperature, hash_parts(content))


class StudentStages:
    """Stages after the signals: training of students and baselines, and evaluation.

    Args:
        config: The settings, with device and precision resolved.
        data: Data of the run.
        signals_fingerprint: Fingerprint of the signals' inputs.
        stage_cache: Cache of stage results.
    """

    def __init__(self, config: RunConfig, data: RunData, signals_fingerprint: str, stage_cache: StageCache) -> None:
        self.config = config
        self.data = data
        self.stage_cache = stage_cache
        self.device = resolve_device(config.device)
        self._signals_fingerprint = signals_fingerprint
        self._labeled_fingerprint = fingerprint_labeled(data.labeled)
        self._evaluation_fingerprint = fingerprint_labeled(data.evaluation)
        self._fingerprints = {TEACHER: signals_fingerprint}

    def train_student_and_baseline(
        self,
        names: tuple[str, str | None],
        source: str,
        prepared: PreparedStudent,
        teacher: SetFitModel | None,
        signals: TeacherSignals,
    ) -> tuple[SetFitModel, SetFitModel | None]:
        """Distil a student, and train the baseline: the same student without distillation.

        Args:
            names: Paths of the student and the baseline in the run folder; the second is None for no baseline.
            source: Name of the student in the settings.
            prepared: The student before training.
            teacher: The refined teacher, or the first of several, for students made from its layers or embeddings.
            signals: Signals of the teacher, or the average of several.

        Returns:
            Student and baseline, on the CPU.
        """
        origin = self._signals_fingerprint if prepared.source_body is None else content_hash(prepared.source_body)
        pool = fingerprint(self.data.pool) if prepared.needs_texts else ""
        body_fingerprint = fingerprint(source, origin, pool)
        student_name, baseline_name = names
        settings = StudentConfig.fingerprint_inputs(self.config)
        student_fingerprint = fingerprint(
            self._signals_fingerprint, self._labeled_fingerprint, body_fingerprint, settings
        )
        baseline_config = self.config
        if prepared.family == "transformer":
            n_without_signals = len(rows_without_signals(signals, self.data.labeled))
            baseline_config = labels_only_config(self.config, len(signals), n_without_signals)
        settings = TeacherConfig.fingerprint_inputs(baseline_config)
        baseline_fingerprint = fingerprint(self._labeled_fingerprint, body_fingerprint, settings)
        body = cache(partial(self._create_body, prepared, teacher))  # created only if one of the two is trained
        train = partial(train_student, signals, labeled=self.data.labeled, config=self.config)
        student = self._train_or_load("Student", student_name, student_fingerprint, train, body)
        if baseline_name is None:
            return student, None
        train = partial(train_teacher, self.data.labeled, config=baseline_config, description="Training baseline")
        return student, self._train_or_load("Baseline", baseline_name, baseline_fingerprint, train, body)

    def _train_or_load(
        self,
        title: str,
        name: str,
        inputs_fingerprint: str,
        train: Callable[..., SetFitModel],
        body: Callable[[], SentenceTransformer],
    ) -> SetFitModel:
        """Train a copy of a body, or load the trained model."""
        self._fingerprints[name] = inputs_fingerprint
        checkpoints = self.stage_cache.checkpoint_folder(name, inputs_fingerprint)

        def run() -> SetFitModel:
            model = train(copy.deepcopy(body()), checkpoints=checkpoints)
            model.model_body.to("cpu")
            return model

        save = partial(save_model, title=title)
        return self.stage_cache.run_or_load(name, inputs_fingerprint, run=run, save=save, load=load_folder)

    def _create_body(self, prepared: PreparedStudent, teacher: SetFitModel | None) -> SentenceTransformer:
        if teacher is None or not prepared.needs_texts or prepared.source_body is not None:
            return prepared.build(teacher and teacher.model_body, self.data.pool, self.device)
        with on_device(teacher, self.device, "Creating student"):
            return prepared.build(teacher.model_body, self.data.pool, self.device)

    def evaluate(self, name: str, model: SetFitModel, data: LabeledSet, teacher: Evaluation | None) -> Evaluation:
        """Evaluate a model, including its size and speed.

        Args:
            name: Path of the model in the run folder.
            model: The model.
            data: Labeled texts that it was not trained on.
            teacher: Evaluation of the teacher; None if the model is a teacher or there is no teacher.
        """

        def run() -> Evaluation:
            folder = None if self.stage_cache.folder is None else self.stage_cache.folder.path / name
            with on_device(model, self.device, f"Evaluating {name}"):
                return evaluate(
                    model,
                    data,
                    teacher=teacher,
                    encode_batch_size=self.config.encode_batch_size,
                    folder=folder,
                    description=f"Evaluating {name}",
                )

        inputs_fingerprint = fingerprint(
            self._fingerprints[TEACHER], self._fingerprints.get(name, ""), self._evaluation_fingerprint
        )
        return self.stage_cache.run_or_load(
            f"{EVALUATION}/{name}", inputs_fingerprint, run=run, save=Evaluation.save, load=Evaluation.load
        )

    def evaluate_ensemble(
        self, evaluations: Sequence[Evaluation], shares: Sequence[float], temperatures: Sequence[float], average: float
    ) -> Evaluation:
        """Evaluate an ensemble of teachers; see `setfit_kd.evaluation.evaluate_ensemble`."""
        return self.stage_cache.run_or_load(
            f"{EVALUATION}/{TEACHER}",
            fingerprint(self._fingerprints[TEACHER], self._evaluation_fingerprint, list(temperatures), average),
            run=lambda: evaluate_ensemble(evaluations, shares, temperatures, average),
            save=Evaluation.save,
            load=Evaluation.load,
        )


def fingerprint_labeled(data: LabeledSet | None) -> str:
    """Fingerprint labeled texts; the empty string for None."""
    if data is None:
        return ""
    return fingerprint(data.texts, data.labels.tolist(), list(data.label_names))


@contextmanager
def on_device(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Context manager that moves a model to a device, and back to the CPU to free the device's memory."""
    move_model(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        model.model_body.to("cpu")
