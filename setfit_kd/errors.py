"""Errors shown to the user, each with a message, a hint and an exit code."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

_OOM_MESSAGE = re.compile(
    r"(CUDA|HIP|XPU|MPS|NPU)[^\n]*out of memory"
    r"|error: out of memory"
    r"|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_NOT_SUPPORTED"  # also seen when memory is short
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|[Ff]ailed to allocate memory for requested buffer"
    r"|std::bad_alloc"
)


class SetFitKDError(Exception):
    """Base class of all errors that setfit-kd raises on purpose.

    Args:
        message: What happened and where.
        hint: What to do next; shown on a separate line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(SetFitKDError, ValueError):
    """Invalid user input: a setting, a file, a row or a model."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown, is out of range or contradicts another setting."""


class DataError(InputError):
    """A data set cannot be read or lacks required content."""


class ModelError(InputError):
    """A model cannot be found or used."""


class OutOfMemoryError(SetFitKDError, MemoryError):
    """Memory ran out and every fallback failed (exit code EX_OSERR of sysexits.h)."""

    exit_code = 71


class TrainingError(SetFitKDError):
    """Training diverged: the loss or the weights are no longer finite."""


class OutputError(SetFitKDError, OSError):
    """A result cannot be written."""

    exit_code = 2


class UnavailableError(SetFitKDError, ConnectionError):
    """A remote service is unavailable (exit code EX_UNAVAILABLE of sysexits.h)."""

    exit_code = 69


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes and contexts; ``raise … from None`` ends the chain."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or any error in its chain of causes, reports that memory ran out.

    Messages count only for the error types of torch and onnxruntime: a `KeyError` that mentions memory does not match.
    """
    # Ctrl+C while an out-of-memory error is handled must end the run: a KeyboardInterrupt is no Exception.
    return isinstance(error, Exception) and any(map(_reports_oom, error_chain(error)))


def _reports_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # includes our OutOfMemoryError
        return True
    if isinstance(error, SetFitKDError):  # may quote the message of another error
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    library = type(error).__module__.partition(".")[0]
    # torch.OutOfMemoryError is a RuntimeError; onnxruntime's own errors derive from Exception.
    if not isinstance(error, RuntimeError) and library != "onnxruntime":
        return False
    return type(error).__name__ == "OutOfMemoryError" or _OOM_MESSAGE.search(str(error)) is not None


def first_line(text: str) -> str:
    """Return the first line of an error message, without the explanations that CUDA adds."""
    return text.strip().partition("\n")[0] or "unknown reason"
