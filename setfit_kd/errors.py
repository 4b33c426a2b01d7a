"""Errors shown to the user, each with a message, a hint and an exit code."""

from __future__ import annotations

from collections.abc import Iterator


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
