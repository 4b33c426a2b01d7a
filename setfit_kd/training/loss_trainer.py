"""transformers' Trainer for a body and a loss over whole batches, with OOM backoff and checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from setfit_kd.errors import DataError
from setfit_kd.memory.oom_errors import is_out_of_memory
from setfit_kd.models.bodies import default_prompt
from setfit_kd.training.callbacks import EvaluationCallback
from setfit_kd.utils.console import Advance

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.config.base import StageConfig
    from setfit_kd.losses.base import BatchLoss
    from setfit_kd.memory.backoff import OOMBackoff
    from setfit_kd.training.checkpoints import Checkpoints

logger = logging.getLogger(__name__)

_BODY, _LOSS_WEIGHTS = "body.safetensors", "beside-body.safetensors"


class LossTrainer(Trainer):
    """Trainer of a body with a `BatchLoss`; also the inner trainer of our SetFit trainers.

    Set ``train_dataset`` (text columns and a column ``label``) and ``loss`` before training. Weights that the loss has
    beside the body are trained, too. ``batches`` holds the rows of each batch; if it is None, they are drawn.
    """

    model: SentenceTransformer
    loss: BatchLoss
    batches: Sequence[list[int]] | None = None
    backoff: OOMBackoff | None = None
    checkpoints: Checkpoints | None = None
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
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log the mean of the earlier losses for a NaN
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        if device.type == "cuda" and device.index:
            # The library has already chosen the first GPU, in its own cache and in accelerate's shared state.
            vars(arguments)["_setup_devices"] = arguments.distributed_state.device = device
        if arguments.n_gpu > 1:
            # With several GPUs the body would be wrapped in DataParallel, which splits the batch of a whole-batch loss.
            arguments._n_gpu = 1
        super().__init__(body, arguments, data_collator=partial(_collate, body))
        self.remove_callback(PrinterCallback)

    @property
    def evaluation_callbacks(self) -> list[EvaluationCallback]:
        """Callbacks that keep the best weights."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EvaluationCallback)]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        keys = ("loss", "embedding_loss")  # checkpoints of older versions have the second
        return [entry[key] for entry in self.state.log_history for key in keys if key in entry]

    def train(self, *_: Any, **__: Any) -> Any:
        """Train from the newest checkpoint, if any; remove all checkpoints if it cannot be loaded.

        Raises:
            DataError: If a file is damaged or in another format, such as a pickle, which is never loaded.
        """
        latest = self.checkpoints.latest() if self.checkpoints else None
        if self.checkpoints is None or latest is None:
            return super().train()
        step = int(latest.name.rpartition("-")[2])
        logger.info("Resuming from step %d (checkpoint in %s).", step, latest.parent)
        self.advance(step)
        try:
            return super().train(resume_from_checkpoint=str(latest))
        except Exception as error:
            if self.state.global_step > step or is_out_of_memory(error):
                raise
            self.checkpoints.clear()
            raise DataError(
                f"Cannot resume from the checkpoint {latest} ({type(error).__name__}: {error}).",
                hint="It was removed. Run the same command again to train from the start.",
            ) from error

    def get_train_dataloader(self) -> Any:
        """Load the predefined batches, if any."""
        if self.batches is None:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer of the body and the weights beside it."""
        return super().create_optimizer(self.loss)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Compute the loss of a batch. Only the body runs in mixed precision."""
        loss: torch.Tensor = self.loss(inputs["features"], inputs["label"])
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step; repeat it in smaller micro-batches if its forward or backward pass runs out of memory."""
        self.loss.zero_grad(set_to_none=True)  # the library only resets the gradients of the body
        run = partial(super().training_step, *args, **kwargs)
        return run() if self.backoff is None else retry_step(run, self.loss, self.state.global_step + 1, self.backoff)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step, stop if its loss is not finite, and request a checkpoint if it is time for one.

        The step that ends the training has none: a training that resumed from it would continue.
        """
        super().log(logs, start_time)
        if "loss" in logs:  # not in the summary at the end
            self.advance(1)
            if not math.isfinite(logs["loss"]):
                self.control.should_training_stop = True
            is_due = self.checkpoints is not None and self.checkpoints.is_due
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
        """Parameters of the loss that do not belong to the body."""
        body = {id(parameter) for parameter in self.model.parameters()}
        return {name: value for name, value in self.loss.named_parameters() if id(value) not in body}


def _collate(body: SentenceTransformer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokenize the text columns of some rows."""
    columns = [[row[name] for row in rows] for name in rows[0] if name != "label"]
    features = [body.preprocess(texts, prompt=default_prompt(body)) for texts in columns]
    return {"features": features, "label": torch.tensor([row["label"] for row in rows])}


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
