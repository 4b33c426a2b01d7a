"""Checkpoints from which an interrupted training resumes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from setfit_kd.errors import DataError, OutputError
from setfit_kd.memory.oom_errors import is_out_of_memory
from setfit_kd.utils.atomic_io import raise_output_errors
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    import torch
    from setfit import Trainer

logger = logging.getLogger(__name__)

_PREFIX = "checkpoint-"
_HASHES, _BODY, _LOSS_WEIGHTS = "whole.json", "body.safetensors", "beside-body.safetensors"


@runtime_checkable
class Stateful(Protocol):
    """A callback whose state is saved in checkpoints."""

    def save_state(self, folder: Path) -> None:
        """Write the state to a checkpoint folder."""

    def load_state(self, folder: Path) -> None:
        """Load the state that `save_state` wrote."""


class Checkpoints:
    """Checkpoints of one training: body, weights of the loss, optimizer, random states and progress.

    They are written by transformers, followed by a file with the hash of every other file. A checkpoint that is
    incomplete or damaged is never loaded.

    Args:
        folder: Folder for the checkpoints; no other training may use it.
        seconds: Approximate time between two checkpoints.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds

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

    def remove_older(self) -> None:
        """Remove all checkpoints but the newest."""
        for path in self._newest_first()[1:]:
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def attach(self, trainer: Trainer, *callbacks: Stateful) -> None:
        """Make a trainer write checkpoints and resume from the newest one, if any."""
        inner = trainer.st_trainer
        inner.args.output_dir = str(self.folder)
        inner._train_batch_size = inner.args.train_batch_size  # SetFit sets the latter after the former was copied
        # The library's own methods would pickle all arguments, write a model card and reload the whole model.
        inner._save = lambda output_dir, **_: _save_body(inner.model, Path(output_dir))
        inner._load_from_checkpoint = lambda folder, *_: inner.model.load_state_dict(load_file(Path(folder) / _BODY))
        latest = self.latest()
        callback = _CheckpointCallback(self, inner, latest, callbacks)
        inner.add_callback(callback)
        inner._save_checkpoint = callback.save
        if latest is not None:
            logger.info("Resuming from step %s (checkpoint in %s).", latest.name.removeprefix(_PREFIX), self.folder)
            inner.train = partial(self._resume, inner.train, callback, latest)

    def _resume(
        self, train: Callable[..., Any], callback: _CheckpointCallback, latest: Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Train from a checkpoint; remove all checkpoints if it cannot be loaded.

        Raises:
            DataError: If a file is damaged or in another format, such as a pickle, which is never loaded.
        """
        try:
            return train(*args, resume_from_checkpoint=str(latest), **kwargs)
        except Exception as error:
            if callback.has_stepped or is_out_of_memory(error):
                raise
            self.clear()
            raise DataError(
                f"Cannot resume from the checkpoint {latest} ({type(error).__name__}: {error}).",
                hint="It was removed. Run the same command again to train from the start.",
            ) from error


class _CheckpointCallback(TrainerCallback):
    """Callback that requests checkpoints at intervals and adds to them what the trainer does not save.

    A checkpoint that cannot be written only causes a warning. If the disk is full, saving the result raises an error.
    """

    def __init__(
        self, checkpoints: Checkpoints, inner: Any, latest: Path | None, callbacks: tuple[Stateful, ...]
    ) -> None:
        self.checkpoints = checkpoints
        self.inner = inner
        self.latest = latest
        self.callbacks = callbacks
        self.original_save = inner._save_checkpoint
        self.has_failed = self.has_stepped = False
        self.next_save = time.monotonic() + checkpoints.seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.latest is None:
            return
        saved = load_file(self.latest / _LOSS_WEIGHTS)
        for name, parameter in self._loss_parameters().items():
            parameter.data.copy_(saved[name])
        for callback in self.callbacks:
            callback.load_state(self.latest)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_stepped = True
        if time.monotonic() >= self.next_save and state.global_step < state.max_steps:
            control.should_save = True

    def save(self, *args: Any) -> None:
        folder = self.checkpoints.folder / f"{_PREFIX}{self.inner.state.global_step}"
        try:
            with raise_output_errors(folder):
                self.original_save(*args)
                self._complete(folder)
            self.checkpoints.remove_older()
        except OutputError as error:
            shutil.rmtree(folder, ignore_errors=True)
            level = logging.DEBUG if self.has_failed else logging.WARNING
            logger.log(level, "Skipped a checkpoint, training continues: %s", error.message)
            self.has_failed = True
        self.next_save = time.monotonic() + self.checkpoints.seconds

    def _complete(self, folder: Path) -> None:
        """Add the weights of the loss, the callbacks' states and the hashes to a checkpoint."""
        weights = {name: value.detach().cpu() for name, value in self._loss_parameters().items()}
        save_file(weights, folder / _LOSS_WEIGHTS)
        for callback in self.callbacks:
            callback.save_state(folder)
        hashes = {str(path.relative_to(folder)): file_hash(path) for path in folder.rglob("*") if path.is_file()}
        (folder / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")

    def _loss_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that belong to the loss and not to the body."""
        body = {id(parameter) for parameter in self.inner.model.parameters()}
        return {name: value for name, value in self.inner.loss.named_parameters() if id(value) not in body}


def _save_body(body: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors cannot write weights that share memory.
    save_file({name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}, folder / _BODY)


def _is_complete(folder: Path) -> bool:
    try:
        hashes = read_json(folder / _HASHES)
        return all(file_hash(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False
