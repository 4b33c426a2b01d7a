"""Embeddings kept on disk, by the content that they were made from."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.arrays import in_parts, load_rows, save_rows
from setfit_kd.errors import OutputError
from setfit_kd.files import cache_folder, whole_folder
from setfit_kd.hashing import content_name
from setfit_kd.models import content_hash, embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
"""What the cache may hold; what was not used for longest goes first."""
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers")
_EMBEDDINGS, _ROWS = "embeddings", "embeddings.npy"


def cache_bytes() -> int:
    """How much is kept."""
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
    found = _found(place / _ROWS, (len(texts), body.get_embedding_dimension()))
    if found is None:
        shutil.rmtree(place, ignore_errors=True)  # whatever is there cannot be read
    if found is not None:
        with suppress(OSError):  # others' caches may only be read
            os.utime(place)
        logger.info("%s: taken from the cache (%s).", description, place)
        return found
    embeddings = embed(body, texts, batch_size=batch_size, normalize=normalize, description=description)
    if embeddings.nbytes > MOST_BYTES:
        return embeddings
    try:
        with whole_folder(place) as part:
            save_rows(embeddings, part / _ROWS)
        _prune(place.parent, keep=place)
    except (OSError, OutputError) as error:
        logger.debug("The embeddings are not kept: %s", error)
    return embeddings


def _found(path: Path, shape: tuple[int, int | None]) -> npt.NDArray[np.floating] | None:
    """The embeddings in a file, if there are any, whole and of that shape; a width of None is any."""
    try:
        rows = load_rows(path)
    except (OSError, ValueError):
        return None
    fits = rows.ndim == 2 and len(rows) == shape[0] and shape[1] in (None, rows.shape[1])
    return rows if fits and all(np.isfinite(part).all() for part in in_parts(rows)) else None


def _name_of(body: SentenceTransformer, texts: Sequence[str], *, normalize: bool) -> str:
    """A name for all that decides the embeddings: the body, the texts, and what computes them."""
    libraries = " ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    parts = chain((f"3 {normalize} {body.device.type} {libraries}", content_hash(body)), texts)
    return content_name(part.encode() for part in parts)


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """When each was last used, its bytes, and where it is; those being written are left out."""
    entries = []
    for path in folder.glob("[!.]*"):
        with suppress(OSError):  # another process may just have removed it
            entries.append((path.stat().st_mtime, (path / _ROWS).stat().st_size, path))
    return entries


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove what was used least lately until the rest fits."""
    entries = _entries(folder)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MOST_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
