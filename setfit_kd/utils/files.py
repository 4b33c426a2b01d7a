"""Read files safely, and find the cache folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 32 << 20
"""Size above which no JSON document or line is read: parsed, it takes about twenty times as much memory."""

CACHE_VARIABLE = "SETFIT_KD_CACHE"


def cache_folder() -> Path | None:
    """Where caches are kept: what the environment's ``SETFIT_KD_CACHE`` says, or the user's cache folder.

    None for a user without a home.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setfit-kd"
    except RuntimeError:
        return None


def check_regular_file(path: Path, *, limit: float = float("inf")) -> Path:
    """Return ``path`` if it is, links resolved, a regular file of at most ``limit`` bytes.

    Reading anything else, such as a pipe or a device, might never end.

    Raises:
        OSError: It does not exist, is something else or is larger.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if about.st_size > limit:
        raise OSError(errno.EFBIG, f"{about.st_size:,} bytes, expected at most {limit:,}", str(path))
    return path


def read_json(path: Path) -> Any:
    """Read a JSON document of at most `MAX_JSON_BYTES` from a regular file.

    Raises:
        OSError: It cannot be read, is no regular file or too large.
        ValueError: It is not JSON in UTF-8.
    """
    return _parse(check_regular_file(path, limit=MAX_JSON_BYTES).read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> Iterator[Any]:
    """Read a regular file of one JSON value per line, each of at most `MAX_JSON_BYTES` characters.

    Raises:
        OSError: It cannot be read or is no regular file.
        ValueError: A line is too long or is not JSON in UTF-8.
    """
    with check_regular_file(path).open(encoding="utf-8") as file:
        while line := file.readline(MAX_JSON_BYTES + 1):
            if len(line) > MAX_JSON_BYTES:
                raise ValueError(f"a line of more than {MAX_JSON_BYTES:,} characters")
            yield _parse(line)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def folder_megabytes(folder: Path) -> float:
    """Size of the files in a folder, in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
