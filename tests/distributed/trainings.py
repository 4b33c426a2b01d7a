"""Trainings to compare between one process and several; started with torchrun, it runs them on all processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import QUICK, few_labels, pool_signals, weights

from setfit_kd import train_student, train_teacher
from setfit_kd.distributed.ranks import OtherRanks, other_ranks, use_ranks
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.bodies import load_body
from setfit_kd.training import shared_batches
from setfit_kd.training.loss_trainer import LossTrainer

LIMIT = 4  # texts that fit in the memory of rank 1 if a body says that it runs out
TEACHER: dict[str, Any] = {"device": "cpu", "precision": "fp32", "teacher_batch_size": 16, "teacher_steps": 4}


def run_trainings(body: Path) -> dict[str, Any]:
    """Return the trained weights, the first gradients and the OOM events of each training."""
    first_gradients: list[torch.Tensor] = []
    training_step = LossTrainer.training_step

    def record(trainer: LossTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(trainer, *args, **kwargs)
        if not first_gradients:
            first_gradients.extend(
                weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None
            )
        return loss

    deal_texts = OtherRanks.deal

    def train(
        kind: str, *, dtype: torch.dtype = torch.float64, fails: str = "", deal: Any = deal_texts, **settings: Any
    ) -> dict[str, Any]:
        first_gradients.clear()
        OtherRanks.deal = deal  # type: ignore[method-assign]
        model: Any = load_body(body).to(dtype)
        model.fails = fails
        with shared_backoff() as events:
            if kind == "student":
                trained = train_student(pool_signals(), model, **{**QUICK, **settings})
            else:
                trained = train_teacher(few_labels(), model, **{**TEACHER, **settings})
        return {"weights": weights(trained), "gradients": list(first_gradients), "events": list(events)}

    LossTrainer.training_step = record  # type: ignore[assignment,method-assign]
    try:
        return {
            "student": train("student"),
            "student, micro-batches": train("student", micro_batch_size=3),
            "teacher": train("teacher"),
            "teacher, micro-batches": train("teacher", micro_batch_size=3),
            "pairs": train("teacher", teacher_objective="pairs"),
            "no texts": train("student", deal=lambda _, lengths: [np.argsort(-lengths)]),
            "float32": train("student", dtype=torch.float32),
            "forward": train("student", fails="forward"),
            "backward": train("student", fails="backward"),
        }
    finally:
        OtherRanks.deal = deal_texts  # type: ignore[method-assign]
        LossTrainer.training_step = training_step  # type: ignore[method-assign]


def limit_memory() -> None:
    """Let other ranks run out of memory in the pass that the body names, with more than `LIMIT` texts."""

    def limited(name: str, original: Any) -> Any:
        def call(part: Any, *args: Any) -> Any:
            if part.model.fails == name and (part.micro_batch_size or LIMIT + 1) > LIMIT:
                raise torch.OutOfMemoryError(f"CUDA out of memory in the {name} pass.")
            return original(part, *args)

        return call

    part: Any = shared_batches._Part
    part.embed_column, part.backward = limited("forward", part.embed_column), limited("backward", part.backward)


if __name__ == "__main__":
    torch.set_num_threads(1)
    limit_memory()
    with use_ranks():
        ranks = other_ranks()
        results = run_trainings(Path(sys.argv[1]))
        torch.save({**results, "count": ranks.count if ranks else 0}, sys.argv[2])
