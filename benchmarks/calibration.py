"""Measure accuracy, calibration error and the estimates without an evaluation set, over several data sets and seeds.

Run: python benchmarks/calibration.py FOLDER ... [--seeds 3] [--pool-size 1000] [--work FOLDER]
A FOLDER holds train.csv and test.csv with the columns text and label; FOLDER=8 draws 8 labels per class instead of 16.
Each run is repeated with the test file as evaluation set; the models are the same, because texts that are also in the
test file are left out. Run the command again to continue.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import click
import pandas as pd

from setfit_kd.data.splits import normalize

HERE = Path(__file__).parent
MODELS = {"teacher": "teacher", "students/layers-0-2-5": "layers", "students/static": "static"}


@click.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--seeds", default=3, type=click.IntRange(1))
@click.option("--pool-size", default=1000, type=click.IntRange(32))
@click.option("--teacher", default="demo:all-MiniLM-L6-v2")
@click.option("--work", default=Path("runs/calibration"), type=click.Path(path_type=Path))
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
def main(folders: tuple[str, ...], seeds: int, pool_size: int, teacher: str, work: Path, output: Path) -> None:
    """Run everything and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    rows = {}
    for folder, _, shots in (folder.partition("=") for folder in folders):
        data = Path(folder).resolve()
        train, test = (pd.read_csv(data / f"{name}.csv") for name in ("train", "test"))
        is_test = train.text.astype(str).map(normalize).isin(set(test.text.astype(str).map(normalize)))
        train[~is_test].to_csv(work / f"{data.name}.csv", index=False)
        for seed in range(seeds):
            run = work / f"{data.name}-{shots or 16}-{pool_size}-{seed}"
            result = run.with_suffix(".json")
            if not result.exists():
                source = work / f"{data.name}.csv"
                flags = ["--labeled", source, "--unlabeled", source, "--shots", shots or 16, "--pool-size", pool_size]
                flags += ["--teacher", teacher, "--student", "layers:0,2,5", "--student", "static", "--no-baseline"]
                flags += ["--seed", seed, "--no-bundle", "--overwrite", "--output-dir", run]
                command = [sys.executable, "-m", "setfit_kd", "run"]
                metrics = []
                for options in (flags, ["--resume", run, "--eval", data / "test.csv"]):
                    subprocess.run([*command, *map(str, options)], check=True)
                    metrics.append(json.loads((run / "metrics.json").read_text()))
                result.write_text(json.dumps(metrics))
            rows[data.name, seed] = json.loads(result.read_text())
    table = format_table(rows, pool_size)
    (output / f"calibration-{pool_size}.md").write_text(table)
    click.echo(table)


def format_table(rows: dict[tuple[str, int], list[dict[str, dict[str, float]]]], pool_size: int) -> str:
    """Format the means over the seeds, and the errors of the estimates, as Markdown."""
    lines = [
        f"# Calibration and estimates, pool of {pool_size:,}",
        "",
        f"Accuracy on the test file in percent, mean over {len({seed for _, seed in rows})} seed(s); in brackets the",
        "calibration error, then the accuracy estimated without the test file. See `benchmarks/calibration.py`.",
        "",
        f"| | {' | '.join(MODELS.values())} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for name in dict.fromkeys(name for name, _ in rows):
        cells = []
        for model in MODELS:
            pairs = [(estimate[model], measured[model]) for (n, _), (estimate, measured) in rows.items() if n == name]
            accuracy, ece = (100 * mean(measured[key] for _, measured in pairs) for key in ("accuracy", "ece"))
            cells.append(f"{accuracy:.1f} ({ece:.1f}), {100 * mean(e['accuracy'] for e, _ in pairs):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    errors, calibration, covered = [], [], []
    for model in MODELS:
        pairs = [(estimate[model], measured[model]) for estimate, measured in rows.values()]
        errors.append(f"{100 * mean(abs(e['accuracy'] - m['accuracy']) for e, m in pairs):.1f}")
        calibration.append(f"{100 * mean(m['ece'] for _, m in pairs):.1f}")
        inside = [e["accuracy_interval"][0] <= m["accuracy"] <= e["accuracy_interval"][1] for e, m in pairs]  # type: ignore[index]
        covered.append(f"{sum(inside)} of {len(inside)}")
    lines.append(f"| mean calibration error | {' | '.join(calibration)} |")
    lines.append(f"| mean error of the estimate, points | {' | '.join(errors)} |")
    lines.append(f"| accuracy within the interval of the estimate | {' | '.join(covered)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
