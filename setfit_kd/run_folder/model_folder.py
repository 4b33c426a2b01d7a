"""Output folder of a command that trains one model: the model, and ``metrics.json`` with settings and metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from setfit_kd.errors import OutputError
from setfit_kd.utils.atomic_io import LOCK_FILE, raise_output_errors, refuse_links, replace_folder, write_text
from setfit_kd.utils.files import read_json

METRICS, _FILES = "metrics.json", "files"


def check_output(folder: Path, *, overwrite: bool, command: str, keys: set[str]) -> set[str]:
    """Return the names of files in a folder that may be replaced; an `OutputError` if it cannot be written to.

    A folder was written by ``setfit-kd COMMAND`` if its ``metrics.json`` has the settings and one of the ``keys``.
    """
    with raise_output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, not a folder.", hint="Choose another --output-dir.")
        if not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir()):
            return {LOCK_FILE}
    try:
        metrics = read_json(folder / METRICS)
        if "settings" not in metrics or not metrics.keys() & keys:
            raise ValueError(f"not written by {command}")
        written = {str(name) for name in metrics.get(_FILES, [METRICS])}
    except (OSError, ValueError, AttributeError, TypeError):
        message = f"The folder {folder} is not empty and was not written by `setfit-kd {command}`."
        raise OutputError(message, hint="Choose another --output-dir.") from None
    if not overwrite:
        message = f"The folder {folder} is not empty."
        raise OutputError(message, hint="Choose another --output-dir, or pass --overwrite.")
    return {LOCK_FILE, *written}


def checkpoints_folder(output_dir: Path) -> Path:
    """Return the folder next to the output folder that holds the checkpoints of unfinished trainings."""
    checkpoints = output_dir.absolute().with_name(f"{output_dir.absolute().name}.checkpoints")
    refuse_links(checkpoints.parent, [checkpoints.name])
    return checkpoints


def write_model(
    output_dir: Path,
    save: Callable[[Path], None],
    metrics: Mapping[str, Any],
    *,
    replaceable: set[str],
    checkpoints: Path,
) -> None:
    """Write a model, with a function that creates its folder, and the metrics; then remove the checkpoints.

    The files named in ``replaceable``, from `check_output`, are replaced.
    """
    replaceable = set(replaceable)
    with replace_folder(output_dir, is_ours=replaceable.__contains__) as folder:
        save(folder)
        files = sorted({METRICS, *(path.name for path in folder.iterdir())})
        replaceable.update(files)
        content = {**metrics, _FILES: files}
        write_text(folder / METRICS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for path in checkpoints.glob("*"):
        if re.fullmatch("[0-9a-f]{32}", path.name):  # the fingerprint of a training
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it contains other files or does not exist
        checkpoints.rmdir()
