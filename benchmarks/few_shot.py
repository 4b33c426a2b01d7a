"""Teacher, baseline and student on a data folder, over several seeds.

Run: python benchmarks/few_shot.py FOLDER [--seeds 3] [--shots 16] [--pool-size 1000]
FOLDER holds train.csv and test.csv with the columns text and label. Labels and pool are drawn from train.csv; accuracy
is that on the whole of test.csv. Prints a Markdown table.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import click

from setfit_kd import RunResult, distill


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1), help="How many seeds, from 0.")
@click.option("--shots", default=16, type=click.IntRange(2))
@click.option("--pool-size", default=1000, type=click.IntRange(32))
@click.option("--teacher", default="demo:all-MiniLM-L6-v2")
@click.option("--student", default="layers:0,2,5")
def main(folder: Path, seeds: int, shots: int, pool_size: int, teacher: str, student: str) -> None:
    """Print accuracy, macro-F1 and cost by model, mean and standard deviation over the seeds."""
    results: list[RunResult] = []
    for seed in range(seeds):
        sources = [str(folder / "train.csv"), str(folder / "train.csv"), str(folder / "test.csv")]
        settings = {"teacher": teacher, "student": student, "shots": shots, "pool_size": pool_size, "seed": seed}
        results.append(distill(*sources, **settings))  # type: ignore[arg-type]
    click.echo("| model | accuracy | macro-F1 | training, s | texts/s |\n|---|---|---|---|---|")
    for name in ("teacher", "baseline", "student"):
        measured = [result.evaluations[name] for result in results]
        cells = [
            _spread([100 * m.quality.accuracy for m in measured]),
            _spread([100 * m.quality.macro_f1 for m in measured]),
            _spread([result.seconds[name] for result in results]),
            f"{mean(m.cost.texts_per_second for m in measured):.0f}",
        ]
        click.echo(f"| {name} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
