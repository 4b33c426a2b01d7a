"""The state of a training, kept in a folder from time to time, so that one that was killed goes on from there."""

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
from setfit_kd.memory import is_out_of_memory
from setfit_kd.utils.atomic_io import write_errors
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    import torch
    from setfit import Trainer

logger = logging.getLogger(__name__)

_MARKER, _BODY, _BESIDE, _PREFIX = "whole.json", "body.safetensors", "beside-body.safetensors", "checkpoint-"


@runtime_checkable
class Stateful(Protocol):
    """A callback with a state of its own, which the checkpoints of its training hold too."""

    def save_state(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder."""

    def load_state(self, folder: Path) -> None:
        """Take up the state that `save_state` wrote."""


class Checkpoints:
    """Checkpoints of one training: body, what its objective trains beside it, optimizer, random states, progress.

    They are transformers' own, with a marker that is written last and holds the hash of every file: what a kill has
    left unfinished, and what has been damaged since, is never taken up.

    Args:
        folder: Where they are kept; of this training alone.
        seconds: About how long lies between two.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds

    def latest(self) -> Path | None:
        """The folder of the newest whole checkpoint; what is not whole is removed."""
        for path in self._newest_first():
            if _is_whole(path):
                return path
            logger.warning("The checkpoint %s is not whole; it is left out.", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def _newest_first(self) -> list[Path]:
        found = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
        return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))

    def keep_newest(self) -> None:
        """Remove all others."""
        for path in self._newest_first()[1:]:
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def attach(self, trainer: Trainer, *parts: Stateful) -> None:
        """Have a trainer keep checkpoints, and go on from the newest one there is."""
        inner = trainer.st_trainer
        inner.args.output_dir = str(self.folder)
        inner._train_batch_size = inner.args.train_batch_size  # SetFit sets the one after the other was taken from it
        # The library's own would pickle all arguments, write a model card, and load the whole model anew.
        inner._save = lambda output_dir, **_: _save_body(inner.model, Path(output_dir))
        inner._load_from_checkpoint = lambda folder, *_: inner.model.load_state_dict(load_file(Path(folder) / _BODY))
        latest = self.latest()
        keeper = _CheckpointCallback(self, inner, latest, parts)
        inner.add_callback(keeper)
        inner._save_checkpoint = keeper.save
        if latest is not None:
            logger.info("Going on from step %s, kept in %s.", latest.name.removeprefix(_PREFIX), self.folder)
            inner.train = partial(self._resume, inner.train, keeper, latest)

    def _resume(
        self, train: Callable[..., Any], keeper: _CheckpointCallback, latest: Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Train from a checkpoint; remove one that turns out to be unusable.

        Raises:
            DataError: It is unusable: a damaged or foreign file, such as a pickle, which is never loaded.
        """
        try:
            return train(*args, resume_from_checkpoint=str(latest), **kwargs)
        except Exception as error:
            if keeper.has_stepped or is_out_of_memory(error):
                raise
            self.clear()
            raise DataError(
                f"The checkpoint {latest} cannot be used ({type(error).__name__}: {error}).",
                hint="It was removed: run the same command again to train from the start.",
            ) from error


class _CheckpointCallback(TrainerCallback):
    """Asks for a checkpoint every so often, and completes each with what the trainer does not know of.

    One that cannot be written is told of and ends nothing: the stages' own writes tell of a full disk.
    """

    def __init__(self, checkpoints: Checkpoints, inner: Any, latest: Path | None, parts: tuple[Stateful, ...]) -> None:
        self.checkpoints = checkpoints
        self.inner = inner
        self.latest = latest
        self.parts = parts
        self.plain_save = inner._save_checkpoint
        self.has_failed = self.has_stepped = False
        self.due = time.monotonic() + checkpoints.seconds

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.latest is None:
            return
        kept = load_file(self.latest / _BESIDE)
        for name, parameter in self._beside_body().items():
            parameter.data.copy_(kept[name])
        for part in self.parts:
            part.load_state(self.latest)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.has_stepped = True
        if time.monotonic() >= self.due and state.global_step < state.max_steps:
            control.should_save = True

    def save(self, *args: Any) -> None:
        folder = self.checkpoints.folder / f"{_PREFIX}{self.inner.state.global_step}"
        try:
            with write_errors(folder):
                self.plain_save(*args)
                self._complete(folder)
            self.checkpoints.keep_newest()
        except OutputError as error:
            shutil.rmtree(folder, ignore_errors=True)
            level = logging.DEBUG if self.has_failed else logging.WARNING
            logger.log(level, "A checkpoint is left out, so that a kill would cost more: %s", error.message)
            self.has_failed = True
        self.due = time.monotonic() + self.checkpoints.seconds

    def _complete(self, folder: Path) -> None:
        save_file({name: value.detach().cpu() for name, value in self._beside_body().items()}, folder / _BESIDE)
        for part in self.parts:
            part.save_state(folder)
        files = {str(path.relative_to(folder)): file_hash(path) for path in folder.rglob("*") if path.is_file()}
        (folder / _MARKER).write_text(json.dumps(files), encoding="utf-8")

    def _beside_body(self) -> dict[str, torch.nn.Parameter]:
        body = {id(parameter) for parameter in self.inner.model.parameters()}
        return {name: value for name, value in self.inner.loss.named_parameters() if id(value) not in body}


def _save_body(body: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, since weights that share memory cannot be written.
    save_file({name: value.detach().to("cpu", copy=True) for name, value in body.state_dict().items()}, folder / _BODY)


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / _MARKER)
        return all(file_hash(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False
