"""The backoff: what is tried, one after the other, when memory runs out."""

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
    """What a phase may take up: a device, and how many texts on it at once."""

    device: torch.device
    size: int

    def __str__(self) -> str:
        return f"{self.size} texts at once on {self.device}"


@dataclass(frozen=True)
class BackoffEvent:
    """One step down the backoff.

    Attributes:
        phase: What ran out of memory, such as ``Training teacher``.
        kind: ``training`` or ``encoding``.
        step: Where in it: the training step, from 1, or the texts that were encoded already; None at the beginning.
        cause: The error's first line.
        before, after: The rungs; the same one where only the cache was cleared.
        free_before, free_after: Bytes free on the device when the error came, and after clearing up; None where the
            system does not tell.
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
        """Plain values for JSON."""
        return {
            "phase": self.phase,
            "kind": self.kind,
            "step": self.step,
            "cause": self.cause,
            "from": {"device": str(self.before.device), "texts": self.before.size},
            "to": {"device": str(self.after.device), "texts": self.after.size},
            "free_mb_before": _megabytes(self.free_before),
            "free_mb_after": _megabytes(self.free_after),
        }


@dataclass
class _SharedState:
    """What is settled and learned while `shared_backoff`."""

    cpu_fallback: bool = True
    events: list[BackoffEvent] = field(default_factory=list)
    learned: list[_Limit] = field(default_factory=list)


@dataclass(frozen=True)
class _Limit:
    """A model of so many parameters was too large for anything above a rung."""

    kind: str
    asked: torch.device
    parameters: int
    attempt: Attempt


_shared_state: ContextVar[_SharedState | None] = ContextVar("memory", default=None)


@contextmanager
def shared_backoff(*, cpu_fallback: bool | None = None) -> Iterator[list[BackoffEvent]]:
    """Within this block, a phase begins where an earlier one of its kind ended that was of a model no larger.

    Blocks nest: an inner one knows and adds to what the outer one has learned.

    Args:
        cpu_fallback: Whether the CPU may take over from an accelerator, where no block around this one forbids it.

    Yields:
        The steps down, as they come.
    """
    outer = _shared_state.get() or _SharedState()
    inner = outer if cpu_fallback is None else replace(outer, cpu_fallback=cpu_fallback and outer.cpu_fallback)
    token = _shared_state.set(inner)
    try:
        yield inner.events
    finally:
        _shared_state.reset(token)


def move_model(model: torch.nn.Module, device: torch.device, *, phase: str) -> None:
    """Move a model to a device, or where it does not fit there to the CPU.

    Raises:
        OutOfMemoryError: It fits neither, or the CPU may not take over.
    """
    OOMBackoff(phase, kind="loading", device=device, size=1, model=model).run(lambda rung: model.to(rung.device))


class OOMBackoff:
    """One phase's way down: once more after clearing the cache, by halves to one text at once, then the CPU.

    Args:
        phase: Its name, for messages and the report.
        kind: What rungs are comparable: ``training`` or ``encoding``.
        device: Where it begins.
        size: Texts at once that it begins with.
        model: What is to be run; what failed for a model is not tried with a larger one.

    Attributes:
        rung: Where it stands.
        step: Where in the phase, for messages: the training step, or the texts encoded so far.
    """

    def __init__(self, phase: str, *, kind: str, device: torch.device, size: int, model: torch.nn.Module) -> None:
        self.phase = phase
        self.step: int | None = None
        self.attempt = self._first = Attempt(device, size)
        self._kind = kind
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._memory = _shared_state.get() or _SharedState()
        self._may_use_cpu = self._memory.cpu_fallback and _is_accelerator(device)
        self._failed: list[Attempt] = []
        self._retried: list[Attempt] = []
        self._worth_a_retry = True
        learned = [
            learned.attempt
            for learned in self._memory.learned
            if (learned.kind, learned.asked) == (kind, device) and self._parameters >= learned.parameters
        ]
        elsewhere = [rung for rung in learned if rung.device != device]
        if elsewhere and self._may_use_cpu:
            self.attempt, self._may_use_cpu = Attempt(_cpu(), min([size, *(rung.size for rung in elsewhere)])), False
        elif learned:
            self.attempt = Attempt(device, min([size, *(rung.size for rung in learned if rung not in elsewhere)]))

    @property
    def can_retry_in_place(self) -> bool:
        """Whether the next rung is on the same device."""
        return self._worth_a_retry or self.attempt.size > 1

    def succeeded(self) -> None:
        """What was tried on this rung went well: a later failure there is worth another try."""
        self._worth_a_retry = self.attempt not in self._retried

    def run(
        self,
        attempt: Callable[[Attempt], T],
        *,
        clear: Callable[[], None] = lambda: None,
    ) -> T:
        """Make an attempt, and while memory runs out another one a rung further down.

        Args:
            attempt: What to do on a rung; it begins anew each time.
            clear: Drops what a failed attempt has left on the model.

        Raises:
            OutOfMemoryError: The last rung failed too.
        """
        while True:
            try:
                result = attempt(self.attempt)
            except Exception as error:
                # The last word of a backoff within this one is the last word here too.
                if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                    raise
                cause = str(error)
            else:
                self.succeeded()
                return result
            # Only here, past the handler, nothing holds the failed attempt's tensors any more.
            self.back_off(cause, clear=clear)

    def back_off(self, cause: str, *, clear: Callable[[], None] = lambda: None) -> None:
        """Clear up and take the next rung. To be called when the error and its traceback are gone.

        Raises:
            OutOfMemoryError: There is none.
        """
        failed = self.attempt
        free_before = _free(failed.device)
        clear()
        clear_cache(failed.device)
        free_after = _free(failed.device)
        if failed not in self._failed:
            self._failed.append(failed)
        if self._worth_a_retry:
            self._retried.append(failed)
        elif failed.size > 1 and (self._kind != "training" or self.step is not None):
            # Before the first step of a training, its memory has nothing to do with how many texts there are at once.
            self.attempt = Attempt(failed.device, failed.size // 2)
        elif self._may_use_cpu:
            self.attempt, self._may_use_cpu = Attempt(_cpu(), self._first.size), False
        else:
            raise self._exhausted(cause)
        self._worth_a_retry = False
        event = BackoffEvent(
            self.phase, self._kind, self.step or None, first_line(cause), failed, self.attempt, free_before, free_after
        )
        self._memory.events.append(event)
        if self.attempt != failed:
            self._memory.learned.append(_Limit(self._kind, self._first.device, self._parameters, self.attempt))
        logger.warning("%s", _describe(event))

    def _exhausted(self, cause: str) -> OutOfMemoryError:
        sizes: dict[str, list[str]] = {}
        for rung in self._failed:
            sizes.setdefault(str(rung.device), []).append(str(rung.size))
        if self._kind == "loading":  # whole models have no sizes to try
            tried = " and ".join(f"on {device}" for device in sizes)
        else:
            tried = "with " + " and ".join(
                f"{', '.join(texts)} texts at once on {device}" for device, texts in sizes.items()
            )
        remedies = ["Take a smaller model", *_REMEDIES[self._kind]]
        if _is_accelerator(self._first.device) and not self._memory.cpu_fallback:
            remedies.append("allow the CPU (--cpu-fallback)")
        return OutOfMemoryError(
            f"{self.phase}{_where(self._kind, self.step)}: memory ran out {tried} ({first_line(cause)}).",
            hint=f"{', or '.join(remedies)}.",
        )


_REMEDIES = {
    "training": ["train on shorter texts (--max-length 64)", "with --gradient-checkpointing"],
    "encoding": ["a model trained on shorter texts (--max-length 64)"],
    "loading": [],
}


def _describe(event: BackoffEvent) -> str:
    before, after = event.before, event.after
    if after == before:
        action = "trying again"
    elif after.device != before.device:
        action = f"going on on the CPU, {after.size} texts at once"
    else:
        action = f"going on with {after.size} texts at once instead of {before.size}"
    free = ""
    if event.free_before is not None and event.free_after is not None:
        free = f" ({_megabytes(event.free_before):,} MiB free, {_megabytes(event.free_after):,} after clearing up)"
    return f"{event.phase}{_where(event.kind, event.step)}: out of memory on {before.device}{free}; {action}."


def _where(kind: str, step: int | None) -> str:
    if not step:
        return ""
    return f", step {step}" if kind == "training" else f", after {step} texts"


def _megabytes(size: int | None) -> int | None:
    return None if size is None else size >> 20


def _free(device: torch.device) -> int | None:
    with suppress(RuntimeError):  # the device may not answer any more
        return free_memory(device)[0]
    return None


def clear_cache(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
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
