"""The folder that a run is written to."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from setfit_kd.config import RunConfig, read_config
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.run_folder.log import _LogFile
from setfit_kd.run_folder.manifest import _is_run, _read_resumable
from setfit_kd.run_folder.names import _CONTENTS, CHECKPOINTS, CONFIG, LOG, METRICS, RESULTS, RUN, SEEDS
from setfit_kd.utils.atomic_io import (
    LOCK,
    TEMPORARY_NAME,
    lock_folder,
    refuse_links,
    temporary_path,
    write_errors,
    write_text,
)

logger = logging.getLogger(__name__)


class RunFolder:
    """A run's folder. Every file and folder in it is written beside its place and renamed: whole or not there.

    ``run.json`` tells what has been made, and from what; what it does not tell of counts as not there.

    Attributes:
        path: Where it is.
        about: What ``run.json`` holds.
    """

    def __init__(self, path: Path, about: dict[str, Any] | None = None) -> None:
        self.path = path
        self.about: dict[str, Any] = {"format": 1, "finished": False, "stages": {}} if about is None else about

    @staticmethod
    def check(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse a folder that cannot take a run, before any work is done; changes nothing.

        Raises:
            OutputError: It is a file, cannot be written, is not empty and neither ``overwrite`` nor ``resume`` is set,
                or holds no run to go on with.
        """
        another = "Choose another --output-dir"
        with write_errors(path):
            existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            if not existing.is_dir():
                raise OutputError(f"{existing} is a file, not a folder.", hint=f"{another}.")
            holds_files = path.is_dir() and any(file.name != LOCK for file in path.iterdir())
            if holds_files and not overwrite and not resume:
                go_on = f", or go on with the run in it: --resume {path}" if (path / RUN).is_file() else ""
                raise OutputError(f"The folder {path} is not empty.", hint=f"{another}, add --overwrite{go_on}.")
            if holds_files and not resume and any((path / name).exists() for name in _CONTENTS) and not _is_run(path):
                raise OutputError(f"The folder {path} holds files with a run's names, but no run.", hint=f"{another}.")
            RunFolder.refuse_links(path)
            if not os.access(existing, os.W_OK | os.X_OK):
                there = "Copy the run to where you may write." if resume else f"{another} that you may write to."
                raise OutputError(f"The folder {existing} cannot be written to.", hint=there)

    @staticmethod
    def refuse_links(path: Path) -> None:
        """Refuse a folder in which what a run writes or deletes is a link, or lies behind one.

        Raises:
            OutputError: It does.
        """
        half_written = (file.name for file in path.glob(".*") if TEMPORARY_NAME.fullmatch(file.name))
        refuse_links(path, (*_CONTENTS, LOCK, *half_written))

    @staticmethod
    def settings(path: Path) -> dict[str, Any]:
        """The settings of the run in a folder.

        Raises:
            InputError: There is no run.
        """
        if not all((path / name).is_file() for name in (CONFIG, RUN)):
            raise ConfigError(f"There is no run in {path} to go on with.", hint="Name a run's folder.")
        return read_config(path / CONFIG)

    @staticmethod
    def is_resumable(path: Path) -> bool:
        """Whether there is an unfinished run in a folder that has made something already and that nobody works in."""
        try:
            about = _read_resumable(path)
            if about.get("finished") or not (about["stages"] or any((path / CHECKPOINTS).glob("*/*"))):
                return False
            with lock_folder(path):
                return True
        except (DataError, OutputError, OSError):
            return False

    @classmethod
    def create(cls, config: RunConfig, path: Path) -> RunFolder:
        """Make the folder, take an earlier run's files out of it, and write the settings.

        Raises:
            OutputError: As `check`, or the disk is full.
        """
        cls.check(path, overwrite=config.overwrite)
        folder = cls(path)
        for name in _CONTENTS:
            if name != RUN:  # without which a folder that is half emptied would be nobody's run
                folder._remove(name)
        folder._remove_half_written()
        folder.update_manifest()
        write_text(path / CONFIG, config.to_yaml())
        return folder

    @classmethod
    def reopen(cls, config: RunConfig, path: Path) -> RunFolder:
        """Go on with the run in a folder, under these settings.

        Raises:
            DataError: What ``run.json`` says cannot be understood.
            OutputError: As `check`, or the disk is full.
        """
        cls.check(path, resume=True)
        folder = cls(path, _read_resumable(path))
        folder._remove_half_written()
        write_text(path / CONFIG, config.to_yaml())
        return folder

    def _remove_half_written(self) -> None:
        """Take out what a process that was killed has left unfinished."""
        for pattern in (".*", *(f"{name}/{below}" for name in _CONTENTS for below in (".*", "*/.*"))):
            for left in self.path.glob(pattern):
                if TEMPORARY_NAME.fullmatch(left.name):
                    self._remove(str(left.relative_to(self.path)))

    def stage(self, name: str, inputs: str) -> dict[str, Any] | None:
        """What is told of a stage, if it has been made from these inputs."""
        told: dict[str, Any] | None = self.about["stages"].get(name)
        return told if told is not None and told.get("inputs") == inputs and (self.path / name).is_dir() else None

    def discard(self, name: str) -> None:
        """Take out what a stage has made, and what was measured of the run."""
        self.about["stages"].pop(name, None)
        self.update_manifest(finished=False)
        for made in (*RESULTS, name):
            self._remove(made)

    def update_manifest(self, **what: Any) -> None:
        """Add to ``run.json``.

        Raises:
            OutputError: It cannot be written.
        """
        self.about.update(what)
        self.write_json(RUN, self.about)

    def has_resumable_run(self, place: str) -> bool:
        """Whether there is a run to go on with in a folder within this one; what else is there is taken out."""
        path = self.path / place
        try:
            if _is_run(path):
                _read_resumable(path)
                return True
        except DataError as error:
            logger.warning("It is gone through again: %s", error.message)
        self._remove(place)
        return False

    def discard_seeds(self, *, keep: Collection[int]) -> None:
        """Take out the runs of other seeds than these."""
        if not keep:
            self._remove(SEEDS)
        for path in (self.path / SEEDS).glob("*"):
            if path.name not in map(str, keep):
                self._remove(f"{SEEDS}/{path.name}")

    def finish(self, metrics: Mapping[str, Any], **what: Any) -> None:
        """Write what was measured, and that the run is whole.

        Raises:
            OutputError: It cannot be written.
        """
        self.write_json(METRICS, metrics)
        self.update_manifest(finished=True, **what)
        self._remove(CHECKPOINTS)

    def _remove(self, name: str) -> None:
        target = self.path / name
        with write_errors(target):
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            # Renamed first, so that a kill leaves no folder that looks whole.
            gone = target if target.name.startswith(".") else temporary_path(target)
            shutil.rmtree(target.rename(gone))
        if target.parent != self.path:
            with suppress(OSError):  # others are in it still
                target.parent.rmdir()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole.

        Raises:
            OutputError: It cannot be written.
        """
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def attach_log(self, recorder: logging.handlers.MemoryHandler) -> None:
        """Write what `recorded` has so far, and from now on everything, to ``run.log``.

        Raises:
            OutputError: It cannot be written.
        """
        with write_errors(self.path / LOG):
            file = _LogFile(self.path / LOG, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(stage)s: %(message)s"))
        recorder.setTarget(file)
        recorder.flushLevel = logging.DEBUG
        recorder.flush()
