"""Read, name and hash files safely, and find the cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 32 << 20  # of a JSON document or line; parsed, it takes about twenty times as much memory
CACHE_VARIABLE = "SETFIT_KD_CACHE"


def cache_folder() -> Path | None:
    """Return ``SETFIT_KD_CACHE`` or a folder in the user's cache; None if the user has no home folder."""
    if configured := os.environ.get(CACHE_VARIABLE):
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setfit-kd"
    except RuntimeError:
        return None


def distinct_names(names: Iterable[str], default: str = "data") -> list[str]:
    """Turn each name into the name of a file or folder, distinct from the others; ``default`` replaces an empty one."""
    slugs: list[str] = []
    for name in names:
        slug = base = re.sub(r"[^\w.-]+", "-", name).strip(".-") or default
        number = 2
        while slug.lower() in map(str.lower, slugs):  # some file systems ignore case
            slug, number = f"{base}-{number}", number + 1
        slugs.append(slug)
    return slugs


def check_regular_file(path: Path, *, limit: float = float("inf")) -> Path:
    """Return ``path`` if it is a regular file, or a link to one, of at most ``limit`` bytes; else raise an `OSError`.

    Reading anything else, such as a pipe or a device, might never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, expected at most {limit:,}", str(path))
    return path


def read_json(path: Path) -> Any:
    """Read JSON in UTF-8 of at most `MAX_JSON_BYTES` from a regular file, or raise an `OSError` or `ValueError`."""
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


def hash_parts(parts: Iterable[bytes]) -> str:
    """Hash a sequence of byte strings to 32 hexadecimal digits; the boundaries between the strings count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def fingerprint(*parts: Any) -> str:
    """Hash JSON-serializable values to 32 hexadecimal digits."""

    def pieces() -> Iterator[bytes]:
        for part in parts:
            values, is_list = (part, True) if isinstance(part, list) else ([part], False)
            yield f"{is_list} {len(values)}".encode()
            yield from (json.dumps(value, sort_keys=True).encode() for value in values)  # no copy of a large pool

    return hash_parts(pieces())


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a regular file's content in hexadecimal."""
    digest = hashlib.sha256()
    with check_regular_file(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
