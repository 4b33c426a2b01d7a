"""Training loop that the trainers of teacher, student and fine-tuned transformers share."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from torch.utils.data import Dataset
from transformers import SchedulerType

from setfit_kd.config.base import StageConfig
from setfit_kd.errors import OutOfMemoryError, TrainingError, first_line, is_out_of_memory
from setfit_kd.losses.base import BatchLoss
from setfit_kd.memory.backoff import Attempt, OOMBackoff, clear_cache
from setfit_kd.models.bodies import is_static, set_pairs
from setfit_kd.models.layers import checkpointed_layers
from setfit_kd.training.loss_trainer import Checkpoints, LossTrainer
from setfit_kd.training.precision import resolve_precision
from setfit_kd.utils.console import track

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=StageConfig)

STATIC_LEARNING_RATE = 1e-3  # larger than for a network, since only the texts that contain a token update its vector
_MAX_WARMUP_STEPS = 500
_SCHEDULES = {"constant": "constant_with_warmup", "plateau": "constant_with_warmup"}


class StageTrainer(Protocol):
    """Trainer of a model: first of its body, with ``inner``, then of its head."""

    inner: LossTrainer
    model: SetFitModel

    def train_body(self) -> None: ...  # noqa: D102
    def fit_head(self) -> None: ...  # noqa: D102


class BodyTrainer:
    """`StageTrainer` of a body without a head, or with one that is part of it.

    Args:
        model: The model that `train` returns.
        body: The body to train.
        dataset: The training data.
        create_loss: Function that creates the loss from the config.
        config, device, output_dir: Arguments of ``make_trainer``, see `train`.
        batches: Rows of each batch; by default, they are drawn for the epochs in the config.
        learning_rate: Learning rate if none is in the config and the body is not static.
    """

    def __init__(
        self,
        model: Any,
        body: SentenceTransformer,
        dataset: Dataset[Any],
        create_loss: Callable[[Config], BatchLoss],
        config: Config,
        device: torch.device,
        output_dir: str,
        *,
        batches: Sequence[list[int]] | None = None,
        learning_rate: float = 5e-5,
    ) -> None:
        settings: Any = config
        rate = resolve_learning_rate(settings.learning_rate, body, default=learning_rate)
        epochs = settings.epochs if batches is None else 1
        options: Any = {"batch_size": settings.batch_size, "learning_rate": rate, "epochs": epochs}
        self.model, self.inner = model, LossTrainer(body, config, device, output_dir, **options)
        self.inner.train_dataset, self.inner.batches = dataset, batches
        self.inner.loss = create_loss(config).to(body.device)

    def train_body(self) -> None:
        """Train the body."""
        self.inner.train()

    def fit_head(self) -> None:
        """Do nothing: there is no other head."""


def resolve_learning_rate(learning_rate: float | None, body: SentenceTransformer, *, default: float) -> float:
    """Return the learning rate, or if it is None the default for this kind of body."""
    default = STATIC_LEARNING_RATE if is_static(body) else default
    return default if learning_rate is None else learning_rate


def train(
    body: SentenceTransformer,
    make_trainer: Callable[[Config, torch.device, str], StageTrainer],
    config: Config,
    *,
    device: torch.device,
    texts: Sequence[str],
    batch_texts: int,
    steps: int,
    description: str,
    checkpoints: str | Path | None = None,
) -> SetFitModel:
    """Train a body in place, backing off when memory runs out, then fit the head.

    A step whose forward or backward pass runs out of memory is repeated in smaller micro-batches. If that is not
    possible (the optimizer step failed, or the device changes), training restarts from the body's initial weights.

    Args:
        make_trainer: Function that creates a trainer from the config, with precision and micro-batch size resolved, a
            device and a folder for temporary files.
        texts: Some of the training texts, to measure the speed of each precision; the body is marked if they are pairs.
        batch_texts: Number of texts in a full batch.
        checkpoints: Folder for checkpoints. If it holds checkpoints of this training, training resumes from them.

    Returns:
        The trained model, with the loss of each step in the attribute ``loss_curve_``.

    Raises:
        OutOfMemoryError: If the last attempt fails too. As after any error, the body has its initial weights.
        TrainingError: If the loss or the weights are not finite.
    """
    set_pairs(body, texts)
    if config.max_length is not None and body.max_seq_length != math.inf:  # a static body has no maximum length
        body.max_seq_length = min(config.max_length, body.max_seq_length or config.max_length)
    size = min(config.micro_batch_size or batch_texts, batch_texts)
    initial_weights = {name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}
    backoff = OOMBackoff(description, kind="training", device=device, batch_size=size, model=body)
    store = None if checkpoints is None else Checkpoints(Path(checkpoints), seconds=config.checkpoint_seconds)

    def resolve_config(attempt: Attempt) -> Config:
        # A precision requested for an accelerator does not apply to the CPU fallback.
        requested = config.precision if attempt.device.type == device.type else "auto"
        requested = "fp32" if is_static(body) else requested  # a table lookup is no faster in half precision
        precision = resolve_precision(requested, body, texts[: attempt.batch_size])
        full_batch = config.micro_batch_size is None and attempt.batch_size >= batch_texts
        micro_batch_size = None if full_batch else attempt.batch_size
        return config.model_copy(update={"precision": precision.name, "micro_batch_size": micro_batch_size})

    def run_attempt(attempt: Attempt) -> StageTrainer:
        backoff.step = None
        body.to(attempt.device).load_state_dict(initial_weights)
        with TemporaryDirectory(prefix="setfit-kd-") as temporary_folder:
            trainer = make_trainer(resolve_config(attempt), attempt.device, temporary_folder)
            inner = trainer.inner
            _set_schedule(inner.args, config, steps)
            inner.backoff = backoff
            if store is not None:
                inner.args.output_dir, inner.checkpoints = str(store.folder), store
            _train_body(trainer, description, steps)
        return trainer

    def clear() -> None:
        _reset_body(body)
        if store is not None:  # the next attempt starts from the initial weights
            store.clear()

    is_trained = False
    try:
        with checkpointed_layers(body) if config.gradient_checkpointing else nullcontext():
            trainer = backoff.run(run_attempt, clear=clear)
        is_trained = True
        trainer.fit_head()
    except BaseException as error:
        if store is not None and isinstance(error, TrainingError):  # a resumed training would diverge again
            store.clear()
        _reset_body(body)
        body.load_state_dict(initial_weights)
        if not is_trained or isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        message = f"{description}: out of memory while fitting the head ({first_line(str(error))})."
        raise OutOfMemoryError(message, hint="Use fewer texts, or a body with shorter embeddings.") from error
    trainer.model.loss_curve_ = trainer.inner.losses
    return trainer.model


def _set_schedule(arguments: Any, config: StageConfig, steps: int) -> None:
    warmup = config.warmup_steps
    arguments.warmup_steps = min(_MAX_WARMUP_STEPS, math.ceil(steps / 10)) if warmup is None else warmup
    arguments.lr_scheduler_type = SchedulerType(_SCHEDULES.get(config.schedule, config.schedule))
    arguments.weight_decay = config.weight_decay


def _train_body(trainer: StageTrainer, description: str, steps: int) -> None:
    """Train the body, with a progress bar, and restore its best weights if it was evaluated."""
    started = time.perf_counter()
    inner = trainer.inner
    with track(description, steps, unit="steps") as inner.advance:
        logger.debug("%s: starting %d steps.", description, steps)
        try:
            trainer.train_body()
        except ValueError:  # raised by an evaluation step if embeddings are NaN
            _check_finite(inner, description)
            raise
    for callback in inner.evaluation_callbacks:
        callback.restore_best_weights()
    _check_finite(inner, description)
    # Free the optimizer's state, twice the size of the body, which the trainer still refers to in several places.
    for holder in (inner, inner.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    inner.accelerator.free_memory()
    clear_cache(inner.args.device)
    _reset_body(inner.model)
    losses, seconds = inner.losses, time.perf_counter() - started
    logger.debug("%s: %d steps in %.1f s, loss %.4f to %.4f.", description, len(losses), seconds, losses[0], losses[-1])


def _check_finite(inner: LossTrainer, description: str) -> None:
    """Raise a `TrainingError` if the last loss or a weight of the body is not finite."""
    losses = inner.losses
    if losses and not math.isfinite(losses[-1]):
        problem = f"the loss is {losses[-1]}"
    elif not all(bool(parameter.isfinite().all()) for parameter in inner.model.parameters()):
        problem = "the weights are not finite"
    else:
        return
    message = f"{description}: {problem} after step {inner.state.global_step}."
    raise TrainingError(message, hint="Lower --learning-rate or --teacher-learning-rate, or add --precision fp32.")


def _reset_body(body: SentenceTransformer) -> None:
    """Undo what training sets on a body: mixed precision, training mode and gradients."""
    extract_model_from_parallel(body, keep_fp32_wrapper=False)
    body.eval()
    body.zero_grad(set_to_none=True)
