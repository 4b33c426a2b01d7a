"""Compare transformer classifiers, an ensemble of two teachers, and augmented pools.

Run: python benchmarks/families.py AG_NEWS TREC [--seeds 3] [--only transformers|teachers|augment]
Each folder holds train.csv and test.csv with the columns text and label. Labels and pool are sampled from the training
file, and all models are evaluated on the test file. --output receives a JSON file and a Markdown table per comparison,
--work the runs. An interrupted run is resumed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from setfit_kd import RunResult, distill
from setfit_kd.report.render import seed_cells, seed_headings
from setfit_kd.report.summary import display_name
from setfit_kd.run_folder.manifest import versions
from setfit_kd.tasks.classification import SINGLE_LABEL

HERE = Path(__file__).parent
MINILM, LAYERS = "demo:all-MiniLM-L6-v2", "layers:0,2,5"
FEW_LABELS = {"shots": 16, "student": LAYERS}
SMALL, LARGE = 50, 1000
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "transformers": {
        "transformers": {
            "teacher": f"transformer:{MINILM}",
            "teacher_learning_rate": 5e-5,
            "refine": "none",
            "student": LAYERS,
            "shots": 500,
            "pool_size": 2000,
        },
    },
    "teachers": {
        "two teachers": {**FEW_LABELS, "teacher": [MINILM, f"transformer:{MINILM}"], "pool_size": 1000},
    },
    "augment": {
        f"{pool} pool texts{f', {n_augmented} augmented' if n_augmented else ''}": {
            **FEW_LABELS,
            "teacher": MINILM,
            "pool_size": pool,
            "augment": n_augmented,
            "baseline": False,
        }
        for pool in (SMALL, 200, LARGE)
        for n_augmented in (0, LARGE)
    },
}
"""Runs by title of the comparison; augment uses TREC, the others AG News."""


@click.command()
@click.argument("ag_news", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("trec", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(2))
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--only", type=click.Choice(list(RUNS)), multiple=True, help="Run only these comparisons.")
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/families"), type=click.Path(path_type=Path))
def main(ag_news: Path, trec: Path, seeds: int, threads: int, only: tuple[str, ...], output: Path, work: Path) -> None:
    """Run the comparisons and write the tables."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    for title in only or RUNS:
        folder = trec if title == "augment" else ag_news
        results = {
            name: run_or_load(folder, work / name.replace(", ", "-").replace(" ", "-"), seeds=seeds, **settings)
            for name, settings in RUNS[title].items()
        }
        about = {"data": folder.name, "seeds": seeds, "threads": threads, "cores": os.cpu_count(), "runs": RUNS[title]}
        metrics = {name: result.metrics for name, result in results.items()}
        content = {"about": {**about, "versions": versions()}, "metrics": metrics}
        (output / f"{title}.json").write_text(json.dumps(content, indent=1) + "\n")
        table = markdown(results)
        (output / f"{title}.md").write_text(table)
        click.echo(table)


def run_or_load(folder: Path, target: Path, **settings: Any) -> RunResult:
    """Run the pipeline in a folder, or resume the run in it."""
    if (target / "config.yaml").is_file():
        return distill(resume=target, **settings)
    train, test = str(folder / "train.csv"), str(folder / "test.csv")
    return distill(train, train, test, output_dir=target, **{"precision": "bf16", "device": "cpu", **settings})


def markdown(results: Mapping[str, RunResult]) -> str:
    """Format a table with one row per model: mean and standard deviation over the seeds, in percent."""
    has_several_runs = len(results) > 1
    headings = (
        *(("run",) if has_several_runs else ()),
        "",
        *seed_headings(SINGLE_LABEL),
        "parameters",
        "MB",
        "texts/s",
    )
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for name, result in results.items():
        for model, spread in result.over_seeds.items():
            cost = result.evaluations[model].cost
            size = f"{(cost.parameters or 0) / 1e6:.1f} M", f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"
            cells = (*((name,) if has_several_runs else ()), display_name(model), *seed_cells(spread), *size)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
