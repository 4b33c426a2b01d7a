"""Blocks of tokens with dynamic masking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from setfit_kd.config.mlm import MlmConfig
from setfit_kd.errors import DataError, ModelError
from setfit_kd.mlm.loss import IGNORED

Ids: TypeAlias = npt.NDArray[np.int64]

_CHUNK = 1024  # texts that are tokenized together
NO_WORD = -1


class Words(NamedTuple):
    """Tokens of a text without special tokens.

    Attributes:
        ids: (T,) token ids.
        words: (T,) number of each token's word in the text; `NO_WORD` for special tokens.
        spans: (T, 2) positions of each token's first character and of the one after its last.
    """

    ids: Ids
    words: Ids
    spans: Ids

    def count_characters(self, text: str, chosen: npt.NDArray[np.bool_]) -> int:
        """Count the characters of chosen tokens (T,) of the text, without spaces."""
        starts, ends = self.spans.T
        # A character may have several tokens.
        starts = np.maximum(starts, [0, *np.maximum.accumulate(ends)[:-1]])
        return sum(len(text[start:end].strip()) for start, end in zip(starts[chosen], ends[chosen], strict=True))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a `ModelError` if a tokenizer is not fast, or has no words, mask token or padding token."""
    required = tokenizer.is_fast and [tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.mask_token_id]
    if not required or None in [*required, tokenizer.pad_token_id]:
        message = "The tokenizer is not fast, or has no pre-tokenizer, mask token or padding token."
        raise ModelError(message, hint="Use a masked language model such as bert-base-uncased.")


def tokenize_words(tokenizer: Any, texts: Sequence[str]) -> Iterator[Words]:
    """Tokenize texts without truncation."""
    special = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": False, "verbose": False}
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer(list(texts[start : start + _CHUNK]), **options)
        for row, (tokens, spans) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
            ids = np.array(tokens, np.int64)
            words = np.array([NO_WORD if word is None else word for word in encoded.word_ids(row)], np.int64)
            yield Words(ids, np.where(np.isin(ids, special), NO_WORD, words), np.array(spans, np.int64).reshape(-1, 2))


class Masking:
    """Masking of blocks of tokens for a tokenizer.

    Attributes:
        prefix, suffix: Token ids that the tokenizer puts before and after a text.
    """

    def __init__(self, tokenizer: Any, config: MlmConfig) -> None:
        check_tokenizer(tokenizer)
        self.config, self._mask_id, self._pad_id = config, tokenizer.mask_token_id, tokenizer.pad_token_id
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        encoded = tokenizer("a", return_special_tokens_mask=True)
        ids, is_special = np.array(encoded["input_ids"], np.int64), encoded["special_tokens_mask"]
        self.prefix = ids[: is_special.index(0)]
        self.suffix = ids[len(ids) - is_special[::-1].index(0) :]

    def choose(self, words: Ids, rng: np.random.Generator, *, whole_words: bool) -> npt.NDArray[np.bool_]:
        """Choose the tokens to predict, at least one, among tokens (T,) with numbers of words: (T,)."""
        units = words if whole_words else np.where(words == NO_WORD, NO_WORD, np.arange(len(words)))
        candidates = np.setdiff1d(units, [NO_WORD])
        n = max(1, int(self.config.mask_probability * len(candidates) + rng.random()))  # rounded without bias
        return np.isin(units, rng.choice(candidates, n, replace=False))

    def corrupt(self, ids: Ids, chosen: npt.NDArray[np.bool_], rng: np.random.Generator) -> Ids:
        """Replace 80% of the chosen tokens by the mask token and 10% by random tokens."""
        draw, ids = rng.random(len(ids)), ids.copy()
        ids[chosen & (draw < 0.8)] = self._mask_id
        is_random = chosen & (draw >= 0.9)
        ids[is_random] = rng.choice(self._ordinary, is_random.sum())
        return ids

    def mask(self, ids: Ids, chosen: npt.NDArray[np.bool_]) -> Ids:
        """Replace the chosen tokens by the mask token."""
        return np.where(chosen, self._mask_id, ids)

    def features(self, rows: Sequence[tuple[Ids, Ids]]) -> dict[str, torch.Tensor]:
        """Pad B blocks of token ids and labels, between prefix and suffix: ``input_ids`` etc., (B, T) each."""
        ids = [np.concatenate([self.prefix, ids, self.suffix]) for ids, _ in rows]
        labels = [np.pad(labels, (len(self.prefix), len(self.suffix)), constant_values=IGNORED) for _, labels in rows]
        return {
            "input_ids": _pad(ids, self._pad_id),
            "attention_mask": _pad([np.ones_like(row) for row in ids], 0),
            "labels": _pad(labels, IGNORED),
        }


def _pad(rows: Sequence[Ids], value: int) -> torch.Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)


class MaskedDataset(Dataset[Any]):
    """Blocks of the tokens of texts, in random order and masked anew in each epoch.

    Rows are numbered over all epochs. Masks depend only on the seed and the row: a resumed training has the same.

    Args:
        body: The body to train.
        texts: The texts, packed into blocks or one per block, as in the config.
        config: The settings.
    """

    def __init__(self, body: SentenceTransformer, texts: Sequence[str], config: MlmConfig) -> None:
        self.masking, self.config = Masking(body.tokenizer, config), config
        length = max_tokens(body, self.masking, config)
        separator = self.masking.suffix[-1:]
        ids, words, ends = [np.empty(0, np.int32)], [np.empty(0, np.int32)], [0]
        for text in tokenize_words(body.tokenizer, texts):
            size = None if config.pack else length
            tokens = np.concatenate([text.ids[:size], separator if config.pack else separator[:0]])
            numbers = np.where(text.words == NO_WORD, NO_WORD, text.words + ends[-1])[:size]
            ids.append(tokens.astype(np.int32))
            words.append(np.pad(numbers, (0, len(tokens) - len(numbers)), constant_values=NO_WORD).astype(np.int32))
            ends.append(ends[-1] + len(tokens))
        self._ids, self._words = np.concatenate(ids), np.concatenate(words)  # of all blocks
        if config.pack:
            ends = [*range(0, ends[-1], length), ends[-1]]
        self.spans = [span for span in pairwise(ends) if (self._words[slice(*span)] != NO_WORD).any()]
        if not self.spans:
            raise DataError("The training texts have no tokens to predict.", hint="Pass other texts.")
        n, size = len(self.spans), min(config.batch_size, len(self.spans))
        n_rows = config.steps * size if config.steps else config.epochs * n
        rng = np.random.default_rng(config.seed)
        self._order = np.concatenate([rng.permutation(n) for _ in range(-(-n_rows // n))])[:n_rows]
        self.batches = [list(range(i, min(i + size, n_rows))) for i in range(0, n_rows, size)]

    def __len__(self) -> int:
        """Return the number of rows of all epochs."""
        return len(self._order)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """Return the features of a batch of rows, with ``labels`` (B, T)."""
        return {"features": [self.masking.features([self._row(row) for row in rows])], "label": np.zeros(len(rows))}

    def _row(self, row: int) -> tuple[Ids, Ids]:
        start, end = self.spans[self._order[row]]
        ids, words = (array[start:end].astype(np.int64) for array in (self._ids, self._words))
        rng = np.random.default_rng([self.config.seed, row])
        chosen = self.masking.choose(words, rng, whole_words=self.config.whole_words)
        return self.masking.corrupt(ids, chosen, rng), np.where(chosen, ids, IGNORED)


def max_tokens(body: SentenceTransformer, masking: Masking, config: MlmConfig) -> int:
    """Return the maximum number of tokens of a block without prefix and suffix."""
    limit = min(config.max_length, body.max_seq_length or config.max_length)
    return limit - len(masking.prefix) - len(masking.suffix)
