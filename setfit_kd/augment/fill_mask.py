"""Replace words with other words that a masked language model predicts in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.memory.backoff import move_model
from setfit_kd.models.encode import run_batches
from setfit_kd.models.safe_loading import load_local, model_errors
from setfit_kd.runtime.classify import shorten
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

_MASK_RATIO = 0.15
_N_CANDIDATES = 10
_MAX_TOKENS = 512
# Some models number positions from 2 and therefore accept 2 tokens fewer than their configuration says.
_SPARE_POSITIONS = 2
_ARCHITECTURES = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
_HINT = "Use a masked language model in the transformers format with a fast tokenizer, such as distilroberta-base."


@dataclass(frozen=True)
class _Word:
    """A word: the tokens ``first`` to ``last`` and the characters ``start`` to ``end``, both end-exclusive."""

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True)
class _MaskedText:
    """A text of T tokens with P words masked.

    Attributes:
        ids: T token ids; each masked word is one mask token.
        words: P masked words, in order.
        positions: P positions of the mask tokens in ``ids``.
        no_space_before: P flags, true if the word does not follow white space.
        originals: For each masked word, the tokens that spell it in any case.
        draws: (P,) random numbers between 0 and 1 that choose the replacements.
    """

    ids: list[int]
    words: list[_Word]
    positions: list[int]
    no_space_before: list[bool]
    originals: list[list[int]]
    draws: npt.NDArray[np.float64]


class FillMask:
    """Replaces about 15% of the words of texts with predictions of a masked language model.

    Args:
        model: Masked language model, on its device.
        tokenizer: The model's fast tokenizer.
        batch_size: Texts per forward pass.

    Raises:
        ModelError: If the vocabulary has too few whole words.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        from tokenizers import Tokenizer

        self._model = model.eval()
        self._batch_size = batch_size
        self._mask_id = int(tokenizer.mask_token_id)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._tokenizer: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_padding()  # some tokenizers pad every text to a fixed length
        self._special_ids = {*tokenizer.all_special_ids, *self._tokenizer.get_added_tokens_decoder()}
        self._token_texts, self._is_word = self._find_whole_words(model.get_input_embeddings().num_embeddings)
        if self._is_word.sum(axis=1).min() <= _N_CANDIDATES:
            raise ModelError("The tokenizer has too few whole words to choose replacements from.", hint=_HINT)
        self._tokens_by_word: dict[str, list[int]] = {}
        for token in np.flatnonzero(self._is_word.any(axis=0)).tolist():
            self._tokens_by_word.setdefault(self._token_texts[token].casefold(), []).append(token)
        positions = getattr(model.config, "max_position_embeddings", None) or _MAX_TOKENS + _SPARE_POSITIONS
        self._tokenizer.enable_truncation(min(tokenizer.model_max_length, positions - _SPARE_POSITIONS, _MAX_TOKENS))

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """Replace about 15% of the words of each text, at least one per text, and leave everything else unchanged.

        Each replacement is sampled from the ten most probable other words that are a single token. Words beyond the
        model's maximum length and texts without words stay unchanged. If memory runs out, the batches get smaller, and
        as a last resort the model runs on the CPU.

        Args:
            texts: n texts.
            seed: Random seed.

        Returns:
            n texts, in the same order.

        Raises:
            OutOfMemoryError: If not even a single text fits into memory.
        """
        rng = np.random.default_rng([seed, 14])
        masked = [self._mask_words(text, rng) for text in texts]
        order = sorted((row for row, text in enumerate(masked) if text.words), key=lambda row: -len(masked[row].ids))
        filled = list(texts)
        size = self._batch_size
        batches = ([masked[row] for row in order[start : start + size]] for start in range(0, len(order), size))
        parts = run_batches(self._model, batches, self._sample, len(order), size=size, description="Replacing words")
        sampled = iter([token for part in parts for token in part])
        for row in order:
            new_words = {word: self._token_texts[next(sampled)] for word in masked[row].words}
            filled[row] = _replace_words(texts[row], new_words)
        return filled

    def _find_whole_words(self, n_rows: int) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """Find the text of each token, and the tokens that are whole words with or without white space before them.

        A token is a whole word if its text, tokenized after another word, gives only this token. Tokenizers mark such
        tokens in different ways, but tokenizing works with all of them.

        Returns:
            V strings and (2, V) flags for the V rows of the model's embeddings. The first row of flags is for words
            after white space, the second for all other words.
        """
        n_known = min(n_rows, 1 + max(self._tokenizer.get_vocab().values()))
        token_texts = [text.strip() for text in self._tokenizer.decode_batch([[token] for token in range(n_known)])]

        def tokenize(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

        [prefix] = tokenize(["a"])
        is_word = np.zeros((2, n_rows), np.bool_)
        after_space = tokenize([f"a {text}" for text in token_texts])
        is_word[0, :n_known] = [ids == [*prefix, token] for token, ids in enumerate(after_space)]
        is_word[0, :n_known] &= [any(map(str.isalnum, text)) for text in token_texts]
        is_word[0, [token for token in self._special_ids if token < n_rows]] = False
        words = {token_texts[token] for token in np.flatnonzero(is_word[0]).tolist()}
        is_single = [ids == [token] for token, ids in enumerate(tokenize(token_texts))]
        is_word[1, :n_known] = [single and text in words for single, text in zip(is_single, token_texts, strict=True)]
        return [*token_texts, *[""] * (n_rows - n_known)], is_word

    def _mask_words(self, text: str, rng: np.random.Generator) -> _MaskedText:
        encoding = self._tokenizer.encode(shorten(text, self._tokenizer))
        words = self._find_words(text, encoding)
        count = min(len(words), max(1, round(_MASK_RATIO * len(words))))
        chosen = [words[index] for index in sorted(rng.permutation(len(words))[:count].tolist())]
        ids: list[int] = []
        positions = []
        end = 0
        for word in chosen:
            ids += encoding.ids[end : word.first]
            positions.append(len(ids))
            ids.append(self._mask_id)
            end = word.last
        return _MaskedText(
            ids=[*ids, *encoding.ids[end:]],
            words=chosen,
            positions=positions,
            no_space_before=[not text[max(0, word.start - 1) : word.start].isspace() for word in chosen],
            originals=[self._tokens_by_word.get(text[word.start : word.end].casefold(), []) for word in chosen],
            draws=rng.random(count),
        )

    def _find_words(self, text: str, encoding: Encoding) -> list[_Word]:
        """Find the words of a text that are not truncated, without the punctuation around them."""
        words = []
        tokens = [token for token, word in enumerate(encoding.word_ids) if word is not None]
        for _, group in groupby(tokens, key=encoding.word_ids.__getitem__):
            word_tokens = list(group)
            if encoding.overflowing and word_tokens[-1] == tokens[-1]:
                break  # the word may continue beyond the maximum length
            if not self._special_ids.isdisjoint(encoding.ids[token] for token in word_tokens):
                continue
            alphanumeric = [
                token for token in word_tokens if any(map(str.isalnum, text[slice(*encoding.offsets[token])]))
            ]
            if not alphanumeric:
                continue
            first, last = alphanumeric[0], alphanumeric[-1]
            start, end = encoding.offsets[first][0], encoding.offsets[last][1]
            start += len(text[start:end]) - len(text[start:end].lstrip())
            if text[start].isalnum():
                words.append(_Word(first, last + 1, start, end))
        return words

    def _sample(self, masked: list[_MaskedText], size: int) -> list[int]:
        """Sample a token for each masked word, in batches of ``size`` texts."""
        sampled: list[int] = []
        for start in range(0, len(masked), size):
            batch = masked[start : start + size]
            probabilities, tokens = self._candidates(batch)
            draws = np.concatenate([text.draws for text in batch])
            for cumulative, draw, candidates in zip(probabilities.cumsum(axis=1), draws, tokens, strict=True):
                sampled.append(int(candidates[np.searchsorted(cumulative, draw * cumulative[-1])]))
        return sampled

    def _candidates(self, batch: list[_MaskedText]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return the probabilities (P, 10) and tokens (P, 10) of the best whole words for the P masked words."""
        import torch

        device = self._model.device
        longest = max(len(text.ids) for text in batch)
        ids = torch.tensor([[*text.ids, *[self._pad_id] * (longest - len(text.ids))] for text in batch])
        attention_mask = torch.arange(longest) < torch.tensor([len(text.ids) for text in batch])[:, None]
        rows = [row for row, text in enumerate(batch) for _ in text.positions]
        columns = [column for text in batch for column in text.positions]
        no_space_before = [int(flag) for text in batch for flag in text.no_space_before]
        originals = [tokens for text in batch for tokens in text.originals]
        excluded = torch.from_numpy(~self._is_word)[no_space_before]
        for row, tokens in enumerate(originals):
            excluded[row, tokens] = True
        with torch.inference_mode():
            logits = self._model(input_ids=ids.to(device), attention_mask=attention_mask.long().to(device)).logits
            top = logits[rows, columns].masked_fill(excluded.to(device), -torch.inf).topk(_N_CANDIDATES)
        return top.values.cpu().double().softmax(dim=1).numpy(), top.indices.cpu().numpy()


def load_fill_mask(folder: Path, *, device: torch.device, batch_size: int = 32) -> FillMask:
    """Load a masked language model in fp32, without running code that comes with it.

    If it does not fit on the device, it is loaded on the CPU.

    Args:
        folder: transformers folder with config, weights and tokenizer.
        device: Device to run on.
        batch_size: Texts per forward pass.

    Raises:
        ModelError: If the folder does not contain a masked language model with a mask token and a fast tokenizer.
        OutOfMemoryError: If it does not fit into memory.
    """
    with model_errors(folder, kind=" as a masked language model", hint=_HINT), quiet_libraries():
        from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

        config: Any = load_local(AutoConfig.from_pretrained, folder)
        architectures = getattr(config, "architectures", None) or []
        if architectures and not any(name.endswith(_ARCHITECTURES) for name in architectures):
            raise ModelError(
                f"Expected a masked language model in {folder}, got {', '.join(architectures)}.", hint=_HINT
            )
        tokenizer: Any = load_local(AutoTokenizer.from_pretrained, folder)
        if not tokenizer.is_fast:
            raise ModelError(f"The tokenizer in {folder} is not a fast tokenizer.", hint=_HINT)
        if tokenizer.mask_token_id is None:
            raise ModelError(f"The tokenizer in {folder} has no mask token.", hint=_HINT)
        model, info = load_local(AutoModelForMaskedLM.from_pretrained, folder, output_loading_info=True)
        if info["missing_keys"]:
            missing = min(info["missing_keys"])
            raise ModelError(
                f"The model in {folder} lacks weights of a masked language model, such as {missing}.", hint=_HINT
            )
    model = model.float()
    move_model(model, device, phase="Loading the masked language model")
    return FillMask(model, tokenizer, batch_size=batch_size)


def _replace_words(text: str, new_words: dict[_Word, str]) -> str:
    """Replace some words of a text, which are in order."""
    parts = []
    end = 0
    for word, new_word in new_words.items():
        parts += [text[end : word.start], new_word]
        end = word.end
    return "".join([*parts, text[end:]])
