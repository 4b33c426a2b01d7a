"""Read files safely and find the cache folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 32 << 20
"""Maximum size of a JSON document or line. Parsed, it takes about twenty times as much memory."""

CACHE_VARIABLE = "SETFIT_KD_CACHE"


def cache_folder() -> Path | None:
    """Return ``SETFIT_KD_CACHE``, or a folder in the user's cache; None if the user has no home folder."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setfit-kd"
    except RuntimeError:
        return None


def check_regular_file(path: Path, *, limit: float = float("inf")) -> Path:
    """Return ``path`` if it is a regular file, or a link to one, of at most ``limit`` bytes.

    Reading anything else, such as a pipe or a device, might never end.

    Raises:
        OSError: If the path does not exist, is not a regular file or is larger.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, expected at most {limit:,}", str(path))
    return path


def read_json(path: Path) -> Any:
    """Read a JSON document of at most `MAX_JSON_BYTES` from a regular file.

    Raises:
        OSError: If the file cannot be read, is not a regular file or is too large.
        ValueError: If the content is not JSON in UTF-8.
    """
    return _parse_json(check_regular_file(path, limit=MAX_JSON_BYTES).read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> Iterator[Any]:
    """Read a regular file of one JSON value per line, each of at most `MAX_JSON_BYTES`; raises as `read_json`."""
    with check_regular_file(path).open(encoding="utf-8") as file:
        while line := file.readline(MAX_JSON_BYTES + 1):
            if len(line) > MAX_JSON_BYTES:
                raise ValueError(f"a line has more than {MAX_JSON_BYTES:,} characters")
            yield _parse_json(line)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def folder_megabytes(folder: Path) -> float:
    """Return the total size of the files in a folder in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
