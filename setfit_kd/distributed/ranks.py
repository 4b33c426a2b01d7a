"""Processes that torchrun started: rank 0 runs a command or a script, and the others run functions for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from setfit_kd.errors import SetFitKDError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch

_TIMEOUT = timedelta(days=30)  # the others wait while rank 0 reads data or fits a head
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENVIRONMENT = (*_LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
_others: OtherRanks | None = None


def other_ranks() -> OtherRanks | None:
    """Return the other processes, on rank 0 within `use_ranks`; None if there are none."""
    return _others


@contextmanager
def use_ranks() -> Iterator[None]:
    """Context manager in which training and encoding use all processes that torchrun or accelerate started.

    Only rank 0 runs the block; the others embed texts for it, and end when it leaves the block. Without a launcher,
    the block runs as usual.

    Example:
        A script for ``torchrun --nproc-per-node 2 script.py``::

            with use_ranks():
                setfit_kd.distill(teacher=..., student=..., output_dir="runs/mine")
    """
    global _others
    if not os.environ.keys() >= set(_LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    import torch
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_TIMEOUT)
    if distributed.get_rank() != 0:
        _serve()
    for name in _ENVIRONMENT:  # accelerate would split the batches, too
        os.environ.pop(name, None)
    _others = OtherRanks(distributed.get_world_size() - 1)
    try:
        yield
    finally:
        _others = None
        distributed.destroy_process_group()


class OtherRanks:
    """The processes besides rank 0, for ``count`` calls at once."""

    def __init__(self, count: int) -> None:
        self.count, self._pending = count, 0

    def submit(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call a function of a module on ranks 1, 2, ... with one tuple of arguments each, after earlier calls."""
        from torch import distributed

        self.collect()
        for rank, values in enumerate(arguments, start=1):
            with connection_errors():
                distributed.send_object_list([(function, values)], dst=rank, device=_cpu())
            self._pending = rank

    def collect(self) -> list[Any]:
        """Wait for the submitted calls and return their results.

        Raises:
            MemoryError: If a process ran out of memory.
            SetFitKDError: If a call failed otherwise, or a process has ended.
        """
        replies = self._receive()
        for rank, (_, problem, is_oom) in enumerate(replies, start=1):
            if problem is not None:
                raise MemoryError(f"rank {rank}: {problem}") if is_oom else SetFitKDError(f"Rank {rank}: {problem}")
        return [result for result, _, _ in replies]

    def discard(self) -> None:
        """Wait for the submitted calls, without raising their errors."""
        self._receive()

    def _receive(self) -> list[Any]:
        from torch import distributed

        pending, self._pending = self._pending, 0
        replies: list[Any] = [None] * pending
        for index in range(pending):
            reply: list[Any] = [None]
            with connection_errors():
                distributed.recv_object_list(reply, src=index + 1, device=_cpu())
            replies[index] = reply[0]
        return replies


@contextmanager
def connection_errors() -> Iterator[None]:
    """Context manager that raises a `SetFitKDError` if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        message = f"Another process has ended ({first_line(str(error))})."
        raise SetFitKDError(message, hint="If its memory ran out, use fewer processes or --micro-batch-size.") from error


def local_device(device: torch.device) -> torch.device:
    """Return the device that this process uses if rank 0 uses ``device``."""
    import torch

    if device.type != "cuda":
        return device
    index = ((device.index or 0) + int(os.environ["LOCAL_RANK"])) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _serve() -> NoReturn:
    """Run the functions that rank 0 submits, without any output, until it ends; then end this process."""
    from torch import distributed

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl+C, rank 0 decides when to end
    with suppress(RuntimeError):  # the connection is closed
        while True:
            request: list[Any] = [None]
            distributed.recv_object_list(request, src=0, device=_cpu())
            distributed.send_object_list([_run(*request[0])], dst=0, device=_cpu())
    os._exit(0)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, bool]:
    """Call a function; return its result, or an error message and whether memory ran out."""
    try:
        return function(*arguments), None, False
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(str(error))}", is_out_of_memory(error)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")
