"""SetFit's figure of distillation: accuracy against the number of unlabeled texts per class, 16 labels per class.

Run: python benchmarks/distillation.py data/ag_news data/goemotions_ekman [--device cuda]
Each folder holds train.csv and test.csv. Unlabeled texts are drawn from the training file, N times the number of
classes, whatever their class. --output receives distillation.json, distillation.md and distillation.png; results that
are in the file are measured again only if their data, libraries or code have changed, as in compare.py.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from compare import HERE, ROWS, Result, Results, data_sets, mean_and_deviation

SIZES = (8, 64, 200, 1000)  # unlabeled texts per class
PUBLISHED = {8: (81.7, 0.9), 64: (83.3, 0.7), 200: (83.8, 0.7), 1000: (84.7, 0.3)}
"""AG News, paraphrase-mpnet-base-v2 distilled into paraphrase-MiniLM-L3-v2 (mean, standard deviation), from the
result files in SetFit's repository."""
SHOWN = ("stock_teacher", "refined_teacher", "labels_alone", "student")


@click.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--teacher", default="demo:all-mpnet-base-v2")
@click.option("--student", default="layers:0,2,5@demo:all-MiniLM-L6-v2")
@click.option("--seeds", default=3, type=click.IntRange(1))
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--device", default="cpu")
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/benchmark"), type=click.Path(path_type=Path), help="Folder for models.")
def main(folders: tuple[str, ...], seeds: int, output: Path, work: Path, **options: Any) -> None:
    """Measure all results that are missing and draw the figure."""
    output.mkdir(parents=True, exist_ok=True)
    settings = {**options, "pair_steps": 500, "tests": None}
    results = Results(output / "distillation.json", settings)
    for name, sources in data_sets(folders, shots=16).items():
        with Path(sources["labeled"]).open(encoding="utf-8", newline="") as file:
            n_classes = len({row["label"] for row in csv.DictReader(file)})
        for seed in range(seeds):
            for row in SHOWN:
                for size in SIZES if ROWS[row].uses_pool else SIZES[:1]:
                    case = {**sources, **settings, "seed": seed, "pool_size": size * n_classes}
                    results.measure(row, name, case, work.resolve())
    table = format_table(results.cells, settings)
    (output / "distillation.md").write_text(table)
    click.echo(table)
    plot(results.cells, output / "distillation.png")


def accuracies(cells: list[Result], data: str, row: str) -> list[list[float]]:
    """Return the accuracies in percent over the seeds, for each size of the pool in ascending order."""
    group = [cell for cell in cells if (cell["data"], cell["row"]) == (data, row)]
    sizes = sorted({cell.get("pool_size", 0) for cell in group})
    return [[100 * cell["accuracy"] for cell in group if cell.get("pool_size", 0) == size] for size in sizes]


def format_table(cells: list[Result], settings: dict[str, Any]) -> str:
    """Format mean and standard deviation over the seeds as a Markdown table."""
    lines = ["# Distillation: accuracy in % by unlabeled texts per class", ""]
    models = f"Teacher {settings['teacher']}, student {settings['student']}, device {settings['device']}"
    lines += [f"{models}; 16 labels per class, whole test files.", ""]
    lines += [f"| | {' | '.join(f'{size:,}' for size in SIZES)} |", "|---" * (len(SIZES) + 1) + "|"]
    for data in dict.fromkeys(cell["data"] for cell in cells):
        for row in SHOWN:
            columns = [mean_and_deviation(values) for values in accuracies(cells, data, row)]
            lines.append(f"| {data}, {ROWS[row].title} | {' | '.join(columns * (len(SIZES) // len(columns)))} |")
        if data == "ag_news":
            published = [f"{value} ± {deviation}" for value, deviation in PUBLISHED.values()]
            lines.append(f"| {data}, student of SetFit's published results | {' | '.join(published)} |")
    return "\n".join(lines) + "\n"


def plot(cells: list[Result], path: Path) -> None:
    """Plot mean and standard deviation of the accuracy against the number of unlabeled texts per class."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(cell["data"] for cell in cells))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4), squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        for color, row in enumerate(SHOWN):
            values = accuracies(cells, data, row)
            values *= len(SIZES) // len(values)
            options: Any = {"linestyle": "-" if ROWS[row].uses_pool else "--", "color": f"C{color}", "capsize": 3}
            label = ROWS[row].title.replace("*", "").replace("`", "")
            error = [stdev(group) if len(group) > 1 else 0 for group in values]
            axis.errorbar(SIZES, [mean(group) for group in values], error, label=label, marker="o", **options)
        if data == "ag_news":
            numbers, deviations = zip(*PUBLISHED.values(), strict=True)
            axis.errorbar(SIZES, numbers, deviations, label="student: published", marker="s", color="gray", capsize=3)
        axis.set(xscale="log", title=data, xlabel="unlabeled texts per class", xticks=SIZES, xticklabels=SIZES)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    figure.tight_layout()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
