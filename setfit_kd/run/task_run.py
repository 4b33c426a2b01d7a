"""Runs that distil question answering and masked language models with a live teacher."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from setfit_kd.config.task_runs import TASK_RUNS, TaskRun
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import content_hash, locate_model
from setfit_kd.report.task_report import write_task_report
from setfit_kd.run.stage_cache import Artifact, StageCache
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.log import record_log
from setfit_kd.run_folder.manifest import versions
from setfit_kd.run_folder.names import BASELINE, EVALUATION, LOG_FILE, STUDENT, TEACHER
from setfit_kd.student.kinds import create_token_body
from setfit_kd.utils.atomic_io import lock_folder
from setfit_kd.utils.files import fingerprint
from setfit_kd.utils.json_artifact import JsonArtifact

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.models.token_model import TokenTask

Metrics = dict[str, Any]  # values of metrics, and intervals


class Task(Protocol):
    """Data of a run and the functions that differ between the tasks; a model has a ``model_body``.

    Attributes:
        name: The task of the models.
        sizes: Numbers of training and evaluation examples.
        key: Fingerprint of the labeled data and of the settings of training without a teacher.
        distillation_key: Fingerprint of the further data and settings of training with a teacher.
        evaluation_key: Fingerprint of the evaluation data and settings; None without evaluation data.
    """

    name: TokenTask
    sizes: dict[str, int]
    key: str
    distillation_key: str
    evaluation_key: str | None

    def load_teacher(self, folder: Path) -> tuple[Any, str]:
        """Load a teacher, and return it with a fingerprint of what it has beside its body."""

    def train_teacher(self, teacher: Any, checkpoints: Path | None) -> Any:
        """Train a teacher in place, unless it is trained already."""

    def train_student(
        self, body: SentenceTransformer, teacher: SentenceTransformer | None, description: str, checkpoints: Path | None
    ) -> Any:
        """Train a student in place: with a teacher, or the baseline without it."""

    def evaluate(self, model: Any) -> Metrics:
        """Evaluate a model on its device."""

    def save(self, model: Any, folder: Path) -> None:
        """Save a model atomically."""

    def load(self, folder: Path) -> Any:
        """Load a model that `save` wrote."""


@dataclass(frozen=True)
class TaskRunResult:
    """Models of a run on the CPU, and their metrics by ``teacher``, ``baseline`` and ``student``."""

    student: Any
    teacher: Any
    metrics: dict[str, Metrics] = field(default_factory=dict)


@dataclass(frozen=True)
class _Evaluation(JsonArtifact):
    """Metrics of a model."""

    file_name = "metrics.json"
    metrics: Metrics


def create_task(config: TaskRun) -> Task:
    """Read the data of a run.

    Raises:
        SetFitKDError: If it cannot be used.
    """
    if config.task == "qa":
        from setfit_kd.qa.distil import QuestionAnswering

        return QuestionAnswering(config)
    from setfit_kd.mlm.distil import MaskedLanguageModeling

    return MaskedLanguageModeling(config)


def resumed_task_config(folder: Path, *layers: Mapping[str, Any]) -> TaskRun:
    """Return the settings of the run in a folder, overridden by others."""
    settings = RunFolder.read_settings(folder)
    for layer in (*layers, {"output_dir": folder, "overwrite": False}):
        settings |= layer
    return TASK_RUNS[settings["task"]].of(**settings)


def run_task(config: TaskRun, *, resume: bool = False) -> TaskRunResult:
    """Train a teacher on the data, distil a student from it, train the same student alone, and evaluate all.

    A teacher that has been trained for the task is used as it is. Stages whose data and settings are unchanged are
    loaded when a run is resumed, and an interrupted training continues from its last checkpoint.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.
    """
    with record_log() as log, shared_backoff(cpu_fallback=config.cpu_fallback), ExitStack() as stack:
        RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=resume)
        device, task = resolve_device(config.device), create_task(config)
        teacher, origin = task.load_teacher(locate_model(config.teacher))
        body = teacher.model_body
        create_token_body(config.student, task.name, teacher=body, seed=config.seed)  # check that it can be built
        stack.enter_context(lock_folder(config.output_dir))
        folder = (RunFolder.reopen if resume else RunFolder.create)(config, config.output_dir)
        log.open(folder.path / LOG_FILE)
        precision = {"name": config.precision, "speedup": None}
        folder.update_manifest(versions=versions(), seed=config.seed, device=str(device), precision=precision)
        cache = StageCache(folder, log)
        result = _run_stages(config, task, cache, teacher, fingerprint(task.key, content_hash(body), origin))
        cache.discard_unused()
        folder.finish(
            result.metrics,
            students={config.student: STUDENT},
            evaluated=list(result.metrics),
            data=task.sizes,
            seconds=cache.seconds,
            out_of_memory=cache.out_of_memory,
        )
        write_task_report(folder.path)
        return result


def _run_stages(config: TaskRun, task: Task, cache: StageCache, pretrained: Any, key: str) -> TaskRunResult:
    files, device = Artifact(task.save, task.load), resolve_device(config.device)
    metrics: dict[str, Metrics] = {}

    def evaluate(path: str, key: str, model: Any) -> None:
        def run() -> _Evaluation:
            move_model(model.model_body, device, phase="Evaluating")
            return _Evaluation(task.evaluate(model))

        if task.evaluation_key is not None:
            key = fingerprint(key, task.evaluation_key)
            artifact = Artifact(_Evaluation.save, _Evaluation.load)
            metrics[path] = cache.run_or_load(f"{EVALUATION}/{path}", key, artifact, run).metrics
        model.model_body.to("cpu")

    checkpoints = cache.checkpoint_folder
    train_teacher = partial(task.train_teacher, pretrained, checkpoints(TEACHER, key))
    teacher = cache.run_or_load(TEACHER, key, files, train_teacher)
    evaluate(TEACHER, key, teacher)
    create_body = partial(create_token_body, config.student, task.name, teacher=teacher.model_body, seed=config.seed)
    student, body_hash = None, content_hash(create_body())
    for path, live_teacher in ((BASELINE, None), (STUDENT, teacher.model_body)):
        if path == BASELINE and not config.baseline:
            continue
        teacher_keys = [] if live_teacher is None else [key, task.distillation_key]
        student_key = fingerprint(task.key, body_hash, *teacher_keys)

        def train(path: str = path, live: Any = live_teacher, student_key: str = student_key) -> Any:
            return task.train_student(create_body(), live, f"Training {path}", checkpoints(path, student_key))

        student = cache.run_or_load(path, student_key, files, train)
        evaluate(path, student_key, student)
    teacher.model_body.to("cpu")  # from where a student has used it
    return TaskRunResult(student, teacher, metrics)
