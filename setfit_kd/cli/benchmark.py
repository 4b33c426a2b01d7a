"""``setfit-kd benchmark``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from setfit_kd.cli.options import (
    json_option,
    output_options,
    passed_settings,
    pickle_option,
    setting_options,
    threads_option,
)
from setfit_kd.config import RunConfig
from setfit_kd.utils.escape import json_text

if TYPE_CHECKING:
    from setfit_kd.inference.benchmark import Speed


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@setting_options("unlabeled", "text_column")
@click.option("--texts", "n_texts", type=click.IntRange(1), default=500, metavar="N",
              help="How many texts to classify. [500]")  # fmt: skip
@threads_option
@setting_options("device")
@json_option
@pickle_option
@output_options
def benchmark(
    models: tuple[str, ...],
    n_texts: int,
    threads: int | None,
    as_json: bool,
    trust_pickle: bool,
    **flags: Any,
) -> None:
    """Measure speed, memory and size of classifiers, side by side.

    MODEL is a bundle, a run's folder, one of its students, or a SetFit model. Each is measured in a process of its
    own, one after the other: texts one by one, then in batches of several sizes. Ratios are to the first. The texts
    are those of --unlabeled, or of the bundled news corpus; without --device, the CPU does the work.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.data import read
    from setfit_kd.inference.benchmark import measure_speed
    from setfit_kd.utils.console import track

    config = RunConfig.of(**{"unlabeled": "bundled:newswire", "device": "cpu", **passed_settings(flags)})
    texts = read(config.unlabeled or "", text_column=config.text_column).texts
    texts = texts[:: max(1, len(texts) // n_texts)][:n_texts]
    found: dict[str, Speed] = {}
    with track("Measuring", len(models)) as advance:
        for model in dict.fromkeys(models):
            found[model] = measure_speed(model, texts, threads=threads, device=config.device, trust_pickle=trust_pickle)
            advance(1)
    if as_json:
        about = {"texts": len(texts), "models": {name: asdict(speed) for name, speed in found.items()}}
        echo(json_text(about, indent=2))
        return
    headings = ("", "p50 ms", "p95 ms", "p99 ms", "texts/s", "ratio", "load s", "memory MB", "disk MB")
    first = next(iter(found.values()))
    rows = [_row(name, speed, first) for name, speed in zip(_short(tuple(found)), found.values(), strict=True)]
    show_table(headings, rows)
    echo(f"\n{len(texts)} texts, {first.threads} threads. p50 to p99: a text alone. ratio: of texts/s.")


def _short(models: tuple[str, ...]) -> list[str]:
    """The last part of each path, or the whole where two end alike."""
    ends = [Path(model).name or model for model in models]
    return ends if len(set(ends)) == len(ends) else list(models)


def _row(name: str, speed: Speed, first: Speed) -> tuple[str, ...]:
    return (
        name,
        f"{speed.p50_ms:.2f}",
        f"{speed.p95_ms:.2f}",
        f"{speed.p99_ms:.2f}",
        f"{speed.texts_per_second:,.0f}",
        f"{speed.texts_per_second / first.texts_per_second:,.1f}x",
        f"{speed.load_seconds:.2f}",
        f"{speed.memory_mb:.0f}",
        "" if speed.disk_mb is None else f"{speed.disk_mb:.1f}",
    )
