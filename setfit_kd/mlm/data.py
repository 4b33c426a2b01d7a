"""Blocks of tokens with dynamic masking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_NO_WORD = -1


class Words(NamedTuple):
    """Tokens of a text without special tokens.

    Attributes:
        ids: (T,) token ids.
        words: (T,) number of each token's word in the text; `_NO_WORD` for special tokens.
        characters: (T,) number of characters of each token.
    """

    ids: Ids
    words: Ids
    characters: Ids


def tokenize_words(body: SentenceTransformer, texts: Sequence[str]) -> Iterator[Words]:
    """Tokenize texts without truncation.

    Raises:
        ModelError: If the tokenizer is not fast, or has no mask or padding token.
    """
    tokenizer = body.tokenizer
    if not tokenizer.is_fast or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        message = "The tokenizer is not fast, or has no mask or padding token."
        raise ModelError(message, hint="Use a masked language model such as bert-base-uncased.")
    special = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": False, "verbose": False}
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        encoded = tokenizer(chunk, **options)
        for row, text in enumerate(chunk):
            ids = np.array(encoded["input_ids"][row], np.int64)
            words = np.array([_NO_WORD if word is None else word for word in encoded.word_ids(row)], np.int64)
            characters, last = np.zeros_like(ids), 0
            for token, (first, end) in enumerate(encoded["offset_mapping"][row]):
                characters[token] = len(text[max(first, last) : end].strip())  # a character may have several tokens
                last = max(last, end)
            yield Words(ids, np.where(np.isin(ids, special), _NO_WORD, words), characters)


class Masking:
    """Masking of blocks of tokens for a tokenizer.

    Attributes:
        prefix, suffix: Token ids that the tokenizer puts before and after a text.
    """

    def __init__(self, tokenizer: Any, config: MlmConfig) -> None:
        self.config, self._mask_id, self._pad_id = config, tokenizer.mask_token_id, tokenizer.pad_token_id
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        encoded = tokenizer("a", return_special_tokens_mask=True)
        ids, is_special = np.array(encoded["input_ids"], np.int64), encoded["special_tokens_mask"]
        self.prefix = ids[: is_special.index(0)]
        self.suffix = ids[len(ids) - is_special[::-1].index(0) :]

    def choose(self, words: Ids, rng: np.random.Generator, *, whole_words: bool) -> npt.NDArray[np.bool_]:
        """Choose the tokens to predict, at least one, among tokens (T,) with numbers of words: (T,)."""
        units = words if whole_words else np.where(words == _NO_WORD, _NO_WORD, np.arange(len(words)))
        candidates = np.setdiff1d(units, [_NO_WORD])
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
        ids, words, self.spans, n_words = list[Ids](), list[Ids](), list[tuple[int, int]](), 0
        total = 0
        for text in tokenize_words(body, texts):
            if config.pack:
                ids += [text.ids, separator]
                words += [np.where(text.words == _NO_WORD, _NO_WORD, text.words + n_words), 0 * separator + _NO_WORD]
                n_words += len(text.ids)
            elif (text.words[:length] != _NO_WORD).any():
                ids.append(text.ids[:length])
                words.append(text.words[:length])
                self.spans.append((total, total := total + len(ids[-1])))
        # Tokens of all blocks.
        self._ids = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int32)
        self._words = np.concatenate([np.empty(0, np.int64), *words]).astype(np.int32)
        if config.pack:
            starts = range(0, len(self._ids), length)
            self.spans = [(i, i + length) for i in starts if (self._words[i : i + length] != _NO_WORD).any()]
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
