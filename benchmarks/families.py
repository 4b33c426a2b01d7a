"""Transformers as teacher and student, two teachers in the place of one, and pools widened by texts that are made.

Run: python benchmarks/families.py AG_NEWS TREC [--seeds 3] [--only transformers|teachers|augment]
Each folder holds train.csv and test.csv with the columns text and label; labels and pool are drawn from the training
file, everything is tested on the test file. Results go to --output, a JSON file and a Markdown table each; runs are
kept in --work, and one that was stopped goes on where it was.
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
from setfit_kd.report import SPREAD_HEADINGS, display_name, spread_cells
from setfit_kd.run_folder import versions

HERE = Path(__file__).parent
MINILM, LAYERS = "demo:all-MiniLM-L6-v2", "layers:0,2,5"
FEW = {"shots": 16, "student": LAYERS}
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
        "two teachers": {**FEW, "teacher": [MINILM, f"transformer:{MINILM}"], "pool_size": 1000},
    },
    "augment": {
        f"{pool} pool texts{f', {made} made' if made else ''}": {
            **FEW,
            "teacher": MINILM,
            "pool_size": pool,
            "augment": made,
            "baseline": False,
        }
        for pool in (SMALL, 200, LARGE)
        for made in (None, LARGE)
    },
}
"""What is run under each title; the last on TREC's questions, the others on AG News."""


@click.command()
@click.argument("ag_news", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("trec", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(2))
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--only", type=click.Choice(list(RUNS)), multiple=True, help="Some of the tables alone.")
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/families"), type=click.Path(path_type=Path))
def main(ag_news: Path, trec: Path, seeds: int, threads: int, only: tuple[str, ...], output: Path, work: Path) -> None:
    """Run what is not yet there, and write the tables."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    for title in only or RUNS:
        folder = trec if title == "augment" else ag_news
        results = {
            name: run_of(folder, work / name.replace(", ", "-").replace(" ", "-"), seeds=seeds, **settings)
            for name, settings in RUNS[title].items()
        }
        about = {"data": folder.name, "seeds": seeds, "threads": threads, "cores": os.cpu_count(), "runs": RUNS[title]}
        measured = {name: result.metrics for name, result in results.items()}
        told = {"about": {**about, "versions": versions()}, "metrics": measured}
        (output / f"{title}.json").write_text(json.dumps(told, indent=1) + "\n")
        table = markdown(results)
        (output / f"{title}.md").write_text(table)
        click.echo(table)


def run_of(folder: Path, target: Path, **settings: Any) -> RunResult:
    """The run in a folder; one that was begun goes on."""
    if (target / "config.yaml").is_file():
        return distill(resume=target)
    train, test = str(folder / "train.csv"), str(folder / "test.csv")
    return distill(train, train, test, output_dir=target, **{"precision": "bf16", "device": "cpu", **settings})


def markdown(results: Mapping[str, RunResult]) -> str:
    """A row a model, figures as mean and deviation over the seeds, in percent."""
    several = len(results) > 1
    headings = (*(("run",) if several else ()), "", *SPREAD_HEADINGS, "parameters", "MB", "texts/s")
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for name, result in results.items():
        for model, spread in result.over_seeds.items():
            cost = result.evaluations[model].cost
            size = f"{cost.parameters / 1e6:.1f} M", f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"
            cells = (*((name,) if several else ()), display_name(model), *spread_cells(spread), *size)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
