"""Add whole words to the vocabulary of a masked language model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.data.readers import read_records
from setfit_kd.data.sources import RowErrors
from setfit_kd.errors import DataError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WORD = re.compile(r"(?=.*[^\W\d])\w+")  # letters, digits and underscores, but not only digits and underscores


def choose_words(texts: Sequence[str], tokenizer: Any, n: int) -> list[str]:
    """Choose at most n words of the texts that save the most tokens when they become a token each.

    A word occurs ``count`` times in ``pieces`` tokens: the words with the largest ``count * (pieces - 1)`` are chosen.
    Words are separated by the tokenizer, in the form in which it normalizes them, such as in lower case.
    """
    counts = Counter(word for text in texts for word in _split(text, tokenizer) if _WORD.fullmatch(word))
    words = sorted(counts.keys() - tokenizer.get_vocab().keys())
    saved = {word: counts[word] * (len(ids) - 1) for word, ids in zip(words, _pieces(words, tokenizer), strict=True)}
    return sorted((word for word in words if saved[word]), key=lambda word: -saved[word])[:n]


def read_words(path: Path, tokenizer: Any) -> list[str]:
    """Read words, one per line, that are not in the vocabulary of a tokenizer; return them as it normalizes them.

    Raises:
        DataError: If a line is not one word, is in the vocabulary, or repeats an earlier one.
    """
    if path.suffix != ".txt" or not path.is_file():
        raise DataError(f"No such text file: {path}.", hint="Pass a .txt file with one word per line.")
    errors, words = RowErrors(str(path), "line"), dict[str, int]()
    known, unknown = tokenizer.get_vocab(), [tokenizer.unk_token_id]
    for number, record in read_records(path):
        line = str(record["text"])
        parts = _split(line, tokenizer)
        if line != line.strip() or len(parts) != 1 or not _WORD.fullmatch(parts[0]):
            errors.add(number, f"expected one word, got {line!r:.60}")
        elif parts[0] in words:
            errors.add(number, f"{line!r} is the same word as in line {words[parts[0]]}")
        elif parts[0] in known or (len(ids := _pieces(parts, tokenizer)[0]) == 1 and ids != unknown):
            errors.add(number, f"{line!r} is already in the vocabulary")
        else:
            words[parts[0]] = number
    errors.check()
    return list(words)


def _split(text: str, tokenizer: Any) -> list[str]:
    """Return the words of a text as a tokenizer normalizes and separates them."""
    backend = tokenizer.backend_tokenizer
    normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
    spans = (span for _, span in backend.pre_tokenizer.pre_tokenize_str(normalized))
    return [normalized[start:end].strip() for start, end in spans]


def _pieces(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each word, as it is tokenized after a space."""
    return [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]


def add_words(body: SentenceTransformer, words: Sequence[str]) -> None:
    """Add words to the vocabulary of a body with a head for masked tokens, in place.

    A word becomes one token where no letter, digit or underscore is next to it. Texts without such a word keep their
    tokens, also if they have longer words that begin with it: the words become added tokens of the tokenizers library,
    which are looked up before the model splits words. As an entry of a WordPiece vocabulary, a word would also become
    the first token of longer words. A new row of the embeddings, the decoder and its bias is the mean of the rows of
    the tokens that the word had before.
    """
    import torch
    from tokenizers import AddedToken

    tokenizer, module = body.tokenizer, body[0]
    model: Any = module.model
    pieces = _pieces(words, tokenizer)
    # Where a space is part of the tokens, it must be part of the added tokens, too.
    takes_space = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a a")[-1][0] != "a"
    first, rows = len(tokenizer), model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=True, lstrip=takes_space) for w in words])
    model.resize_token_embeddings(max(rows, len(tokenizer)), mean_resizing=False)  # some models have spare rows
    embeddings, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embeddings.weight, decoder.weight, decoder.bias]
    with torch.no_grad():
        for table in {id(table): table for table in tables if table is not None}.values():  # two may be the same
            for row, ids in enumerate(pieces, first):
                table[row] = table[ids].mean(dim=0)
    if model.config.tie_word_embeddings:
        return
    # Some models have the bias twice, and load both unless the embeddings are tied.
    for module in model.modules():
        bias = module._parameters.get("bias")
        if module is not decoder and bias is not None and (bias is decoder.bias or len(bias) == rows):
            module.bias = torch.nn.Parameter(decoder.bias.detach().clone())
