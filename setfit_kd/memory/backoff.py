"""OOM backoff: retry with smaller batches, then on the CPU, if memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from setfit_kd.errors import OutOfMemoryError
from setfit_kd.memory.devices import free_memory
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """Device and batch size that a phase is run with.

    Attributes:
        device: Device to run on.
        batch_size: Texts per forward pass; in training, the micro-batch size.
    """

    device: torch.device
    batch_size: int

    def __str__(self) -> str:
        return f"batch size {self.batch_size} on {self.device}"


@dataclass(frozen=True)
class BackoffEvent:
    """One out-of-memory error and the attempt that follows it.

    Attributes:
        phase: Phase that ran out of memory, such as ``Training teacher``.
        kind: ``training``, ``encoding`` or ``loading``.
        step: Training step, from 1, or number of texts encoded so far; None at the beginning.
        cause: First line of the error message.
        before, after: Failed attempt and next attempt; equal if only the cache was cleared.
        free_before, free_after: Bytes free on the device before and after clearing the cache; None if unknown.
    """

    phase: str
    kind: str
    step: int | None
    cause: str
    before: Attempt
    after: Attempt
    free_before: int | None
    free_after: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the event as plain values for JSON."""
        return {
            "phase": self.phase,
            "kind": self.kind,
            "step": self.step,
            "cause": self.cause,
            "from": {"device": str(self.before.device), "texts": self.before.batch_size},
            "to": {"device": str(self.after.device), "texts": self.after.batch_size},
            "free_mb_before": _megabytes(self.free_before),
            "free_mb_after": _megabytes(self.free_after),
        }


@dataclass
class _BackoffState:
    """Settings and results that the backoffs within `shared_backoff` share."""

    cpu_fallback: bool = True
    events: list[BackoffEvent] = field(default_factory=list)
    limits: list[_KnownLimit] = field(default_factory=list)


@dataclass(frozen=True)
class _KnownLimit:
    """Attempt that a model of this size has to start from, because larger attempts ran out of memory.

    Attributes:
        kind: Kind of phase.
        requested_device: Device that the phase started on.
        parameters: Parameters of the model.
        attempt: Next attempt after the failed one.
    """

    kind: str
    requested_device: torch.device
    parameters: int
    attempt: Attempt


_backoff_state: ContextVar[_BackoffState | None] = ContextVar("oom_backoff", default=None)


@contextmanager
def shared_backoff(*, cpu_fallback: bool | None = None) -> Iterator[list[BackoffEvent]]:
    """Context manager in which a phase starts from the limits found by earlier phases.

    A limit applies to phases of the same kind whose model is at least as large. Nested blocks share the limits and
    events of the outermost block.

    Args:
        cpu_fallback: Whether to fall back from an accelerator to the CPU. None inherits the setting of the enclosing
            block. True has no effect inside a block that forbids the fallback.

    Yields:
        List of backoff events, extended as they occur.
    """
    outer = _backoff_state.get() or _BackoffState()
    inner = outer if cpu_fallback is None else replace(outer, cpu_fallback=cpu_fallback and outer.cpu_fallback)
    token = _backoff_state.set(inner)
    try:
        yield inner.events
    finally:
        _backoff_state.reset(token)


def move_model(model: torch.nn.Module, device: torch.device, *, phase: str) -> None:
    """Move a model to a device, or to the CPU if it does not fit on the device.

    Raises:
        OutOfMemoryError: If the model does not fit on the CPU either, or if the CPU fallback is off.
    """
    backoff = OOMBackoff(phase, kind="loading", device=device, batch_size=1, model=model)
    backoff.run(lambda attempt: model.to(attempt.device))


class OOMBackoff:
    """Sequence of attempts to run a phase.

    After an out-of-memory error, the cache is cleared and the attempt is retried once. Then the batch size is halved
    down to 1. The last resort is the CPU, which starts with the initial batch size.

    Args:
        phase: Name of the phase, for messages and the report.
        kind: ``training``, ``encoding`` or ``loading``. Known limits are shared between phases of the same kind.
        device: Device of the first attempt.
        batch_size: Batch size of the first attempt.
        model: Model to run. An attempt that failed for a model is skipped for models that are at least as large.

    Attributes:
        attempt: Current attempt.
        step: Training step, or number of texts encoded so far, for messages.
    """

    def __init__(self, phase: str, *, kind: str, device: torch.device, batch_size: int, model: torch.nn.Module) -> None:
        self.phase = phase
        self.step: int | None = None
        self.attempt = self._first = Attempt(device, batch_size)
        self._kind = kind
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._state = _backoff_state.get() or _BackoffState()
        self._can_use_cpu = self._state.cpu_fallback and _is_accelerator(device)
        self._failed: list[Attempt] = []
        self._retried: list[Attempt] = []
        self._can_repeat = True
        limits = [
            limit.attempt
            for limit in self._state.limits
            if (limit.kind, limit.requested_device) == (kind, device) and self._parameters >= limit.parameters
        ]
        cpu_sizes = [limit.batch_size for limit in limits if limit.device != device]
        device_sizes = [limit.batch_size for limit in limits if limit.device == device]
        if cpu_sizes and self._can_use_cpu:
            self.attempt, self._can_use_cpu = Attempt(_cpu(), min([batch_size, *cpu_sizes])), False
        elif limits:
            self.attempt = Attempt(device, min([batch_size, *device_sizes]))

    @property
    def can_retry_on_device(self) -> bool:
        """Whether the next attempt runs on the same device."""
        return self._can_repeat or self.attempt.batch_size > 1

    def record_success(self) -> None:
        """Allow one retry of the current attempt after a later error, unless it has been retried before."""
        self._can_repeat = self.attempt not in self._retried

    def run(self, function: Callable[[Attempt], T], *, clear: Callable[[], None] = lambda: None) -> T:
        """Call a function with the current attempt, and back off until it no longer runs out of memory.

        Args:
            function: Function to run. It starts from the beginning at each attempt.
            clear: Function that frees the remains of a failed attempt, such as gradients.

        Raises:
            OutOfMemoryError: If the last attempt failed.
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
        """Clear the cache and move on to the next attempt.

        Call it outside the except block, when nothing refers to the error or its traceback any more.

        Raises:
            OutOfMemoryError: If no attempt is left.
        """
        failed = self.attempt
        free_before = _free_bytes(failed.device)
        clear()
        clear_cache(failed.device)
        free_after = _free_bytes(failed.device)
        if failed not in self._failed:
            self._failed.append(failed)
        if self._can_repeat:
            self._retried.append(failed)
        elif failed.batch_size > 1 and (self._kind != "training" or self.step is not None):
            # Before the first step of a training, memory use does not depend on the batch size.
            self.attempt = Attempt(failed.device, failed.batch_size // 2)
        elif self._can_use_cpu:
            self.attempt, self._can_use_cpu = Attempt(_cpu(), self._first.batch_size), False
        else:
            raise self._exhausted(cause)
        self._can_repeat = False
        event = BackoffEvent(
            self.phase, self._kind, self.step or None, first_line(cause), failed, self.attempt, free_before, free_after
        )
        self._state.events.append(event)
        if self.attempt != failed:
            self._state.limits.append(_KnownLimit(self._kind, self._first.device, self._parameters, self.attempt))
        logger.warning("%s", _format_event(event))

    def _exhausted(self, cause: str) -> OutOfMemoryError:
        sizes: dict[str, list[str]] = {}
        for attempt in self._failed:
            sizes.setdefault(str(attempt.device), []).append(str(attempt.batch_size))
        if self._kind == "loading":  # loading has no batch size
            tried = " and ".join(f"on {device}" for device in sizes)
        else:
            tried = "with " + " and ".join(
                f"batch size {', '.join(failed)} on {device}" for device, failed in sizes.items()
            )
        hints = ["Use a smaller model", *_HINTS[self._kind]]
        if _is_accelerator(self._first.device) and not self._state.cpu_fallback:
            hints.append("allow the CPU (--cpu-fallback)")
        return OutOfMemoryError(
            f"{self.phase}{_format_position(self._kind, self.step)}: out of memory {tried} ({first_line(cause)}).",
            hint=f"{', or '.join(hints)}.",
        )


_HINTS = {
    "training": ["train on shorter texts (--max-length 64)", "use --gradient-checkpointing"],
    "encoding": ["use a model trained on shorter texts (--max-length 64)"],
    "loading": [],
}


def _format_event(event: BackoffEvent) -> str:
    before, after = event.before, event.after
    if after == before:
        action = "retrying"
    elif after.device != before.device:
        action = f"continuing on the CPU with batch size {after.batch_size}"
    else:
        action = f"continuing with batch size {after.batch_size} instead of {before.batch_size}"
    free = ""
    if event.free_before is not None and event.free_after is not None:
        free_before, free_after = _megabytes(event.free_before), _megabytes(event.free_after)
        free = f" ({free_before:,} MiB free, {free_after:,} MiB after clearing the cache)"
    return f"{event.phase}{_format_position(event.kind, event.step)}: out of memory on {before.device}{free}; {action}."


def _format_position(kind: str, step: int | None) -> str:
    if not step:
        return ""
    return f", step {step}" if kind == "training" else f", after {step} texts"


def _megabytes(size: int | None) -> int | None:
    return None if size is None else size >> 20


def _free_bytes(device: torch.device) -> int | None:
    with suppress(RuntimeError):  # a device may stop responding after an error
        return free_memory(device)[0]
    return None


def clear_cache(device: torch.device) -> None:
    """Collect garbage and empty the device's memory cache."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _is_accelerator(device: torch.device) -> bool:
    return device.type != "cpu"


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")
