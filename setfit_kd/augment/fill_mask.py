"""Replacing words by others that a masked language model holds probable in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.memory import move_model
from setfit_kd.models import load_local, model_errors, run_batches
from setfit_kd.runtime import shorten
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

_MASKED = 0.15
_CANDIDATES = 10
_MOST_TOKENS = 512
# Some models count positions from 2, and have so many fewer than their configuration says.
_SPARE_POSITIONS = 2
_ARCHITECTURES = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
_HINT = "Give a masked language model in the format of transformers, with a fast tokenizer, such as distilroberta-base."


@dataclass(frozen=True)
class _Word:
    """A word, in the tokens ``first`` up to ``last`` and the characters ``start`` up to ``end``."""

    first: int
    last: int
    start: int
    end: int


@dataclass(frozen=True)
class _Masked:
    """A text of T tokens with P words masked.

    Attributes:
        ids: T tokens, each masked word one of them.
        words: P words, in order.
        places: P places of the masks in ``ids``.
        glued: P flags, set where no white space comes before the word.
        originals: For each word, the tokens that write it, in whatever case.
        draws: (P,) numbers between 0 and 1 that decide what comes in their place.
    """

    ids: list[int]
    words: list[_Word]
    places: list[int]
    glued: list[bool]
    originals: list[list[int]]
    draws: npt.NDArray[np.float64]


class FillMask:
    """Replaces about 15 % of the words of texts.

    Args:
        model: A masked language model, on the device it shall run on.
        tokenizer: Its fast tokenizer.
        batch_size: Texts a forward pass.

    Raises:
        ModelError: The tokenizer knows too few whole words.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        from tokenizers import Tokenizer

        self._model = model.eval()
        self._batch_size = batch_size
        self._mask = int(tokenizer.mask_token_id)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._reader: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._reader.no_padding()  # some pad every text to a fixed length
        self._special = {*tokenizer.all_special_ids, *self._reader.get_added_tokens_decoder()}
        self._surfaces, self._allowed = self._read_vocabulary(model.get_input_embeddings().num_embeddings)
        if self._allowed.sum(axis=1).min() <= _CANDIDATES:
            raise ModelError("The tokenizer knows too few whole words to replace others by.", hint=_HINT)
        self._written: dict[str, list[int]] = {}
        for token in np.flatnonzero(self._allowed.any(axis=0)).tolist():
            self._written.setdefault(self._surfaces[token].casefold(), []).append(token)
        positions = getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS + _SPARE_POSITIONS
        self._reader.enable_truncation(min(tokenizer.model_max_length, positions - _SPARE_POSITIONS, _MOST_TOKENS))

    def __call__(self, texts: Sequence[str], seed: int) -> list[str]:
        """The texts with about 15 % of their words replaced, at least one; all else stays as it is.

        What comes in a word's place is drawn, by probability, from the ten most probable other words of one token. A
        text's words beyond what the model reads, and a text without words, stay as they are. Where memory runs out, it
        goes on in smaller batches, and at last on the CPU.

        Args:
            texts: n texts.
            seed: The same seed replaces the same words.

        Returns:
            n texts, in their order.

        Raises:
            OutOfMemoryError: Not even one text at once fits.
        """
        rng = np.random.default_rng([seed, 14])
        masked = [self._hide(text, rng) for text in texts]
        order = sorted((row for row, one in enumerate(masked) if one.words), key=lambda row: -len(masked[row].ids))
        filled = list(texts)
        size = self._batch_size
        batches = ([masked[row] for row in order[start : start + size]] for start in range(0, len(order), size))
        parts = run_batches(self._model, batches, self._draw, len(order), size=size, description="Replacing words")
        drawn = iter([token for part in parts for token in part])
        for row in order:
            filled[row] = _put(texts[row], {word: self._surfaces[next(drawn)] for word in masked[row].words})
        return filled

    def _read_vocabulary(self, n_rows: int) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """How each token is written, and which of them are whole words: after white space, and elsewhere.

        A whole word is what is read as that one token when it stands behind another word. A mark for that in the
        token differs between kinds of tokenizers; reading does not.

        Returns:
            V strings, and (2, V) flags for the V rows that the model has.
        """
        n_known = min(n_rows, 1 + max(self._reader.get_vocab().values()))
        surfaces = [text.strip() for text in self._reader.decode_batch([[token] for token in range(n_known)])]

        def read(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in self._reader.encode_batch(texts, add_special_tokens=False)]

        [before] = read(["a"])
        behind = [ids == [*before, token] for token, ids in enumerate(read([f"a {text}" for text in surfaces]))]
        allowed = np.zeros((2, n_rows), np.bool_)
        allowed[0, :n_known] = behind
        allowed[0, :n_known] &= [any(map(str.isalnum, text)) for text in surfaces]
        allowed[0, [token for token in self._special if token < n_rows]] = False
        words = {surfaces[token] for token in np.flatnonzero(allowed[0]).tolist()}
        alone = [ids == [token] for token, ids in enumerate(read(surfaces))]
        allowed[1, :n_known] = [is_one and text in words for is_one, text in zip(alone, surfaces, strict=True)]
        return [*surfaces, *[""] * (n_rows - n_known)], allowed

    def _hide(self, text: str, rng: np.random.Generator) -> _Masked:
        encoding = self._reader.encode(shorten(text, self._reader))
        words = self._words(text, encoding)
        count = min(len(words), max(1, round(_MASKED * len(words))))
        chosen = [words[index] for index in sorted(rng.permutation(len(words))[:count].tolist())]
        ids: list[int] = []
        places = []
        end = 0
        for word in chosen:
            ids += encoding.ids[end : word.first]
            places.append(len(ids))
            ids.append(self._mask)
            end = word.last
        return _Masked(
            ids=[*ids, *encoding.ids[end:]],
            words=chosen,
            places=places,
            glued=[not text[max(0, word.start - 1) : word.start].isspace() for word in chosen],
            originals=[self._written.get(text[word.start : word.end].casefold(), []) for word in chosen],
            draws=rng.random(count),
        )

    def _words(self, text: str, encoding: Encoding) -> list[_Word]:
        """The words of a text that were read to their ends, without punctuation around them."""
        words = []
        tokens = [token for token, word in enumerate(encoding.word_ids) if word is not None]
        for _, group in groupby(tokens, key=encoding.word_ids.__getitem__):
            of_word = list(group)
            if encoding.overflowing and of_word[-1] == tokens[-1]:
                break  # it may go on where the model does not read
            if not self._special.isdisjoint(encoding.ids[token] for token in of_word):
                continue
            lettered = [token for token in of_word if any(map(str.isalnum, text[slice(*encoding.offsets[token])]))]
            if not lettered:
                continue
            first, last = lettered[0], lettered[-1]
            start, end = encoding.offsets[first][0], encoding.offsets[last][1]
            start += len(text[start:end]) - len(text[start:end].lstrip())
            if text[start].isalnum():
                words.append(_Word(first, last + 1, start, end))
        return words

    def _draw(self, masked: list[_Masked], size: int) -> list[int]:
        """A token for each masked word of some texts."""
        drawn: list[int] = []
        for start in range(0, len(masked), size):
            batch = masked[start : start + size]
            probabilities, tokens = self._candidates(batch)
            draws = np.concatenate([one.draws for one in batch])
            for reached, draw, row in zip(probabilities.cumsum(axis=1), draws, tokens, strict=True):
                drawn.append(int(row[np.searchsorted(reached, draw * reached[-1])]))
        return drawn

    def _candidates(self, batch: list[_Masked]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """For each of the P masked words of some texts, its (P, 10) most probable whole words and how probable."""
        import torch

        device = self._model.device
        longest = max(len(one.ids) for one in batch)
        ids = torch.tensor([[*one.ids, *[self._padding] * (longest - len(one.ids))] for one in batch])
        there = torch.arange(longest) < torch.tensor([len(one.ids) for one in batch])[:, None]
        rows = [row for row, one in enumerate(batch) for _ in one.places]
        columns = [column for one in batch for column in one.places]
        glued = [int(flag) for one in batch for flag in one.glued]
        originals = [tokens for one in batch for tokens in one.originals]
        barred = torch.from_numpy(~self._allowed)[glued]
        for row, tokens in enumerate(originals):
            barred[row, tokens] = True
        with torch.inference_mode():
            logits = self._model(input_ids=ids.to(device), attention_mask=there.long().to(device)).logits
            found = logits[rows, columns].masked_fill(barred.to(device), -torch.inf).topk(_CANDIDATES)
        return found.values.cpu().double().softmax(dim=1).numpy(), found.indices.cpu().numpy()


def load_fill_mask(folder: Path, *, device: torch.device, batch_size: int = 32) -> FillMask:
    """Load a masked language model, in single precision; code that comes with it is never run.

    Where the device has no room for it, it goes to the CPU.

    Args:
        folder: Of transformers, with config, weights and tokenizer.
        device: Where it shall run.
        batch_size: Texts a forward pass.

    Raises:
        ModelError: The folder does not hold a masked language model with a mask token and a fast tokenizer.
        OutOfMemoryError: It does not fit.
    """
    with model_errors(folder, kind=" as a masked language model", hint=_HINT), quiet_libraries():
        from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

        config: Any = load_local(AutoConfig.from_pretrained, folder)
        named = getattr(config, "architectures", None) or []
        if named and not any(name.endswith(_ARCHITECTURES) for name in named):
            raise ModelError(f"The model in {folder} is no masked language model but a {', '.join(named)}.", hint=_HINT)
        tokenizer: Any = load_local(AutoTokenizer.from_pretrained, folder)
        if not tokenizer.is_fast:
            raise ModelError(f"The tokenizer in {folder} is not a fast one.", hint=_HINT)
        if tokenizer.mask_token_id is None:
            raise ModelError(f"The tokenizer in {folder} has no mask token.", hint=_HINT)
        model, info = load_local(AutoModelForMaskedLM.from_pretrained, folder, output_loading_info=True)
        if info["missing_keys"]:
            lacking = min(info["missing_keys"])
            raise ModelError(
                f"The model in {folder} lacks weights of a masked language model, such as {lacking}.", hint=_HINT
            )
    model = model.float()
    move_model(model, device, phase="Loading the masked language model")
    return FillMask(model, tokenizer, batch_size=batch_size)


def _put(text: str, words: dict[_Word, str]) -> str:
    """A text with some of its words, in order, replaced."""
    parts = []
    end = 0
    for word, new in words.items():
        parts += [text[end : word.start], new]
        end = word.end
    return "".join([*parts, text[end:]])
