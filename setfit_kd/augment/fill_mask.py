"""Replace words with other words that a masked language model predicts in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.errors import ModelError
from setfit_kd.memory.backoff import move_model
from setfit_kd.models.bodies import load_local, model_errors
from setfit_kd.models.encode import run_batches
from setfit_kd.runtime.classify import shorten
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch

_MASK_RATIO = 0.15
_N_CANDIDATES, _N_SPELLINGS = 10, 6  # additional tokens in case some of them spell the masked word
# Some models number positions from 2 and therefore accept 2 tokens fewer than their configuration says.
_MAX_TOKENS, _SPARE_POSITIONS = 512, 2
# Characters without white space and punctuation.
_WORD = re.compile("[^\\s!-/:-@\\[-`{-~\xa1\xab\xbb\xbf\u2000-\u206f\u3000-\u303f\uff00-\uff0f]+")
_HINT = "Use a masked language model in the transformers format with a fast tokenizer, such as distilroberta-base."


class FillMask:
    """Replaces about 15% of the words of texts with predictions of a masked language model.

    The model is loaded from a transformers folder in fp32, without running code that comes with it; on the CPU if it
    does not fit on the device. ``batch_size`` is the number of texts per forward pass.

    Raises:
        ModelError: If the folder does not contain a masked language model with a mask token and a fast tokenizer whose
            vocabulary has enough whole words.
        OutOfMemoryError: If the model does not fit into memory.
    """

    def __init__(self, folder: Path, *, device: torch.device, batch_size: int = 32) -> None:
        with model_errors(folder, kind=" as a masked language model", hint=_HINT), quiet_libraries():
            from transformers import AutoModelForMaskedLM, AutoTokenizer

            self._tokenizer = tokenizer = load_local(AutoTokenizer.from_pretrained, folder)
            if not tokenizer.is_fast or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
                raise ModelError("The tokenizer is not fast, or has no mask or padding token.", hint=_HINT)
            model, info = load_local(AutoModelForMaskedLM.from_pretrained, folder, output_loading_info=True)
            for name in sorted(info["missing_keys"])[:1]:
                raise ModelError(f"It lacks weights of a masked language model: {name}.", hint=_HINT)
            # A token is a whole word if its text, tokenized after another word, gives only this token.
            n_tokens = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
            texts = [text.strip() for text in tokenizer.batch_decode([[token] for token in range(n_tokens)])]
            [prefix, *encoded] = tokenizer(["a", *(f"a {text}" for text in texts)], add_special_tokens=False).input_ids
            self._tokens = [
                token
                for token, (text, ids) in enumerate(zip(texts, encoded, strict=True))
                if ids == [*prefix, token] and any(map(str.isalnum, text)) and token not in tokenizer.all_special_ids
            ]
            self._words = [texts[token] for token in self._tokens]
            if len(self._words) < _N_CANDIDATES + _N_SPELLINGS:
                raise ModelError("The tokenizer has too few whole words to choose replacements from.", hint=_HINT)
        positions = getattr(model.config, "max_position_embeddings", None) or _MAX_TOKENS + _SPARE_POSITIONS
        max_length = min(tokenizer.model_max_length, positions - _SPARE_POSITIONS, _MAX_TOKENS)
        tokenizer.backend_tokenizer.enable_truncation(max_length)
        self._truncation = {"truncation": True, "max_length": max_length}
        self._batch_size, self._model = batch_size, model.float().eval()
        move_model(self._model, device, phase="Loading the masked language model")

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """Replace about 15% of the words of each text, at least one per text; return the texts in the same order.

        Each replacement is sampled from the ten most probable other words that are a single token. Words beyond the
        model's maximum length, and texts without words or with the mask token, stay unchanged. If memory runs out, the
        batches get smaller, and as a last resort the model runs on the CPU.

        Raises:
            OutOfMemoryError: If not even a single text fits into memory.
        """
        rng = np.random.default_rng([seed, 14])
        chosen = [self._choose_words(text, rng) for text in texts]
        rows = sorted((row for row, words in enumerate(chosen) if words), key=lambda row: -len(texts[row]))
        masked = [_replace(texts[row], chosen[row], [self._tokenizer.mask_token] * len(chosen[row])) for row in rows]
        size, filled = self._batch_size, list(texts)
        batches = (masked[start : start + size] for start in range(0, len(masked), size))
        parts = run_batches(self._model, batches, self._predict, len(masked), size=size, description="Replacing words")
        for row, (logits, indices) in zip(rows, chain.from_iterable(parts), strict=True):
            new_words = []
            for match, word_logits, word_indices in zip(chosen[row], logits, indices, strict=False):
                words = [self._words[index] for index in word_indices]
                others = [i for i, word in enumerate(words) if word.casefold() != match[0].casefold()][:_N_CANDIDATES]
                noise = rng.gumbel(size=len(others))  # the largest sum is a sample from the softmax of the logits
                new_words.append(words[others[int(np.argmax(word_logits[others] + noise))]])
            filled[row] = _replace(texts[row], chosen[row], new_words)
        return filled

    def _choose_words(self, text: str, rng: np.random.Generator) -> list[re.Match[str]]:
        """Choose the words to replace among those that the model reads."""
        if not text or self._tokenizer.mask_token in text:
            return []
        part = shorten(text, self._tokenizer.backend_tokenizer)
        offsets = self._tokenizer(part, return_offsets_mapping=True, **self._truncation)["offset_mapping"]
        start = min((first for first, stop in offsets if stop > first), default=0)
        end = max((stop for _, stop in offsets), default=0)
        read = (word for word in _WORD.finditer(part) if start <= word.start() and word.end() <= end)
        words = [word for word in read if any(map(str.isalnum, word[0]))]
        count = min(len(words), max(1, round(_MASK_RATIO * len(words))))
        return [words[index] for index in sorted(rng.permutation(len(words))[:count].tolist())]

    def _predict(self, texts: list[str], size: int) -> list[tuple[Any, Any]]:
        """Return the logits (P, 16) and indices (P, 16) of the best words for the P masks of each text."""
        import torch

        results: list[tuple[Any, Any]] = []
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            inputs = self._tokenizer(batch, padding=True, return_tensors="pt", **self._truncation)
            is_mask = inputs["input_ids"] == self._tokenizer.mask_token_id
            with torch.inference_mode():
                logits = self._model(**inputs.to(self._model.device)).logits[is_mask][:, self._tokens]
            top, counts = logits.topk(_N_CANDIDATES + _N_SPELLINGS), is_mask.sum(dim=1).tolist()
            parts = (part.cpu().split(counts) for part in (top.values, top.indices))
            results += [(values.double().numpy(), indices.numpy()) for values, indices in zip(*parts, strict=True)]
        return results


def _replace(text: str, matches: list[re.Match[str]], new_words: list[str]) -> str:
    for match, new_word in reversed(list(zip(matches, new_words, strict=False))):
        text = text[: match.start()] + new_word + text[match.end() :]
    return text
