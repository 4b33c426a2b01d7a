"""Compare students and bundles with their teacher and MPNet-base, and classify a million lines with a bundle.

Run: python benchmarks/deploy.py FOLDER [--seeds 3] [--pool-size 4000] [--threads 2] [--lines 1000000]
FOLDER holds train.csv and test.csv with the columns text and label. --output receives the results as JSON and Markdown,
--work the runs and bundles; finished runs are not repeated. MPNet-base has random weights, so only its speed counts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import numpy as np
import psutil

from setfit_kd import distill, load
from setfit_kd.data.sources import read
from setfit_kd.export.bundle import export_bundle
from setfit_kd.inference.benchmark import measure_speed
from setfit_kd.models.bodies import locate_model
from setfit_kd.models.io import new_model, save_model
from setfit_kd.run_folder.manifest import versions
from setfit_kd.signals.signals import TeacherSignals

HERE = Path(__file__).parent
TEACHER, LAYERS = "demo:all-MiniLM-L6-v2", "layers:0,2,5"
_POLL_S = 0.05


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1))
@click.option("--shots", default=16, type=click.IntRange(2))
@click.option("--pool-size", default=4000, type=click.IntRange(32))
@click.option("--threads", default=2, type=click.IntRange(1))
@click.option("--texts", default=500, type=click.IntRange(1), help="Number of test texts for the speed measurement.")
@click.option(
    "--lines", default=1_000_000, type=click.IntRange(1), help="Number of lines that the static bundle classifies."
)
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option(
    "--work", default=Path("runs/deploy"), type=click.Path(path_type=Path), help="Folder for runs and bundles."
)
def main(folder: Path, output: Path, work: Path, **settings: Any) -> None:
    """Measure and write the results."""
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    metrics = [run_or_load(folder, seed, work, **settings) for seed in range(settings["seeds"])]
    models = dict(create_models(work))
    tests = read(folder / "test.csv", role="test").texts
    texts = [tests[row] for row in np.linspace(0, len(tests) - 1, settings["texts"]).astype(int)]
    speeds = {}
    for name, path in models.items():
        threads = 1 if name.endswith("one thread") else settings["threads"]
        speeds[name] = asdict(measure_speed(path, texts, threads=threads))
        click.echo(f"{name}: {speeds[name]}")
    streams = [measure_stream(work, tests, n) for n in sorted({settings["lines"] // 10, settings["lines"]}) if n]
    results = {
        "about": {"data": folder.name, "cores": os.cpu_count(), **settings, "versions": versions()},
        "accuracy": metrics,
        "parity": {name: read_parity(path) for name, path in models.items() if (path / "manifest.json").is_file()},
        "speed": speeds,
        "stream": streams,
    }
    (output / "deploy.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (output / "deploy.md").write_text(table)
    click.echo(table)


def run_or_load(folder: Path, seed: int, work: Path, *, shots: int, pool_size: int, **_: Any) -> dict[str, Any]:
    """Return the metrics of the run with a seed; the first run also has a student of teacher layers."""
    target = work / f"run-{seed}"
    if not (target / "metrics.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        distill(
            str(folder / "train.csv"),
            str(folder / "train.csv"),
            str(folder / "test.csv"),
            teacher=TEACHER,
            student=["static", LAYERS] if seed == 0 else ["static"],
            shots=shots,
            pool_size=pool_size,
            seed=seed,
            baseline=False,
            device="cpu",
            output_dir=target,
        )
    metrics = json.loads((target / "metrics.json").read_text())
    names = {"student": "students/static"}
    accuracies = {names.get(name, name): metrics[name]["accuracy"] for name in metrics}
    click.echo(f"seed {seed}: {accuracies}")
    return {"seed": seed, **accuracies}


def create_models(work: Path) -> Iterator[tuple[str, Path]]:
    """Create and yield every model to measure, starting with the reference."""
    run = work / "run-0"
    layers, static = run / "students" / "layers-0-2-5", run / "students" / "static"
    yield "MPNet-base, torch (no weights)", mpnet_base(work / "mpnet-base", run / "teacher")
    yield "teacher all-MiniLM-L6-v2, torch", run / "teacher"
    yield "its layers 0, 2, 5, torch", layers
    texts = TeacherSignals.load(run / "signals").texts
    for name, student, kind in (
        ("the same, ONNX", layers, "onnx"),
        ("the same, ONNX in 8 bits", layers, "onnx-int8"),
        ("static student", static, "static"),
    ):
        bundle = work / f"bundle-{kind}"
        shutil.rmtree(bundle, ignore_errors=True)
        exported = export_bundle(load(student, device="cpu"), bundle, texts=texts, format=kind)
        click.echo(f"{name}: {exported}")
        if kind == "static":
            yield "static student, torch", static
        yield name, bundle
    yield "static student, one thread", work / "bundle-static"


def mpnet_base(folder: Path, teacher_folder: Path) -> Path:
    """Create a classifier with random MPNet-base weights, the demo tokenizer and the classes of the teacher."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(locate_model(TEACHER))
    plain = folder.with_name(folder.name + "-plain")
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer) + 5)).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=128)
    body = SentenceTransformer(modules=[transformer, Pooling(768)], device="cpu")
    teacher = load(teacher_folder, device="cpu")
    model = new_model(body, list(teacher.labels or ()))
    n_classes = len(model.labels)
    rng = np.random.default_rng(0)
    model.model_head.fit(rng.normal(size=(8 * n_classes, 768)), np.arange(8 * n_classes) % n_classes)
    save_model(model, folder, title="MPNet-base without weights")
    return folder


def read_parity(bundle: Path) -> dict[str, Any]:
    """Return the result of the bundle's agreement check."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {**manifest["parity"], "weights": manifest["weights"]}


def measure_stream(work: Path, texts: list[str], lines: int) -> dict[str, Any]:
    """Classify lines with `setfit-kd predict` and the static bundle; measure rate and peak memory."""
    source, target = work / "lines.txt", work / "lines.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(" ".join(text.split()) + "\n" for text in islice(cycle(texts), lines))
    command = [sys.executable, "-m", "setfit_kd", "predict", str(work / "bundle-static"), "--quiet"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([*command, "--input", str(source), "--output", str(target)]) as process:
        child = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(_POLL_S)
    seconds = time.perf_counter() - started
    with target.open("rb") as file:
        lines_out = sum(1 for _ in file)
    source.unlink()
    target.unlink()
    result = {
        "lines_in": lines,
        "lines_out": lines_out,
        "exit_code": process.returncode,
        "seconds": round(seconds, 1),
        "lines_per_second": round(lines / seconds),
        "peak_memory_mb": round(peak / 1e6, 1),
    }
    click.echo(result)
    return result


def markdown(results: dict[str, Any]) -> str:
    """Format the results as Markdown tables."""
    about, accuracies = results["about"], results["accuracy"]
    lines = [
        f"# {about['data']}: from teacher to device",
        "",
        f"{about['shots']} labels per class, pool of {about['pool_size']:,}; full test file; {about['seeds']} seeds.",
        "",
        "| | " + " | ".join(f"seed {row['seed']}" for row in accuracies) + " | mean |",
        "|---" * (len(accuracies) + 2) + "|",
    ]
    for name in accuracies[0]:
        if name != "seed":
            values = [100 * row[name] for row in accuracies if name in row]
            cells = [f"{value:.1f}" for value in values] + [""] * (len(accuracies) - len(values))
            summary = f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
            lines.append(f"| {name} | {' | '.join(cells)} | {summary} |")
    first = next(iter(results["speed"].values()))
    lines += [
        "",
        f"Speed on {about['texts']} test texts, {about['threads']} threads unless noted, on {about['cores']} "
        "cores, one process per model. p50 to p99 are milliseconds for a single text; ratios compare texts/s.",
        "",
        "| | p50 | p95 | p99 | texts/s | ratio | load, s | memory, MB | disk, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, speed in results["speed"].items():
        lines.append(
            f"| {name} | {speed['p50_ms']:.2f} | {speed['p95_ms']:.2f} | {speed['p99_ms']:.2f} "
            f"| {speed['texts_per_second']:,.0f} | {speed['texts_per_second'] / first['texts_per_second']:,.1f} "
            f"| {speed['load_seconds']:.2f} | {speed['memory_mb']:,.0f} | {speed['disk_mb']:.1f} |"
        )
    lines += ["", "| bundle | agreement with torch | largest difference | texts |", "|---|---|---|---|"]
    for name, parity in results["parity"].items():
        if "one thread" not in name:
            lines.append(
                f"| {name} ({parity['weights']}) | {parity['agreement']:.1%} | {parity['largest_difference']:.1g} "
                f"| {parity['texts']:,} |"
            )
    lines += ["", "| lines in | lines out | seconds | lines/s | peak memory, MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {stream['lines_in']:,} | {stream['lines_out']:,} | {stream['seconds']:.0f} "
        f"| {stream['lines_per_second']:,} | {stream['peak_memory_mb']:.0f} |"
        for stream in results["stream"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
