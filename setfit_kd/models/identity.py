"""What a body is, whatever it is called and wherever it lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.hashing import content_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def content_hash(body: SentenceTransformer) -> str:
    """A name for all of a body that decides its embeddings: modules, weights, tokenizer, settings."""
    return content_name(_parts(body))


def _parts(body: SentenceTransformer) -> Iterator[bytes]:
    yield f"{body.max_seq_length} {body.prompts} {body.default_prompt_name}".encode()
    yield repr(body).encode()
    config = getattr(getattr(body[0], "auto_model", None), "config", None)
    if config is not None:
        yield json.dumps({**config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str).encode()
    backend = getattr(body.tokenizer, "backend_tokenizer", body.tokenizer)
    described = json.loads(backend.to_str()) if hasattr(backend, "to_str") else repr(body.tokenizer)
    if isinstance(described, dict):  # these two are set by use, as the body's own settings say
        described = {key: value for key, value in described.items() if key not in ("truncation", "padding")}
    yield json.dumps(described).encode()
    for name, value in body.state_dict().items():
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes()
