"""What SetFit's trainers need from us, teacher's and student's alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from setfit import TrainingArguments
from torch.utils.data import BatchSampler
from transformers import PrinterCallback, TrainerCallback

from setfit_kd.progress import Advance, track

if TYPE_CHECKING:
    from setfit import Trainer

logger = logging.getLogger(__name__)


def training_arguments(
    output_dir: str,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
    num_iterations: int,
    seed: int,
    precision: str,
) -> TrainingArguments:
    """SetFit's arguments for one embedding phase that logs every step and writes and reports nothing."""
    return TrainingArguments(
        output_dir=output_dir,
        batch_size=(batch_size, batch_size),
        num_epochs=(epochs, 1),
        body_learning_rate=(learning_rate, learning_rate),
        num_iterations=num_iterations,
        seed=seed,
        use_amp=precision == "fp16",
        show_progress_bar=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )


class ProgressCallback(TrainerCallback):
    """Hands each finished step to a progress bar."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Advance by one step."""
        self.advance(1)


class FixedBatches(BatchSampler):
    """Batches laid out beforehand, as lists of row indices."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def prepare_inner_trainer(trainer: Trainer, advance: Advance) -> None:
    """Settle what SetFit leaves to its inner trainer's defaults: one device, our progress bar, nobody's prints."""
    inner = trainer.st_trainer
    inner.remove_callback(PrinterCallback)
    inner.add_callback(ProgressCallback(advance))
    if inner.args.n_gpu > 1:
        # Several GPUs would be wrapped in DataParallel, which the objectives' whole-batch losses cannot use.
        inner.args._n_gpu = 1
    trainer.model.model_body.to(inner.args.device)


def fit(trainer: Trainer, device: torch.device, *, description: str, steps: int) -> None:
    """Train body and head on the trainer's own data, with a progress bar over the body's ``steps``."""
    started = time.perf_counter()
    parameters = trainer.dataset_to_parameters(trainer.train_dataset)
    with track(description, steps) as advance:
        prepare_inner_trainer(trainer, advance)
        logger.debug("%s: %d steps begin.", description, steps)
        trainer.train_embeddings(*parameters)
    settle(trainer, device)
    trainer.train_classifier(*parameters)
    losses, seconds = losses_of(trainer), time.perf_counter() - started
    logger.debug("%s: %d steps in %.1f s, loss %.4f to %.4f.", description, len(losses), seconds, losses[0], losses[-1])


def losses_of(trainer: Trainer) -> list[float]:
    """The loss of each step of the last training."""
    return [entry["embedding_loss"] for entry in trainer.st_trainer.state.log_history if "embedding_loss" in entry]


def settle(trainer: Trainer, device: torch.device) -> None:
    """Leave the trained model on its device, in evaluation mode and single precision, without gradients."""
    body = trainer.model.model_body
    trainer.st_trainer.accelerator.unwrap_model(body, keep_fp32_wrapper=False)
    body.to(device)
    body.eval()
    body.zero_grad(set_to_none=True)
