"""Hashes and fingerprints of content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from setfit_kd.utils.files import check_regular_file


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
            is_list = isinstance(part, list)
            yield f"{is_list} {len(part) if is_list else 1}".encode()
            for piece in part if is_list else [part]:  # avoids a JSON copy of a large pool
                yield json.dumps(piece, sort_keys=True).encode()

    return hash_parts(pieces())


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a regular file's content in hexadecimal."""
    digest = hashlib.sha256()
    with check_regular_file(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
