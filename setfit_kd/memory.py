"""Devices: which one a stage runs on, and holding SetFit's trainers to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from setfit_kd.errors import ConfigError

if TYPE_CHECKING:
    import torch


_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: The device is not there.
    """
    import torch

    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"{name!r} is no device.", hint="There are auto, cuda, cuda:N, mps and cpu.")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count() if cuda else 0
    if (device.type == "cuda" and (device.index or 0) >= count) or (device.type == "mps" and not mps):
        raise ConfigError(f"There is no device {name!r} here.", hint="Take --device auto, or see `setfit-kd doctor`.")
    return device


def check_device(name: str) -> None:
    """Raise where `resolve_device` would; loads torch only for an accelerator asked for by name."""
    if name not in ("auto", "cpu"):
        resolve_device(name)


@contextmanager
def inner_trainer_on(device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Within this block, SetFit's trainers are built for ``device`` and ``precision``.

    SetFit builds the arguments of its inner trainer itself and passes neither on, so that trainer would pick the
    first accelerator whatever the model is on; its choice is cached when the arguments are made.
    """
    import setfit.trainer as setfit_trainer

    original = setfit_trainer.SentenceTransformerTrainingArguments
    setfit_trainer.SentenceTransformerTrainingArguments = partial(
        original,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=device.type == "cuda",
    )
    try:
        yield
    finally:
        setfit_trainer.SentenceTransformerTrainingArguments = original
