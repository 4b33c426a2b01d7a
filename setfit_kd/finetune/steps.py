"""Batch size and number of training steps of fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from setfit_kd.config.stages import FinetuneConfig

if TYPE_CHECKING:
    import torch

_ON_CPU, _ON_ACCELERATOR = 16, 32


def resolve_batch_size(device: torch.device, config: FinetuneConfig) -> int:
    """Return the batch size in the settings, or the default for the device."""
    return config.batch_size or (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR)


def finetune_steps(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Return the maximum number of training steps on ``texts`` labeled texts."""
    return config.steps or config.epochs * steps_per_epoch(config, texts, device)


def steps_per_epoch(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Return the number of training steps per epoch over ``texts`` texts."""
    return -(-texts // resolve_batch_size(device, config))
