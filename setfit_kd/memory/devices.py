"""Find devices and measure their free memory."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

from setfit_kd.errors import ConfigError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Resolve a device name; ``auto`` prefers CUDA, then MPS, then the CPU.

    ``auto`` uses a device only after a small test allocation on it, because the device may be full, or not supported
    by the installed torch. A device requested by name may be full: the OOM backoff handles that.

    Raises:
        ConfigError: If the device is unknown, is not available or does not work.
    """
    import torch

    if name == "auto":
        for device in map(torch.device, _available_accelerators()):
            error = _probe_device(device)
            if error is None:
                return device
            logger.warning("Cannot use device %s: %s", device, first_line(str(error)))
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Unknown device: {name!r}.", hint="Use auto, cuda, cuda:N, mps or cpu.") from None
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in _available_accelerators() or (device.index or 0) >= count:
        message = f"Device {name!r} is not available."
        raise ConfigError(message, hint="Use --device auto, or run `setfit-kd doctor` to list the devices.")
    error = _probe_device(device)
    if error is not None and not is_out_of_memory(error):
        raise ConfigError(f"Cannot use device {name!r}: {first_line(str(error))}", hint="Use --device cpu.")
    return device


def _available_accelerators() -> list[str]:
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return [name for name, is_available in available.items() if is_available]


def _probe_device(device: torch.device) -> RuntimeError | None:
    """Try to allocate 1 MiB on a device; return the error if it fails."""
    import torch

    try:
        torch.ones(1 << 18, device=device).sum().item()
    except RuntimeError as error:
        return error.with_traceback(None)
    return None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; from the CPU to a GPU from pinned memory, so that neither waits for the other."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def attention_kernels(device: torch.device, *, plain: bool = False) -> AbstractContextManager[None]:
    """Context manager that selects the kernels for attention on batches of varying shapes.

    On a GPU, cuDNN is excluded: it builds a plan for every new shape, which can take a second. ``plain`` selects the
    plain implementation.
    """
    if device.type != "cuda" and not plain:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return cast("AbstractContextManager[None]", sdpa_kernel([*fused, SDPBackend.MATH]))


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total memory of a device in bytes."""
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
