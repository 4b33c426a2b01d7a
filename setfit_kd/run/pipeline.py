"""Pipeline of a run: all stages in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.run import RunConfig
from setfit_kd.data.sources import Source, are_names
from setfit_kd.evaluation.estimates import Estimate, estimate_table
from setfit_kd.evaluation.measure import Evaluation, SeedSummary, evaluation_table, summarize_seeds, write_texts
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.report.render import write_report
from setfit_kd.run.inputs import RunInputs, prepare_run
from setfit_kd.run.search import Trial
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.stages import Stages, Teachers, fingerprint_signals
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.log import record_log
from setfit_kd.run_folder.manifest import versions
from setfit_kd.run_folder.names import EVALUATION, LOG_FILE, SEEDS, STUDENT, STUDENTS, TEACHER, reference_models
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import check_pool
from setfit_kd.student.kinds import folder_names
from setfit_kd.training.precision import Precision, resolve_precision
from setfit_kd.utils.atomic_io import lock_folder

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class RunResult:
    """Result of a run.

    Attributes:
        students: The distilled classifiers by their name in the settings, on the device of the run.
        teacher: The teacher, on the CPU; None with several teachers, which are in the output folder, or with signals
            from a file.
        signals: Signals for the pool; with several teachers, their weighted average.
        evaluations: Evaluations by ``teacher``, ``baseline`` and ``student``; with several students by
            ``baselines/NAME`` and ``students/NAME``; with several teachers by ``teachers/NAME`` for each teacher and
            ``teacher`` for the ensemble. Empty without an evaluation set. With several sets, on the first.
        estimates: Without an evaluation set, the estimated quality of the teacher, or ensemble, and the students; empty
            if no teacher was calibrated.
        config: The settings.
        more_evaluations: With several evaluation sets, the evaluations on the others, by the name of the set.
        by_seed: With several seeds, the evaluations of each seed, including the first; otherwise empty.
        trials: With a search, the trials for ``teacher`` and ``student``, of the first seed.
        seconds: Wall time in seconds by stage.
        output_dir: Folder of the run; None if it was not written.
        out_of_memory: Steps of the OOM backoff, over all seeds.
    """

    students: dict[str, SetFitModel]
    teacher: SetFitModel | None
    signals: TeacherSignals
    evaluations: dict[str, Evaluation]
    config: RunConfig
    estimates: dict[str, Estimate] = field(default_factory=dict)
    more_evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    by_seed: dict[int, dict[str, Evaluation]] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    output_dir: Path | None = None
    out_of_memory: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return a short table of the evaluations or estimates."""
        title = f"RunResult of {', '.join(self.students)}" + (f" in {self.output_dir}" if self.output_dir else "")
        if not self.evaluations and not self.estimates:
            return f"{title} (without an evaluation set)"
        headings, rows = evaluation_table(self.evaluations) if self.evaluations else estimate_table(self.estimates)
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in (headings, *rows)
        ]
        return "\n".join([title, *lines])

    @property
    def student(self) -> SetFitModel:
        """The student; with several students, the first one."""
        return next(iter(self.students.values()))

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """All metrics by model, as in ``metrics.json``; estimates have the entry ``estimated``.

        Those of a student include the differences ``against`` the teacher and the baseline. With several seeds, each
        model has a summary ``over_seeds``, and with several evaluation sets ``more_evaluations`` by their names.
        """
        if not self.evaluations:
            return {name: estimate.as_dict() for name, estimate in self.estimates.items()}
        metrics = self._metrics_on_set(self.evaluations)
        for name, summary in self.over_seeds.items():
            metrics[name]["over_seeds"] = asdict(summary)
        for set_name, evaluations in self.more_evaluations.items():
            for name, values in self._metrics_on_set(evaluations).items():
                metrics[name].setdefault("more_evaluations", {})[set_name] = values
        return metrics

    def _metrics_on_set(self, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
        target = self.config.target_accuracy
        metrics = {name: evaluation.as_dict(target_accuracy=target) for name, evaluation in evaluations.items()}
        for student in student_paths(self.config).values():
            metrics[student]["against"] = {}
            for role, reference in reference_models(student, evaluations).items():
                differences = evaluations[student].difference_to(evaluations[reference])
                metrics[student]["against"][role] = {name: asdict(value) for name, value in differences.items()}
        return metrics

    @property
    def over_seeds(self) -> dict[str, SeedSummary]:
        """Summary of each model over the seeds; empty for a single seed."""
        if not self.by_seed:
            return {}
        references = {name: reference_models(name, self.evaluations) for name in student_paths(self.config).values()}
        return summarize_seeds(list(self.by_seed.values()), references)


def distill(
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | Mapping[str, Source] | None = None,  # noqa: A002 - the setting's name everywhere
    *,
    config: RunConfig | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Train a teacher on a few labels, score the pool with it, and distil it into a student.

    Args:
        labeled: A few labeled texts: a path, a hub name, a ``datasets.Dataset``, a ``pandas.DataFrame``, columns, or
            (text, label) pairs.
        unlabeled: The pool: the same types, or a list of texts.
        eval: Labeled texts to evaluate on; they are removed from the training data. Several sets are a list of paths or
            names, or a mapping of names to paths, data sets or data frames; the first is the main one.
        config: The settings; any field of `RunConfig` can also be passed as a keyword argument.
        resume: Folder of a run to resume, with its settings unless others are passed. Stages whose data and settings
            are unchanged are loaded. Data that was passed as objects must be passed again.

    Returns:
        Teacher, student, signals and evaluations; also written to ``output_dir`` if it is set.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.

    Example:
        >>> from setfit_kd import distill
        >>> result = distill("few.csv", "pool.txt", "test.csv", teacher="demo:all-MiniLM-L6-v2",
        ...                  student="layers:0,2,5")  # doctest: +SKIP
        >>> result.student.predict(["Rain stops play on the third day"])  # doctest: +SKIP
        ['Sports']
    """
    sources: dict[str, Any] = {}
    for name, source in (("labeled", labeled), ("unlabeled", unlabeled), ("eval", eval)):
        # Names are settings, so that config.yaml describes the run completely.
        if isinstance(source, str | Path):
            settings[name] = str(source)
        elif name == "eval" and are_names(source):
            settings[name] = list(map(str, source))
        elif source is not None:
            sources[name] = source
    if resume is None:
        config = RunConfig.merged(config, settings)
    else:
        config = resumed_config(Path(resume), settings if config is None else {**config.model_dump(), **settings})
    return run(config, resume=resume is not None, **sources)


def resumed_config(folder: Path, *layers: Mapping[str, Any]) -> RunConfig:
    """Return the settings of the run in a folder, overridden by others.

    If the labeled texts, the pool or the signals are overridden, all of them and the evaluation set must be passed, so
    that data of different runs is not mixed. The settings for reading and sampling the data are kept.

    Raises:
        ConfigError: If the folder contains no run, or a setting is unknown or out of range.
    """
    settings = RunFolder.read_settings(folder)
    kept = {name: settings[name] for name in (*RunConfig.of().columns, "shots", "pool_size") if name in settings}
    return RunConfig.resolve(settings, kept, *layers, {"output_dir": folder, "overwrite": False})


def run(config: RunConfig, *, resume: bool = False, **sources: Source | None) -> RunResult:
    """Run all stages.

    Args:
        config: The settings.
        resume: Resume the run in the output folder: load the stages whose data and settings are unchanged.
        sources: ``labeled``, ``unlabeled`` and ``eval``: data to use instead of the sources named in the settings.

    Raises:
        SetFitKDError: See `distill`.
    """
    result = _run(config, sources, resume=resume)
    for student in result.students.values():
        move_model(student.model_body, resolve_device(config.device), phase="Moving student")
    return result


def _run(config: RunConfig, sources: Mapping[str, Source | None], *, resume: bool, stage: str = "") -> RunResult:
    """Run all stages for all seeds; return the result, with its models on the CPU."""
    with record_log(stage) as log, shared_backoff(cpu_fallback=config.cpu_fallback), ExitStack() as stack:
        inputs, folder = prepare_run(config, **sources, resume=resume), None
        if config.output_dir is not None:
            stack.enter_context(lock_folder(config.output_dir))
            folder = (RunFolder.reopen if resume else RunFolder.create)(config, config.output_dir)
            log.open(folder.path / LOG_FILE)
        resolved, cache = _resolve_config(config, inputs, folder), StageCache(folder, log)
        stages = Stages(resolved, inputs.data, cache)
        result = _run_stages(config, stages, inputs)
        if config.seeds > 1:
            result = _run_other_seeds(result, resolved, sources, folder)
        data = inputs.data
        n_augmented = 0 if data.signals else len(result.signals) - len(data.pool) - len(data.labeled)
        cache.discard_unused()
        if folder:
            folder.discard_seeds(keep=result.by_seed)
            folder.finish(
                result.metrics,
                students=student_paths(config),
                evaluated=list(result.evaluations),
                estimated=list(result.estimates),
                search={stage: list(map(asdict, trials)) for stage, trials in result.trials.items()},
                data=vars(data.report) | ({"augmented": n_augmented} if n_augmented else {}),
                seconds=result.seconds,
                out_of_memory=result.out_of_memory,
                seeds=list(result.by_seed),
            )
            write_report(folder.path)
        return result


def _run_stages(config: RunConfig, stages: Stages, inputs: RunInputs) -> RunResult:
    """Run all stages for one seed."""
    data, cache, folder = inputs.data, stages.cache, stages.cache.folder
    if data.evaluation and folder:
        write_texts(data.evaluation, folder.path / EVALUATION)  # for the report
    if data.signals:
        teachers = Teachers(data.signals, fingerprint_signals(data.signals), stages.thresholds(data.signals))
    else:
        augmented = stages.augment(inputs.fill_mask)
        check_pool(len(data.pool) + len(data.labeled) + len(augmented), config)  # may be fewer than requested
        stages.search_teacher(inputs)
        teachers = stages.run_teachers(inputs, augmented)
    if folder and folder.manifest.get("teacher_shares", {}) != teachers.shares:
        folder.update_manifest(teacher_shares=teachers.shares)
    stages.search_student(inputs.students[0], teachers)
    models: dict[str, SetFitModel] = {}
    for (name, path), prepared in zip(student_paths(config).items(), inputs.students, strict=True):
        models |= stages.run_student(path, name, prepared, teachers)
    evaluations = dict(teachers.evaluations)
    for path, model in models.items():
        evaluations |= stages.evaluate(path, model, teachers.key, cache.key(path), teachers.evaluations)
    on_main_set = {path: evaluation for path, evaluation in evaluations.items() if "@" not in path}
    more = {name: {path: evaluations[f"{path}@{name}"] for path in on_main_set} for name in [*data.evaluations][1:]}
    estimates: dict[str, Estimate] = {}
    if teachers.estimate is not None:
        estimates = {TEACHER: teachers.estimate}
        estimates |= {path: stages.estimate_student(path, model, teachers) for path, model in models.items()}
    return RunResult(
        {name: models[path] for name, path in student_paths(config).items()},
        teachers.first if len(inputs.teachers) == 1 else None,
        teachers.signals,
        on_main_set,
        config,
        estimates,
        more,
        trials=stages.trials,
        seconds=cache.seconds,
        output_dir=folder.path if folder else None,
        out_of_memory=cache.out_of_memory,
    )


def _run_other_seeds(
    result: RunResult, resolved: RunConfig, sources: Mapping[str, Source | None], folder: RunFolder | None
) -> RunResult:
    """Repeat a run with the other seeds; return the result with their evaluations.

    Each seed has a subfolder in the run folder. Only the models of the first seed and of one other are kept in memory.
    """
    by_seed, seconds, out_of_memory = {resolved.seed: result.evaluations}, 0.0, list(result.out_of_memory)
    for seed in range(resolved.seed + 1, resolved.seed + resolved.seeds):
        logger.info("Running seed %d (%d of %d).", seed, len(by_seed) + 1, resolved.seeds)
        name, resume = f"{SEEDS}/{seed}", False
        changes: dict[str, Any] = {"seed": seed, "seeds": 1, "overwrite": False, "bundle": False}
        if folder is not None:
            changes["output_dir"], resume = folder.path / name, folder.prepare_nested_run(name)
        seed_result = _run(resolved.model_copy(update=changes), sources, resume=resume, stage=name)
        by_seed[seed] = seed_result.evaluations
        seconds += sum(seed_result.seconds.values())
        out_of_memory += seed_result.out_of_memory
        del seed_result  # free its models
    all_seconds = {**result.seconds, "other seeds": round(seconds, 2)}
    return replace(result, by_seed=by_seed, seconds=all_seconds, out_of_memory=out_of_memory)


def _resolve_config(config: RunConfig, inputs: RunInputs, folder: RunFolder | None) -> RunConfig:
    """Resolve device and precision; a run that is resumed on the same device keeps its automatic precision."""
    device = resolve_device(config.device)
    manifest = {} if folder is None else folder.manifest
    if config.precision == "auto" and manifest.get("device") == str(device) and "precision" in manifest:
        precision = Precision(**manifest["precision"])
    else:
        body = next(iter(inputs.bodies.values()), None) or inputs.students[0].source_body
        assert body is not None
        move_model(body, device, phase="Choosing precision")
        texts = inputs.data.pool or inputs.data.labeled.texts
        precision = resolve_precision(config.precision, body, texts)
        body.to("cpu")
    if folder:
        earlier = manifest.get("precision", {}).get("name", precision.name)
        if earlier != precision.name:
            message = "This run was started in %s and is resumed in %s: the models are trained again."
            logger.warning(message, earlier, precision.name)
        current_versions = versions()
        if manifest.get("versions") not in (None, current_versions):
            logger.warning("This run was started with other package versions; its results so far are kept.")
        folder.update_manifest(
            versions=current_versions,
            seed=config.seed,
            device=str(device),
            precision=asdict(precision),
            revisions=inputs.revisions,
        )
    return config.model_copy(update={"device": str(device), "precision": precision.name})


def student_paths(config: RunConfig) -> dict[str, str]:
    """Return the path of each student in the run folder and metrics, by its name in the settings."""
    if len(config.student) == 1:
        return {config.student[0]: STUDENT}
    folders = folder_names(config.student)
    return {name: f"{STUDENTS}/{folder}" for name, folder in zip(config.student, folders, strict=True)}
