"""The log of a run, ``run.log``."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from setfit_kd.errors import SetFitKDError
from setfit_kd.utils.escape import printable

logger = logging.getLogger(__name__)
_stage: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def log_stage(stage: str) -> Iterator[None]:
    """Within this block, ``run.log`` tells that what happens is of this stage; blocks nest as folders do."""
    token = _stage.set("/".join(filter(None, (_stage.get(), stage))))
    try:
        yield
    finally:
        _stage.reset(token)


def _add_stage(record: logging.LogRecord) -> bool:
    record.stage = _stage.get() or "run"
    return True


class _LogFile(logging.FileHandler):
    """A log that gives up quietly where it cannot be written: the stages' own writes tell of a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, with control characters escaped."""
        return printable(super().format(record), None)

    def close(self) -> None:
        """Close the file, whether or not its last lines fit."""
        with suppress(OSError):
            super().close()


class _Forwarder(logging.Handler):
    """Hands records to the handlers that a logger had, at the level that it had."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self.before = logging.Logger(logger.name)
        vars(self.before).update(vars(logger))

    def emit(self, record: logging.LogRecord) -> None:
        """Do what the logger would have done; a warning that nobody handles goes to stderr."""
        self.before.callHandlers(record)


@contextmanager
def record_log() -> Iterator[logging.handlers.MemoryHandler]:
    """Within this block, keep everything that setfit-kd logs, until a run folder takes it; see `RunFolder.attach_log`.

    Handlers other than the recorder get what they would get without it.
    """
    recorder = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    recorder.addFilter(_add_stage)
    logger = logging.getLogger("setfit_kd")
    others = _Forwarder(logger)
    logger.handlers, logger.propagate = [recorder, others], False
    logger.setLevel(logging.DEBUG)
    try:
        yield recorder
    except SetFitKDError as error:
        logger.debug("The run ended: %s", error)
        raise
    except BaseException:
        logger.debug("The run ended.", exc_info=True)
        raise
    finally:
        logger.handlers, logger.propagate = others.before.handlers, others.before.propagate
        logger.setLevel(others.before.level)
        if recorder.target is not None:
            recorder.target.close()
        recorder.close()
