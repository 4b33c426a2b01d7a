"""``setfit-kd run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli.options import given, setting_options, verbosity_options
from setfit_kd.config import DEFAULT_PRESET, PRESETS, RunConfig, preset, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from setfit_kd.pipeline import RunResult


@click.command()
@click.option("--preset", "preset_name", type=click.Choice(list(PRESETS)), default=None,
              help=f"Settings to start from. [{DEFAULT_PRESET}]")  # fmt: skip
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, metavar="FILE.yaml",
              help="Settings that override the preset's.")  # fmt: skip
@setting_options()
@click.option("--dry-run", is_flag=True, help="Check everything, print the settings, sizes and forward passes; stop.")
@verbosity_options
def run(
    preset_name: str | None, config_file: Path | None, dry_run: bool, quiet: bool, verbose: bool, **flags: Any
) -> None:
    """Train a teacher on a few labels and distil it into a small student.

    SOURCE is a CSV, TSV, JSONL, Parquet or (for the pool) text file, a folder written by datasets' save_to_disk, a hub
    name such as ag_news, ag_news[test] or nyu-mll/glue:sst2[validation], or bundled:newswire. MODEL is a hub name, a
    folder, or demo:all-MiniLM-L6-v2.

    Flags override the file, the file overrides the preset. Whoever names --labeled or --unlabeled names all the data:
    the preset's is dropped.
    """
    from_file = read_config(config_file) if config_file else {}
    config = RunConfig.resolve(preset(preset_name or DEFAULT_PRESET), from_file, given(flags))

    from setfit_kd.cli.screen import screen

    with screen(quiet=quiet, verbose=verbose) as results:
        from setfit_kd.pipeline import run as run_pipeline
        from setfit_kd.runfolder import default_folder

        if config.output_dir is None:
            config = config.model_copy(update={"output_dir": default_folder(config)})
        if dry_run:
            _print_plan(config, results)
            return

        _print_result(run_pipeline(config), results)


def _print_plan(config: RunConfig, results: Console) -> None:
    from setfit_kd.cli.screen import rows_table, say, show
    from setfit_kd.pipeline import plan, prepare_run

    stages = plan(config, prepare_run(config))
    say(results, config.to_yaml())
    rows = [(stage.stage, stage.texts, stage.forward_passes) for stage in stages]
    total = sum(stage.forward_passes for stage in stages)
    show(results, rows_table(("stage", "texts", "forward passes"), [*rows, ("total", "", total)]))


def _shown(name: str) -> str:
    """A model's name in the table; of several students, their names alone."""
    group, _, slug = name.partition("/")
    return {"baselines": f"{slug} (baseline)", "students": slug}.get(group, name)


def _print_result(result: RunResult, results: Console) -> None:
    from setfit_kd.cli.screen import evaluation_table, say, show
    from setfit_kd.pipeline import model_names

    if result.evaluations:
        show(results, evaluation_table({_shown(name): found for name, found in result.evaluations.items()}))
        results.print()
    seconds = sum(result.seconds.values())
    if len(result.students) == 1:
        say(results, f"Took {seconds:.0f} s. The student is in {result.output_dir}/student; to use it:")
        say(results, f'  setfit-kd predict {result.output_dir} "..."')
        return
    say(results, f"Took {seconds:.0f} s. The students are in {result.output_dir}/students; to use one:")
    first = model_names(result.config)[0][1]
    say(results, f'  setfit-kd predict {result.output_dir}/{first} "..."')
