"""setfit-kd beside what one would use instead: same labels, pool, seeds and threads, one process each.

Run: python benchmarks/compare.py [FOLDER ...] [--seeds 3] [--shots 16] [--pool-size 1000] [--quick]
A FOLDER holds train.csv and test.csv with the columns text and label; without any, the bundled news corpus is used.
Labels and pool are drawn from the training file, everything is tested on the test file. Results go to --output: a JSON
file and a Markdown table a data set, and one plot. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from click.core import ParameterSource

from setfit_kd.run_folder import versions

HERE = Path(__file__).parent
ROWS = {  # in the order in which they must run; see contestants.py
    "tfidf": "TF-IDF + logistic regression",
    "frozen": "frozen encoder + logistic regression",
    "stock_teacher": "teacher: SetFit's `Trainer`, pairs",
    "teacher": "teacher: in-batch",
    "refined_teacher": "teacher: in-batch, refined by the pool",
    "labels_alone": "student: labels alone",
    "stock_student": "student: SetFit's `DistillationTrainer`",
    "pairs_student": "student: pairs with right targets",
    "student": "student: setfit-kd",
}
BEFORE = {
    "refined_teacher": ("teacher",),
    "stock_student": ("teacher", "refined_teacher"),
    "pairs_student": ("teacher", "refined_teacher"),
    "student": ("teacher", "refined_teacher"),
}
"""What a row builds upon; its training cost is added to the row's in the plot."""
QUICK = {"seeds": 1, "shots": 8, "pool_size": 250, "pair_steps": 125, "tests": 400}

Cell = dict[str, Any]


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1), help="How many seeds, from 0.")
@click.option("--shots", default=16, type=click.IntRange(2))
@click.option("--pool-size", default=1000, type=click.IntRange(32))
@click.option("--pair-steps", default=500, type=click.IntRange(1), help="Steps of the students on pairs.")
@click.option("--threads", default=2, type=click.IntRange(1))
@click.option("--teacher", default="demo:all-MiniLM-L6-v2")
@click.option("--student", default="layers:0,2,5")
@click.option(
    "--quick",
    is_flag=True,
    help="One seed, 8 labels a class, a small pool, 400 test texts: under ten minutes a data set.",
)
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/benchmark"), type=click.Path(path_type=Path), help="For what is in between.")
def main(folders: tuple[Path, ...], output: Path, work: Path, quick: bool, **settings: Any) -> None:
    """Compare and write the results."""
    settings["tests"] = None
    if quick:
        context = click.get_current_context()
        chosen = {name for name in QUICK if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        settings.update({name: value for name, value in QUICK.items() if name not in chosen})
        output, work = output / "quick", work / "quick"
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[Cell]]] = {}
    for name, sources in data_sets(folders).items():
        for cells in run_seeds(name, sources, work.resolve(), **settings):
            results[name] = cells
            table = write(name, cells, output, settings)
        click.echo(table)
    plot(results, output / f"accuracy-{settings['shots']}-shots.png")


def data_sets(folders: tuple[Path, ...]) -> dict[str, dict[str, str]]:
    """Sources by data set."""
    if not folders:
        return {"newswire": dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")}
    sets = {}
    for folder in map(Path.resolve, folders):
        if folder.name in sets:
            raise click.ClickException(f"Two folders are named {folder.name}: compare them one after the other.")
        train = str(folder / "train.csv")
        sets[folder.name] = {"labeled": train, "unlabeled": train, "eval": str(folder / "test.csv")}
    return sets


def run_seeds(name: str, sources: dict[str, str], work: Path, **settings: Any) -> Iterator[dict[str, list[Cell]]]:
    """Every row at every seed, each in a process of its own; those that are there already are read.

    Yields all cells so far after each seed.
    """
    seeds = settings.pop("seeds")
    cells: dict[str, list[Cell]] = {row: [] for row in ROWS}
    for seed in range(seeds):
        folder = work / f"{name}-{settings['shots']}-{settings['pool_size']}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        case = {**sources, **settings, "seed": seed, "work": str(folder)}
        keep_case(folder / "case.json", case)
        for row in ROWS:
            result = folder / f"{row}.json"
            if not result.is_file():
                click.echo(f"{name}, seed {seed}: {ROWS[row]} ...", nl=False)
                run_one(row, folder, case["threads"])
                cell = json.loads(result.read_text())
                click.echo(f" {100 * cell['accuracy']:.1f} %, {cell['seconds']:.0f} s")
            cells[row].append(json.loads(result.read_text()))
        yield cells


def keep_case(file: Path, case: dict[str, Any]) -> None:
    """Write down what is compared; cells that are there already must be of the same."""
    if file.is_file() and json.loads(file.read_text()) != case:
        raise click.ClickException(f"{file.parent} holds cells of other settings: remove it, or give another --work.")
    file.write_text(json.dumps(case))


def run_one(row: str, folder: Path, threads: int) -> None:
    """One row in a fresh process."""
    for kept in {"teacher": ["teacher"], "refined_teacher": ["refined", "signals"]}.get(row, []):
        shutil.rmtree(folder / kept, ignore_errors=True)  # left by a run that was stopped
    case, part = folder / "case.json", folder / f"{row}.json.part"
    command = [sys.executable, str(HERE / "contestants.py"), row, str(case), str(part)]
    number = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(
        command, env={**os.environ, **number, "TOKENIZERS_PARALLELISM": "false"}, capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(f"{row} failed:\n{done.stderr[-3000:]}")
    part.rename(folder / f"{row}.json")


def write(name: str, cells: dict[str, list[Cell]], output: Path, settings: dict[str, Any]) -> str:
    """Write the JSON file and the Markdown table of a data set; returns the table."""
    n = cells["student"][0]["tests"]
    about = {
        "data": name,
        "cores": os.cpu_count(),
        **{
            key: settings[key] for key in ("seeds", "threads", "shots", "pool_size", "pair_steps", "teacher", "student")
        },
        "tests": n,
        "precision": " or ".join(sorted({cell["precision"] for cell in cells["student"]})),
        "versions": versions(),
    }
    stem = f"{name}-{settings['shots']}-shots"
    (output / f"{stem}.json").write_text(json.dumps({"about": about, "rows": cells}, indent=1) + "\n")
    lines = [
        f"# {name}: {settings['shots']} labels a class, pool of {settings['pool_size']:,}",
        "",
        f"Teacher {settings['teacher']}, student {settings['student']}; {n:,} test texts; mean ± standard deviation "
        f"over {len(cells['student'])} seeds; {settings['threads']} thread(s) on {os.cpu_count()} cores, our own "
        f"trainings in {about['precision']}. Passes are texts that gradients flow back through; seconds of computing "
        "and peak memory are those of the row's own training.",
        "",
        "| | accuracy | macro-F1 | passes | seconds | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row, title in ROWS.items():
        values = cells[row]
        figures = [
            spread([100 * cell["accuracy"] for cell in values]),
            spread([100 * cell["macro_f1"] for cell in values]),
            f"{mean(cell['training_passes'] for cell in values):,.0f}",
            spread([cost(cell) for cell in values]),
            f"{mean(cell['peak_mb'] for cell in values):,.0f}",
        ]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    table = "\n".join(lines) + "\n"
    (output / f"{stem}.md").write_text(table)
    return table


def cost(cell: Cell) -> float:
    """Seconds of computing of all threads, which other work on the machine hardly changes."""
    return float(cell["cpu_seconds"] if "cpu_seconds" in cell else cell["seconds"])


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def plot(results: dict[str, dict[str, list[Cell]]], path: Path) -> None:
    """Accuracy against all the training that a row takes, its teacher's included: a panel a data set."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.6), squeeze=False)
    colours = plt.get_cmap("tab10").colors
    for axis, (name, cells) in zip(axes[0], results.items(), strict=True):
        for number, (row, title) in enumerate(ROWS.items()):
            parts = (*BEFORE.get(row, ()), row)
            seconds = sum(mean(map(cost, cells[part])) for part in parts)
            values = [100 * cell["accuracy"] for cell in cells[row]]
            error = stdev(values) if len(values) > 1 else 0
            marker = {"student": "*", "teacher": "s"}.get(title.partition(":")[0], "o")
            size = 16 if row == "student" else 8
            axis.errorbar(
                seconds, mean(values), error, fmt=marker, ms=size, color=colours[number], label=title, capsize=3
            )
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("seconds of computing, the teacher's included")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout()
    labels = [label.replace("`", "") for label in labels]
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
