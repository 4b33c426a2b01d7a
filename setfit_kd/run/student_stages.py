"""The stages that follow the signals: what each is made by and from, and how it is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.config import RunConfig, StudentConfig, TeacherConfig
from setfit_kd.data import LabeledSet
from setfit_kd.evaluation import Evaluation, evaluate, evaluate_ensemble
from setfit_kd.memory import move_model, resolve_device
from setfit_kd.models import content_hash, load_folder, save_model
from setfit_kd.run.data import RunData
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run_folder import EVALUATION, TEACHER
from setfit_kd.signals import TeacherSignals
from setfit_kd.student import PreparedStudent, labels_only_config, rows_without_signals, train_student
from setfit_kd.teacher import train_teacher
from setfit_kd.utils.arrays import iter_chunks
from setfit_kd.utils.hashing import fingerprint, hash_parts

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel


def signals_hash(signals: TeacherSignals) -> str:
    """A name for all that a student learns from signals, wherever they came from."""
    said = [np.ascontiguousarray(signals.probabilities).tobytes()]
    if signals.embeddings is not None:
        said += [np.ascontiguousarray(part).tobytes() for part in iter_chunks(signals.embeddings)]
    return fingerprint(signals.texts, list(signals.label_names), signals.temperature, hash_parts(said))


class StudentStages:
    """Goes through the stages that follow the signals.

    Args:
        config: The settings, device and precision settled.
        data: What it works on.
        signals_key: Fingerprint of what the signals are made from.
        stage_cache: What has been gone through.
    """

    def __init__(self, config: RunConfig, data: RunData, signals_key: str, stage_cache: StageCache) -> None:
        self.config = config
        self.data = data
        self.stage_cache = stage_cache
        self.device = resolve_device(config.device)
        self._signals_key = signals_key
        self._labeled_key = labeled_key(data.labeled)
        self._evaluation_key = labeled_key(data.evaluation)
        self._keys = {TEACHER: signals_key}

    def student_and_baseline(
        self,
        names: tuple[str, str | None],
        source: str,
        prepared: PreparedStudent,
        teacher: SetFitModel | None,
        signals: TeacherSignals,
    ) -> tuple[SetFitModel, SetFitModel | None]:
        """The distilled student and, to compare, its body trained on the labels alone; both on the CPU.

        Args:
            names: What the two are called in the folder; without a name for it, there is no baseline.
            source: The student's name in the settings.
            prepared: Its body.
            teacher: The refined teacher whose layers or vectors a student may have; of several, the first.
            signals: What they say.
        """
        origin = self._signals_key if prepared.reads is None else content_hash(prepared.reads)
        read = fingerprint(self.data.pool) if prepared.reads_texts else ""
        body_key = fingerprint(source, origin, read)
        student_name, baseline_name = names
        settings = StudentConfig.fingerprinted(self.config)
        student_key = fingerprint(self._signals_key, self._labeled_key, body_key, settings)
        baseline_config = self.config
        if prepared.family == "transformer":
            unseen = len(rows_without_signals(signals, self.data.labeled))
            baseline_config = labels_only_config(self.config, len(signals), unseen)
        baseline_key = fingerprint(self._labeled_key, body_key, TeacherConfig.fingerprinted(baseline_config))
        body = cache(partial(self._student_body, prepared, teacher))  # made only where one of the two is trained
        train = partial(train_student, signals, labeled=self.data.labeled, config=self.config)
        student = self._trained("Student", student_name, student_key, train, body)
        if baseline_name is None:
            return student, None
        train = partial(train_teacher, self.data.labeled, config=baseline_config, description="Training baseline")
        return student, self._trained("Baseline", baseline_name, baseline_key, train, body)

    def _trained(
        self,
        title: str,
        name: str,
        key: str,
        train: Callable[..., SetFitModel],
        body: Callable[[], SentenceTransformer],
    ) -> SetFitModel:
        """Train a copy of a body, or load what was trained before."""
        self._keys[name] = key

        def make() -> SetFitModel:
            model = train(copy.deepcopy(body()), checkpoints=self.stage_cache.checkpoints(name, key))
            model.model_body.to("cpu")
            return model

        return self.stage_cache.run_or_load(
            name, key, make=make, save=partial(save_model, title=title), load=load_folder
        )

    def _student_body(self, prepared: PreparedStudent, teacher: SetFitModel | None) -> SentenceTransformer:
        if teacher is None or not prepared.reads_texts or prepared.reads is not None:
            return prepared.make(teacher and teacher.model_body, self.data.pool, self.device)
        with on_device(teacher, self.device, "Making student"):
            return prepared.make(teacher.model_body, self.data.pool, self.device)

    def evaluation(self, name: str, model: SetFitModel, data: LabeledSet, teacher: Evaluation | None) -> Evaluation:
        """How good a model is, and what it costs.

        Args:
            name: What it is called in the folder.
            model: The model.
            data: Labeled texts that it was not trained on.
            teacher: The teacher's evaluation; None for a teacher itself, and where there is none.
        """

        def make() -> Evaluation:
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

        inputs = fingerprint(self._keys[TEACHER], self._keys.get(name, ""), self._evaluation_key)
        return self.stage_cache.run_or_load(
            f"{EVALUATION}/{name}", inputs, make=make, save=Evaluation.save, load=Evaluation.load
        )

    def evaluation_together(
        self, evaluations: Sequence[Evaluation], shares: Sequence[float], temperatures: Sequence[float], average: float
    ) -> Evaluation:
        """How good several teachers are together; see `evaluate_ensemble`."""
        return self.stage_cache.run_or_load(
            f"{EVALUATION}/{TEACHER}",
            fingerprint(self._keys[TEACHER], self._evaluation_key, list(temperatures), average),
            make=lambda: evaluate_ensemble(evaluations, shares, temperatures, average),
            save=Evaluation.save,
            load=Evaluation.load,
        )


def labeled_key(data: LabeledSet | None) -> str:
    """Fingerprint of labeled texts; empty where there are none."""
    if data is None:
        return ""
    return fingerprint(data.texts, data.labels.tolist(), list(data.label_names))


@contextmanager
def on_device(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Within this block, a model is on the device; outside it, the device's memory is for others."""
    move_model(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        model.model_body.to("cpu")
