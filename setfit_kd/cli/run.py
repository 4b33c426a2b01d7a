"""``setfit-kd run``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli.options import output_options, passed_settings, setting_options
from setfit_kd.config import DEFAULT_PRESET, PRESETS, RunConfig, preset, read_config
from setfit_kd.errors import ConfigError
from setfit_kd.utils.escape import printable

if TYPE_CHECKING:
    from setfit_kd.run import RunResult


@click.command()
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default=None,
              help=f"Settings to start from. [{DEFAULT_PRESET}]")  # fmt: skip
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, metavar="FILE.yaml",
              help="Settings that override the preset's.")  # fmt: skip
@click.option("--resume", type=click.Path(path_type=Path), default=None, metavar="RUN",
              help="Go on with the run in this folder; its settings hold where no others are given.")  # fmt: skip
@setting_options()
@click.option("--dry-run", is_flag=True, help="Check everything, print the settings, texts and training steps; stop.")
@output_options
def run(
    preset_name: str | None,
    config_file: Path | None,
    resume: Path | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train one or several teachers on a few labels and distil them into small students.

    SOURCE is a CSV, TSV, JSONL, Parquet or (for the pool) text file, a folder written by datasets' save_to_disk, a hub
    name such as ag_news, ag_news[test] or nyu-mll/glue:sst2[validation], or bundled:newswire. MODEL is a hub name, a
    folder, or demo:all-MiniLM-L6-v2.

    Flags override the file, the file overrides the preset. Whoever names --labeled, --unlabeled or --signals names all
    the data: the preset's is dropped.

    A run that was stopped goes on by --resume RUN, after the last stage that was whole, and within a training from its
    last checkpoint. Settings that are given with it do anew the stages that they touch, and no other.
    """
    from_file = read_config(config_file) if config_file else {}
    settings = passed_settings(flags)
    if resume is not None and preset_name is not None:
        raise ConfigError("--resume takes the run's own settings, not a preset's.", hint="Drop --preset.")
    if resume is not None and settings.keys() & {"output_dir", "overwrite"}:
        raise ConfigError("--resume goes on in the run's own folder.", hint="Drop --output-dir and --overwrite.")

    from setfit_kd.run import resumed_config
    from setfit_kd.run import run as run_pipeline
    from setfit_kd.run_folder import default_folder

    if resume is not None:
        config = resumed_config(resume, from_file, settings)
    else:
        config = RunConfig.resolve(preset(preset_name or DEFAULT_PRESET), from_file, settings)
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": default_folder(config)})
    if dry_run:
        _print_plan(config, resume=resume is not None)
        return

    try:
        result = run_pipeline(config, resume=resume is not None)
    except BaseException:
        # The error itself is told by others, first.
        click.get_current_context().find_root().call_on_close(partial(_print_resume_hint, config.output_dir))
        raise
    _print_result(result)


def _print_resume_hint(folder: Path | None) -> None:
    """Where a run has come anywhere, say how it goes on."""
    from setfit_kd.run_folder import RunFolder

    if folder is not None and RunFolder.is_resumable(folder):
        click.echo(printable(f"What is whole is kept. To go on: setfit-kd run --resume {folder}"), err=True)


def _print_plan(config: RunConfig, *, resume: bool) -> None:
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.run import plan, prepare_run

    stages = plan(config, prepare_run(config, resume=resume))
    echo(config.to_yaml())
    show_table(("stage", "texts", "steps"), [(of.stage, of.texts, of.steps or "") for of in stages])
    if config.seeds > 1:
        echo(f"All of it over {config.seeds} seeds.")


def _print_result(result: RunResult) -> None:
    from setfit_kd.cli.output import echo, show_evaluations, show_table
    from setfit_kd.report import SPREAD_HEADINGS, display_name, spread_cells
    from setfit_kd.run import student_paths

    if result.evaluations:
        show_evaluations({display_name(name): found for name, found in result.evaluations.items()})
        echo("")
    if result.by_seed:
        rows = [(display_name(name), *spread_cells(found)) for name, found in result.over_seeds.items()]
        show_table((f"{len(result.by_seed)} seeds", *SPREAD_HEADINGS), rows)
        echo("")
    seconds = sum(result.seconds.values())
    which, place = "the", str(result.output_dir)
    if len(result.students) > 1:
        which, place = "a", f"{place}/{next(iter(student_paths(result.config).values()))}"
    echo(f"Took {seconds:.0f} s. The report is {result.output_dir}/report.html. To use {which} student:")
    echo(f'  setfit-kd predict {place} "..."')
