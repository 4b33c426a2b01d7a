"""A whole run: the stages in order."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config import RunConfig
from setfit_kd.data import RunData, Source, load_run_data
from setfit_kd.evaluation import Evaluation, evaluate
from setfit_kd.memory import check_device, place, remembering, resolve_device
from setfit_kd.models import load_body, locate, save_model
from setfit_kd.precision import check_precision, resolve_precision
from setfit_kd.runfolder import (
    BASELINE,
    METRICS,
    RUN,
    SIGNALS,
    STUDENT,
    STUDENTS,
    TEACHER,
    RunFolder,
    recorded,
    versions,
)
from setfit_kd.student import PreparedStudent, check_pool, locate_student, slugs, student_passes, train_student
from setfit_kd.teacher import refine_and_score, teacher_passes, train_teacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

    from setfit_kd.signals import TeacherSignals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        students: The distilled classifiers by the name that the config gives them, on the device of the run.
        teacher: The classifier they were distilled from, on the CPU.
        signals: What the teacher said about the pool.
        evaluations: By ``teacher``, ``baseline`` and ``student``, or of several students ``baselines/NAME`` and
            ``students/NAME``; empty without an evaluation set.
        config: The settings.
        seconds: Wall time by stage.
        output_dir: Where the run is, if it was written.
    """

    students: dict[str, SetFitModel]
    teacher: SetFitModel
    signals: TeacherSignals
    evaluations: dict[str, Evaluation]
    config: RunConfig
    seconds: dict[str, float] = field(default_factory=dict)
    output_dir: Path | None = None

    @property
    def student(self) -> SetFitModel:
        """The student; of several, the first."""
        return next(iter(self.students.values()))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Quality and cost by model, as in ``metrics.json``."""
        return {name: evaluation.as_dict() for name, evaluation in self.evaluations.items()}


def distill(
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002 - the setting's name everywhere
    *,
    config: RunConfig | None = None,
    **settings: Any,
) -> RunResult:
    """Fine-tune a teacher on a few labels, let it label a pool softly, and distil it into a student.

    Args:
        labeled: A few labeled texts: a path, a hub name, a ``datasets.Dataset``, columns, or (text, label) pairs.
        unlabeled: The pool: the same kinds, or a list of texts.
        eval: Labeled texts to evaluate on; none of them is trained on.
        config: The settings; any field of `RunConfig` may also be given by keyword.

    Returns:
        Teacher, student, signals and evaluations; also written to ``output_dir`` where that is set.

    Raises:
        SetFitKDError: Something given cannot be used; nothing is left half-written.

    Example:
        >>> from setfit_kd import distill
        >>> result = distill("few.csv", "pool.txt", "test.csv", teacher="demo:all-MiniLM-L6-v2",
        ...                  student="layers:0,2,5")  # doctest: +SKIP
        >>> result.student.predict(["Rain stops play on the third day"])  # doctest: +SKIP
        ['Sports']
    """
    objects: dict[str, Any] = {}
    for name, source in (("labeled", labeled), ("unlabeled", unlabeled), ("eval", eval)):
        # A name belongs to the settings, so that config.yaml tells the whole run.
        if isinstance(source, str | Path):
            settings[name] = str(source)
        elif source is not None:
            objects[name] = source
    return run(RunConfig.given(config, settings), **objects)


def run(
    config: RunConfig,
    *,
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002
) -> RunResult:
    """Run every stage; objects given here take the place of the names in the config.

    Raises:
        SetFitKDError: See `distill`.
    """
    with recorded() as log:
        inputs = prepare_run(config, labeled=labeled, unlabeled=unlabeled, eval=eval)
        folder = RunFolder.create(config, config.output_dir) if config.output_dir else None
        if folder:
            folder.keep_log(log)
        return _run_stages(config, inputs, folder)


@dataclass(frozen=True)
class RunInputs:
    """All that a run starts from: clean data, and the bodies as they come."""

    data: RunData
    teacher_body: SentenceTransformer
    students: list[PreparedStudent]


def prepare_run(
    config: RunConfig,
    *,
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002
) -> RunInputs:
    """Find, check and load everything that a run needs before it writes or trains anything.

    Raises:
        SetFitKDError: Something is missing or cannot be used.
    """
    check_device(config.device)
    if config.output_dir:
        RunFolder.check(config.output_dir, overwrite=config.overwrite)
    teacher_folder = locate(config.teacher)
    sources = [locate_student(name) for name in config.student]
    data = load_run_data(config, labeled=labeled, unlabeled=unlabeled, eval=eval)
    check_pool(len(data.pool), config)
    if data.evaluation is None:
        logger.warning("There is no evaluation set: nothing will be measured. Name one by --eval.")
    check_precision(config.precision, resolve_device(config.device))
    teacher_body = load_body(teacher_folder)
    return RunInputs(data, teacher_body, [source.prepare(teacher_body) for source in sources])


def _run_stages(config: RunConfig, inputs: RunInputs, folder: RunFolder | None) -> RunResult:
    data, seconds, device = inputs.data, dict[str, float](), resolve_device(config.device)
    given, config = config, config.model_copy(update={"device": str(device)})
    models: dict[str, SetFitModel] = {}
    students: dict[str, SetFitModel] = {}

    with remembering(cpu_fallback=config.cpu_fallback) as recoveries:
        with _timed("teacher", seconds):
            teacher = train_teacher(data.labeled, inputs.teacher_body, config=config)
            precision = resolve_precision(config.precision, teacher.model_body, data.pool)
            if teacher.model_body.device.type == device.type:
                config = config.model_copy(update={"precision": precision.name})
        with _timed("signals", seconds), _placed(teacher, device, "Scoring pool"):
            teacher, signals = refine_and_score(teacher, data.labeled, data.pool, config=config, origin=config.teacher)
        if folder:
            save_model(teacher, folder.path / TEACHER, title="Teacher")
            signals.save(folder.path / SIGNALS)
        models["teacher"] = teacher
        for name, prepared, (baseline_name, student_name) in zip(
            config.student, inputs.students, model_names(config), strict=True
        ):
            with _timed("student", seconds):
                with _placed(teacher, device, "Making student") if prepared.passes else nullcontext():
                    body = prepared.make(teacher.model_body, data.pool)
                baseline_body = copy.deepcopy(body) if config.baseline and data.evaluation else None
                students[name] = train_student(signals, body, labeled=data.labeled, config=config)
            students[name].model_body.to("cpu")
            if folder:
                save_model(students[name], folder.path / student_name, title="Student")
            if baseline_body is not None:
                with _timed("baseline", seconds):
                    models[baseline_name] = train_teacher(
                        data.labeled, baseline_body, config=config, description="Training baseline"
                    )
                models[baseline_name].model_body.to("cpu")
            models[student_name] = students[name]

        evaluations: dict[str, Evaluation] = {}
        with _timed("evaluation", seconds):
            for name, model in models.items() if data.evaluation else ():
                saved = folder.path / name if folder and (folder.path / name).is_dir() else None
                with _placed(model, device, f"Evaluating {name}"):
                    evaluations[name] = evaluate(
                        model,
                        data.evaluation,
                        teacher=evaluations.get("teacher"),
                        encode_batch_size=config.encode_batch_size,
                        folder=saved,
                        description=f"Evaluating {name}",
                    )
    result = RunResult(students, teacher, signals, evaluations, given, seconds, folder.path if folder else None)
    if folder:
        folder.write_json(METRICS, result.metrics)
        about = {
            "versions": versions(),
            "seed": config.seed,
            "device": str(device),
            "precision": asdict(precision),
            "out_of_memory": [recovery.as_dict() for recovery in recoveries],
        }
        folder.write_json(RUN, {**about, "data": data.report.as_dict(), "seconds": seconds})
    with remembering(cpu_fallback=config.cpu_fallback):
        for student in students.values():
            place(student.model_body, device, phase="Handing over student")
    return result


def model_names(config: RunConfig) -> list[tuple[str, str]]:
    """What the baseline and the student are called in a run's folder and metrics, for each student."""
    if len(config.student) == 1:
        return [(BASELINE, STUDENT)]
    return [(f"{BASELINE}s/{slug}", f"{STUDENTS}/{slug}") for slug in slugs(config.student)]


@contextmanager
def _placed(model: SetFitModel, device: torch.device, phase: str) -> Iterator[None]:
    """Within this block, a model is on the device; outside it, the device's memory is for others."""
    place(model.model_body, device, phase=phase)
    try:
        yield
    finally:
        model.model_body.to("cpu")


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    took = time.perf_counter() - started
    seconds[stage] = round(seconds.get(stage, 0) + took, 2)
    logger.debug("Stage %s took %.1f s.", stage, took)


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would go through, with the texts that would pass forward through a model."""

    stage: str
    texts: int
    forward_passes: int


def plan(config: RunConfig, inputs: RunInputs) -> list[PlannedStage]:
    """The stages of a run with their forward passes, a pass being one text through one model."""
    data, report = inputs.data, inputs.data.report
    n_students = len(config.student)
    n_models = 1 + n_students * (2 if config.baseline else 1)
    n_texts = report.pool + report.labeled
    split = [config.model_copy(update={"micro_batch_size": None}) if s.is_static else config for s in inputs.students]
    student = sum(s.passes for s in inputs.students) + sum(student_passes(c, n_texts, report.labeled) for c in split)
    stages = [
        PlannedStage("teacher", report.labeled, teacher_passes(config, data.labeled)),
        PlannedStage("signals", n_texts, n_texts),
        PlannedStage("student", n_texts, student),
    ]
    if data.evaluation:
        if config.baseline:
            stages.append(PlannedStage("baseline", report.labeled, sum(teacher_passes(c, data.labeled) for c in split)))
        stages.append(PlannedStage("evaluation", report.evaluation, n_models * report.evaluation))
    return stages
