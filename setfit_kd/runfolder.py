"""The folder that a run is written to."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from setfit_kd import __version__
from setfit_kd.config import RunConfig
from setfit_kd.errors import OutputError, writing

CONFIG, METRICS, RUN, LOG = "config.yaml", "metrics.json", "run.json", "run.log"
TEACHER, STUDENT, SIGNALS = "teacher", "student", "signals"
_CONTENTS = (CONFIG, METRICS, RUN, LOG, TEACHER, STUDENT, SIGNALS)
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
                if target.is_dir():
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
        target = self.path / name
        part = target.with_name(f".{name}.{uuid4().hex[:8]}")
        try:
            with writing(target):
                part.write_text(text, encoding="utf-8")
                part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole.

        Raises:
            OutputError: It cannot be written.
        """
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Within this block, everything that setfit-kd logs also goes to ``run.log``."""
        with writing(self.path / LOG):
            handler = _LogFile(self.path / LOG, encoding="utf-8", delay=False)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        logger = logging.getLogger("setfit_kd")
        level = logger.level
        handler.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        except BaseException as error:
            logger.debug("The run ended by %s: %s", type(error).__name__, error)
            raise
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()
