"""Content hash of a body, independent of its name and folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from setfit_kd.utils.hashing import hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TOKENIZER_SETTINGS = (
    *("model_max_length", "truncation_side", "padding_side", "pad_token_type_id", "model_input_names"),
    *("special_tokens_map", "split_special_tokens", "encode_special_tokens", "chat_template"),
)


def content_hash(body: SentenceTransformer) -> str:
    """Hash everything that affects the embeddings of a body: modules, weights, tokenizer and settings."""
    return hash_parts(_hashed_parts(body))


def _hashed_parts(body: SentenceTransformer) -> Iterator[bytes]:
    import torch

    prompt = body.prompts.get(body.default_prompt_name or "")
    yield f"{body.max_seq_length} {body.truncate_dim} {prompt!r}".encode()
    yield repr(body).encode()
    for name, module in body.named_modules():
        if "Dropout" not in type(module).__name__:  # inactive while encoding
            yield f"{name} {type(module).__name__} {module.extra_repr()}".encode()
    config = getattr(getattr(body[0], "auto_model", None), "config", None)
    if config is not None:
        yield json.dumps({**config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str).encode()
    yield json.dumps(_describe_tokenizer(body.tokenizer), sort_keys=True, default=str).encode()
    for name, value in body.state_dict().items():
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return everything that affects the tokens of a tokenizer, without its path."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        description: dict[str, Any] = json.loads(backend.to_str())
    else:
        path = repr(getattr(tokenizer, "name_or_path", ""))
        description = {
            "tokenizer": repr(tokenizer).replace(path, ""),
            "vocabulary": getattr(tokenizer, "get_vocab", dict)(),
        }
    if backend is not tokenizer:  # transformers sets both before each use; a bare tokenizer keeps its own
        description.update(truncation=None, padding=None)
    return {**description, **{name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}}
