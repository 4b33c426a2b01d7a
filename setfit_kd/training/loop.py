"""Training loop that the trainers of teacher, student and fine-tuned transformers share."""

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
from setfit_kd.memory.backoff import Attempt, OOMBackoff, clear_cache
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory
from setfit_kd.models.bodies import default_prompt, is_static
from setfit_kd.models.layers import checkpointed_layers
from setfit_kd.training.callbacks import ProgressCallback
from setfit_kd.training.checkpoints import Checkpoints, Stateful
from setfit_kd.training.precision import resolve_precision
from setfit_kd.utils.console import Advance, track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer

    from setfit_kd.config.base import StageConfig

    Config = TypeVar("Config", bound=StageConfig)

logger = logging.getLogger(__name__)

STATIC_LEARNING_RATE = 1e-3
"""Larger than for a network, since only the texts that contain a token update its vector."""
_MAX_WARMUP_STEPS = 500
_SCHEDULES = {"constant": "constant_with_warmup", "plateau": "constant_with_warmup"}
_losses: ContextVar[list[float] | None] = ContextVar("losses", default=None)


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
    """Create SetFit's arguments for one embedding phase that logs every step and neither saves nor reports."""
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


def resolve_learning_rate(learning_rate: float | None, body: SentenceTransformer, *, default: float) -> float:
    """Return the learning rate, or if it is None the default for this kind of body."""
    if learning_rate is not None:
        return learning_rate
    return STATIC_LEARNING_RATE if is_static(body) else default


@contextmanager
def record_losses() -> Iterator[list[float]]:
    """Context manager that yields a list to which every successful training appends the loss of each step."""
    losses: list[float] = []
    token = _losses.set(losses)
    try:
        yield losses
    finally:
        _losses.reset(token)


class FixedBatchSampler(BatchSampler):
    """Sampler of predefined batches, each a list of row indices."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def prepare_inner_trainer(trainer: Trainer, advance: Advance) -> None:
    """Configure what SetFit does not pass to its inner trainer: one device, prompt, progress bar, no prints."""
    inner = trainer.st_trainer
    inner.remove_callback(PrinterCallback)
    inner.add_callback(ProgressCallback(advance))
    inner.data_collator.prompts = default_prompt(trainer.model.model_body)
    if inner.args.n_gpu > 1:
        # With several GPUs the body would be wrapped in DataParallel, which splits the batch of a whole-batch loss.
        inner.args._n_gpu = 1
    trainer.model.model_body.to(inner.args.device)


def train(
    body: SentenceTransformer,
    make_trainer: Callable[[Config, torch.device, str], Trainer],
    config: Config,
    *,
    device: torch.device,
    texts: Sequence[str],
    batch_texts: int,
    steps: int,
    description: str,
    checkpoints: str | Path | None = None,
) -> SetFitModel:
    """Train the body, backing off when memory runs out, then fit the head.

    A step whose forward or backward pass runs out of memory is repeated in smaller micro-batches. If that is not
    possible (the optimizer step failed, or the device changes), training restarts from the body's initial weights.

    Args:
        body: The body, trained in place.
        make_trainer: Function that creates a trainer from the config, with precision and micro-batch size resolved, a
            device and a folder for temporary files.
        config: The settings of the stage.
        device: Device to start on.
        texts: Some of the training texts, to measure the speed of each precision.
        batch_texts: Number of texts in a full batch.
        steps: Number of training steps, for the progress bar and the schedule.
        description: Name of the phase in the progress bar and in messages.
        checkpoints: Folder for checkpoints. If it holds checkpoints of this training, training resumes from them.

    Raises:
        OutOfMemoryError: If the last attempt fails too, or the head does not fit into memory. As after any error, the
            body has its initial weights.
        TrainingError: If the loss or the weights are not finite.
    """
    if config.max_length is not None and body.max_seq_length != math.inf:  # a static body has no maximum length
        body.max_seq_length = min(config.max_length, body.max_seq_length or config.max_length)
    size = min(config.micro_batch_size or batch_texts, batch_texts)
    initial_weights = {name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}
    backoff = OOMBackoff(description, kind="training", device=device, batch_size=size, model=body)
    store = None if checkpoints is None else Checkpoints(Path(checkpoints), seconds=config.checkpoint_seconds)

    def resolve_config(attempt: Attempt) -> Config:
        # A precision requested for an accelerator does not apply to the CPU fallback.
        requested = config.precision if attempt.device.type == device.type else "auto"
        if is_static(body):  # a table lookup is no faster in half precision
            requested = "fp32"
        precision = resolve_precision(requested, body, texts[: attempt.batch_size])
        full_batch = config.micro_batch_size is None and attempt.batch_size >= batch_texts
        micro_batch_size = None if full_batch else attempt.batch_size
        return config.model_copy(update={"precision": precision.name, "micro_batch_size": micro_batch_size})

    def run_attempt(attempt: Attempt) -> Trainer:
        backoff.step = None
        body.to(attempt.device).load_state_dict(initial_weights)
        with TemporaryDirectory(prefix="setfit-kd-") as temporary_folder:
            trainer = make_trainer(resolve_config(attempt), attempt.device, temporary_folder)
            _set_schedule(trainer.st_trainer.args, config, steps)
            if store is not None:
                store.attach(trainer, *_stateful_callbacks(trainer))
            _train_body(trainer, backoff, description=description, steps=steps)
        return trainer

    def clear() -> None:
        _reset_body(body)
        if store is not None:  # the next attempt starts from the initial weights
            store.clear()

    try:
        with checkpointed_layers(body) if config.gradient_checkpointing else nullcontext():
            trainer = backoff.run(run_attempt, clear=clear)
        _fit_head(trainer, description)
        recorded = _losses.get()
        if recorded is not None:
            recorded.extend(step_losses(trainer))
        return trainer.model
    except BaseException as error:
        if store is not None and isinstance(error, TrainingError):  # a resumed training would diverge again
            store.clear()
        _reset_body(body)
        body.load_state_dict(initial_weights)
        raise


def _set_schedule(arguments: Any, config: StageConfig, steps: int) -> None:
    """Set warmup, learning rate schedule and weight decay, which SetFit does not pass to its inner trainer."""
    warmup = config.warmup_steps
    arguments.warmup_steps = min(_MAX_WARMUP_STEPS, math.ceil(steps / 10)) if warmup is None else warmup
    arguments.lr_scheduler_type = SchedulerType(_SCHEDULES.get(config.schedule, config.schedule))
    arguments.weight_decay = config.weight_decay


def _train_body(trainer: Trainer, backoff: OOMBackoff, *, description: str, steps: int) -> None:
    """Train the body on the trainer's data, with a progress bar of ``steps`` steps."""
    started = time.perf_counter()
    parameters = trainer.dataset_to_parameters(trainer.train_dataset)
    with track(description, steps) as advance:
        prepare_inner_trainer(trainer, advance)
        retry_failed_steps(trainer.st_trainer, backoff)
        logger.debug("%s: starting %d steps.", description, steps)
        try:
            trainer.train_embeddings(*parameters)
        except ValueError:  # raised by an evaluation step if embeddings are NaN
            _check_finite(trainer, description)
            raise
    _check_finite(trainer, description)
    _drop_optimizer(trainer.st_trainer)
    finish_training(trainer, backoff.attempt.device)
    losses, seconds = step_losses(trainer), time.perf_counter() - started
    logger.debug("%s: %d steps in %.1f s, loss %.4f to %.4f.", description, len(losses), seconds, losses[0], losses[-1])


def _check_finite(trainer: Trainer, description: str) -> None:
    """Raise a `TrainingError` if the last loss or a weight of the body is not finite."""
    losses = step_losses(trainer)
    if losses and not math.isfinite(losses[-1]):
        problem = f"the loss is {losses[-1]}"
    elif not all(bool(parameter.isfinite().all()) for parameter in trainer.model.model_body.parameters()):
        problem = "the weights are not finite"
    else:
        return
    raise TrainingError(
        f"{description}: {problem} after step {trainer.st_trainer.state.global_step}.",
        hint="Lower --learning-rate (for a teacher, --teacher-learning-rate), or add --precision fp32.",
    )


def _fit_head(trainer: Trainer, description: str) -> None:
    """Fit the head on the trainer's data; raise an `OutOfMemoryError` if memory runs out."""
    try:
        trainer.train_classifier(*trainer.dataset_to_parameters(trainer.train_dataset))
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{description}: out of memory while fitting the head ({first_line(str(error))}).",
            hint="Free some memory, use fewer texts, or choose a body with shorter embeddings.",
        ) from error


def _stateful_callbacks(trainer: Trainer) -> list[Stateful]:
    """Return the trainer's callbacks whose state belongs in checkpoints."""
    return [callback for callback in trainer.st_trainer.callback_handler.callbacks if isinstance(callback, Stateful)]


def _drop_optimizer(inner: Any) -> None:
    """Free the optimizer's state, twice the size of the body, which the trainer still refers to in several places."""
    for holder in (inner, inner.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    inner.accelerator.free_memory()
    clear_cache(inner.args.device)


def retry_failed_steps(inner: Any, backoff: OOMBackoff) -> None:
    """Make the inner trainer repeat a step whose forward or backward pass runs out of memory."""
    original = inner.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        backoff.step = inner.state.global_step + 1
        while True:
            try:
                loss: torch.Tensor = original(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error) or not backoff.can_retry_on_device:
                    raise
                cause = str(error)
            else:
                backoff.record_success()
                return loss
            size = backoff.attempt.batch_size
            backoff.back_off(cause, clear=partial(inner.loss.zero_grad, set_to_none=True))
            if backoff.attempt.batch_size < size:
                inner.loss.micro_batch_size = backoff.attempt.batch_size

    inner.training_step = training_step


def step_losses(trainer: Trainer) -> list[float]:
    """Return the loss of each step of the last training."""
    return [entry["embedding_loss"] for entry in trainer.st_trainer.state.log_history if "embedding_loss" in entry]


def finish_training(trainer: Trainer, device: torch.device) -> None:
    """Leave the trained body on its device, in evaluation mode and single precision, without gradients."""
    _reset_body(trainer.model.model_body.to(device))


def _reset_body(body: SentenceTransformer) -> None:
    """Undo what training sets on a body: mixed precision, training mode and gradients."""
    extract_model_from_parallel(body, keep_fp32_wrapper=False)
    body.eval()
    body.zero_grad(set_to_none=True)


@contextmanager
def inner_trainer_options(device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Context manager in which SetFit's trainers are created for this device and precision.

    SetFit creates the arguments of its inner trainer itself and passes on neither of the two, so the inner trainer
    would choose the first accelerator, whatever device the model is on; the choice is cached when the arguments are
    created.
    """
    import setfit.trainer as setfit_trainer

    original = setfit_trainer.SentenceTransformerTrainingArguments

    def create_arguments(*args: Any, **kwargs: Any) -> Any:
        arguments = original(
            *args,
            **kwargs,
            use_cpu=device.type == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would log the mean of the earlier losses for a NaN
            save_strategy="no",
            dataloader_pin_memory=device.type == "cuda",
        )
        if device.type == "cuda" and device.index:
            # The library has already chosen the first GPU, in its own cache and in accelerate's shared state.
            vars(arguments)["_setup_devices"] = arguments.distributed_state.device = device
        return arguments

    setfit_trainer.SentenceTransformerTrainingArguments = create_arguments
    try:
        yield
    finally:
        setfit_trainer.SentenceTransformerTrainingArguments = original
