"""``setfit-kd run``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli.options import GroupedCommand, output_options, own_settings, passed, setting_options
from setfit_kd.config.base import StageConfig
from setfit_kd.config.presets import DEFAULT_PRESET, PRESETS, preset, read_config
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import AugmentConfig, ColumnsConfig, SignalsConfig, StudentConfig, TeacherConfig
from setfit_kd.config.task_runs import TASK_RUNS, MlmRunConfig, QuestionRunConfig
from setfit_kd.errors import ConfigError, UnavailableError
from setfit_kd.utils.console import printable

_QUESTION_SETTINGS = ("validation", "stride", "max_answer_tokens")
_MLM_SETTINGS = ("steps", "head_steps", "pack", "mask_probability", "whole_words", "cosine_weight")
_COMMON = {
    "Data": ("labeled", "unlabeled", "eval", "text_column", "pair_column", "label_column", "shots"),
    "Models": ("teacher", "student"),
    "Output": ("output_dir", "overwrite"),
    "Run": ("task", "preset_name", "config_file", "resume", "dry_run", "seed", "device"),
}
_GROUPS = {
    "Data": ["labeled", "unlabeled", "eval", *own_settings(ColumnsConfig), "shots", "pool_size", "signals"],
    "Teacher": ["teacher", "teacher_weights", *own_settings(TeacherConfig)],
    "Signals": own_settings(SignalsConfig),
    "Student": ["student", "baseline", "bundle", *own_settings(StudentConfig)],
    "Augmentation": own_settings(AugmentConfig),
    "Questions and masked words": ["task", *_QUESTION_SETTINGS, *_MLM_SETTINGS],
    "Training and memory": list(StageConfig.model_fields),
}


@click.command(cls=GroupedCommand, common=_COMMON, groups=_GROUPS)
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default=None,
              help=f"Settings to start from. [default: {DEFAULT_PRESET}]")  # fmt: skip
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, metavar="FILE.yaml",
              help="File of settings that override the preset.")  # fmt: skip
@click.option("--resume", type=click.Path(path_type=Path), default=None, metavar="RUN",
              help="Resume the run in this folder, with its settings unless you override them.")  # fmt: skip
@click.option("--task", type=click.Choice(["classification", *TASK_RUNS]), default=None,
              help="Classification of texts, extractive question answering (qa) or masked language modeling (mlm). "
                   "[default: classification]")  # fmt: skip
@setting_options()
@setting_options(*_QUESTION_SETTINGS, config_class=QuestionRunConfig)
@setting_options(*_MLM_SETTINGS, config_class=MlmRunConfig)
@click.option("--dry-run", is_flag=True, help="Check all inputs, print the settings and the planned stages, and exit.")
@output_options
def run(
    preset_name: str | None,
    config_file: Path | None,
    resume: Path | None,
    task: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train teachers on a few labels and distil them into small students.

    \b
    Examples:
      setfit-kd run --preset newswire
      setfit-kd run --labeled few.csv --unlabeled pool.txt --eval test.csv --output-dir runs/mine
      setfit-kd run --resume runs/mine

    SOURCE is a CSV, TSV, JSONL, Parquet or (for the pool) text file, a folder written by datasets' save_to_disk, a hub
    name such as ag_news, ag_news[test] or nyu-mll/glue:sst2[validation], or bundled:newswire. MODEL is a hub name, a
    folder, demo:all-MiniLM-L6-v2 or demo:all-mpnet-base-v2 (extras demo and mpnet).

    Flags override the config file, which overrides the preset. If you set --labeled, --unlabeled or --signals, the
    data of the preset is not used: pass all the data you need. The preset reference-offline has no data: it is the
    case of ag_news for your files, with all-mpnet-base-v2 and three layers of all-MiniLM-L6-v2, without the hub.

    With --task qa or mlm, the student is distilled from a teacher that answers questions or predicts masked words.
    There is one teacher and one student, by default layers:3 of it. Other defaults are --batch-size 16, --learning-rate
    5e-5, --temperature 2, dropout, --max-length 384 (mlm: 128) and --alpha 0.5 (mlm: 0.1).

    --resume RUN continues an interrupted run after its last completed stage, or from the last checkpoint of the stage
    that was training. If you change settings, only the stages that depend on them run again.
    """
    started = time.perf_counter()
    settings = (read_config(config_file) if config_file else {}, passed(flags))
    if resume is not None and preset_name is not None:
        raise ConfigError("--resume cannot be combined with --preset.", hint="Remove --preset.")
    if resume is not None and settings[1].keys() & {"output_dir", "overwrite"}:
        raise ConfigError("--resume cannot be combined with --output-dir or --overwrite.", hint="Remove these flags.")
    chosen = task or settings[0].pop("task", None)
    task = chosen if resume is None else _task_of(resume)
    if chosen is not None and str(chosen) not in ("classification", *TASK_RUNS):
        raise ConfigError(f"Unknown task {chosen!r}.", hint=f"Use classification, {' or '.join(TASK_RUNS)}.")
    if resume is not None and chosen not in (None, task or "classification"):
        raise ConfigError(f"{resume} is a run of the task {task or 'classification'}.", hint="Remove the task.")
    if task in TASK_RUNS:
        if preset_name is not None or dry_run:
            flag = "--dry-run" if preset_name is None else "--preset"
            raise ConfigError(f"A run of the task {task} has no {flag}.", hint=f"Remove {flag}.")
        _run_task(task, settings, resume)
        return
    if resume is None:
        config = RunConfig.resolve(preset(preset_name or DEFAULT_PRESET), *settings)

    from setfit_kd.run import pipeline
    from setfit_kd.run_folder.names import default_folder

    if resume is not None:
        config = pipeline.resumed_config(resume, *settings)
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": default_folder(config)})
    try:
        if dry_run:
            _print_plan(config, resume=resume is not None)
            return
        result = pipeline.run(config, resume=resume is not None)
    except BaseException as error:
        if isinstance(error, UnavailableError) and resume is None:
            error.hint = _offline_hint(error, config, chosen=settings[0].keys() | settings[1].keys()) or error.hint
        # Runs when click closes its context, so that the hint appears below the error message.
        click.get_current_context().find_root().call_on_close(partial(_print_resume_hint, config.output_dir))
        raise
    seconds = time.perf_counter() - started

    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.data.sources import evaluation_sources
    from setfit_kd.evaluation.estimates import estimate_table
    from setfit_kd.evaluation.measure import evaluation_table
    from setfit_kd.report.render import seed_cells, seed_headings
    from setfit_kd.report.summary import display_name

    if result.evaluations:
        first = next(iter(evaluation_sources(result.config.eval))) if result.more_evaluations else ""
        for set_name, evaluations in {first: result.evaluations, **result.more_evaluations}.items():
            table = evaluation_table({display_name(name): each for name, each in evaluations.items()})
            show_table((set_name, *table[0][1:]), table[1])
            echo("")
    elif result.estimates:
        show_table(*estimate_table({display_name(name): each for name, each in result.estimates.items()}))
        echo("")
    if result.by_seed:
        rows = [(display_name(name), *seed_cells(summary)) for name, summary in result.over_seeds.items()]
        show_table((f"{len(result.by_seed)} seeds", *seed_headings(result.signals.task)), rows)
        echo("")
    student, model_path = "the student", str(result.output_dir)
    if len(result.students) > 1:
        student, model_path = "a student", f"{model_path}/{next(iter(pipeline.student_paths(result.config).values()))}"
    echo(f"Finished in {seconds:.0f} s. Report: {result.output_dir}/report.html. To use {student}:")
    echo(f'  setfit-kd predict {shlex.quote(model_path)} "..."' + ' "..."' * bool(result.config.pair_column))


def _task_of(folder: Path) -> str | None:
    """Return the task of the run in a folder, if it is not classification."""
    from setfit_kd.run_folder.folder import RunFolder

    return RunFolder.read_settings(folder).get("task")


def _run_task(task: str, settings: tuple[dict[str, Any], dict[str, Any]], resume: Path | None) -> None:
    """Run the distillation of question answering or of a masked language model."""
    if resume is None:
        config = TASK_RUNS[task].of(**{**settings[0], **settings[1], "task": task})

    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.report.task_report import metrics_table
    from setfit_kd.run.task_run import resumed_task_config, run_task
    from setfit_kd.run_folder.names import REPORT_HTML

    started = time.perf_counter()
    if resume is not None:
        config = resumed_task_config(resume, *settings)
    try:
        result = run_task(config, resume=resume is not None)
    except BaseException:
        click.get_current_context().find_root().call_on_close(partial(_print_resume_hint, config.output_dir))
        raise
    if result.metrics:
        show_table(*metrics_table(task, result.metrics))
        echo("")
    echo(f"Finished in {time.perf_counter() - started:.0f} s. Report: {config.output_dir / REPORT_HTML}")


def _offline_hint(error: UnavailableError, config: RunConfig, *, chosen: Set[str]) -> str | None:
    """Return the same command with the demo model instead of unavailable default models, if it can then succeed."""
    from setfit_kd.models.bodies import locate_model

    defaults = [role for role in ("teacher", "student") if role not in chosen]
    data = [source for source in (config.labeled, config.unlabeled, *(config.eval or ()), config.signals) if source]
    is_default = any(repr(name) in error.message for role in defaults for name in getattr(config, role))
    if not is_default or not all(Path(source).exists() or source.startswith("bundled:") for source in data):
        return None
    flags = [part for role in defaults for part in (f"--{role}", PRESETS["newswire"][role])]
    command = shlex.join(["setfit-kd", "run", *click.get_current_context().meta["arguments"], *flags])
    try:
        locate_model(PRESETS["newswire"]["teacher"])
    except UnavailableError as missing:
        return f"{missing.hint} Then run this command, which works without the hub: {command}"
    return f"Run this command, which works without the hub: {command}"


def _print_resume_hint(folder: Path | None) -> None:
    """Print how to resume the run, if it can be resumed."""
    from setfit_kd.run_folder.folder import RunFolder

    if folder is not None and RunFolder.contains_interrupted_run(folder):
        command = f"setfit-kd run --resume {shlex.quote(str(folder))}"
        click.echo(printable(f"Completed stages are kept. Resume with: {command}"), err=True)


def _print_plan(config: RunConfig, *, resume: bool) -> None:
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.run.dry_run import plan
    from setfit_kd.run.inputs import prepare_run

    stages = plan(config, prepare_run(config, resume=resume))
    echo(config.to_yaml())
    show_table(("stage", "texts", "steps"), [(stage.name, stage.texts, stage.steps or "") for stage in stages])
    if config.seeds > 1:
        echo(f"All stages run with {config.seeds} seeds.")
