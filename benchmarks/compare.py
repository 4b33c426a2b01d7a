"""Compare setfit-kd with alternatives: same labels, pool, seeds and threads, and a separate process for each.

Run: python benchmarks/compare.py [FOLDER[=SHOTS] ...] [--seeds 3] [--pool-size 300 --pool-size 1000] [--row student]
A FOLDER holds train.csv and test.csv with the columns text and label; the default is the bundled news corpus. Labels
and pool are sampled from the training file, and all methods are evaluated on the test file. --output receives all
results (compare.json), tables (compare.md) and a plot. Run the command again to continue: a result is measured again
only if its data, its settings, the versions of the libraries or the source code that it uses have changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import click

import setfit_kd
from setfit_kd.utils.atomic_io import write_text
from setfit_kd.utils.files import file_hash, fingerprint

HERE = Path(__file__).parent
PACKAGE = Path(setfit_kd.__file__).parent
QUICK = {"seeds": 1, "shots": 8, "pool_sizes": (250,), "pair_steps": 125, "tests": 400}
LIBRARIES = ("setfit", "sentence-transformers", "transformers", "torch", "scikit-learn")

Result = dict[str, Any]


class Row(NamedTuple):
    """A row of the table, a function of methods.py.

    ``requires`` are the rows whose artifacts it uses: their training is part of its cost. A row with ``is_ours`` is
    measured again if setfit-kd has changed.
    """

    title: str
    requires: tuple[str, ...] = ()
    uses_pool: bool = False
    is_ours: bool = True


_SIGNALS = ("teacher", "refined_teacher")
ROWS = {  # in the order of execution
    "tfidf": Row("TF-IDF + logistic regression", is_ours=False),
    "frozen": Row("frozen encoder + logistic regression", is_ours=False),
    "model2vec": Row("static: model2vec's classifier", is_ours=False),  # optional
    "stock_teacher": Row("teacher: SetFit's `Trainer`, 20 iterations", is_ours=False),
    "unique_teacher": Row("teacher: SetFit's `Trainer`, unique pairs", is_ours=False),
    "teacher": Row("teacher: calibrated, not refined"),
    "refined_teacher": Row("**teacher**", ("teacher",), uses_pool=True),
    "labels_alone": Row("student: labels alone"),
    "stock_student": Row("student: SetFit's `DistillationTrainer`", _SIGNALS, uses_pool=True),
    "pairs_student": Row("student: pairs with correct targets", _SIGNALS, uses_pool=True),
    "student": Row("**student**", _SIGNALS, uses_pool=True),
    "static_student": Row("**static student**", _SIGNALS, uses_pool=True),
}


@click.command()
@click.argument("folders", nargs=-1)
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds, starting at 0. [default: 3]")
@click.option("--shots", type=click.IntRange(2), help="Labels per class. [default: 16]")
@click.option("--pool-size", "pool_sizes", type=click.IntRange(32), multiple=True, help="[default: 1000]")
@click.option("--row", "rows", type=click.Choice(list(ROWS)), multiple=True, help="Rows to measure. [default: all]")
@click.option("--pair-steps", type=int, help="Training steps of students on pairs. [default: 500]")
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--device", default="cpu", help="Device of all rows but TF-IDF and model2vec: cpu or cuda.")
@click.option(
    "--model2vec", help="Interpreter of an environment with model2vec[distill,train], to include its classifier."
)
@click.option("--label-column", help="Column of the labels. [default: label]")
@click.option("--label-separator", help="Separator of the labels, if a text can have several.")
@click.option("--teacher", default="demo:all-MiniLM-L6-v2")
@click.option("--student", default="layers:0,2,5")
@click.option(
    "--quick",
    is_flag=True,
    help="Use one seed, 8 labels per class, a small pool and 400 test texts: under ten minutes per data set.",
)
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/benchmark"), type=click.Path(path_type=Path), help="Folder for models.")
def main(
    folders: tuple[str, ...], rows: tuple[str, ...], output: Path, work: Path, quick: bool, **options: Any
) -> None:
    """Run the comparison and write the results."""
    defaults: dict[str, Any] = {"seeds": 3, "shots": 16, "pool_sizes": (1000,), "pair_steps": 500, "tests": None} | (
        QUICK if quick else {}
    )
    options = defaults | {name: value for name, value in options.items() if value not in (None, ())}
    seeds, pool_sizes = options.pop("seeds"), options.pop("pool_sizes")
    if quick:
        output, work = output / "quick", work / "quick"
    output.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in ROWS if row in (rows or ROWS) and (row != "model2vec" or "model2vec" in options)]
    settings = {key: options[key] for key in ("teacher", "student", "device", "threads", "pair_steps", "tests")}
    results = Results(output / "compare.json", settings)
    for name, sources in data_sets(folders, options.pop("shots")).items():
        for seed in range(seeds):
            for row in chosen:
                for pool_size in pool_sizes if ROWS[row].uses_pool else (pool_sizes[0],):
                    case = {**sources, **options, "seed": seed, "pool_size": pool_size}
                    results.measure(row, name, case, work.resolve())
    table = format_tables(results.cells, settings)
    (output / "compare.md").write_text(table)
    click.echo(table)
    plot(results.cells, output / "compare.png")


def data_sets(folders: Sequence[str], shots: int) -> dict[str, dict[str, Any]]:
    """Return the data sources and the labels per class by name of the data set."""
    if not folders:
        return {"newswire": {**dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire"), "shots": shots}}
    sources: dict[str, dict[str, Any]] = {}
    for folder, _, number in (folder.partition("=") for folder in folders):
        path = Path(folder).resolve()
        if path.name in sources:
            raise click.ClickException(f"Two folders are named {path.name}. Compare them in separate runs.")
        train, test = str(path / "train.csv"), str(path / "test.csv")
        sources[path.name] = {"labeled": train, "unlabeled": train, "eval": test, "shots": int(number or shots)}
    return sources


class Results:
    """All results, in a JSON file: one for each row, data set, number of labels, seed and, if it is used, pool size."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.cells: list[Result] = []
        if file.is_file():
            content = json.loads(file.read_text())
            if content["settings"] != settings:
                raise click.ClickException(f"{file} has results with other settings. Choose another --output.")
            self.cells = content["results"]

    def measure(self, row: str, name: str, case: dict[str, Any], work: Path, *, again: bool = False) -> None:
        """Measure a row in a new process, after those it requires, unless its result is up to date."""
        cell = {"row": row, "data": name, "shots": case["shots"], "seed": case["seed"]}
        if ROWS[row].uses_pool:
            cell["pool_size"] = case["pool_size"]
        inputs = fingerprint_inputs(row, case)
        up_to_date = any(cell.items() <= known.items() and known["inputs"] == inputs for known in self.cells)
        if up_to_date and not again:
            return
        for required in ROWS[row].requires:
            self.measure(required, name, case, work, again=not artifact_folder(required, case, work).is_dir())
        click.echo(f"{', '.join(map(str, cell.values()))} ...", nl=False)
        result = run_row(row, case, work)
        shown = f"{100 * result['accuracy']:.1f}%, {result['cpu_seconds']:.0f} s" if result else "left out"
        click.echo(f" {shown}")
        self.cells = [known for known in self.cells if not cell.items() <= known.items()]
        self.cells.append({**cell, **result, "inputs": inputs})
        write_text(self.file, json.dumps({"settings": self.settings, "results": self.cells}, indent=1) + "\n")


def fingerprint_inputs(row: str, case: dict[str, Any]) -> str:
    """Fingerprint everything that a result depends on."""
    files = [file_hash(Path(case[key])) if Path(case[key]).is_file() else case[key] for key in ("labeled", "eval")]
    keys = ["seed", "shots", "tests", "threads", "teacher", "device"] + ["pool_size"] * ROWS[row].uses_pool
    keys += [key for key in ("label_column", "label_separator") if key in case]
    keys += ["student"] * (row in ("labels_alone", "stock_student", "pairs_student", "student"))
    keys += ["pair_steps"] * (row in ("stock_student", "pairs_student"))
    sources = [HERE / "methods.py", HERE / "model2vec_recipe.py"]
    sources += (PACKAGE if ROWS[row].is_ours else PACKAGE / "data").rglob("*.py")
    code = [file_hash(path) for path in sorted(sources)]
    return fingerprint(row, files, [case[key] for key in keys], [version(name) for name in LIBRARIES], code)


def artifact_folder(row: str, case: dict[str, Any], work: Path) -> Path:
    """Return the folder of the model, and of the signals, that a row leaves for others."""
    return work / f"{row}-{fingerprint_inputs(row, case)[:16]}"


def run_row(row: str, case: dict[str, Any], work: Path) -> Result:
    """Run one row in a new process."""
    artifacts = {name: str(artifact_folder(name, case, work)) for name in (row, *ROWS[row].requires)}
    shutil.rmtree(artifacts[row], ignore_errors=True)  # of an interrupted run
    work.mkdir(parents=True, exist_ok=True)
    file = Path(artifacts[row]).with_suffix(".json")
    file.write_text(json.dumps({**case, "artifacts": artifacts}))
    command = [sys.executable, str(HERE / "methods.py"), row, str(file), str(file)]
    variables = {name: str(case["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    process = subprocess.run(
        command, env={**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false"}, capture_output=True, text=True
    )
    if process.returncode:
        raise click.ClickException(f"{row} failed:\n{process.stderr[-3000:]}")
    result: Result = json.loads(file.read_text())
    return result


def format_tables(cells: list[Result], settings: dict[str, Any]) -> str:
    """Format accuracy with calibration error, macro-F1, and cost as Markdown tables."""
    cells = [cell for cell in cells if "accuracy" in cell]
    sets = list(dict.fromkeys((cell["data"], cell["shots"]) for cell in cells))
    lines = ["# Comparison", ""]
    models = f"Teacher {settings['teacher']}, student {settings['student']}"
    lines += [f"{models}; {settings['threads']} thread(s), {settings['device']}."]
    lines += ["Test files, mean ± standard deviation over the seeds. Bold rows are what a run of setfit-kd trains."]
    quantities: dict[str, Callable[[list[Result]], str]] = {
        "Accuracy in %, calibration error in brackets": lambda group: (
            f"{mean_and_deviation([100 * cell['accuracy'] for cell in group])} "
            f"({100 * mean(cell['ece'] for cell in group):.1f})"
        ),
        "Macro-F1 in %": lambda group: mean_and_deviation([100 * cell["macro_f1"] for cell in group]),
        "Micro-F1 in % (several labels per text)": lambda group: (
            mean_and_deviation([100 * cell["micro_f1"] for cell in group]) if "micro_f1" in group[0] else ""
        ),
        "CPU seconds of training, including the teacher": lambda group: (
            f"{mean(total_cost(cell, cells) for cell in group):.0f}"
        ),
    }
    for quantity, format_group in quantities.items():
        lines += ["", f"## {quantity}", "", f"| | {' | '.join(f'{data}, {shots} labels' for data, shots in sets)} |"]
        lines += ["|---" * (len(sets) + 1) + "|"]
        for row, about in ROWS.items():
            for pool_size in sorted({cell.get("pool_size", 0) for cell in cells if cell["row"] == row}):
                columns = []
                for data, shots in sets:
                    wanted = {"row": row, "data": data, "shots": shots} | (
                        {"pool_size": pool_size} if pool_size else {}
                    )
                    group = [cell for cell in cells if wanted.items() <= cell.items()]
                    columns.append(format_group(group) if group else "")
                title = about.title + (f", pool of {pool_size:,}" if pool_size else "")
                lines.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def total_cost(cell: Result, cells: list[Result]) -> float:
    """Return the CPU seconds of a row and of those it requires; unlike wall time, they hardly depend on the load."""
    total = float(cell["cpu_seconds"])
    for required in ROWS[cell["row"]].requires:
        keys = ("data", "shots", "seed", *(["pool_size"] if ROWS[required].uses_pool else []))
        wanted = {"row": required, **{key: cell[key] for key in keys}}
        total += sum(other["cpu_seconds"] for other in cells if wanted.items() <= other.items())
    return total


def mean_and_deviation(values: list[float]) -> str:
    """Format the mean, and the standard deviation of several values."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def plot(cells: list[Result], path: Path) -> None:
    """Plot accuracy against the size of the pool, with one panel per data set; rows without a pool are lines."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys((cell["data"], cell["shots"]) for cell in cells))
    figure, axes = plt.subplots(1, len(sets), figsize=(3.6 * len(sets), 4.2), squeeze=False)
    colors = dict(zip(ROWS, plt.get_cmap("tab20").colors, strict=False))
    for axis, (data, shots) in zip(axes[0], sets, strict=True):
        for row, about in ROWS.items():
            group = [cell for cell in cells if {"row": row, "data": data, "shots": shots}.items() <= cell.items()]
            group = [cell for cell in group if "accuracy" in cell]
            sizes = sorted({cell.get("pool_size", 0) for cell in group})
            values = [mean(100 * c["accuracy"] for c in group if c.get("pool_size", 0) == size) for size in sizes]
            style = {"color": colors[row], "label": about.title.replace("*", "").replace("`", "")}
            if sizes == [0]:
                axis.axhline(values[0], linestyle="--", linewidth=1, **style)
            elif sizes:
                axis.plot(sizes, values, marker="o", **style)
        axis.set_xscale("log")
        axis.set_title(f"{data}, {shots} labels")
        axis.set_xlabel("pool texts")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
