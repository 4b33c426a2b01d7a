"""Trainings that are the same with one process and with several; a script for torchrun."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from synthetic import QUICK, few_labels, pool_signals, weights

from setfit_kd import train_student, train_teacher
from setfit_kd.cli import main as cli
from setfit_kd.distributed.ranks import OtherRanks, use_ranks
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.bodies import load_body
from setfit_kd.training.loss_trainer import LossTrainer
from setfit_kd.training.shared_batches import _Part

LIMIT = 4  # texts that fit in memory in the function whose name a body has
TEACHER = {"device": "cpu", "precision": "fp32", "teacher_batch_size": 16, "teacher_steps": 4, "num_iterations": 1}
PAIRS = {"kind": "teacher", "teacher_objective": "pairs"}
TRAININGS: dict[str, dict[str, Any]] = {
    "student": {"kind": "student"},
    "teacher": {"kind": "teacher"},
    "pairs": PAIRS,
    "float32": {"kind": "student", "dtype": torch.float32},
    "bf16": {"kind": "student", "dtype": torch.float32, "precision": "bf16"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "student": {"kind": "student", "micro_batch_size": 3},
    "teacher": {"kind": "teacher", "micro_batch_size": 3, "gradient_checkpointing": True},
    "pairs": {**PAIRS, "shares": False},
}
OUT_OF_MEMORY: dict[str, dict[str, Any]] = {
    "embed_column": {"kind": "student", "fails": "embed_column"},
    "backward": {"kind": "student", "fails": "backward"},
    "embed_rows": {"kind": "student", "fails": "embed_rows"},
}


def train(
    body: Path, *, kind: str, dtype: torch.dtype = torch.float64, fails: str = "", shares: bool = True, **settings: Any
) -> dict[str, Any]:
    """Return the weights, the gradients of the first step, and the numbers of texts after each OOM event.

    Without ``shares``, the other processes are dealt no texts.
    """
    model: Any = load_body(body).to(dtype)
    model.fails = fails
    deal = OtherRanks.deal if shares else lambda _, lengths: [np.argsort(-lengths)]
    with record_gradients() as gradients, shared_backoff() as events, patch.object(OtherRanks, "deal", deal):
        if kind == "student":
            trained = train_student(pool_signals(), model, **{**QUICK, **settings})
        else:
            trained = train_teacher(few_labels(), model, **{**TEACHER, **settings})
    return {"weights": weights(trained), "gradients": gradients, "sizes": [event["to"]["texts"] for event in events]}


@contextmanager
def record_gradients() -> Iterator[list[torch.Tensor]]:
    training_step, gradients = LossTrainer.training_step, list[torch.Tensor]()

    def record(trainer: LossTrainer, *args: Any) -> torch.Tensor:
        loss = training_step(trainer, *args)
        if not gradients:
            gradients.extend(weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None)
        return loss

    with patch.object(LossTrainer, "training_step", record):
        yield gradients


def limit_memory(owner: type, name: str) -> None:
    """Let a function of a loss run out of memory with more than `LIMIT` texts, if the body has its name."""
    original = getattr(owner, name)

    def limited(loss: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(loss.model, "fails", "") == name and (loss.micro_batch_size or LIMIT + 1) > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(loss, *args, **kwargs)

    setattr(owner, name, limited)


def main(body: str, file: str, *command: str) -> None:
    """Run all trainings and write the results to a file, then run a command of the command line."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # see `conftest.set_up_process`
    for name in OUT_OF_MEMORY:
        limit_memory(SimilarityLoss if name == "embed_rows" else _Part, name)  # on rank 0 or on the other
    groups = TRAININGS, VARIANTS, OUT_OF_MEMORY
    with use_ranks():
        results = [{name: train(Path(body), **settings) for name, settings in group.items()} for group in groups]
        torch.save(results, file)
        sys.exit(cli(list(command), standalone_mode=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
