"""Long texts: shortened before they are tokenized, with the same result, in bounded memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from predictions import predicted, read_output
from synthetic import few_labels, pool_signals
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from setfit_kd import train_student, train_teacher
from setfit_kd.models import embed, load_body, static
from setfit_kd.runtime import Classifier, in_windows, shorten

LIMIT = "setfit_kd.runtime.classify.MAX_CHARACTERS"
WORDS = ["the", "then", "hen", "e", "東京", "、", "é", "x" * 150, "🙂", "\x1c", "\u3000", "\u00a0", "'s", "[MASK]"]
SPACES = ["", " ", " ", "\n", "\t", "   ", " \r\n"]


def word_piece() -> Tokenizer:
    pieces = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "he",
        "##he",
        "##n",
        *"thenx東京",
        *(f"##{letter}" for letter in "thenx"),
    ]
    tokenizer = Tokenizer(tokenizer_models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def byte_level() -> Tokenizer:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("x", "x"), ("xx", "xx"), ("Ċ", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(tokenizer_models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unigram() -> Tokenizer:
    """Over whole texts: nothing splits them into words."""
    scores = {
        "<unk>": 0.0,
        "▁": -2.0,
        "▁the": -2.5,
        "the": -3.0,
        "he": -3.5,
        "hen": -3.6,
        "▁東": -4.0,
        "東京": -4.0,
        "xx": -5.0,
    }
    pieces = [*scores.items(), *((letter, -6.0) for letter in "thenx東京")]
    tokenizer = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [word_piece, byte_level, unigram])
@given(
    pairs=st.lists(st.tuples(st.sampled_from(WORDS) | st.text(max_size=5), st.sampled_from(SPACES)), max_size=12),
    repeats=st.integers(1, 200),
    around=st.tuples(*[st.sampled_from(["", "the then ", "x" * 700, " " * 700])] * 2),
    max_length=st.integers(1, 9),
    options=st.sampled_from([{}, {"stride": 2}, {"padding": 6}]),
)
@example(pairs=[("the", " ")], repeats=200, around=("", ""), max_length=5, options={})
@example(pairs=[("東京、", "")], repeats=200, around=("the ", " the"), max_length=5, options={})
@settings(max_examples=60)
def test_a_shortened_text_has_the_tokens_of_the_whole(
    make: Callable[[], Tokenizer],
    side: str,
    pairs: list[tuple[str, str]],
    repeats: int,
    around: tuple[str, str],
    max_length: int,
    options: dict[str, int],
) -> None:
    text = around[0] + "".join(word + space for word, space in pairs) * repeats + around[1]
    tokenizer = make()
    if "padding" in options:
        tokenizer.enable_padding(length=options["padding"])
    # A stride must be smaller than the maximum length without special tokens.
    tokenizer.enable_truncation(max_length + 4, stride=options.get("stride", 0), direction=side)
    shortened = shorten(text, tokenizer)
    assert text.startswith(shortened) if side == "right" else text.endswith(shortened)
    for special in (True, False):
        assert (
            tokenizer.encode(shortened, add_special_tokens=special).ids
            == tokenizer.encode(text, add_special_tokens=special).ids
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [word_piece, byte_level, unigram])
def test_words_are_shortened_to_little(make: Callable[[], Tokenizer], side: str) -> None:
    tokenizer = make()
    tokenizer.enable_truncation(64, direction=side)
    assert len(shorten("the then hen " * 50_000, tokenizer)) < 2_000


def test_a_short_text_is_not_tokenized() -> None:
    truncating: Any = SimpleNamespace(truncation={"max_length": 64, "direction": "right", "stride": 0})
    assert shorten("the hen " * 64, truncating) == "the hen " * 64
    with pytest.raises(AttributeError, match="encode"):
        shorten("the hen " * 640, truncating)


@pytest.mark.parametrize(("side", "kept"), [("right", "aaaab"), ("left", "bcccc"), (None, "aaaab")])
def test_no_more_than_the_limit_is_read(side: str | None, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LIMIT, 5)
    tokenizer = word_piece()
    if side is not None:
        tokenizer.enable_truncation(64, direction=side)
    assert shorten("aaaabcccc", tokenizer) == kept


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([], 3, []),
        ([3, 3, 3, 3, 3], 9, [[3, 3, 3], [3, 3]]),
        ([1, 1, 1, 1, 1], 2, [[1, 1], [1, 1], [1]]),
        ([10, 10], 9, [[10], [10]]),
        ([1, 25, 1], 9, [[1], [25], [1]]),
        ([None, 9, None, 1, 1], 9, [[None, 9, None, 1], [1]]),
    ],
)
def test_windows_are_bounded_by_texts_and_characters(
    lengths: list[int | None],
    most: int,
    expected: list[list[int | None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(LIMIT, 10)
    texts = [None if length is None else "x" * length for length in lengths]
    windows = list(in_windows(texts, most))
    assert [[None if text is None else len(text) for text in window] for window in windows] == expected
    long = sum(length is not None and length > 10 for length in lengths)
    assert [record.getMessage() for record in caplog.records] == ["Number of texts cut to 10 characters: 1."] * long


class Recorder:
    """A tokenizer that notes how many characters it is handed at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.handed = tokenizer, [0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.handed.append(len(text))
        return self.tokenizer.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.handed.append(sum(map(len, texts)))
        return self.tokenizer.encode_batch_fast(texts, **options)

    encode_batch = encode_batch_fast


def record(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """What bundles and SetFit models that are loaded later hand to their tokenizers."""
    from sentence_transformers import SentenceTransformer

    from setfit_kd.runtime import classify

    recorders: list[Recorder] = []
    read, preprocess = classify._read_tokenizer, SentenceTransformer.preprocess

    def reading(content: bytes) -> Any:
        recorders.append(Recorder(read(content)))
        return recorders[-1]

    def preprocessing(self: SentenceTransformer, texts: Any, *arguments: Any, **options: Any) -> Any:
        recorders.append(Recorder(self.tokenizer))
        recorders[-1].handed.append(sum(map(len, texts)))
        return preprocess(self, texts, *arguments, **options)

    monkeypatch.setattr(classify, "_read_tokenizer", reading)
    monkeypatch.setattr(SentenceTransformer, "preprocess", preprocessing)
    return recorders


@pytest.mark.parametrize(("model", "most"), [("bundle", 5_000), ("setfit", 1_000)])
def test_predict_hands_few_characters_to_the_tokenizer(
    model: str,
    most: int,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LIMIT, 5_000)
    texts = ["match goal shares " * 200, *["vote law chip " * 250] * 60, "match goal shares " * 3_000, "goal " * 1_001]
    expected = [text[:5_000] for text in texts]
    cut = read_output("stdout", predicted(models[model], stdin="\n".join(expected)))
    recorders = record(monkeypatch)
    result = predicted(models[model], "-q", stdin="\n".join(texts))
    assert max(characters for one in recorders for characters in one.handed) <= most
    rows = read_output("stdout", result)
    assert [row.text for row in rows] == texts
    assert [row.label for row in rows] == [row.label for row in cut]
    for row, other in zip(rows, cut, strict=True):
        assert row.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert result.stderr.splitlines() == ["Warning: Number of texts cut to 5,000 characters: 2."]


def test_embed_reads_of_long_texts_what_the_body_would_read(tiny_student: Path) -> None:
    texts = ["match goal shares " * 400, "x" * 3_000, "vote", "law " * 500, "東京、" * 900]
    for side, max_length in (("right", 64), ("left", 64), ("right", 16)):
        body = load_body(tiny_student)
        body.tokenizer.truncation_side = side
        body.max_seq_length = max_length
        np.testing.assert_allclose(embed(body, texts), body.encode(texts), atol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "student", "transformer"])
def test_training_hands_few_characters_to_the_tokenizer(
    kind: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, labeled = pool_signals(), few_labels()
    signals.texts[0] = labeled.texts[0] = "match goal team " * 3_000
    recorders = record(monkeypatch)
    quick: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    if kind == "student":
        train_student(signals, load_body(tiny_student), batch_size=16, epochs=1, **quick)
    else:
        name = f"transformer:{tiny_student}" if kind == "transformer" else str(tiny_student)
        train_teacher(labeled, name, teacher_steps=1, **quick)
    handed = [characters for one in recorders for characters in one.handed]
    assert 0 < max(handed) <= 16 * 1_000  # a batch of texts at once


def test_token_counts_of_a_static_student_take_few_characters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the then hen " * 20] * 50
    expected = static._sif_weights(word_piece(), texts, 20)
    recorder: Any = Recorder(word_piece())
    monkeypatch.setattr(LIMIT, 1_000)
    np.testing.assert_array_equal(static._sif_weights(recorder, texts, 20), expected)
    assert max(recorder.handed) <= 1_000


def test_a_stream_reports_texts_beyond_the_limit_once(
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(LIMIT, 100)
    classifier = Classifier(models["bundle"])
    texts = ["goal " * 21, "goal", "vote " * 30] * 2
    for say in (classifier.predict, lambda all_texts: [one.label for one in classifier.stream(all_texts, at_once=2)]):
        caplog.clear()
        assert say(texts) == classifier.predict([text[:100] for text in texts])
        assert [(one.name, one.levelno, one.args[1]) for one in caplog.records] == [  # type: ignore[index]
            ("setfit_kd.runtime", logging.WARNING, 4)
        ]


def test_the_file_in_a_bundle_reports_on_stderr(models: dict[str, Path]) -> None:
    ran = subprocess.run(
        [sys.executable, "-I", str(models["bundle"] / "classify.py")],
        input=b"x" * 1_000_001 + b"\nx\n",
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == 0
    assert len(ran.stdout.splitlines()) == 2
    assert ran.stderr.decode().strip() == "Number of texts cut to 1,000,000 characters: 1."


CHILD = """
import sys
from setfit_kd.cli import main
from setfit_kd.speed import _peak_memory
main(sys.argv[1:], standalone_mode=False)
print(_peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bundle", "setfit"])
@pytest.mark.parametrize(("lines", "length"), [(1, 100_000_000), (2_000, 100_000)])
def test_long_lines_take_less_than_two_gigabytes(
    model: str,
    lines: int,
    length: int,
    models: dict[str, Path],
) -> None:
    texts = [("match goal shares " * (1 + length // 18))[:length], ("vote law chip " * (1 + length // 14))[:length]]
    with Path("in.txt").open("w") as file:
        file.writelines(texts[line % 2] + "\n" for line in range(lines))
    arguments = ["predict", str(models[model]), "--device", "cpu", "-q", "-i", "in.txt", "-o", "out.jsonl"]
    ran = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, check=True, timeout=600)
    assert int(ran.stdout) < 2e9
    with Path("out.jsonl").open() as file:
        labels = [json.loads(line)["label"] for line in file]
    cut = "".join(text[:1_000_000] + "\n" for text in texts)
    expected = [row.label for row in read_output("stdout", predicted(models[model], stdin=cut))]
    assert labels == [expected[line % 2] for line in range(lines)]
