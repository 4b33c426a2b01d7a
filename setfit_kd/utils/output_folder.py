"""Output folder of a command that trains one model, with its metrics, and checkpoints next to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from setfit_kd.errors import OutputError
from setfit_kd.utils.atomic_io import (
    LOCK_FILE,
    lock_folder,
    raise_output_errors,
    refuse_links,
    replace_folder,
    write_text,
)
from setfit_kd.utils.files import read_json

METRICS, _FILES = "metrics.json", "files"


class Trained(NamedTuple):
    """Model on the device of the run that trained it, and its metrics, as in ``metrics.json``."""

    model: Any
    metrics: dict[str, Any]


class OutputFolder:
    """Locked output folder, from `open_output_folder`.

    Attributes:
        path: The folder.
        checkpoints: Folder next to it that has a folder of checkpoints for each training, named by its fingerprint.
    """

    def __init__(self, path: Path, replaceable: set[str]) -> None:
        self.path, self._replaceable = path, replaceable
        self.checkpoints = path.absolute().with_name(f"{path.absolute().name}.checkpoints")
        refuse_links(self.checkpoints.parent, [self.checkpoints.name])

    def write(self, save: Callable[[Path], None], metrics: Mapping[str, Any]) -> None:
        """Write a model with ``save``, which creates a folder, and its metrics; then remove the checkpoints."""
        with replace_folder(self.path, is_ours=self._replaceable.__contains__) as folder:
            save(folder)
            files = sorted({METRICS, *(path.name for path in folder.iterdir())})
            self._replaceable.update(files)
            text = json.dumps({**metrics, _FILES: files}, indent=2, ensure_ascii=False)
            write_text(folder / METRICS, text + "\n")
        for path in self.checkpoints.glob("*"):
            if re.fullmatch("[0-9a-f]{32}", path.name):  # the fingerprint of a training
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # it contains other files or does not exist
            self.checkpoints.rmdir()


@contextmanager
def open_output_folder(path: Path, *, overwrite: bool, command: str, keys: Collection[str]) -> Iterator[OutputFolder]:
    """Lock a folder that does not exist, is empty, or with ``overwrite`` was written by the same command.

    Args:
        path: The folder.
        overwrite: Replace an earlier model.
        command: Name of the command, for messages.
        keys: Keys of which the metrics of this command have at least one.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    _check(path, overwrite, command, keys)  # before the lock file is created
    with lock_folder(path):
        yield OutputFolder(path, _check(path, overwrite, command, keys))


def _check(folder: Path, overwrite: bool, command: str, keys: Collection[str]) -> set[str]:
    """Return the names of files in a folder that may be replaced; an `OutputError` if it cannot be written to."""
    with raise_output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, not a folder.", hint="Choose another --output-dir.")
        if not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir()):
            return {LOCK_FILE}
    try:
        metrics = read_json(folder / METRICS)
        if "settings" not in metrics or metrics.keys().isdisjoint(keys):
            raise ValueError("not written by this command")
        written = {str(name) for name in metrics.get(_FILES, [METRICS])}
    except (OSError, ValueError, AttributeError, TypeError):
        message = f"The folder {folder} is not empty and was not written by `setfit-kd {command}`."
        raise OutputError(message, hint="Choose another --output-dir.") from None
    if not overwrite:
        message = f"The folder {folder} is not empty."
        raise OutputError(message, hint="Choose another --output-dir, or pass --overwrite.")
    return {LOCK_FILE, *written}
