"""Which devices there are, which one a setting names, and how much memory is free on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from setfit_kd.errors import ConfigError
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_TRIED_BYTES = 1 << 20


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; ``auto`` takes CUDA, then MPS, then the CPU.

    ``auto`` takes a device only when a small allocation on it has worked: one that is there may be full, or too new or
    too old for this torch.

    Raises:
        ConfigError: The device is not there or does not work. One that is merely full is taken at the user's word.
    """
    import torch

    if name == "auto":
        for device in map(torch.device, _accelerators()):
            obstacle = _obstacle(device)
            if obstacle is None:
                return device
            logger.warning("The device %s cannot be used: %s", device, first_line(str(obstacle)))
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{name!r} is no device.", hint="There are auto, cuda, cuda:N, mps and cpu.") from None
    if device.type != "cpu":
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        if device.type not in _accelerators() or (device.index or 0) >= count:
            raise ConfigError(
                f"There is no device {name!r} here.", hint="Take --device auto, or see `setfit-kd doctor`."
            )
        obstacle = _obstacle(device)
        if obstacle is not None and not is_out_of_memory(obstacle):  # a full one is for the backoff
            raise ConfigError(
                f"The device {name!r} cannot be used: {first_line(str(obstacle))}", hint="Take --device cpu."
            )
    return device


def _accelerators() -> list[str]:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, is_there in there.items() if is_there]


def _obstacle(device: torch.device) -> RuntimeError | None:
    """Why nothing can be allocated on a device; None where it can."""
    import torch

    try:
        torch.ones(_TRIED_BYTES // 4, device=device).sum().item()
    except RuntimeError as error:
        return error.with_traceback(None)
    return None


def check_device(name: str) -> None:
    """Raise where `resolve_device` would; loads torch only for an accelerator asked for by name."""
    if name not in ("auto", "cpu"):
        resolve_device(name)


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free on a device and bytes in all."""
    import psutil
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    memory = psutil.virtual_memory()
    return memory.available, memory.total
