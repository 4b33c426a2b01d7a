"""The errors a user may meet. Each says what happened, where, and what to do next, and owns its exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


class OutputError(SetFitKDError, OSError):
    """A result cannot be written."""

    exit_code = 2


class UnavailableError(SetFitKDError, ConnectionError):
    """Something that lies outside this machine cannot be had now (sysexits' EX_UNAVAILABLE)."""

    exit_code = 69


_WRITE_HINTS = {
    errno.ENOSPC: "The disk is full: free some space, or choose another --output-dir.",
    errno.EDQUOT: "The disk quota is used up: free some space, or choose another --output-dir.",
    errno.EROFS: "The file system is read-only: choose another --output-dir.",
    errno.EACCES: "Permission is missing: choose an --output-dir that you may write to.",
    errno.EPERM: "Permission is missing: choose an --output-dir that you may write to.",
    errno.ENOTDIR: "A part of the path is a file: choose another --output-dir.",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any failure to write to ``path`` into an `OutputError` that says what to do.

    The tensor writers below us wrap the system's error in types of their own, so its number is looked for in the
    chain of causes and, failing that, in the text.
    """
    try:
        yield
    except SetFitKDError:
        raise
    except Exception as error:
        code = _errno_of(error)
        if code is None:
            raise
        reason = errno.errorcode[code]
        raise OutputError(
            f"Cannot write {path}: {error} [{reason}]",
            hint=_WRITE_HINTS.get(code, "Choose another --output-dir."),
        ) from error


def new_folder(path: str | Path) -> Path:
    """The path, made absolute, of a folder that is still to be made.

    Raises:
        OutputError: Something is there already.
    """
    folder = Path(path).absolute()
    with writing(folder):
        if folder.exists():
            raise OutputError(f"{path} is there already.", hint="Choose another name, or remove it first.")
    return folder


def _errno_of(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in errno.errorcode:
            return error.errno
        text = str(error)
        if "No space left on device" in text or "os error 28" in text:
            return errno.ENOSPC
        if "Read-only file system" in text or "os error 30" in text:
            return errno.EROFS
        error = error.__cause__ or error.__context__
    return None
