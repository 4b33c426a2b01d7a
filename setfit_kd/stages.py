"""The stages of a run: what each is made by and from, and how it is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.config import RunConfig, SignalsConfig, StudentConfig, TeacherConfig
from setfit_kd.data import LabeledSet, RunData
from setfit_kd.evaluation import Evaluation, evaluate, write_texts
from setfit_kd.files import whole_folder
from setfit_kd.journal import Journal, fingerprint
from setfit_kd.memory import place, resolve_device
from setfit_kd.models import (
    content_hash,
    family_of,
    load_folder,
    put_head,
    replace_head,
    save_head,
    save_model,
    with_head,
)
from setfit_kd.runfolder import EVALUATION, SIGNALS, TEACHER
from setfit_kd.signals import TeacherSignals
from setfit_kd.student import PreparedStudent, on_labels_alone, train_student
from setfit_kd.teacher import refine_and_score, train_teacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_TRAINED_HEAD, _HEAD = "trained_head", "head"
"""Where the teacher's folder keeps the head that it had before the pool refined it, and where the signals' keeps the
one that made them."""


class RunStages:
    """Goes through the stages of one run.

    Args:
        config: The settings, device and precision settled.
        data: What it works on.
        teacher_body: The teacher's body as it comes.
        journal: What has been gone through.
    """

    def __init__(self, config: RunConfig, data: RunData, teacher_body: SentenceTransformer, journal: Journal) -> None:
        self.config = config
        self.data = data
        self.teacher_body = teacher_body
        self.journal = journal
        self.device = resolve_device(config.device)
        labeled = _key_of(data.labeled)
        self._pool_key = fingerprint(data.pool)
        self._teacher_key = fingerprint(labeled, content_hash(teacher_body), TeacherConfig.deciding(config))
        self._signals_key = fingerprint(self._teacher_key, self._pool_key, SignalsConfig.deciding(config))
        self._labeled_key = labeled
        self._evaluation_key = _key_of(data.evaluation) if data.evaluation else ""
        self._keys = {TEACHER: self._signals_key}

    def teacher(self) -> SetFitModel:
        """The teacher as it is trained on the labels, on the CPU."""

        def save(teacher: SetFitModel, folder: Path) -> None:
            save_model(teacher, folder, title="Teacher")
            _save_head(teacher, folder / _TRAINED_HEAD)

        def make() -> SetFitModel:
            teacher = train_teacher(
                self.data.labeled,
                self.teacher_body,
                config=self.config,
                checkpoints=self.journal.checkpoints(TEACHER, self._teacher_key),
            )
            teacher.model_body.to("cpu")
            return teacher

        def restore(folder: Path) -> SetFitModel:
            return with_head(load_folder(folder), folder / _TRAINED_HEAD)

        return self.journal.go_through(TEACHER, self._teacher_key, make=make, save=save, load=restore)

    def signals(self, teacher: SetFitModel) -> tuple[SetFitModel, TeacherSignals]:
        """The teacher with its head refined on the pool, and what it says of the pool and the labeled texts."""

        def make() -> tuple[SetFitModel, TeacherSignals]:
            with _placed(teacher, self.device, "Scoring pool"):
                return refine_and_score(
                    teacher, self.data.labeled, self.data.pool, config=self.config, origin=self.config.teacher
                )

        def save(made: tuple[SetFitModel, TeacherSignals], folder: Path) -> None:
            made[1].save(folder)
            _save_head(made[0], folder / _HEAD)

        def restore(folder: Path) -> tuple[SetFitModel, TeacherSignals]:
            return with_head(teacher, folder / _HEAD), TeacherSignals.load(folder)

        refined, signals = self.journal.go_through(SIGNALS, self._signals_key, make=make, save=save, load=restore)
        if family_of(refined.model_body) == "transformer":
            put_head(refined.model_head, refined.model_body)  # a student that copies its layers copies this one too
        if self.journal.folder is not None:
            replace_head(refined, self.journal.folder.path / TEACHER)
        return refined, signals

    def student_and_baseline(
        self,
        names: tuple[str, str | None],
        source: str,
        prepared: PreparedStudent,
        teacher: SetFitModel,
        signals: TeacherSignals,
    ) -> tuple[SetFitModel, SetFitModel | None]:
        """The distilled student and, to compare, its body trained on the labels alone; both on the CPU.

        Args:
            names: What the two are called in the folder; without a name for it, there is no baseline.
            source: The student's name in the settings.
            prepared: Its body.
            teacher: The refined teacher.
            signals: What it says.
        """
        origin = self._signals_key if prepared.reads is None else content_hash(prepared.reads)
        body_key = fingerprint(source, origin)
        student_name, baseline_name = names
        student_key = fingerprint(self._signals_key, body_key, StudentConfig.deciding(self.config))
        baseline_config = self.config
        if prepared.family == "transformer":
            baseline_config = on_labels_alone(self.config, len(signals))
        baseline_key = fingerprint(self._labeled_key, body_key, TeacherConfig.deciding(baseline_config))
        self._keys[student_name] = student_key
        body = _Once(partial(self._student_body, prepared, teacher))

        def make_student() -> SetFitModel:
            return train_student(
                signals,
                body(),
                labeled=self.data.labeled,
                config=self.config,
                checkpoints=self.journal.checkpoints(student_name, student_key),
            )

        student = self._trained("Student", student_name, student_key, make_student)
        if baseline_name is None:
            return student, None
        self._keys[baseline_name] = baseline_key

        def make_baseline() -> SetFitModel:
            return train_teacher(
                self.data.labeled,
                body(),
                config=baseline_config,
                description="Training baseline",
                checkpoints=self.journal.checkpoints(baseline_name, baseline_key),
            )

        return student, self._trained("Baseline", baseline_name, baseline_key, make_baseline)

    def _trained(self, title: str, name: str, key: str, make: Callable[[], SetFitModel]) -> SetFitModel:
        def make_and_rest() -> SetFitModel:
            model = make()
            model.model_body.to("cpu")
            return model

        return self.journal.go_through(
            name, key, make=make_and_rest, save=partial(save_model, title=title), load=load_folder
        )

    def _student_body(self, prepared: PreparedStudent, teacher: SetFitModel) -> SentenceTransformer:
        if not prepared.passes:
            return prepared.make(teacher.model_body, self.data.pool)
        with _placed(teacher, self.device, "Making student"):
            return prepared.make(teacher.model_body, self.data.pool)

    def keep_texts(self, data: LabeledSet) -> None:
        """Write what is evaluated on into the run's folder, for its report."""
        if self.journal.folder is not None:
            write_texts(data, self.journal.folder.path / EVALUATION)

    def evaluation(self, name: str, model: SetFitModel, data: LabeledSet, teacher: Evaluation | None) -> Evaluation:
        """How good a model is, and what it costs.

        Args:
            name: What it is called in the folder.
            model: The model.
            data: Labeled texts that it was not trained on.
            teacher: The teacher's evaluation; None for the teacher itself.
        """

        def make() -> Evaluation:
            folder = None if self.journal.folder is None else self.journal.folder.path / name
            with _placed(model, self.device, f"Evaluating {name}"):
                return evaluate(
                    model,
                    data,
                    teacher=teacher,
                    encode_batch_size=self.config.encode_batch_size,
                    folder=folder,
                    description=f"Evaluating {name}",
                )

        key = fingerprint(self._keys[TEACHER], self._keys[name], self._evaluation_key)
        return self.journal.go_through(
            f"{EVALUATION}/{name}", key, make=make, save=Evaluation.save, load=Evaluation.load
        )


class _Once:
    """A body that is made when it is first asked for; each asker has a copy of its own."""

    def __init__(self, make: Callable[[], SentenceTransformer]) -> None:
        self._make = make
        self._made: SentenceTransformer | None = None

    def __call__(self) -> SentenceTransformer:
        if self._made is None:
            self._made = self._make()
        return copy.deepcopy(self._made)


def _save_head(model: SetFitModel, folder: Path) -> None:
    with whole_folder(folder) as part:
        save_head(model.model_head, part)


def _key_of(data: LabeledSet) -> str:
    return fingerprint(data.texts, data.labels.tolist(), list(data.label_names))


@contextmanager
def _placed(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Within this block, a model is on the device; outside it, the device's memory is for others."""
    place(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        model.model_body.to("cpu")
