"""What SetFit's trainers need from us, teacher's and student's alike."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from setfit import TrainingArguments
from torch.utils.data import BatchSampler
from transformers import PrinterCallback, SchedulerType

from setfit_kd.errors import OutOfMemoryError, TrainingError
from setfit_kd.memory import Attempt, OOMBackoff, clear_cache, first_line, is_out_of_memory
from setfit_kd.models import checkpointed_layers, default_prompt, is_static
from setfit_kd.training.checkpoints import Checkpoints, Stateful
from setfit_kd.training.precision import resolve_precision
from setfit_kd.utils.console import Advance, track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer

    from setfit_kd.config import StageConfig

    Config = TypeVar("Config", bound=StageConfig)
from setfit_kd.training.callbacks import ProgressCallback

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
    steps: int | None = None,
) -> TrainingArguments:
    """SetFit's arguments for one embedding phase that logs every step and writes and reports nothing."""
    return TrainingArguments(
        output_dir=output_dir,
        batch_size=(batch_size, batch_size),
        num_epochs=(epochs, 1),
        body_learning_rate=(learning_rate, learning_rate),
        num_iterations=num_iterations,
        seed=seed,
        max_steps=-1 if steps is None else steps,
        use_amp=precision == "fp16",
        show_progress_bar=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )


STATIC_LEARNING_RATE = 1e-3
"""A token's vector is moved only by the texts that it stands in, so that it takes larger steps than a network."""


def resolve_learning_rate(given: float | None, body: SentenceTransformer, *, usual: float) -> float:
    """The learning rate given, or what is usual for this kind of body."""
    if given is not None:
        return given
    return STATIC_LEARNING_RATE if is_static(body) else usual


_losses: ContextVar[list[float] | None] = ContextVar("losses", default=None)


@contextmanager
def record_losses() -> Iterator[list[float]]:
    """Within this block, the loss of each step of a training that ends well is added to the list yielded."""
    losses: list[float] = []
    token = _losses.set(losses)
    try:
        yield losses
    finally:
        _losses.reset(token)


class FixedBatchSampler(BatchSampler):
    """Batches laid out beforehand, as lists of row indices."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def prepare_inner_trainer(trainer: Trainer, advance: Advance) -> None:
    """Settle what SetFit leaves to its inner trainer's defaults: one device, prompt, our progress bar, no prints."""
    inner = trainer.st_trainer
    inner.remove_callback(PrinterCallback)
    inner.add_callback(ProgressCallback(advance))
    inner.data_collator.prompts = default_prompt(trainer.model.model_body)
    if inner.args.n_gpu > 1:
        # Several GPUs would be wrapped in DataParallel, which the objectives' whole-batch losses cannot use.
        inner.args._n_gpu = 1
    trainer.model.model_body.to(inner.args.device)


def train(
    body: SentenceTransformer,
    make: Callable[[Config, torch.device, str], Trainer],
    config: Config,
    *,
    device: torch.device,
    texts: Sequence[str],
    batch_texts: int,
    steps: int,
    description: str,
    checkpoints: str | Path | None = None,
) -> SetFitModel:
    """Train the body, down the backoff where memory runs out, then fit the head.

    A step that fails in its forward or backward pass is done again, in smaller micro-batches. What cannot go on in
    place, such as a failed optimizer step or a change of device, starts again from the weights that the body came with.

    Args:
        body: What is trained, in place.
        make: From the config with its precision and micro-batch size settled, a device, and a folder for its files to a
            trainer.
        config: How.
        device: Where to begin.
        texts: Some of what is trained on, for the probe of the precision.
        batch_texts: Texts in a whole batch.
        steps: Steps of the body's training, for the progress bar.
        description: What to call it there and in messages.
        checkpoints: Folder in which the training's state is kept from time to time; one that holds the state of this
            training goes on from there.

    Raises:
        OutOfMemoryError: The last rung failed too, or the head does not fit into memory. The body then has the weights
            that it came with, as after any error.
        TrainingError: The loss or the weights are no longer finite.
    """
    if config.max_length is not None and body.max_seq_length != math.inf:  # a static body reads texts of any length
        body.max_seq_length = min(config.max_length, body.max_seq_length or config.max_length)
    size = min(config.micro_batch_size or batch_texts, batch_texts)
    start = {name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}
    backoff = OOMBackoff(description, kind="training", device=device, size=size, model=body)
    kept = None if checkpoints is None else Checkpoints(Path(checkpoints), seconds=config.checkpoint_seconds)

    def settled(rung: Attempt) -> Config:
        # What was asked of an accelerator is no word on the CPU that takes over.
        asked = config.precision if rung.device.type == device.type else "auto"
        if is_static(body):  # a table lookup is no faster in fewer bits
            asked = "fp32"
        precision = resolve_precision(asked, body, texts[: rung.size])
        whole = config.micro_batch_size is None and rung.size >= batch_texts
        return config.model_copy(update={"precision": precision.name, "micro_batch_size": None if whole else rung.size})

    def attempt(rung: Attempt) -> Trainer:
        backoff.step = None
        body.to(rung.device).load_state_dict(start)
        with TemporaryDirectory(prefix="setfit-kd-") as scratch:
            trainer = make(settled(rung), rung.device, scratch)
            _schedule(trainer.st_trainer.args, config, steps)
            if kept is not None:
                kept.attach(trainer, *_stateful(trainer))
            _train_body(trainer, backoff, description=description, steps=steps)
        return trainer

    def clear() -> None:
        _reset_body(body)
        if kept is not None:  # an attempt that begins anew has nothing to do with the one before
            kept.clear()

    try:
        with checkpointed_layers(body) if config.gradient_checkpointing else nullcontext():
            trainer = backoff.run(attempt, clear=clear)
        _fit_head(trainer, description)
        recorded = _losses.get()
        if recorded is not None:
            recorded.extend(step_losses(trainer))
        return trainer.model
    except BaseException as error:
        if kept is not None and isinstance(error, TrainingError):  # to resume it would lead to the same end
            kept.clear()
        _reset_body(body)
        body.load_state_dict(start)
        raise


_MAX_WARMUP_STEPS = 500


def _schedule(arguments: Any, config: StageConfig, steps: int) -> None:
    """How the learning rate goes up and down, which SetFit does not pass on either."""
    warmup = config.warmup_steps
    arguments.warmup_steps = min(_MAX_WARMUP_STEPS, math.ceil(steps / 10)) if warmup is None else warmup
    arguments.lr_scheduler_type = SchedulerType(_SCHEDULES.get(config.schedule, config.schedule))
    arguments.weight_decay = config.weight_decay


_SCHEDULES = {"constant": "constant_with_warmup", "plateau": "constant_with_warmup"}


def _train_body(trainer: Trainer, backoff: OOMBackoff, *, description: str, steps: int) -> None:
    """Train the body on the trainer's own data, with a progress bar over its ``steps``."""
    started = time.perf_counter()
    parameters = trainer.dataset_to_parameters(trainer.train_dataset)
    with track(description, steps) as advance:
        prepare_inner_trainer(trainer, advance)
        retry_failed_steps(trainer.st_trainer, backoff)
        logger.debug("%s: %d steps begin.", description, steps)
        try:
            trainer.train_embeddings(*parameters)
        except ValueError:  # evaluations within the training refuse NaN
            _check_finite(trainer, description)
            raise
    _check_finite(trainer, description)
    _drop_optimizer(trainer.st_trainer)
    finish_training(trainer, backoff.attempt.device)
    losses, seconds = step_losses(trainer), time.perf_counter() - started
    logger.debug("%s: %d steps in %.1f s, loss %.4f to %.4f.", description, len(losses), seconds, losses[0], losses[-1])


def _check_finite(trainer: Trainer, description: str) -> None:
    """Raise a `TrainingError` where the last loss or a weight of the body is not finite."""
    losses = step_losses(trainer)
    if losses and not math.isfinite(losses[-1]):
        what = f"the loss is {losses[-1]}"
    elif not all(bool(parameter.isfinite().all()) for parameter in trainer.model.model_body.parameters()):
        what = "the weights are not finite"
    else:
        return
    raise TrainingError(
        f"{description}: {what} after step {trainer.st_trainer.state.global_step}.",
        hint="Lower --learning-rate (for a teacher, --teacher-learning-rate), or add --precision fp32.",
    )


def _fit_head(trainer: Trainer, description: str) -> None:
    """Fit the head on the trainer's own data; one that does not fit into memory is an `OutOfMemoryError`."""
    try:
        trainer.train_classifier(*trainer.dataset_to_parameters(trainer.train_dataset))
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{description}: memory ran out while the head was fitted ({first_line(str(error))}).",
            hint="Free some memory, or use fewer texts or a body with shorter embeddings.",
        ) from error


def _stateful(trainer: Trainer) -> list[Stateful]:
    """The callbacks of a trainer that have a state of their own."""
    return [callback for callback in trainer.st_trainer.callback_handler.callbacks if isinstance(callback, Stateful)]


def _drop_optimizer(inner: Any) -> None:
    """Free the optimizer's state, twice the size of the body, which the trainer's many references would keep."""
    for holder in (inner, inner.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    inner.accelerator.free_memory()
    clear_cache(inner.args.device)


def retry_failed_steps(inner: Any, backoff: OOMBackoff) -> None:
    """Have the inner trainer do a step again whose forward or backward pass ran out of memory."""
    plain = inner.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        backoff.step = inner.state.global_step + 1
        while True:
            try:
                loss: torch.Tensor = plain(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error) or not backoff.can_retry_in_place:
                    raise
                cause = str(error)
            else:
                backoff.succeeded()
                return loss
            size = backoff.attempt.size
            backoff.back_off(cause, clear=partial(inner.loss.zero_grad, set_to_none=True))
            if backoff.attempt.size < size:
                inner.loss.micro_batch_size = backoff.attempt.size

    inner.training_step = training_step


def step_losses(trainer: Trainer) -> list[float]:
    """The loss of each step of the last training."""
    return [entry["embedding_loss"] for entry in trainer.st_trainer.state.log_history if "embedding_loss" in entry]


def finish_training(trainer: Trainer, device: torch.device) -> None:
    """Leave the trained model on its device, in evaluation mode and single precision, without gradients."""
    _reset_body(trainer.model.model_body.to(device))


def _reset_body(body: SentenceTransformer) -> None:
    """Take from a body what training has put on it: mixed precision, training mode, gradients."""
    extract_model_from_parallel(body, keep_fp32_wrapper=False)
    body.eval()
    body.zero_grad(set_to_none=True)


@contextmanager
def inner_trainer_options(device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Within this block, SetFit's trainers are built for ``device`` and ``precision``.

    SetFit builds the arguments of its inner trainer itself and passes neither on, so that trainer would pick the
    first accelerator whatever the model is on; its choice is cached when the arguments are made.
    """
    import setfit.trainer as setfit_trainer

    original = setfit_trainer.SentenceTransformerTrainingArguments

    def arguments(*args: Any, **kwargs: Any) -> Any:
        made = original(
            *args,
            **kwargs,
            use_cpu=device.type == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # which would log a NaN as the mean of the losses before it
            save_strategy="no",
            dataloader_pin_memory=device.type == "cuda",
        )
        if device.type == "cuda" and device.index:
            # The library has settled on the first GPU by now, in its own cache and in accelerate's shared state.
            vars(made)["_setup_devices"] = made.distributed_state.device = device
        return made

    setfit_trainer.SentenceTransformerTrainingArguments = arguments
    try:
        yield
    finally:
        setfit_trainer.SentenceTransformerTrainingArguments = original
