"""The log of a run, ``run.log``."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from setfit_kd.errors import SetFitKDError
from setfit_kd.utils.atomic_io import raise_output_errors
from setfit_kd.utils.console import printable


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


class RunLog(logging.handlers.MemoryHandler):
    """Handler that keeps log messages in memory until `open` names the file for them and all later ones.

    It is not for runs in several threads of one process, whose messages would get mixed.

    Args:
        stage: Name of the current stage, which is added to every record.
    """

    def __init__(self, stage: str = "") -> None:
        # Nothing is flushed before `open`.
        super().__init__(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.stage = stage

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the name of the stage to a record, unless the log of a nested run has done so."""
        record.stage = getattr(record, "stage", self.stage or "run")
        return True

    @contextmanager
    def in_stage(self, name: str) -> Iterator[None]:
        """Context manager that adds the name of a stage to all records."""
        outer, self.stage = self.stage, f"{self.stage}/{name}".lstrip("/")
        try:
            yield
        finally:
            self.stage = outer

    def open(self, path: Path) -> None:
        """Write the messages so far, and all later ones, to a file.

        Raises:
            OutputError: If the file cannot be opened.
        """
        with raise_output_errors(path):
            file = _LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(stage)s: %(message)s"))
        self.setTarget(file)
        self.flushLevel = logging.DEBUG
        self.flush()


class _Forwarder(logging.Handler):
    """Handler that forwards records to a logger's original handlers, at its original level."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        # A copy, because `record_log` replaces the handlers, level and propagation of the logger.
        self.original = logging.Logger(logger.name)
        vars(self.original).update(vars(logger))

    def emit(self, record: logging.LogRecord) -> None:
        """Handle a record as the original logger would have."""
        self.original.callHandlers(record)


@contextmanager
def record_log(stage: str = "") -> Iterator[RunLog]:
    """Context manager that records all log messages of setfit-kd. Other handlers receive the same records as before."""
    log = RunLog(stage)
    package_logger = logging.getLogger("setfit_kd")
    forwarder = _Forwarder(package_logger)
    package_logger.handlers, package_logger.propagate = [log, forwarder], False
    package_logger.setLevel(logging.DEBUG)
    try:
        yield log
    except SetFitKDError as error:
        package_logger.debug("The run failed: %s", error)
        raise
    except BaseException:
        package_logger.debug("The run failed.", exc_info=True)
        raise
    finally:
        package_logger.handlers, package_logger.propagate = forwarder.original.handlers, forwarder.original.propagate
        package_logger.setLevel(forwarder.original.level)
        if log.target is not None:
            log.target.close()
        log.close()
