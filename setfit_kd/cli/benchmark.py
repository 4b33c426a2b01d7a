"""``setfit-kd benchmark``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from setfit_kd.cli.options import json_option, output_options, passed, pickle_option, setting_options, threads_option
from setfit_kd.config.run import RunConfig
from setfit_kd.utils.console import json_text


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@setting_options("unlabeled", "text_column", "pair_column")
@click.option("--texts", "n_texts", type=click.IntRange(1), default=500, metavar="N",
              show_default=True, help="Number of texts to classify.")  # fmt: skip
@threads_option
@click.option("--device", metavar="DEVICE", help="Device: auto, cuda, cuda:N, mps or cpu. [default: cpu]")
@json_option
@pickle_option
@output_options
def benchmark(
    models: tuple[str, ...], n_texts: int, threads: int | None, as_json: bool, trust_pickle: bool, **flags: Any
) -> None:
    """Compare speed, memory and size of classifiers.

    MODEL is a bundle, a run folder, one of its students, or a SetFit model. Each model is measured in a separate
    process, one after the other: on single texts, then on batches of several sizes. Ratios are relative to the first
    model. The texts come from --unlabeled, or from the bundled news corpus.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.data.sources import read
    from setfit_kd.inference.benchmark import measure_speed
    from setfit_kd.utils.console import track

    config = RunConfig.of(**{"unlabeled": "bundled:newswire", "device": "cpu", **passed(flags)})
    texts = read(config.unlabeled or "", text_column=config.text_column, pair_column=config.pair_column).texts
    texts = texts[:: max(1, len(texts) // n_texts)][:n_texts]
    speeds = {}
    with track("Measuring", len(models), unit="models") as advance:
        for path in dict.fromkeys(models):
            speeds[path] = measure_speed(path, texts, threads=threads, device=config.device, trust_pickle=trust_pickle)
            advance(1)
    if as_json:
        results = {"texts": len(texts), "models": {name: asdict(speed) for name, speed in speeds.items()}}
        echo(json_text(results, indent=2))
        return
    names = [Path(model).name or model for model in speeds]
    if len(set(names)) < len(names):
        names = list(speeds)
    first = next(iter(speeds.values()))
    rows = []
    for name, speed in zip(names, speeds.values(), strict=True):
        latency = [f"{milliseconds:.2f}" for milliseconds in (speed.p50_ms, speed.p95_ms, speed.p99_ms)]
        throughput = (f"{speed.texts_per_second:,.0f}", f"{speed.texts_per_second / first.texts_per_second:,.1f}x")
        disk = "" if speed.disk_mb is None else f"{speed.disk_mb:.1f}"
        rows.append((name, *latency, *throughput, f"{speed.load_seconds:.2f}", f"{speed.memory_mb:.0f}", disk))
    show_table(("", "p50 ms", "p95 ms", "p99 ms", "texts/s", "ratio", "load s", "memory MB", "disk MB"), rows)
    note = "p50 to p99: latency of a single text. ratio: texts/s relative to the first model."
    echo(f"\n{len(texts)} texts, {first.threads} threads. {note}")
