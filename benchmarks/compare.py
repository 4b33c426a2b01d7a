"""Compare setfit-kd with alternatives: same labels, pool, seeds and threads, and a separate process for each.

Run: python benchmarks/compare.py [FOLDER ...] [--seeds 3] [--shots 16] [--pool-size 1000] [--quick]
A FOLDER holds train.csv and test.csv with the columns text and label; the default is the bundled news corpus. Labels
and pool are sampled from the training file, and all methods are evaluated on the test file. --output receives a JSON
file and a Markdown table per data set, and one plot. Run the command again to continue an interrupted comparison.
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

from setfit_kd.run_folder.manifest import versions

HERE = Path(__file__).parent
ROWS = {  # in the order of execution; see methods.py
    "tfidf": "TF-IDF + logistic regression",
    "frozen": "frozen encoder + logistic regression",
    "model2vec": "static: model2vec's classifier",  # optional
    "stock_teacher": "teacher: SetFit's `Trainer`, pairs",
    "teacher": "teacher: in-batch",
    "refined_teacher": "teacher: in-batch, refined by the pool",
    "labels_alone": "student: labels alone",
    "stock_student": "student: SetFit's `DistillationTrainer`",
    "pairs_student": "student: pairs with right targets",
    "student": "student: setfit-kd",
}
REQUIRED_ROWS = {
    "refined_teacher": ("teacher",),
    "stock_student": ("teacher", "refined_teacher"),
    "pairs_student": ("teacher", "refined_teacher"),
    "student": ("teacher", "refined_teacher"),
}
"""Rows whose artifacts a row uses; the plot adds their training costs to those of the row."""
QUICK = {"seeds": 1, "shots": 8, "pool_size": 250, "pair_steps": 125, "tests": 400}

Cell = dict[str, Any]


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1), help="Number of seeds, starting at 0.")
@click.option("--shots", default=16, type=click.IntRange(2))
@click.option("--pool-size", default=1000, type=click.IntRange(32))
@click.option(
    "--pair-steps", default=500, type=click.IntRange(1), help="Training steps of the students that train on pairs."
)
@click.option("--threads", default=2, type=click.IntRange(1))
@click.option(
    "--model2vec", help="Interpreter of an environment with model2vec[distill,train], to include its classifier."
)
@click.option("--teacher", default="demo:all-MiniLM-L6-v2")
@click.option("--student", default="layers:0,2,5")
@click.option(
    "--quick",
    is_flag=True,
    help="Use one seed, 8 labels per class, a small pool and 400 test texts: under ten minutes per data set.",
)
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option(
    "--work", default=Path("runs/benchmark"), type=click.Path(path_type=Path), help="Folder for intermediate results."
)
def main(folders: tuple[Path, ...], output: Path, work: Path, quick: bool, **settings: Any) -> None:
    """Run the comparison and write the results."""
    settings["tests"] = None
    if quick:
        context = click.get_current_context()
        explicit = {name for name in QUICK if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        settings.update({name: value for name, value in QUICK.items() if name not in explicit})
        output, work = output / "quick", work / "quick"
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[Cell]]] = {}
    for name, sources in data_sets(folders).items():
        for cells in run_seeds(name, sources, work.resolve(), **settings):
            results[name] = cells
            table = write_results(name, cells, output, settings)
        click.echo(table)
    plot(results, output / f"accuracy-{settings['shots']}-shots.png")


def data_sets(folders: tuple[Path, ...]) -> dict[str, dict[str, str]]:
    """Return the data sources by name of the data set."""
    if not folders:
        return {"newswire": dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")}
    sources = {}
    for folder in map(Path.resolve, folders):
        if folder.name in sources:
            raise click.ClickException(f"Two folders are named {folder.name}. Compare them in separate runs.")
        train = str(folder / "train.csv")
        sources[folder.name] = {"labeled": train, "unlabeled": train, "eval": str(folder / "test.csv")}
    return sources


def run_seeds(name: str, sources: dict[str, str], work: Path, **settings: Any) -> Iterator[dict[str, list[Cell]]]:
    """Run every row with every seed, each in a separate process, or load its result.

    Yields:
        All results so far, after each seed.
    """
    seeds = settings.pop("seeds")
    cells: dict[str, list[Cell]] = {row: [] for row in ROWS if row != "model2vec" or settings["model2vec"]}
    for seed in range(seeds):
        folder = work / f"{name}-{settings['shots']}-{settings['pool_size']}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        case = {**sources, **settings, "seed": seed, "work": str(folder)}
        save_case(folder / "case.json", case)
        for row in cells:
            result = folder / f"{row}.json"
            if not result.is_file():
                click.echo(f"{name}, seed {seed}: {ROWS[row]} ...", nl=False)
                run_row(row, folder, case["threads"])
                cell = json.loads(result.read_text())
                click.echo(f" {100 * cell['accuracy']:.1f}%, {cell['seconds']:.0f} s")
            cells[row].append(json.loads(result.read_text()))
        yield cells


def save_case(file: Path, case: dict[str, Any]) -> None:
    """Save the settings of the comparison; existing results must have the same settings."""
    if file.is_file() and json.loads(file.read_text()) != case:
        raise click.ClickException(
            f"{file.parent} holds results with other settings. Remove it, or choose another --work."
        )
    file.write_text(json.dumps(case))


def run_row(row: str, folder: Path, threads: int) -> None:
    """Run one row in a new process."""
    for artifact in {"teacher": ["teacher"], "refined_teacher": ["refined", "signals"]}.get(row, []):
        shutil.rmtree(folder / artifact, ignore_errors=True)  # of an interrupted run
    case, part = folder / "case.json", folder / f"{row}.json.part"
    command = [sys.executable, str(HERE / "methods.py"), row, str(case), str(part)]
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    process = subprocess.run(
        command, env={**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false"}, capture_output=True, text=True
    )
    if process.returncode:
        raise click.ClickException(f"{row} failed:\n{process.stderr[-3000:]}")
    part.rename(folder / f"{row}.json")


def write_results(name: str, cells: dict[str, list[Cell]], output: Path, settings: dict[str, Any]) -> str:
    """Write the JSON file and the Markdown table of a data set; return the table."""
    n_tests = cells["student"][0]["tests"]
    about = {
        "data": name,
        "cores": os.cpu_count(),
        **{
            key: settings[key] for key in ("seeds", "threads", "shots", "pool_size", "pair_steps", "teacher", "student")
        },
        "tests": n_tests,
        "precision": " or ".join(sorted({cell["precision"] for cell in cells["student"]})),
        "versions": versions(),
    }
    stem = f"{name}-{settings['shots']}-shots"
    (output / f"{stem}.json").write_text(json.dumps({"about": about, "rows": cells}, indent=1) + "\n")
    lines = [
        f"# {name}: {settings['shots']} labels per class, pool of {settings['pool_size']:,}",
        "",
        f"Teacher {settings['teacher']}, student {settings['student']}; {n_tests:,} test texts; mean ± standard "
        f"deviation over {len(cells['student'])} seeds; {settings['threads']} thread(s) on {os.cpu_count()} cores; "
        f"setfit-kd trains in {about['precision']}. Passes are texts in forward passes with gradients. CPU seconds and "
        "peak memory are those of the row's own training.",
        "",
        "| | accuracy | macro-F1 | passes | seconds | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row, values in cells.items():
        row_cells = [
            mean_and_deviation([100 * cell["accuracy"] for cell in values]),
            mean_and_deviation([100 * cell["macro_f1"] for cell in values]),
            f"{mean(cell['training_passes'] for cell in values):,.0f}",
            mean_and_deviation([cost(cell) for cell in values]),
            f"{mean(cell['peak_mb'] for cell in values):,.0f}",
        ]
        lines.append(f"| {ROWS[row]} | {' | '.join(row_cells)} |")
    table = "\n".join(lines) + "\n"
    (output / f"{stem}.md").write_text(table)
    return table


def cost(cell: Cell) -> float:
    """Return the CPU seconds of all threads, which depend little on the load of the machine."""
    return float(cell["cpu_seconds"] if "cpu_seconds" in cell else cell["seconds"])


def mean_and_deviation(values: list[float]) -> str:
    """Format the mean, and the standard deviation of several values."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def plot(results: dict[str, dict[str, list[Cell]]], path: Path) -> None:
    """Plot accuracy against the training time including the teacher, with one panel per data set."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.6), squeeze=False)
    colors = plt.get_cmap("tab10").colors
    for axis, (name, cells) in zip(axes[0], results.items(), strict=True):
        for number, (row, title) in enumerate(ROWS.items()):
            if row not in cells:
                continue
            required = (*REQUIRED_ROWS.get(row, ()), row)
            seconds = sum(mean(map(cost, cells[name])) for name in required)
            values = [100 * cell["accuracy"] for cell in cells[row]]
            error = stdev(values) if len(values) > 1 else 0
            marker = {"student": "*", "teacher": "s"}.get(title.partition(":")[0], "o")
            size = 16 if row == "student" else 8
            axis.errorbar(
                seconds, mean(values), error, fmt=marker, ms=size, color=colors[number], label=title, capsize=3
            )
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("CPU seconds, including the teacher")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout()
    labels = [label.replace("`", "") for label in labels]
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
