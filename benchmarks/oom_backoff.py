"""Measure the overhead of the OOM backoff in a training that never runs out of memory.

Run: python benchmarks/oom_backoff.py [--steps 30]
The overhead is far below the noise of a training, so its parts are timed separately: copying the initial weights for a
restart, restoring them, and wrapping each training step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np
import torch

from setfit_kd import TeacherSignals, train_student
from setfit_kd.data.sources import read
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.memory.backoff import OOMBackoff
from setfit_kd.models.bodies import load_body, locate_model
from setfit_kd.models.encode import embed
from setfit_kd.models.layers import cut_layers
from setfit_kd.training.loss_trainer import retry_step

BATCH_SIZE = 32


def time_calls(function: Callable[[], Any], *, n_calls: int) -> float:
    """Return the best of three means of the seconds per call."""

    def mean() -> float:
        started = time.perf_counter()
        for _ in range(n_calls):
            function()
        return (time.perf_counter() - started) / n_calls

    return min(mean() for _ in range(3))


@click.command()
@click.option("--steps", default=30, type=click.IntRange(4), help="Training steps of 32 texts.")
def main(steps: int) -> None:
    """Measure and print the overhead."""
    body = cut_layers(load_body(locate_model("demo:all-MiniLM-L6-v2")), (0, 2, 5))
    texts = (read("bundled:newswire").texts * 9)[: steps * BATCH_SIZE]
    classes = np.arange(len(texts)) % 2
    signals = TeacherSignals(texts, np.eye(2, dtype=np.float32)[classes], ("a", "b"), embed(body, texts))
    started = time.perf_counter()
    train_student(signals, body, device="cpu", precision="fp32", epochs=1, batch_size=BATCH_SIZE)
    training = time.perf_counter() - started

    initial = {name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}
    copying = time_calls(lambda: {name: value.to("cpu", copy=True) for name, value in initial.items()}, n_calls=3)
    restoring = time_calls(lambda: body.load_state_dict(initial), n_calls=3)
    step, loss = partial(torch.zeros, ()), SimilarityLoss(body, np.eye(2))
    unwrapped = time_calls(step, n_calls=10_000)
    backoff = OOMBackoff("Phase", kind="training", device=torch.device("cpu"), batch_size=BATCH_SIZE, model=body)
    wrapping = time_calls(lambda: retry_step(step, loss, 1, backoff), n_calls=10_000) - unwrapped
    total = copying + restoring + steps * wrapping
    click.echo(f"training: {steps} steps of {BATCH_SIZE} texts in {training:.2f} s")
    click.echo(f"copying the weights {1e3 * copying:.1f} ms, restoring them {1e3 * restoring:.1f} ms,")
    click.echo(f"wrapping a step {1e6 * wrapping:.1f} µs: {100 * total / training:.3f}% of the training")


if __name__ == "__main__":
    main()
