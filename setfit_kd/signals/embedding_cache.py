"""Embeddings kept on disk, by the content that they were made from."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import OutputError
from setfit_kd.models import content_hash, embed
from setfit_kd.utils.arrays import load_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import cache_folder
from setfit_kd.utils.hashing import file_hash, hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

MAX_BYTES = 2 << 30
"""What the cache may hold; what was not used for longest goes first."""
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers")
_EMBEDDINGS, _ROWS, _CHECKSUM = "embeddings", "embeddings.npy", "embeddings.sha256"
_ENTRY = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{8}")
"""Name of an entry, or of one that is being written."""
_ABANDONED_SECONDS = 3600.0
"""Age at which an entry that was never finished is removed."""


def cache_bytes() -> int:
    """Size of the cache, unfinished entries included."""
    folder = cache_folder()
    return sum(size for _, size, _ in _entries(folder / _EMBEDDINGS)) if folder else 0


def cached_embed(
    body: SentenceTransformer, texts: Sequence[str], *, batch_size: int, normalize: bool, description: str
) -> npt.NDArray[np.floating]:
    """As `embed`, from the cache where the same body has met the same texts before.

    The cache helps where it can and is silent where it cannot: it never fails a run.
    """
    folder = cache_folder()
    if folder is None:
        return embed(body, texts, batch_size=batch_size, normalize=normalize, description=description)
    place = folder / _EMBEDDINGS / _name_of(body, texts, normalize=normalize)
    found = _load(place)
    if found is not None:
        with suppress(OSError):  # others' caches may only be read
            os.utime(place)
        logger.info("%s: taken from the cache (%s).", description, place)
        return found
    embeddings = embed(body, texts, batch_size=batch_size, normalize=normalize, description=description)
    if embeddings.nbytes > MAX_BYTES:
        return embeddings
    try:
        with atomic_folder(place) as part:
            save_rows(embeddings, part / _ROWS)
            (part / _CHECKSUM).write_text(file_hash(part / _ROWS), encoding="utf-8")
        _prune(place.parent, keep=place)
    except (OSError, OutputError) as error:
        logger.debug("The embeddings are not kept: %s", error)
    return embeddings


def _load(place: Path) -> npt.NDArray[np.floating] | None:
    """The embeddings of an entry; None, and no entry any more, unless they match their checksum."""
    if not os.path.lexists(place):
        return None
    try:
        if any(path.is_symlink() for path in (place, place / _ROWS, place / _CHECKSUM)):
            raise ValueError("it holds a symbolic link")
        if file_hash(place / _ROWS) != (place / _CHECKSUM).read_text(encoding="utf-8"):
            raise ValueError("its checksum does not match")
        return load_rows(place / _ROWS)
    except (OSError, ValueError) as error:
        logger.warning("Cached embeddings in %s cannot be used (%s): they are computed again.", place, error)
        _remove(place)
        return None


def _remove(place: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


def _name_of(body: SentenceTransformer, texts: Sequence[str], *, normalize: bool) -> str:
    """A name for all that decides the embeddings: the body, the texts, and what computes them."""
    libraries = " ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    parts = chain((f"4 {normalize} {body.device.type} {libraries}", content_hash(body)), texts)
    return hash_parts(part.encode() for part in parts)


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """When each was last used, its bytes, and where it is; a name that begins with a dot is of an unfinished one."""
    entries = []
    for path in folder.glob("*"):
        with suppress(OSError):  # another process may just have removed it
            if _ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                files = [file.lstat() for file in path.iterdir()]
                used = max([path.stat().st_mtime, *(file.st_mtime for file in files if path.name[0] == ".")])
                entries.append((used, sum(file.st_size for file in files), path))
    return entries


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove what was abandoned, and then what was used least lately until the rest fits."""
    entries = sorted(_entries(folder), key=lambda entry: (entry[2].name[0] != ".", entry[0]))
    total = sum(size for _, size, _ in entries)
    for used, size, path in entries:
        is_old = time.time() - used > _ABANDONED_SECONDS
        if is_old if path.name[0] == "." else total > MAX_BYTES and path != keep:
            _remove(path)
            total -= size
