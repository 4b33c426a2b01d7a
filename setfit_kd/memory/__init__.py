"""Devices, what an out-of-memory error looks like, and the ladder down from one.

The only room that knows any of the three.
"""

from setfit_kd.memory.backoff import Ladder, Recovery, Rung, clear_cache, place, remembering
from setfit_kd.memory.devices import check_device, free_memory, resolve_device
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory

__all__ = [
    "Ladder",
    "Recovery",
    "Rung",
    "check_device",
    "clear_cache",
    "first_line",
    "free_memory",
    "is_out_of_memory",
    "place",
    "remembering",
    "resolve_device",
]
