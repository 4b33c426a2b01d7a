"""The errors a user may meet. Each says what happened, where, and what to do next, and owns its exit code."""

from __future__ import annotations

from collections.abc import Iterator


class SetFitKDError(Exception):
    """Base of every error that setfit-kd raises on purpose.

    Args:
        message: What happened, and where.
        hint: What to do next; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(SetFitKDError, ValueError):
    """Something the user gave cannot be used: a setting, a file, a row, a model."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown, out of range or contradicts another."""


class DataError(InputError):
    """A data set cannot be read or does not hold what the job needs."""


class ModelError(InputError):
    """A name or folder does not hold a usable model."""


class OutOfMemoryError(SetFitKDError, MemoryError):
    """Memory ran out, and whatever could be done about it has been tried (sysexits' EX_OSERR)."""

    exit_code = 71


class TrainingError(SetFitKDError):
    """A training diverged: its loss or its weights are no longer finite."""


class OutputError(SetFitKDError, OSError):
    """A result cannot be written."""

    exit_code = 2


class UnavailableError(SetFitKDError, ConnectionError):
    """Something that lies outside this machine cannot be had now (sysexits' EX_UNAVAILABLE)."""

    exit_code = 69


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its cause or context, and so on; a ``raise … from None`` ends it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
