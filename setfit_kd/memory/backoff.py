"""OOM backoff: retry with smaller batches, then on the CPU, if memory runs out."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from setfit_kd.errors import OutOfMemoryError, first_line, is_out_of_memory
from setfit_kd.memory.devices import free_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
_HINTS = {
    "training": ["train on shorter texts (--max-length 64)", "use --gradient-checkpointing"],
    "encoding": ["use a model trained on shorter texts (--max-length 64)"],
}


@dataclass(frozen=True)
class Attempt:
    """Device and batch size that a phase is run with: texts per forward pass; in training, the micro-batch size."""

    device: torch.device
    batch_size: int


@dataclass
class _BackoffState:
    """Setting, events and limits that the backoffs within `shared_backoff` share."""

    cpu_fallback: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)
    # Attempts that followed an error, by kind of phase and first device, and by the number of parameters of the model.
    limits: list[tuple[tuple[str, torch.device], int, Attempt]] = field(default_factory=list)


_backoff_state: ContextVar[_BackoffState | None] = ContextVar("oom_backoff", default=None)


@contextmanager
def shared_backoff(*, cpu_fallback: bool | None = None) -> Iterator[list[dict[str, Any]]]:
    """Context manager in which a phase starts from the limits found by earlier phases.

    A limit applies to phases of the same kind whose model is at least as large. Nested blocks share the limits and
    events of the outermost block. Yields the list of events as plain values for JSON, extended as they occur.

    ``cpu_fallback`` is whether to fall back from an accelerator to the CPU. None inherits the setting of the enclosing
    block, and True has no effect inside a block that forbids the fallback.
    """
    outer = _backoff_state.get() or _BackoffState()
    inner = outer if cpu_fallback is None else replace(outer, cpu_fallback=cpu_fallback and outer.cpu_fallback)
    token = _backoff_state.set(inner)
    try:
        yield inner.events
    finally:
        _backoff_state.reset(token)


def move_model(model: torch.nn.Module, device: torch.device, *, phase: str) -> None:
    """Move a model to a device, or to the CPU if it does not fit; an `OutOfMemoryError` if that fails or is off."""
    backoff = OOMBackoff(phase, kind="loading", device=device, batch_size=1, model=model)
    backoff.run(lambda attempt: model.to(attempt.device))


class OOMBackoff:
    """Sequence of attempts to run a phase.

    After an out-of-memory error, the cache is cleared and the attempt is retried once. Then the batch size is halved
    down to 1. The last resort is the CPU, which starts with the initial batch size.

    Args:
        phase: Name of the phase, for messages and the report.
        kind: ``training``, ``encoding`` or ``loading``. Known limits are shared between phases of the same kind.
        device, batch_size: Those of the first attempt.
        model: Model to run. An attempt that failed for a model is skipped for models that are at least as large.

    Attributes:
        attempt: Current attempt.
        step: Training step from 1, or number of texts encoded so far, for messages.
    """

    def __init__(self, phase: str, *, kind: str, device: torch.device, batch_size: int, model: torch.nn.Module) -> None:
        self.phase, self._kind = phase, kind
        self.step: int | None = None
        self._first = Attempt(device, batch_size)
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._state = _backoff_state.get() or _BackoffState()
        self._can_use_cpu = self._state.cpu_fallback and _is_accelerator(device)
        self._failed: list[Attempt] = []
        self._retried: list[Attempt] = []
        self._can_repeat = True
        self._key = (kind, device)
        limits = [limit for key, n, limit in self._state.limits if key == self._key and n <= self._parameters]
        cpu_sizes = [limit.batch_size for limit in limits if limit.device != device]
        device_sizes = [limit.batch_size for limit in limits if limit.device == device]
        if cpu_sizes and self._can_use_cpu:
            self._use_cpu(min([batch_size, *cpu_sizes]))
        else:
            self.attempt = Attempt(device, min([batch_size, *device_sizes]))

    def _use_cpu(self, batch_size: int) -> None:
        import torch

        self.attempt, self._can_use_cpu = Attempt(torch.device("cpu"), batch_size), False

    @property
    def can_retry_on_device(self) -> bool:
        """Whether the next attempt runs on the same device."""
        return self._can_repeat or self.attempt.batch_size > 1

    def record_success(self) -> None:
        """Allow one retry of the current attempt after a later error, unless it has been retried before."""
        self._can_repeat = self.attempt not in self._retried

    def run(self, function: Callable[[Attempt], T], *, clear: Callable[[], None] = lambda: None) -> T:
        """Call a function with the current attempt, and back off until it no longer runs out of memory.

        The function starts from the beginning at each attempt, and ``clear`` frees the remains of a failed one, such
        as gradients. If the last attempt fails, an `OutOfMemoryError` is raised.
        """
        while True:
            try:
                result = function(self.attempt)
            except Exception as error:
                # An OutOfMemoryError comes from a nested backoff that has already tried everything.
                if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                    raise
                cause = str(error)
            else:
                self.record_success()
                return result
            # Back off outside the except block: the traceback would keep the failed attempt's tensors alive.
            self.back_off(cause, clear=clear)

    def back_off(self, cause: str, *, clear: Callable[[], None] = lambda: None) -> None:
        """Clear the cache and move on to the next attempt; if none is left, raise an `OutOfMemoryError`.

        Call it outside the except block, when nothing refers to the error or its traceback any more.
        """
        failed, cause = self.attempt, first_line(cause)
        free_before = _free_mb(failed.device)
        clear()
        clear_cache(failed.device)
        free_after = _free_mb(failed.device)
        if failed not in self._failed:
            self._failed.append(failed)
        action = f"continuing with batch size {failed.batch_size // 2} instead of {failed.batch_size}"
        if self._can_repeat:
            self._retried.append(failed)
            action = "retrying"
        elif failed.batch_size > 1 and (self._kind != "training" or self.step is not None):
            # Before the first step of a training, memory use does not depend on the batch size.
            self.attempt = Attempt(failed.device, failed.batch_size // 2)
        elif self._can_use_cpu:
            self._use_cpu(self._first.batch_size)
            action = f"continuing on the CPU with batch size {self._first.batch_size}"
        else:
            raise self._exhausted(cause)
        self._can_repeat = False
        if self.attempt != failed:
            self._state.limits.append((self._key, self._parameters, self.attempt))
        event = {
            "phase": self.phase,
            "kind": self._kind,
            "step": self.step or None,
            "cause": cause,
            "from": {"device": str(failed.device), "texts": failed.batch_size},
            "to": {"device": str(self.attempt.device), "texts": self.attempt.batch_size},
            "free_mb_before": free_before,
            "free_mb_after": free_after,
        }
        self._state.events.append(event)
        is_known = free_before is not None and free_after is not None
        free = f" ({free_before:,} MiB free, {free_after:,} MiB after clearing the cache)" if is_known else ""
        logger.warning("%s: out of memory on %s%s; %s.", self._position, failed.device, free, action)

    @property
    def _position(self) -> str:
        progress = f"step {self.step}" if self._kind == "training" else f"after {self.step} texts"
        return f"{self.phase}, {progress}" if self.step else self.phase

    def _exhausted(self, cause: str) -> OutOfMemoryError:
        tried: dict[str, list[str]] = {}
        for attempt in self._failed:
            tried.setdefault(str(attempt.device), []).append(str(attempt.batch_size))
        attempts = [f"with batch size {', '.join(sizes)} on {device}" for device, sizes in tried.items()]
        if self._kind == "loading":
            attempts = [f"on {device}" for device in tried]
        hints = ["Use a smaller model", *_HINTS.get(self._kind, [])]
        if _is_accelerator(self._first.device) and not self._state.cpu_fallback:
            hints.append("allow the CPU (--cpu-fallback)")
        message = f"{self._position}: out of memory {' and '.join(attempts)} ({cause})."
        return OutOfMemoryError(message, hint=f"{', or '.join(hints)}.")


def _free_mb(device: torch.device) -> int | None:
    with suppress(RuntimeError):  # a device may stop responding after an error
        return free_memory(device)[0] >> 20
    return None


def clear_cache(device: torch.device) -> None:
    """Collect garbage and empty the device's memory cache; on the CPU, return freed memory to the system."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        with suppress(OSError, AttributeError, TypeError):  # only glibc has it, which keeps most of what is freed
            ctypes.CDLL(None).malloc_trim(0)


def _is_accelerator(device: torch.device) -> bool:
    return device.type != "cpu"
