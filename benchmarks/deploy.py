"""What a device gets: students and bundles beside their teacher and MPNet-base, and a million lines through a bundle.

Run: python benchmarks/deploy.py FOLDER [--seeds 3] [--pool-size 4000] [--threads 2] [--lines 1000000]
FOLDER holds train.csv and test.csv with the columns text and label. Results go to --output as JSON and Markdown; runs
and bundles are kept in --work, and a run that was stopped goes on where it was. MPNet-base is an architecture without
weights: its speed is real, its answers are not.
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
from setfit_kd.data import read
from setfit_kd.export import export_bundle
from setfit_kd.inference.benchmark import measure_speed
from setfit_kd.models import locate, new_model, save_model
from setfit_kd.run_folder import versions
from setfit_kd.signals import TeacherSignals

HERE = Path(__file__).parent
TEACHER, LAYERS = "demo:all-MiniLM-L6-v2", "layers:0,2,5"
_POLL = 0.05


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1))
@click.option("--shots", default=16, type=click.IntRange(2))
@click.option("--pool-size", default=4000, type=click.IntRange(32))
@click.option("--threads", default=2, type=click.IntRange(1))
@click.option("--texts", default=500, type=click.IntRange(1), help="Test texts to measure speed with.")
@click.option("--lines", default=1_000_000, type=click.IntRange(1), help="Lines through the static bundle.")
@click.option("--output", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--work", default=Path("runs/deploy"), type=click.Path(path_type=Path), help="For runs and bundles.")
def main(folder: Path, output: Path, work: Path, **settings: Any) -> None:
    """Measure and write the results."""
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    metrics = [run_of(folder, seed, work, **settings) for seed in range(settings["seeds"])]
    models = dict(made_models(work))
    tests = read(folder / "test.csv", role="test").texts
    texts = [tests[row] for row in np.linspace(0, len(tests) - 1, settings["texts"]).astype(int)]
    speeds = {}
    for name, path in models.items():
        threads = 1 if name.endswith("one thread") else settings["threads"]
        speeds[name] = asdict(measure_speed(path, texts, threads=threads))
        click.echo(f"{name}: {speeds[name]}")
    streams = [stream(work, tests, n) for n in sorted({settings["lines"] // 10, settings["lines"]}) if n]
    results = {
        "about": {"data": folder.name, "cores": os.cpu_count(), **settings, "versions": versions()},
        "accuracy": metrics,
        "parity": {name: parity_of(path) for name, path in models.items() if (path / "manifest.json").is_file()},
        "speed": speeds,
        "stream": streams,
    }
    (output / "deploy.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (output / "deploy.md").write_text(table)
    click.echo(table)


def run_of(folder: Path, seed: int, work: Path, *, shots: int, pool_size: int, **_: Any) -> dict[str, Any]:
    """The metrics of a run of this seed; the first has a student of layers beside the static one."""
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
    found = json.loads((target / "metrics.json").read_text())
    named = {"student": "students/static"}
    accuracies = {named.get(name, name): found[name]["accuracy"] for name in found}
    click.echo(f"seed {seed}: {accuracies}")
    return {"seed": seed, **accuracies}


def made_models(work: Path) -> Iterator[tuple[str, Path]]:
    """Every model to be measured, the first being what the others are compared with."""
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
        made = export_bundle(load(student, device="cpu"), bundle, texts=texts, format=kind)
        click.echo(f"{name}: {made}")
        if kind == "static":
            yield "static student, torch", static
        yield name, bundle
    yield "static student, one thread", work / "bundle-static"


def mpnet_base(folder: Path, like: Path) -> Path:
    """A classifier on MPNet-base with random weights, and the tokenizer and classes of the model in ``like``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(locate(TEACHER))
    plain = folder.with_name(folder.name + "-plain")
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer) + 5)).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=128)
    body = SentenceTransformer(modules=[transformer, Pooling(768)], device="cpu")
    teacher = load(like, device="cpu")
    model = new_model(body, list(teacher.labels or ()))
    n_classes = len(model.labels)
    rng = np.random.default_rng(0)
    model.model_head.fit(rng.normal(size=(8 * n_classes, 768)), np.arange(8 * n_classes) % n_classes)
    save_model(model, folder, title="MPNet-base without weights")
    return folder


def parity_of(bundle: Path) -> dict[str, Any]:
    """What the bundle's check has found."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {**manifest["parity"], "weights": manifest["weights"]}


def stream(work: Path, texts: list[str], lines: int) -> dict[str, Any]:
    """So many lines through `setfit-kd predict` with the static bundle: rate, and the most memory it took."""
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
            time.sleep(_POLL)
    seconds = time.perf_counter() - started
    with target.open("rb") as file:
        written = sum(1 for _ in file)
    source.unlink()
    target.unlink()
    found = {
        "lines_in": lines,
        "lines_out": written,
        "exit_code": process.returncode,
        "seconds": round(seconds, 1),
        "lines_per_second": round(lines / seconds),
        "peak_memory_mb": round(peak / 1e6, 1),
    }
    click.echo(found)
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    about, accuracies = results["about"], results["accuracy"]
    lines = [
        f"# {about['data']}: from teacher to device",
        "",
        f"{about['shots']} labels a class, pool of {about['pool_size']:,}; whole test file; {about['seeds']} seeds.",
        "",
        "| | " + " | ".join(f"seed {row['seed']}" for row in accuracies) + " | mean |",
        "|---" * (len(accuracies) + 2) + "|",
    ]
    for name in accuracies[0]:
        if name != "seed":
            values = [100 * row[name] for row in accuracies if name in row]
            cells = [f"{value:.1f}" for value in values] + [""] * (len(accuracies) - len(values))
            middle = f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
            lines.append(f"| {name} | {' | '.join(cells)} | {middle} |")
    first = next(iter(results["speed"].values()))
    lines += [
        "",
        f"Speed on {about['texts']} test texts, {about['threads']} threads unless said otherwise, on {about['cores']} "
        "cores; a process each. p50 to p99 are milliseconds of a text alone; ratios are of texts/s.",
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
    lines += ["", "| bundle | agrees with torch | largest difference | texts |", "|---|---|---|---|"]
    for name, parity in results["parity"].items():
        if "one thread" not in name:
            lines.append(
                f"| {name} ({parity['weights']}) | {parity['agreement']:.1%} | {parity['largest_difference']:.1g} "
                f"| {parity['texts']:,} |"
            )
    lines += ["", "| lines in | lines out | seconds | lines/s | peak memory, MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {found['lines_in']:,} | {found['lines_out']:,} | {found['seconds']:.0f} | {found['lines_per_second']:,} "
        f"| {found['peak_memory_mb']:.0f} |"
        for found in results["stream"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
