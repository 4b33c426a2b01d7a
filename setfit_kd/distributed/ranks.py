"""Processes that torchrun started: rank 0 runs a command or a script, and the others run functions for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from typing import TYPE_CHECKING, Any, NoReturn

from setfit_kd.errors import SetFitKDError, first_line, is_out_of_memory
from setfit_kd.utils.console import suppress_warnings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TIMEOUT = timedelta(days=30)  # the others wait while rank 0 reads data or fits a head
_ENVIRONMENT = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
_others: OtherRanks | None = None


def other_ranks() -> OtherRanks | None:
    """Return the other processes, on rank 0 within `use_ranks`; None if there are none."""
    return _others


@contextmanager
def use_ranks() -> Iterator[None]:
    """Context manager in which training and encoding use all processes that torchrun or accelerate started.

    Only rank 0 runs the block. The others embed texts for it, and end with the block. Without a launcher, the block
    runs in this process.

    Example:
        >>> with use_ranks():  # in a script that is started by torchrun --nproc-per-node 2 script.py
        ...     distill("few.csv", "pool.txt", output_dir="runs/mine")  # doctest: +SKIP
    """
    global _others
    if not os.environ.keys() >= _ENVIRONMENT:
        yield
        return
    import torch
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_TIMEOUT)
    if distributed.get_rank() != 0:
        _serve()
    for name in _ENVIRONMENT:  # accelerate would split the batches, too
        del os.environ[name]
    count = distributed.get_world_size() - 1
    _others = OtherRanks(count) if count else None
    try:
        with suppress_warnings("transformers.training_args"):  # that its trainer does not use the other processes
            yield
    finally:
        _others = None
        distributed.destroy_process_group()


class OtherRanks:
    """The ``count`` processes besides rank 0, which run functions at the same time."""

    def __init__(self, count: int) -> None:
        self.count, self._pending = count, 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context manager for calls that belong together; after an error, it waits for calls that still run."""
        try:
            yield
        except Exception:
            self._receive()
            raise

    def deal(self, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Deal out texts of n lengths, longest first; return the rows of rank 0, and those of each other rank."""
        order, n_parts = (-lengths).argsort(kind="stable"), self.count + 1
        return [order[start::n_parts] for start in range(min(n_parts, len(order)))]

    def submit(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Call a function of a module on ranks 1, 2, ... with one tuple of arguments each, after earlier calls."""
        self.collect()
        for rank, values in enumerate(arguments, start=1):
            with connection_errors():
                _send((function, values), rank)
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
                raise MemoryError(f"rank {rank}: {problem}") if is_oom else SetFitKDError(f"Rank {rank}: {problem}.")
        return [result for result, _, _ in replies]

    def _receive(self) -> list[Any]:
        ranks, self._pending = range(1, self._pending + 1), 0
        with connection_errors():
            return [_receive(rank) for rank in ranks]


@contextmanager
def connection_errors() -> Iterator[None]:
    """Context manager that raises a `SetFitKDError` if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        message = f"Another process has ended ({first_line(str(error))})."
        raise SetFitKDError(
            message, hint="If its memory ran out, use fewer processes or --micro-batch-size."
        ) from error


def _serve() -> NoReturn:
    """Run the functions that rank 0 submits, without any output, until it ends; then end this process."""
    import torch

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl+C, rank 0 decides when to end
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with suppress(RuntimeError):  # the connection is closed
        while True:
            _send(_run(*_receive(0)), 0)
    os._exit(0)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, bool]:
    """Call a function; return its result, or an error message and whether memory ran out."""
    try:
        return function(*arguments), None, False
    except Exception as error:
        return None, f"{type(error).__name__}: {first_line(str(error))}", is_out_of_memory(error)


def _send(value: Any, rank: int) -> None:
    import torch

    buffer = BytesIO()
    torch.save(value, buffer)
    torch.distributed.send_object_list([buffer.getvalue()], dst=rank)


def _receive(rank: int) -> Any:
    """Receive a value of one of our own processes, with tensors on the same type of device as there."""
    import torch

    def place(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    data = [b""]
    torch.distributed.recv_object_list(data, src=rank)
    return torch.load(BytesIO(data[0]), map_location=place, weights_only=False)
