"""Embeddings kept on disk, by the content that they were made from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.arrays import in_parts, load_rows, save_rows
from setfit_kd.errors import OutputError
from setfit_kd.files import whole_folder
from setfit_kd.models import embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

VARIABLE = "SETFIT_KD_CACHE"
MOST_BYTES = 2 << 30
"""What the cache may hold; what was not used for longest goes first."""
_EMBEDDINGS, _ROWS = "embeddings", "embeddings.npy"


def cache_folder() -> Path:
    """Where embeddings are kept: what the environment's ``SETFIT_KD_CACHE`` says, or the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setfit-kd"


def cache_bytes() -> int:
    """How much is kept."""
    return sum(path.stat().st_size for path in (cache_folder() / _EMBEDDINGS).glob(f"*/{_ROWS}"))


def cached_embed(
    body: SentenceTransformer, texts: Sequence[str], *, batch_size: int, normalize: bool, description: str
) -> npt.NDArray[np.floating]:
    """As `embed`, from the cache where the same body has met the same texts before.

    The cache helps where it can and is silent where it cannot: it never fails a run.
    """
    place = cache_folder() / _EMBEDDINGS / content_hash(body, texts, normalize=normalize)
    found = _found(place / _ROWS, (len(texts), body.get_embedding_dimension()))
    if found is not None:
        with suppress(OSError):  # others' caches may only be read
            os.utime(place)
        logger.info("%s: taken from the cache (%s).", description, place)
        return found
    embeddings = embed(body, texts, batch_size=batch_size, normalize=normalize, description=description)
    try:
        shutil.rmtree(place, ignore_errors=True)  # whatever is there could not be read
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


def content_hash(body: SentenceTransformer, texts: Sequence[str], *, normalize: bool) -> str:
    """A name for all that decides a body's embeddings of texts: modules, weights, tokenizer, texts."""
    digest = hashlib.sha256()

    def add(content: bytes) -> None:
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)

    add(f"1 {normalize} {body.device.type} {body.max_seq_length} {body.prompts} {body.default_prompt_name}".encode())
    add(repr(body).encode())
    backend = getattr(body.tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else repr(body.tokenizer)
    if isinstance(described, dict):  # these two are set by use, as the body's own settings say
        described = {key: value for key, value in described.items() if key not in ("truncation", "padding")}
    add(json.dumps(described).encode())
    for name, value in body.state_dict().items():
        add(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        add(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())
    for text in texts:
        add(text.encode())
    return digest.hexdigest()[:32]


def _prune(folder: Path, *, keep: Path) -> None:
    """Remove what was used least lately until the rest fits."""
    entries = []
    for path in folder.iterdir():
        rows = path / _ROWS
        if rows.is_file():
            entries.append((path.stat().st_mtime, rows.stat().st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MOST_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
