"""How many steps a fine-tuning takes at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from setfit_kd.config import FinetuneConfig

if TYPE_CHECKING:
    import torch

_ON_CPU, _ON_ACCELERATOR = 16, 32


def resolve_batch_size(device: torch.device, config: FinetuneConfig) -> int:
    """Texts in a batch: as many as are given, or as are usual on a device."""
    return config.batch_size or (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR)


def finetune_steps(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Steps of fine-tuning on so many labeled texts."""
    return config.steps or config.epochs * steps_per_epoch(config, texts, device)


def steps_per_epoch(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Steps of one pass over so many texts."""
    return -(-texts // resolve_batch_size(device, config))
