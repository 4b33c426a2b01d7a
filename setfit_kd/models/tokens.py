"""Tokenize texts once, and pad them batch by batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.models.bodies import default_prompt
from setfit_kd.runtime.classify import chunk_texts, shorten
from setfit_kd.utils.files import hash_parts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Rows = npt.NDArray[np.int64]

MAX_CACHED_TOKENS = 1 << 24  # of four bytes each
_MIN_CACHED_TEXTS = 256  # for fewer, a lookup takes about as long as the tokenization
_CHUNK = 1024  # texts that are tokenized together
_PADDED, _CONSTANT = {"input_ids", "attention_mask", "token_type_ids"}, {"modality", "prompt_length"}
_CHARACTERS_PER_TOKEN = 4  # an estimate
_cache: OrderedDict[str, Tokens] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of n texts, without padding.

    Attributes:
        rows: (n,) positions of the texts in the list that was tokenized.
        lengths: (n,) number of tokens of each text.
        starts: (n,) position of each text's first token in ``ids``.
        ids: Token ids of all texts, int32.
        constants: Features that are the same for all texts.
        texts: The texts of a body with features of another kind, which is given its texts batch by batch; else None.
    """

    rows: Rows
    lengths: Rows
    starts: Rows
    ids: npt.NDArray[np.int32]
    constants: dict[str, Any]
    texts: list[str] | None = None

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.rows)

    def take(self, indices: Rows) -> Tokens:
        """Return the tokens of some texts, given by their indices from 0 to n - 1."""
        texts = None if self.texts is None else [self.texts[index] for index in indices]
        rows, lengths, starts = self.rows[indices], self.lengths[indices], self.starts[indices]
        return replace(self, rows=rows, lengths=lengths, starts=starts, texts=texts)

    def features(self, body: SentenceTransformer) -> dict[str, Any]:
        """Return the features of all texts for a body, padded to the longest text, on the CPU."""
        import torch

        if self.texts is not None:
            return body.preprocess(self.texts, prompt=default_prompt(body))
        width, tokenizer = int(self.lengths.max(initial=0)), body.tokenizer
        columns = np.arange(width) - np.zeros_like(self.lengths)[:, None]  # (n, width)
        if getattr(tokenizer, "padding_side", "right") == "left":
            columns -= (width - self.lengths)[:, None]
        mask = (columns >= 0) & (columns < self.lengths[:, None])
        ids = self.ids[(columns + self.starts[:, None])[mask]]
        if not hasattr(tokenizer, "pad_token_id"):  # static embeddings need no padding
            offsets = np.cumsum(self.lengths) - self.lengths
            return {"input_ids": torch.from_numpy(ids.astype(np.int64)), "offsets": torch.from_numpy(offsets)}
        padded = np.full(mask.shape, tokenizer.pad_token_id or 0, np.int64)
        padded[mask] = ids
        attention_mask = torch.from_numpy(mask.astype(np.int64))
        return {"input_ids": torch.from_numpy(padded), "attention_mask": attention_mask, **self.constants}


def tokenize(body: SentenceTransformer, texts: Sequence[str]) -> Tokens:
    """Tokenize n texts; the rows of the result are 0 to n - 1."""
    key, tokens = _find(body, texts)
    return tokens or _join(list(_tokenize_all(body, texts, _CHUNK)), key)


def iter_tokens(
    body: SentenceTransformer, texts: Sequence[str], size: int, *, use_cache: bool = True
) -> Iterator[Tokens]:
    """Tokenize texts in chunks of at most ``size`` texts, longest first; the next chunk while the last one is in use.

    With ``use_cache``, texts that an equal tokenizer tokenized before are taken from memory.
    """
    key, tokens = _find(body, texts, use_cache=use_cache)
    if tokens:
        order = _longest_first(texts)
        yield from (tokens.take(order[start : start + size]) for start in range(0, len(order), size))
        return
    parts: list[Tokens] = []
    n_tokens = 0
    for part in _tokenize_all(body, texts, size):
        yield part
        n_tokens += len(part.ids)
        if key and n_tokens <= MAX_CACHED_TOKENS:
            parts.append(part)
        else:
            parts.clear()
    if parts:
        _join(parts, key)


def _longest_first(texts: Sequence[str]) -> Rows:
    return np.argsort([-len(text) for text in texts], kind="stable")


def _find(
    body: SentenceTransformer, texts: Sequence[str], *, use_cache: bool = True
) -> tuple[str | None, Tokens | None]:
    """Return the cache key of texts, if they are to be cached, and their tokens if they are cached."""
    body.preprocess(["a"])  # sets the truncation of the tokenizer
    backend = getattr(body.tokenizer, "backend_tokenizer", body.tokenizer)
    if not use_cache or len(texts) < _MIN_CACHED_TEXTS or not hasattr(backend, "to_str"):
        return None, None
    try:
        serialized = backend.to_str()
    except Exception:  # it has a component that is written in Python
        return None, None
    options = [getattr(body[0], "processing_kwargs", None), getattr(body.tokenizer, "split_special_tokens", None)]
    settings = type(body[0]).__name__, type(body.tokenizer).__name__, repr(options), default_prompt(body), serialized
    key = hash_parts(part.encode("utf-8", "surrogatepass") for part in (*settings, *texts))
    if key in _cache:
        _cache.move_to_end(key)
    return key, _cache.get(key)


def _tokenize_all(body: SentenceTransformer, texts: Sequence[str], size: int) -> Iterator[Tokens]:
    chunks = chunk_texts(((row, texts[row]) for row in _longest_first(texts).tolist()), size, get_text=itemgetter(1))
    with ThreadPoolExecutor(1) as executor:
        tokenized = (_tokenize(body, chunk) for chunk in chunks)
        future = executor.submit(next, tokenized, None)
        while (tokens := future.result()) is not None:
            future = executor.submit(next, tokenized, None)
            yield tokens


def _tokenize(body: SentenceTransformer, chunk: list[tuple[int, str]]) -> Tokens:
    tokenizer = getattr(body.tokenizer, "backend_tokenizer", body.tokenizer)
    shortened = [shorten(text, tokenizer) for _, text in chunk]
    features = body.preprocess(shortened, prompt=default_prompt(body))
    texts: list[str] | None = shortened
    constants = {name: value for name, value in features.items() if name in _CONSTANT}
    ids = np.empty(0, np.int32)
    lengths = np.array([len(text) // _CHARACTERS_PER_TOKEN for text in shortened], np.int64)
    if set(features) == {"input_ids", "offsets"}:  # static embeddings
        ids, lengths = (
            features["input_ids"].numpy(),
            np.diff(features["offsets"].numpy(), append=len(features["input_ids"])),
        )
        texts = None
    elif (
        "attention_mask" in features
        and set(features) <= _PADDED | _CONSTANT
        and not ("token_type_ids" in features and features["token_type_ids"].any())
    ):
        mask = features["attention_mask"].numpy().astype(bool)
        ids, lengths, texts = features["input_ids"].numpy()[mask], mask.sum(axis=1), None
    rows = np.array([row for row, _ in chunk], np.int64)
    starts = np.cumsum(lengths) - lengths
    return Tokens(rows, lengths, starts, ids.astype(np.int32), constants, texts)


def _join(parts: list[Tokens], key: str | None) -> Tokens:
    """Join the tokens of all chunks in the order of the rows, and cache them."""
    n, start = sum(map(len, parts)), 0
    lengths, starts = np.zeros(n, np.int64), np.zeros(n, np.int64)
    texts = [""] * n if parts and parts[0].texts else None
    for part in parts:
        lengths[part.rows], starts[part.rows] = part.lengths, part.starts + start
        start += len(part.ids)
        if texts and part.texts:
            for row, text in zip(part.rows, part.texts, strict=True):
                texts[row] = text
    ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)])
    constants = parts[0].constants if parts else {}
    tokens = Tokens(np.arange(n), lengths, starts, ids, constants, texts)
    if key and texts is None and len(ids) <= MAX_CACHED_TOKENS:
        _cache[key] = tokens
        while sum(len(tokens.ids) for tokens in list(_cache.values())) > MAX_CACHED_TOKENS:
            _cache.popitem(last=False)
    return tokens
