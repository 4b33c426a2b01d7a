"""The log of a run, ``run.log``."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from setfit_kd.errors import SetFitKDError
from setfit_kd.utils.escape import printable

_stage: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def stage_in_log(stage: str) -> Iterator[None]:
    """Context manager that adds the name of a stage to all log records; nested names are joined by slashes."""
    token = _stage.set("/".join(filter(None, (_stage.get(), stage))))
    try:
        yield
    finally:
        _stage.reset(token)


def _add_stage(record: logging.LogRecord) -> bool:
    record.stage = _stage.get() or "run"
    return True


class _LogFile(logging.FileHandler):
    """Log file that ignores write errors; on a full disk, the next stage fails when it writes its result."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record and escape control characters."""
        return printable(super().format(record), limit=None)

    def close(self) -> None:
        """Close the file, even if its last lines cannot be written."""
        with suppress(OSError):
            super().close()


class _Forwarder(logging.Handler):
    """Handler that forwards records to a logger's original handlers, at its original level."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        # A copy, because `buffer_log` replaces the handlers, level and propagation of the logger.
        self.original = logging.Logger(logger.name)
        vars(self.original).update(vars(logger))

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a record as the original logger would have."""
        self.original.callHandlers(record)


@contextmanager
def buffer_log() -> Iterator[logging.handlers.MemoryHandler]:
    """Context manager that keeps all log messages of setfit-kd in memory until `RunFolder.attach_log` opens a file.

    Then all of them are written to the file. Other handlers receive the same records as before.
    """
    # Nothing is flushed until `attach_log` sets a target and lowers the flush level.
    buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    buffer.addFilter(_add_stage)
    package_logger = logging.getLogger("setfit_kd")
    forwarder = _Forwarder(package_logger)
    package_logger.handlers, package_logger.propagate = [buffer, forwarder], False
    package_logger.setLevel(logging.DEBUG)
    try:
        yield buffer
    except SetFitKDError as error:
        package_logger.debug("The run failed: %s", error)
        raise
    except BaseException:
        package_logger.debug("The run failed.", exc_info=True)
        raise
    finally:
        package_logger.handlers, package_logger.propagate = forwarder.original.handlers, forwarder.original.propagate
        package_logger.setLevel(forwarder.original.level)
        if buffer.target is not None:
            buffer.target.close()
        buffer.close()
