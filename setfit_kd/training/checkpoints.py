"""Checkpoints from which an interrupted training resumes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from setfit_kd.errors import OutputError
from setfit_kd.utils.atomic_io import raise_output_errors
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import file_hash

logger = logging.getLogger(__name__)

_PREFIX, _HASHES = "checkpoint-", "whole.json"


class Checkpoints:
    """Checkpoints of one training: body, weights of the loss, optimizer, random states and progress.

    They are written by transformers, followed by a file with the hash of every other file. A checkpoint that is
    incomplete or damaged is never loaded.

    Args:
        folder: Folder for the checkpoints; no other training may use it.
        seconds: Approximate time between two checkpoints.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._has_failed = False
        self._next = time.monotonic() + seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time to write a checkpoint."""
        return time.monotonic() >= self._next

    def latest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint; remove newer ones that are not complete."""
        for path in self._newest_first():
            if _is_complete(path):
                return path
            logger.warning("The checkpoint %s is incomplete or damaged and is ignored.", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def _newest_first(self) -> list[Path]:
        paths = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
        return sorted(paths, key=lambda path: -int(path.name.removeprefix(_PREFIX)))

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, step: int, save: Callable[[], None]) -> None:
        """Write a checkpoint with a function, add the hashes, and remove older checkpoints.

        A checkpoint that cannot be written only causes a warning. If the disk is full, saving the result raises an
        error.
        """
        folder = self.folder / f"{_PREFIX}{step}"
        try:
            with raise_output_errors(folder):
                save()
                files = [path for path in folder.rglob("*") if path.is_file()]
                hashes = {str(path.relative_to(folder)): file_hash(path) for path in files}
                (folder / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
            for path in self._newest_first()[1:]:
                shutil.rmtree(path, ignore_errors=True)
        except OutputError as error:
            shutil.rmtree(folder, ignore_errors=True)
            level = logging.DEBUG if self._has_failed else logging.WARNING
            logger.log(level, "Skipped a checkpoint, training continues: %s", error.message)
            self._has_failed = True
        self._next = time.monotonic() + self.seconds


def _is_complete(folder: Path) -> bool:
    try:
        hashes = read_json(folder / _HASHES)
        return all(file_hash(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False
