"""Names for content: what is equal has the same, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def content_name(parts: Iterable[bytes]) -> str:
    """32 hexadecimal digits for a sequence of byte strings; where one ends and the next begins makes a difference."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]
