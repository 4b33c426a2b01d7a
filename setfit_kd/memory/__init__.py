"""Devices, recognition of out-of-memory errors, and OOM backoff."""

from setfit_kd.memory.backoff import Attempt, BackoffEvent, OOMBackoff, clear_cache, move_model, shared_backoff
from setfit_kd.memory.devices import check_device, free_memory, resolve_device
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory

__all__ = [
    "Attempt",
    "BackoffEvent",
    "OOMBackoff",
    "check_device",
    "clear_cache",
    "first_line",
    "free_memory",
    "is_out_of_memory",
    "move_model",
    "resolve_device",
    "shared_backoff",
]
