"""A whole run: the stages in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.augment import drop_uncertain
from setfit_kd.config import RunConfig
from setfit_kd.data import Source
from setfit_kd.evaluation import Evaluation, OverSeeds, over_seeds, write_texts
from setfit_kd.memory import move_model, resolve_device, shared_backoff
from setfit_kd.report import write_report
from setfit_kd.run.augment_stage import augmented_texts
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.student_stages import StudentStages, signals_hash
from setfit_kd.run.teacher_stages import TeachersResult, run_teachers
from setfit_kd.run_folder import (
    EVALUATION,
    SEEDS,
    STUDENT,
    STUDENTS,
    TEACHER,
    RunFolder,
    baseline_path,
    log_stage,
    record_log,
    reference_models,
    versions,
)
from setfit_kd.signals import TeacherSignals
from setfit_kd.student import check_pool, folder_names
from setfit_kd.training.precision import Precision, resolve_precision
from setfit_kd.utils.atomic_io import lock_folder
from setfit_kd.utils.hashing import fingerprint

if TYPE_CHECKING:
    from setfit import SetFitModel
from setfit_kd.run.inputs import RunInputs, prepare_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        students: The distilled classifiers by the name that the config gives them, on the device of the run.
        teacher: The classifier they were distilled from, on the CPU; None where there were several, each kept in the
            output folder, and where signals came from elsewhere.
        signals: What the teacher said about the pool; of several, on average.
        evaluations: By ``teacher``, ``baseline`` and ``student``, or of several students ``baselines/NAME`` and
            ``students/NAME``; of several teachers, each by ``teachers/NAME`` and all together by ``teacher``. Empty
            without an evaluation set.
        config: The settings.
        by_seed: Where it was gone through with several seeds, the evaluations of each seed, its own among them.
        seconds: Wall time by stage.
        output_dir: Where the run is, if it was written.
    """

    students: dict[str, SetFitModel]
    teacher: SetFitModel | None
    signals: TeacherSignals
    evaluations: dict[str, Evaluation]
    config: RunConfig
    by_seed: dict[int, dict[str, Evaluation]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    output_dir: Path | None = None

    @property
    def student(self) -> SetFitModel:
        """The student; of several, the first."""
        return next(iter(self.students.values()))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Everything measured by model, as in ``metrics.json``.

        A student's are also told ``against`` the teacher's and the baseline's, and with several seeds each model's
        ``over_seeds``.
        """
        target = self.config.target_accuracy
        measured = {name: found.as_dict(target_accuracy=target) for name, found in self.evaluations.items()}
        for student in student_paths(self.config).values() if self.evaluations else ():
            evaluation = self.evaluations[student]
            measured[student]["against"] = {
                called: {name: asdict(figure) for name, figure in evaluation.against(self.evaluations[other]).items()}
                for called, other in reference_models(student, self.evaluations).items()
            }
        for name, spread in self.over_seeds.items():
            measured[name]["over_seeds"] = asdict(spread)
        return measured

    @property
    def over_seeds(self) -> dict[str, OverSeeds]:
        """What each model comes to over the seeds; nothing for a single one."""
        if not self.by_seed:
            return {}
        compared = {name: reference_models(name, self.evaluations) for name in student_paths(self.config).values()}
        return over_seeds(list(self.by_seed.values()), compared)


def distill(
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002 - the setting's name everywhere
    *,
    config: RunConfig | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Fine-tune a teacher on a few labels, let it label a pool softly, and distil it into a student.

    Args:
        labeled: A few labeled texts: a path, a hub name, a ``datasets.Dataset``, columns, or (text, label) pairs.
        unlabeled: The pool: the same kinds, or a list of texts.
        eval: Labeled texts to evaluate on; none of them is trained on.
        config: The settings; any field of `RunConfig` may also be given by keyword.
        resume: Folder of a run to go on with. Its settings hold where no others are given; what it has made from the
            same data and settings is not made again. Data that was given as objects must be given again.

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
    if resume is None:
        config = RunConfig.merged(config, settings)
    else:
        config = resumed_config(Path(resume), settings if config is None else {**config.model_dump(), **settings})
    return run(config, resume=resume is not None, **objects)


def resumed_config(folder: Path, *layers: Mapping[str, Any]) -> RunConfig:
    """The settings of the run in a folder, with others laid over them.

    Where one of its labeled texts, pool and signals is named anew, the others and the evaluation set must be, too: no
    run's labels meet another's pool. How they are read and drawn stays as it was.

    Raises:
        ConfigError: There is no run, or a setting is unknown or out of range.
    """
    settings = RunFolder.settings(folder)
    read_as: dict[str, Any] = {
        name: settings[name] for name in ("text_column", "label_column", "shots", "pool_size") if name in settings
    }
    return RunConfig.resolve(settings, read_as, *layers, {"output_dir": folder, "overwrite": False})


def run(
    config: RunConfig,
    *,
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002
    resume: bool = False,
) -> RunResult:
    """Run every stage; objects given here take the place of the names in the config.

    With ``resume``, go on with the run in the output folder: what it has made from the same data and settings is taken
    from there.

    Raises:
        SetFitKDError: See `distill`.
    """
    objects = {"labeled": labeled, "unlabeled": unlabeled, "eval": eval}
    result, _ = _run(config, objects, resume=resume)
    for student in result.students.values():
        move_model(student.model_body, resolve_device(config.device), phase="Handing over student")
    return result


def _run(
    config: RunConfig, objects: Mapping[str, Source | None], *, resume: bool
) -> tuple[RunResult, list[dict[str, Any]]]:
    """A run with its models on the CPU, and where its memory ran out."""
    with record_log() as log, shared_backoff(cpu_fallback=config.cpu_fallback), ExitStack() as stack:
        inputs, folder = prepare_run(config, **objects, resume=resume), None
        if config.output_dir is not None:
            stack.enter_context(lock_folder(config.output_dir))
            folder = (RunFolder.reopen if resume else RunFolder.create)(config, config.output_dir)
            folder.attach_log(log)
        settled, stage_cache = _resolve_config(config, inputs, folder), StageCache(folder)
        result = _run_stages(config, settled, inputs, stage_cache)
        out_of_memory = stage_cache.out_of_memory
        if config.seeds > 1:
            result, others = _run_other_seeds(result, settled, objects, folder)
            out_of_memory = [*out_of_memory, *others]
        stage_cache.discard_unused()
        if folder:
            folder.discard_seeds(keep=result.by_seed)
            folder.finish(
                result.metrics,
                students=student_paths(config),
                evaluated=list(result.evaluations),
                data=inputs.data.report.as_dict(),
                seconds=result.seconds,
                out_of_memory=out_of_memory,
                seeds=list(result.by_seed),
            )
            write_report(folder.path)
        return result, out_of_memory


def _run_stages(config: RunConfig, settled: RunConfig, inputs: RunInputs, stage_cache: StageCache) -> RunResult:
    data = inputs.data
    if data.evaluation and stage_cache.folder is not None:
        write_texts(data.evaluation, stage_cache.folder.path / EVALUATION)  # for the report
    if data.signals is None:
        made = augmented_texts(settled, data, inputs.fill_mask, stage_cache)
        check_pool(len(data.pool) + len(data.labeled) + len(made), settled)  # fewer may have been made
        taught = run_teachers(
            settled,
            replace(data, pool=[*data.pool, *made]),
            inputs.teachers,
            stage_cache,
            keep_first=any(student.reads is None for student in inputs.students),
        )
        if made:
            made_rows = range(len(data.pool), len(data.pool) + len(made))
            kept = drop_uncertain(taught.signals, made_rows, min_confidence=config.augment_confidence)
            taught = replace(taught, signals=kept, key=fingerprint(taught.key, kept.texts))
    else:
        taught = TeachersResult(data.signals, signals_hash(data.signals))
    stages, signals = StudentStages(settled, data, taught.key, stage_cache), taught.signals
    evaluations = dict(taught.evaluations)
    if stage_cache.folder is not None and stage_cache.folder.about.get("teacher_shares", {}) != taught.shares:
        stage_cache.folder.update_manifest(teacher_shares=taught.shares)
    students: dict[str, SetFitModel] = {}
    models = {}
    for (source, name), prepared in zip(student_paths(config).items(), inputs.students, strict=True):
        baseline_name = baseline_path(name) if config.baseline and data.evaluation and len(data.labeled) else None
        names = (name, baseline_name)
        students[source], baseline = stages.student_and_baseline(names, source, prepared, taught.first, signals)
        if baseline_name is not None and baseline is not None:
            models[baseline_name] = baseline
        models[name] = students[source]
    if data.evaluation:
        for name, model in models.items():
            evaluations[name] = stages.evaluation(name, model, data.evaluation, evaluations.get(TEACHER))
    return RunResult(
        students,
        taught.first if len(inputs.teachers) == 1 else None,
        signals,
        evaluations,
        config,
        seconds=stage_cache.seconds,
        output_dir=stage_cache.folder.path if stage_cache.folder else None,
    )


def _run_other_seeds(
    result: RunResult, settled: RunConfig, objects: Mapping[str, Source | None], folder: RunFolder | None
) -> tuple[RunResult, list[dict[str, Any]]]:
    """The result with the evaluations of the same run with the other seeds, and where their memory ran out.

    Each has a folder of its own within the run's. No more than one seed's models are held beside the first's.
    """
    by_seed, seconds = {settled.seed: result.evaluations}, 0.0
    out_of_memory: list[dict[str, Any]] = []
    for seed in range(settled.seed + 1, settled.seed + settled.seeds):
        logger.info("The same with seed %d (%d of %d).", seed, len(by_seed) + 1, settled.seeds)
        place, begun = f"{SEEDS}/{seed}", False
        changes: dict[str, Any] = {"seed": seed, "seeds": 1, "overwrite": False}
        if folder is not None:
            changes["output_dir"], begun = folder.path / place, folder.has_resumable_run(place)
        with log_stage(place):
            other, events = _run(settled.model_copy(update=changes), objects, resume=begun)
        by_seed[seed] = other.evaluations
        seconds += sum(other.seconds.values())
        out_of_memory += events
        del other
    whole = {**result.seconds, "other seeds": round(seconds, 2)}
    return replace(result, by_seed=by_seed, seconds=whole), out_of_memory


def _resolve_config(config: RunConfig, inputs: RunInputs, folder: RunFolder | None) -> RunConfig:
    """The settings with device and precision named; a run that goes on keeps the precision that it was begun in."""
    device = resolve_device(config.device)
    told = {} if folder is None else folder.about
    if config.precision == "auto" and told.get("device") == str(device) and "precision" in told:
        precision = Precision(**told["precision"])
    else:
        body = inputs.teachers[0].body if inputs.teachers else inputs.students[0].reads
        assert body is not None
        move_model(body, device, phase="Choosing precision")
        texts = inputs.data.pool or inputs.data.labeled.texts
        precision = resolve_precision(config.precision, body, texts)
        body.to("cpu")
    if folder:
        begun_in = told.get("precision", {}).get("name", precision.name)
        if begun_in != precision.name:
            logger.warning(
                "This run was begun in %s and goes on in %s: what was trained is trained again.",
                begun_in,
                precision.name,
            )
        earlier, now = told.get("versions"), versions()
        if earlier not in (None, now):
            logger.warning("This run was begun with other versions; what it has made so far is kept.")
        folder.update_manifest(
            versions=now, seed=config.seed, device=str(device), precision=asdict(precision), revisions=inputs.revisions
        )
    return config.model_copy(update={"device": str(device), "precision": precision.name})


def student_paths(config: RunConfig) -> dict[str, str]:
    """What each student is called in a run's folder and metrics, by its name in the settings."""
    if len(config.student) == 1:
        return {config.student[0]: STUDENT}
    return {
        source: f"{STUDENTS}/{slug}" for source, slug in zip(config.student, folder_names(config.student), strict=True)
    }
