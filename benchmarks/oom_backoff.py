"""What the out-of-memory backoff costs a training phase in which memory never runs out.

Run: python benchmarks/backoff.py [--steps 30]
Its parts are timed one by one, since the whole is far below the noise of a training: the copy of the first weights that
a new start would need, putting them back, and the watch over each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch

from setfit_kd import TeacherSignals, train_student
from setfit_kd.data import read
from setfit_kd.memory import OOMBackoff
from setfit_kd.models import cut_layers, embed, load_body, locate
from setfit_kd.training.loop import retry_failed_steps

BATCH = 32


def seconds_of(work: Callable[[], Any], *, times: int) -> float:
    """The best of three means over so many calls."""

    def mean() -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    return min(mean() for _ in range(3))


@click.command()
@click.option("--steps", default=30, type=click.IntRange(4), help="Steps of 32 texts of the phase that is timed.")
def main(steps: int) -> None:
    """Time and print."""
    body = cut_layers(load_body(locate("demo:all-MiniLM-L6-v2")), (0, 2, 5))
    texts = (read("bundled:newswire").texts * 9)[: steps * BATCH]
    classes = np.arange(len(texts)) % 2
    signals = TeacherSignals(texts, np.eye(2, dtype=np.float32)[classes], ("a", "b"), embed(body, texts))
    started = time.perf_counter()
    train_student(signals, body, device="cpu", precision="fp32", epochs=1, batch_size=BATCH)
    phase = time.perf_counter() - started

    start = {name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}
    copied = seconds_of(lambda: {name: value.to("cpu", copy=True) for name, value in start.items()}, times=3)
    put_back = seconds_of(lambda: body.load_state_dict(start), times=3)
    inner = SimpleNamespace(training_step=lambda: torch.zeros(()), state=SimpleNamespace(global_step=0))
    plain = seconds_of(inner.training_step, times=10_000)
    backoff = OOMBackoff("Phase", kind="training", device=torch.device("cpu"), size=BATCH, model=body)
    retry_failed_steps(inner, backoff)
    watched = seconds_of(inner.training_step, times=10_000) - plain
    total = copied + put_back + steps * watched
    click.echo(f"phase: {steps} steps of {BATCH} texts in {phase:.2f} s")
    click.echo(f"copy of the weights {1e3 * copied:.1f} ms, putting them back {1e3 * put_back:.1f} ms,")
    click.echo(f"watch over a step {1e6 * watched:.1f} µs: {100 * total / phase:.3f} % of the phase")


if __name__ == "__main__":
    main()
