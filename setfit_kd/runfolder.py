"""The folder that a run is written to."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from setfit_kd import __version__
from setfit_kd.config import RunConfig, read_config
from setfit_kd.errors import OutputError, SetFitKDError
from setfit_kd.files import write_whole, writing

CONFIG, METRICS, RUN, LOG = "config.yaml", "metrics.json", "run.json", "run.log"
TEACHER, BASELINE, STUDENT, STUDENTS, SIGNALS = "teacher", "baseline", "student", "students", "signals"
_CONTENTS = (CONFIG, METRICS, RUN, LOG, TEACHER, STUDENT, STUDENTS, SIGNALS)
_PACKAGES = (
    "setfit",
    "sentence-transformers",
    "transformers",
    "datasets",
    "huggingface-hub",
    "torch",
    "scikit-learn",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "setfit-kd": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def default_folder(config: RunConfig) -> Path:
    """Where a run goes that names no folder: ``runs/`` and the name of its labeled texts."""
    name = Path((config.labeled or "").removeprefix("bundled:")).stem
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run")


class _LogFile(logging.FileHandler):
    """A log that gives up quietly where it cannot be written: the stages' own writes tell of a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the record."""

    def close(self) -> None:
        """Close the file, whether or not its last lines fit."""
        with suppress(OSError):
            super().close()


def _is_run(path: Path) -> bool:
    """Whether the settings in a folder are those of a run."""
    try:
        RunConfig.of(**read_config(path / CONFIG))
    except SetFitKDError:
        return False
    return True


class RunFolder:
    """A run's folder. Every file and folder in it is written beside its place and renamed: whole or not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check(path: Path, *, overwrite: bool) -> None:
        """Refuse a folder that cannot take a run, before any work is done; changes nothing.

        Raises:
            OutputError: It is a file, cannot be written, or is not empty and ``overwrite`` is not set.
        """
        with writing(path):
            RunFolder._check(path, overwrite)

    @staticmethod
    def _check(path: Path, overwrite: bool) -> None:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file, not a folder.", hint="Choose another --output-dir.")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputError(
                f"The folder {path} is not empty.", hint="Choose another --output-dir, or add --overwrite."
            )
        if path.is_dir() and any((path / name).exists() for name in _CONTENTS) and not _is_run(path):
            raise OutputError(
                f"The folder {path} holds files with a run's names, but no run.", hint="Choose another --output-dir."
            )
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise OutputError(f"{existing} is a file, not a folder.", hint="Choose another --output-dir.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(
                f"The folder {existing} cannot be written to.", hint="Choose an --output-dir that you may write to."
            )

    @classmethod
    def create(cls, config: RunConfig, path: Path) -> RunFolder:
        """Make the folder, take an earlier run's files out of it, and write the settings.

        Raises:
            OutputError: As `check`, or the disk is full.
        """
        cls.check(path, overwrite=config.overwrite)
        folder = cls(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            for name in _CONTENTS:
                target = path / name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        folder.write_text(CONFIG, config.to_yaml())
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(self.path / name, text)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole.

        Raises:
            OutputError: It cannot be written.
        """
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def keep_log(self, recorder: logging.handlers.MemoryHandler) -> None:
        """Write what `recorded` has so far, and from now on everything, to ``run.log``.

        Raises:
            OutputError: It cannot be written.
        """
        with writing(self.path / LOG):
            file = _LogFile(self.path / LOG, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        recorder.setTarget(file)
        recorder.flushLevel = logging.DEBUG
        recorder.flush()


@contextmanager
def recorded() -> Iterator[logging.handlers.MemoryHandler]:
    """Within this block, keep everything that setfit-kd logs, until a run folder takes it; see `RunFolder.keep_log`."""
    recorder = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    logger = logging.getLogger("setfit_kd")
    level = logger.level
    logger.addHandler(recorder)
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
        logger.setLevel(level)
        logger.removeHandler(recorder)
        if recorder.target is not None:
            recorder.target.close()
        recorder.close()
