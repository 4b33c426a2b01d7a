"""On-disk cache of embeddings, keyed by body and texts."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import OutputError
from setfit_kd.models.bodies import content_hash
from setfit_kd.models.encode import embed
from setfit_kd.models.forward import METHODS, ForwardPass
from setfit_kd.utils.arrays import load_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import cache_folder, file_hash, hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

MAX_BYTES = 2 << 30  # of the cache
_EMBEDDINGS, _ROWS, _CHECKSUM = "embeddings", "embeddings.npy", "embeddings.sha256"
_ENTRY = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{8}")  # finished, or being written


def cache_bytes() -> int:
    """Return the size of the cache in bytes, including unfinished entries."""
    folder = cache_folder()
    return sum(size for _, size, _ in _entries(folder / _EMBEDDINGS)) if folder else 0


def cached_embed(
    choose_forward: Callable[[], ForwardPass],
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    methods: Sequence[str],
    normalize: bool,
    description: str,
    **options: Any,
) -> npt.NDArray[np.floating]:
    """Compute embeddings with `embed`, or load them if the same body has embedded the same texts before.

    Problems with the cache are logged and never raise an error.

    Args:
        choose_forward: Function that returns the forward pass to compute the embeddings with.
        body, texts, normalize, description, options: As in `embed`; the description also labels the log messages.
        methods: Methods of the forward pass that may have computed the embeddings, the best one first.
    """
    options.update(normalize=normalize, description=description)
    if (folder := cache_folder()) is None:
        return embed(body, texts, forward=choose_forward(), **options)
    names = "torch", "transformers", "sentence-transformers", "tokenizers"
    libraries = " ".join(f"{library} {version(library)}" for library in names)
    parts = chain((f"5 {normalize} {body.device.type} {libraries}", content_hash(body)), texts)
    inputs = hash_parts(part.encode() for part in parts)
    entries = {method: folder / _EMBEDDINGS / hash_parts([inputs.encode(), method.encode()]) for method in METHODS}
    for entry in map(entries.__getitem__, methods):
        if (cached := _load(entry)) is not None:
            with suppress(OSError):  # a shared cache may be read-only
                os.utime(entry)
            logger.info("%s: loaded from the cache (%s).", description, entry)
            return cached
    forward = choose_forward()
    entry, embeddings = entries[forward.method], embed(body, texts, forward=forward, **options)
    if embeddings.nbytes <= MAX_BYTES:
        try:
            with atomic_folder(entry) as part:
                save_rows(embeddings, part / _ROWS)
                (part / _CHECKSUM).write_text(file_hash(part / _ROWS), encoding="utf-8")
            _prune(entry.parent, keep=entry)
        except (OSError, OutputError) as error:
            logger.debug("Could not cache the embeddings: %s", error)
    return embeddings


def _load(entry: Path) -> npt.NDArray[np.floating] | None:
    """Load the embeddings of an entry; remove the entry and return None if they do not match their checksum."""
    try:
        if not os.path.lexists(entry):
            return None
        if any(path.is_symlink() for path in (entry, entry / _ROWS, entry / _CHECKSUM)):
            raise ValueError("it contains a symbolic link")
        if file_hash(entry / _ROWS) != (entry / _CHECKSUM).read_text(encoding="utf-8"):
            raise ValueError("its checksum does not match")
        return load_rows(entry / _ROWS)
    except (OSError, ValueError) as error:
        logger.warning("Cannot use the cached embeddings in %s (%s): computing them again.", entry, error)
        _remove(entry)
        return None


def _remove(entry: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """List the time of last use, the size in bytes and the path of each entry, including unfinished ones."""
    entries = []
    for path in folder.glob("*"):
        with suppress(OSError):  # another process may have removed it
            if _ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                size = sum(file.lstat().st_size for file in path.iterdir())
                entries.append((path.stat().st_mtime, size, path))
    return entries


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove the least recently used entries, finished or not, until the rest fits in `MAX_BYTES`."""
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total > MAX_BYTES and path != keep:
            _remove(path)
            total -= size
