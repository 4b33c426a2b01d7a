"""Tests of long texts: they are shortened before tokenization, with the same result and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from predictions import predict_ok, read_output
from synthetic import few_labels, pool_signals
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from setfit_kd import train_student, train_teacher
from setfit_kd.models import static
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import embed
from setfit_kd.runtime.classify import PAIR_SEPARATOR, chunk_texts, shorten

LIMIT = "setfit_kd.runtime.classify.MAX_CHARACTERS"
WORDS = ["the", "then", "hen", "e", "東京", "、", "é", "x" * 150, "🙂", "\x1c", "\u3000", "\u00a0", "'s", "[MASK]"]
SPACES = ["", " ", " ", "\n", "\t", "   ", " \r\n"]
ANY_TEXT = st.text(st.characters(exclude_characters=PAIR_SEPARATOR, codec="utf-8"), max_size=5)  # not a pair


def wordpiece_tokenizer() -> Tokenizer:
    suffixes = [f"##{letters}" for letters in ("he", *"thenx")]
    pieces = ["[UNK]", "[CLS]", "[SEP]", "the", "he", *"thenx東京", *suffixes]
    tokenizer = Tokenizer(tokenizer_models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def byte_level_tokenizer() -> Tokenizer:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("x", "x"), ("xx", "xx"), ("Ċ", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(tokenizer_models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """Create a tokenizer that does not split texts into words first."""
    words = ["<unk>", "▁", "▁the", "the", "he", "hen", "▁東", "東京", "xx"]
    pieces = [(word, -index / 2) for index, word in enumerate(words)] + [(letter, -6.0) for letter in "thenx東京"]
    tokenizer = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make_tokenizer", [wordpiece_tokenizer, byte_level_tokenizer, unigram_tokenizer])
@given(
    pairs=st.lists(st.tuples(st.sampled_from(WORDS) | ANY_TEXT, st.sampled_from(SPACES)), max_size=12),
    repeats=st.integers(1, 200),
    affixes=st.tuples(*[st.sampled_from(["", "the then ", "x" * 700, " " * 700])] * 2),
    max_length=st.integers(1, 9),
    options=st.sampled_from([{}, {"stride": 2}, {"padding": 6}]),
)
@example(pairs=[("the", " ")], repeats=200, affixes=("", ""), max_length=5, options={})
@example(pairs=[("東京、", "")], repeats=200, affixes=("the ", " the"), max_length=5, options={})
@settings(max_examples=40)
def test_shortened_text_has_the_same_tokens(
    make_tokenizer: Callable[[], Tokenizer],
    side: str,
    pairs: list[tuple[str, str]],
    repeats: int,
    affixes: tuple[str, str],
    max_length: int,
    options: dict[str, int],
) -> None:
    text = affixes[0] + "".join(word + space for word, space in pairs) * repeats + affixes[1]
    tokenizer = make_tokenizer()
    if "padding" in options:
        tokenizer.enable_padding(length=options["padding"])
    # A stride must be smaller than the maximum length without special tokens.
    tokenizer.enable_truncation(max_length + 4, stride=options.get("stride", 0), direction=side)
    shortened = shorten(text, tokenizer)
    assert text.startswith(shortened) if side == "right" else text.endswith(shortened)
    for special in (True, False):
        ids = [tokenizer.encode(part, add_special_tokens=special).ids for part in (shortened, text)]
        assert ids[0] == ids[1]
    tokenizer.enable_truncation(64, direction=side)
    assert len(shorten("the then hen " * 5_000, tokenizer)) < 2_000


def test_texts_are_cut_to_the_character_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, 5)
    tokenizer = wordpiece_tokenizer()
    assert shorten("aaaabcccc", tokenizer) == "aaaab"
    tokenizer.enable_truncation(64, direction="left")
    assert shorten("aaaabcccc", tokenizer) == "bcccc"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 3, 3, 3, 3], [[3, 3, 3], [3, 3]]),
        ([1, 1, 1, 1, 1], [[1, 1, 1, 1], [1]]),
        ([1, 25, 1], [[1], [25], [1]]),
        ([None, 9, None, 1, 1], [[None, 9, None, 1], [1]]),
    ],
)
def test_chunks_are_limited_in_texts_and_characters(
    lengths: list[int | None], expected: list[list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMIT, 10)
    chunks = chunk_texts([None if length is None else "x" * length for length in lengths], 4)
    assert [[None if text is None else len(text) for text in chunk] for chunk in chunks] == expected


class RecordingTokenizer:
    """A tokenizer that records the number of characters per call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.n_characters = tokenizer, [0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.n_characters.append(len(text))
        return self.tokenizer.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.n_characters.append(sum(map(len, texts)))
        return self.tokenizer.encode_batch_fast(texts, **options)

    encode_batch = encode_batch_fast


def record_tokenizers(monkeypatch: pytest.MonkeyPatch) -> list[RecordingTokenizer]:
    """Record the tokenizer calls of all bundles and SetFit models that are loaded later."""
    from sentence_transformers import SentenceTransformer

    recorders: list[RecordingTokenizer] = []
    preprocess = SentenceTransformer.preprocess

    def from_buffer(content: bytes) -> RecordingTokenizer:
        recorders.append(RecordingTokenizer(Tokenizer.from_buffer(content)))
        return recorders[-1]

    def preprocess_recording(self: SentenceTransformer, texts: Any, *arguments: Any, **options: Any) -> Any:
        recorders.append(RecordingTokenizer(self.tokenizer))
        recorders[-1].n_characters.append(sum(map(len, texts)))
        return preprocess(self, texts, *arguments, **options)

    monkeypatch.setattr("setfit_kd.runtime.classify.Tokenizer", SimpleNamespace(from_buffer=from_buffer))
    monkeypatch.setattr(SentenceTransformer, "preprocess", preprocess_recording)
    return recorders


@pytest.mark.parametrize(("model", "max_characters"), [("bundle", 5_000), ("setfit", 1_000)])
def test_predict_tokenizes_few_characters_per_call(
    model: str, max_characters: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMIT, 5_000)
    texts = ["match goal shares " * 200, *["vote law chip " * 250] * 60, "match goal shares " * 3_000, "goal " * 1_001]
    truncated = [text[:5_000] for text in texts]
    expected = read_output("stdout", predict_ok(models[model], stdin="\n".join(truncated)))
    recorders = record_tokenizers(monkeypatch)
    result = predict_ok(models[model], "-q", stdin="\n".join(texts))
    assert max(count for recorder in recorders for count in recorder.n_characters) <= max_characters
    rows = read_output("stdout", result)
    assert [row.text for row in rows] == texts
    assert [row.label for row in rows] == [row.label for row in expected]
    for row, expected_row in zip(rows, expected, strict=True):
        assert row.probabilities == pytest.approx(expected_row.probabilities, abs=1e-5)
    assert result.stderr.splitlines() == ["Warning: Number of texts truncated to 5,000 characters: 2."]


def test_embed_matches_the_body_for_long_texts(tiny_student: Path) -> None:
    texts = ["match goal shares " * 400, "x" * 3_000, "vote", "law " * 500, "東京、" * 900]
    for side, max_length in (("right", 64), ("left", 64), ("right", 16)):
        body = load_body(tiny_student)
        body.tokenizer.truncation_side = side
        body.max_seq_length = max_length
        np.testing.assert_allclose(embed(body, texts), body.encode(texts), atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "student", "transformer"])
def test_training_tokenizes_few_characters_per_call(
    kind: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, labeled = pool_signals(), few_labels()
    signals.texts[0] = labeled.texts[0] = "match goal team " * 3_000
    recorders = record_tokenizers(monkeypatch)
    quick: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    if kind == "student":
        train_student(signals, load_body(tiny_student), batch_size=16, epochs=1, **quick)
    else:
        name = f"transformer:{tiny_student}" if kind == "transformer" else str(tiny_student)
        train_teacher(labeled, name, teacher_steps=1, **quick)
    counts = [count for recorder in recorders for count in recorder.n_characters]
    assert 0 < max(counts) <= 16 * 1_000  # one batch per call


def test_token_counts_of_a_static_student_tokenize_few_characters_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the then hen " * 20] * 50
    expected = static._sif_weights(wordpiece_tokenizer(), texts, 20)
    recorder: Any = RecordingTokenizer(wordpiece_tokenizer())
    monkeypatch.setattr(LIMIT, 1_000)
    np.testing.assert_array_equal(static._sif_weights(recorder, texts, 20), expected)
    assert max(recorder.n_characters) <= 1_000
