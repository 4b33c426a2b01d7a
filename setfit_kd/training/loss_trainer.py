"""transformers' Trainer for a body and a loss over whole batches, with checkpoints and early stopping."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from setfit_kd.config.base import StageConfig
from setfit_kd.errors import DataError, OutputError, SetFitKDError, is_out_of_memory
from setfit_kd.losses.base import BatchLoss
from setfit_kd.memory.backoff import OOMBackoff
from setfit_kd.models.tokens import tokenize
from setfit_kd.training.precision import training_attention
from setfit_kd.training.shared_batches import SharedBatches, share_batches
from setfit_kd.utils.atomic_io import raise_output_errors
from setfit_kd.utils.console import Advance
from setfit_kd.utils.files import file_hash, read_json

logger = logging.getLogger(__name__)

_BODY, _LOSS_WEIGHTS = "body.safetensors", "beside-body.safetensors"
_GPU_LOGGING_STEPS = 10  # reading a loss waits for the GPU
_PREFIX, _HASHES = "checkpoint-", "whole.json"
_STATE_FILE, _BEST_WEIGHTS_FILE = "early-stop.json", "early-stop.safetensors"


class TokenDataset(Dataset[Any]):
    """Training texts of a body in one or two columns, with a label per row; the texts are tokenized only once.

    Args:
        body: The body to train.
        texts: m texts.
        labels: (n,) labels.
        columns: Rows of the texts in each column, (n,) each, -1 for no text; None for a single column with all texts.
    """

    def __init__(
        self, body: SentenceTransformer, texts: Sequence[str], labels: Any, columns: Sequence[Any] | None = None
    ) -> None:
        self.body, self.tokens, self.labels = body, tokenize(body, texts), np.asarray(labels)
        self.columns = [np.arange(len(texts))] if columns is None else columns

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """Return the features of each column and the labels, of a batch of rows."""
        texts = (column[rows] for column in self.columns)
        columns = [column[column >= 0] for column in texts if (column >= 0).any()]
        features = [self.tokens.take(column).features(self.body) for column in columns]
        # An array of labels stays on the CPU, where the losses need it.
        return {"features": features, "label": self.labels[rows]}


class LossTrainer(Trainer):
    """Trainer of a body with a `BatchLoss`; also the inner trainer of our SetFit trainers.

    Set ``train_dataset`` and ``loss`` before training. Weights that the loss has beside the body are trained, too.
    ``batches`` holds the rows of each batch; if it is None, they are drawn.
    """

    model: SentenceTransformer
    loss: BatchLoss
    batches: Sequence[list[int]] | None = None
    backoff: OOMBackoff | None = None
    checkpoints: Checkpoints | None = None
    shared: SharedBatches | None = None
    advance: Advance = staticmethod(lambda _: None)

    def __init__(
        self,
        body: SentenceTransformer,
        config: StageConfig,
        device: torch.device,
        output_dir: str,
        *,
        batch_size: int,
        learning_rate: float,
        epochs: int = 1,
        steps: int | None = None,
    ) -> None:
        arguments = TrainingArguments(
            output_dir,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            max_steps=steps or -1,
            seed=config.seed,
            use_cpu=device.type == "cpu",
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            disable_tqdm=True,
            logging_steps=1 if device.type == "cpu" else _GPU_LOGGING_STEPS,
            logging_nan_inf_filter=False,  # it would log the mean of the earlier losses for a NaN
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            accelerator_config={"non_blocking": device.type == "cuda"},
        )
        if device.type == "cuda" and device.index:
            # The library has already chosen the first GPU, in its own cache and in accelerate's shared state.
            vars(arguments)["_setup_devices"] = arguments.distributed_state.device = device
        # With several GPUs the body would be wrapped in DataParallel, which splits the batch of a whole-batch loss.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(body, arguments, data_collator=cast("Any", lambda batch: batch))
        self.remove_callback(PrinterCallback)
        self._new_losses: list[torch.Tensor] = []

    @property
    def evaluation_callbacks(self) -> list[EvaluationCallback]:
        """Callbacks that keep the best weights."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EvaluationCallback)]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def train(self, *_: Any, **__: Any) -> Any:
        """Train from the newest checkpoint, if any; if it cannot be loaded, remove all and raise a `DataError`."""
        self.shared = share_batches(self.model, self.loss, self.args)
        latest = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or latest is None:
            return super().train()
        step = int(latest.name.rpartition("-")[2])
        logger.info("Resuming from step %d (checkpoint in %s).", step, latest.parent)
        self.advance(step)
        try:
            return super().train(resume_from_checkpoint=str(latest))
        except Exception as error:
            if self.state.global_step > step or is_out_of_memory(error) or isinstance(error, SetFitKDError):
                raise
            self.checkpoints.clear()
            message = f"Cannot resume from the checkpoint {latest} ({type(error).__name__}: {error})."
            raise DataError(message, hint="It was removed. Run the same command again to start over.") from error

    def get_train_dataloader(self) -> Any:
        """Load the predefined batches, if any."""
        if self.batches is None:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        pin_memory = self.args.dataloader_pin_memory
        loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=self.data_collator, pin_memory=pin_memory)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer of the body and the weights beside it."""
        return super().create_optimizer(self.loss)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Compute the loss of a batch. Only the body runs in mixed precision."""
        # Until the end of the outer block, weights that the body casts are kept for the other chunks of the batch. The
        # gradients of all chunks are then added in half precision, which is too coarse for many micro-batches.
        keeps_weights = self.loss.micro_batch_size is None
        with torch.autocast(self.args.device.type, enabled=False) if keeps_weights else nullcontext():
            return cast("torch.Tensor", self.loss(inputs["features"], torch.from_numpy(inputs["label"])))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step; repeat it in smaller micro-batches if its forward or backward pass runs out of memory."""
        self.loss.zero_grad(set_to_none=True)  # the library only resets the gradients of the body
        run = partial(super().training_step, model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        if self.shared is not None:
            run = partial(self.shared.run_step, run, step)
        with training_attention(inputs["features"], bf16=self.args.bf16):
            loss = run() if self.backoff is None else retry_step(run, self.loss, step, self.backoff)
        self._new_losses.append(loss)
        if self.checkpoints is not None and self.checkpoints.is_due:
            self.control.should_log = True
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the losses since the last call; stop if one is not finite; request a checkpoint if it is time for one."""
        losses = torch.stack(self._new_losses).tolist() if self._new_losses else []
        self._new_losses.clear()
        for loss in losses:
            super().log({"loss": loss}, start_time)
        self.advance(len(losses))
        if not all(map(math.isfinite, losses)):
            self.control.should_training_stop = True
        is_due = self.checkpoints is not None and self.checkpoints.is_due
        # The last step has no checkpoint: a training that resumed from it would continue.
        self.control.should_save = is_due and not self.control.should_training_stop

    # The library's own methods would pickle all arguments, write a model card and reload the whole model.

    def _save_checkpoint(self, *args: Any) -> None:
        assert self.checkpoints is not None
        self.checkpoints.write(self.state.global_step, partial(super()._save_checkpoint, *args))

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # Copies, because safetensors cannot write weights that share memory.
        save_file({k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}, folder / _BODY)
        save_file({k: v.detach().cpu() for k, v in self._loss_weights().items()}, folder / _LOSS_WEIGHTS)
        for callback in self.evaluation_callbacks:
            callback.save_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.model.load_state_dict(load_file(folder / _BODY))
        saved = load_file(folder / _LOSS_WEIGHTS)
        for name, parameter in self._loss_weights().items():
            parameter.data.copy_(saved[name])
        for callback in self.evaluation_callbacks:
            callback.load_state(folder)

    def _loss_weights(self) -> dict[str, torch.nn.Parameter]:
        body = {id(parameter) for parameter in self.model.parameters()}
        return {name: value for name, value in self.loss.named_parameters() if id(value) not in body}


def retry_step(run: Callable[[], torch.Tensor], loss: BatchLoss, step: int, backoff: OOMBackoff) -> torch.Tensor:
    """Run a training step, and repeat it with the next attempt of the backoff while it runs out of memory."""
    backoff.step = step
    while True:
        try:
            result = run()
        except Exception as error:
            if not is_out_of_memory(error) or not backoff.can_retry_on_device:
                raise
            cause = str(error)
        else:
            backoff.record_success()
            return result
        size = backoff.attempt.batch_size
        backoff.back_off(cause, clear=partial(loss.zero_grad, set_to_none=True))
        if backoff.attempt.batch_size < size:
            loss.micro_batch_size = backoff.attempt.batch_size


class Checkpoints:
    """Checkpoints of one training in a folder of its own, written about every ``seconds`` seconds.

    They hold body, weights of the loss, optimizer, random states and progress, as written by transformers, and a file
    with the hash of every other file. A checkpoint that is incomplete or damaged is never loaded.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._has_failed = False
        self._next = time.monotonic() + seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time to write a checkpoint."""
        return time.monotonic() >= self._next

    def latest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint; remove newer ones that are not complete."""
        for path in self._newest_first():
            if _is_complete(path):
                return path
            logger.warning("The checkpoint %s is incomplete or damaged and is ignored.", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def _newest_first(self) -> list[Path]:
        paths = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
        return sorted(paths, key=lambda path: -int(path.name.removeprefix(_PREFIX)))

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, step: int, save: Callable[[], None]) -> None:
        """Write a checkpoint with a function, add the hashes, and remove older checkpoints; warn if that fails."""
        folder = self.folder / f"{_PREFIX}{step}"
        try:
            with raise_output_errors(folder):
                save()
                files = [path for path in folder.rglob("*") if path.is_file()]
                hashes = {str(path.relative_to(folder)): file_hash(path) for path in files}
                (folder / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
            for path in self._newest_first()[1:]:
                shutil.rmtree(path, ignore_errors=True)
        except OutputError as error:
            shutil.rmtree(folder, ignore_errors=True)
            level = logging.DEBUG if self._has_failed else logging.WARNING
            logger.log(level, "Skipped a checkpoint, training continues: %s", error.message)
            self._has_failed = True
        self._next = time.monotonic() + self.seconds


def _is_complete(folder: Path) -> bool:
    try:
        hashes = read_json(folder / _HASHES)
        return all(file_hash(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


@dataclass
class EvaluationCallback(TrainerCallback, ABC):
    """Callback that evaluates the body at intervals, keeps the best weights and stops early.

    Training stops after ``patience`` consecutive evaluations without a better score; None disables early stopping.
    """

    body: SentenceTransformer
    patience: int | None
    history: list[tuple[int, float]] = field(default_factory=list, kw_only=True)  # steps and scores
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    best_score: float = field(default=-1.0, kw_only=True)
    evaluations_since_best: int = field(default=0, kw_only=True)

    @abstractmethod
    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Return whether to evaluate after this step; ``args`` and ``state`` are the trainer's."""

    @abstractmethod
    def measure(self, step: int) -> float:
        """Return the score of the current weights. It must be greater than -1; higher is better."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is due, keep the weights if they are the best, and stop if patience has run out."""
        if not self.is_due(state.global_step, args, state):
            return
        score = self.measure(state.global_step)
        self.history.append((state.global_step, score))
        self.evaluations_since_best += 1
        if score > self.best_score:
            self.best_score, self.evaluations_since_best = score, 0
            self.best_weights = {k: v.detach().to("cpu", copy=True) for k, v in self.body.state_dict().items()}
        else:
            self.on_no_improvement(**kwargs)
        if self.patience is not None and self.evaluations_since_best >= self.patience:
            control.should_training_stop = True

    def on_no_improvement(self, **kwargs: Any) -> None:
        """Hook that is called after an evaluation without a better score, with the trainer's keyword arguments."""

    def save_state(self, folder: Path) -> None:
        """Write the history and the best weights to a checkpoint folder."""
        state = {"history": self.history, "best": self.best_score}
        state["evaluations_since_best"] = self.evaluations_since_best
        (folder / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        save_file(self.best_weights, folder / _BEST_WEIGHTS_FILE)

    def load_state(self, folder: Path) -> None:
        """Load the state that `save_state` wrote."""
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        self.history = [(step, score) for step, score in state["history"]]
        self.best_score, self.evaluations_since_best = state["best"], state["evaluations_since_best"]
        self.best_weights = load_file(folder / _BEST_WEIGHTS_FILE)

    def restore_best_weights(self) -> None:
        """Load the best weights into the body."""
        if self.best_weights:
            self.body.load_state_dict(self.best_weights)
            step, score = max(self.history, key=itemgetter(1))
            logger.info("Restored the best weights: step %d of %d, score %.3f.", step, self.history[-1][0], score)
