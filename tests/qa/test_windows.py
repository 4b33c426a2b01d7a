"""Windows of long contexts, and the tokens of the gold answers in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_questions import config, load_body
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from setfit_kd.qa.data import Question
from setfit_kd.qa.windows import UNKNOWN, BodyWindows, answer_tokens
from setfit_kd.runtime.answer import Window, Windows

LETTERS = "abcdefghij "


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer like BERT's: token types, one separator, letters of a word as tokens."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_tokenizer(*, trim_offsets: bool = False) -> Tokenizer:
    """Return a tokenizer like RoBERTa's: two separators, no token types, bytes with the space before a word."""
    pieces = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("Ġ", letter) for letter in LETTERS.strip()]
    vocabulary |= {first + second: len(vocabulary) + row for row, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """Return a tokenizer like those of ALBERT and DeBERTa: the space before a word is part of its first token."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for letter in LETTERS.strip() for piece in (letter, "▁" + letter))]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁", -3.0), ("[CLS]", 0.0), ("[SEP]", 0.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" {2,}"), "removed"), pre_tokenizers.Metaspace(replacement="▁")]
    )
    special = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "words": word_tokenizer,
    "bytes": byte_tokenizer,
    "trimmed bytes": lambda: byte_tokenizer(trim_offsets=True),
    "sentencepiece": sentencepiece_tokenizer,
}


def with_inputs(source: Path, folder: Path, names: list[str] | None) -> Path:
    """Copy a model, with these inputs named by its tokenizer, or else without a maximum length."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"model_input_names": names} if names else {"model_max_length": 1000}
    path.write_text(json.dumps(settings))
    return folder


def spans(window: Window) -> list[tuple[int, ...]]:
    """Return the characters of the tokens of the context."""
    return [tuple(map(int, span)) for span in window.spans[window.in_context]]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_windows_are_overlapping_slices_of_the_context(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]().to_str()
    text = st.text(LETTERS, min_size=1, max_size=60).filter(str.strip)
    question, context = data.draw(st.text("abc", min_size=1, max_size=5)), data.draw(text)
    max_length, stride = data.draw(st.integers(16, 24)), data.draw(st.integers(0, 4))
    (whole,) = Windows(tokenizer, max_length=10_000, stride=0).split([(question, context)])
    windows = Windows(tokenizer, max_length=max_length, stride=stride).split([(question, context)])
    tokens, before = whole.ids[whole.in_context].tolist(), whole.ids[: int(np.argmax(whole.in_context))].tolist()
    assert whole.in_context.any()
    room = max_length - (len(whole.ids) - len(tokens))
    starts = [0]
    while starts[-1] + room < len(tokens):
        starts.append(starts[-1] + room - stride)
    assert len(windows) == len(starts)
    for window, start in zip(windows, starts, strict=True):
        assert len(window.ids) <= max_length
        assert window.ids[window.in_context].tolist() == tokens[start : start + room]
        assert spans(window) == spans(whole)[start : start + room]
        assert window.ids[: len(before)].tolist() == before
    assert "".join(context[first:last] for first, last in spans(whole)).replace(" ", "") == context.replace(" ", "")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_answer_tokens_cover_the_answer_in_every_window_that_has_all_of_it(name: str, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.text("abcdefghij", min_size=1, max_size=4), min_size=1, max_size=25))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    context, start = " ".join(words), len("".join(f"{word} " for word in words[:first]))
    answer = " ".join(words[first : last + 1])
    question = Question("1", "abc", context, ((answer, start),))
    splitter = Windows(TOKENIZERS[name]().to_str(), max_length=24, stride=6)
    windows = splitter.split([("abc", context)])
    found = 0
    for window, (begin, end) in zip(windows, answer_tokens(windows, [question]), strict=True):
        covered = set().union(*(range(*span) for span in spans(window)))
        characters = {index for index in range(start, start + len(answer)) if context[index] != " "}
        assert (begin > 0) == (characters <= covered)
        if begin:
            found += 1
            assert context[window.spans[begin, 0] : window.spans[end, 1]].strip() == answer
        else:
            assert end == 0
    assert found or len(answer) > 6


def test_positions_of_unknown_and_missing_answers() -> None:
    questions = [
        Question("1", "a", "b c"),
        Question("2", "a", "b c", ()),
        Question("3", "a", "b c", (("c", 2), ("b", 0))),
    ]
    windows = Windows(word_tokenizer().to_str(), max_length=20, stride=0).split(
        [(q.question, q.context) for q in questions]
    )
    # [CLS] a [SEP] b c [SEP]; the first of several answers counts
    assert answer_tokens(windows, questions).tolist() == [[UNKNOWN, UNKNOWN], [0, 0], [4, 4]]
    assert windows[0].types.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_question_without_room_for_the_context_has_no_windows() -> None:
    windows = Windows(word_tokenizer().to_str(), max_length=16, stride=3)
    split = windows.split([("a " * 10, "b"), ("a", "b"), ("a " * 10, "b"), ("a " * 9, "b " * 8)])  # leaves 4 tokens
    assert [window.row for window in split] == [1, *[3] * 5]


def test_body_limits_windows(tiny_student: Path) -> None:
    body = load_body(tiny_student)
    windows = BodyWindows(body, config(max_length=384, stride=128))
    assert (windows.max_length, windows.stride) == (64, 21)
    shorter = BodyWindows(body, config(max_length=32, stride=4))
    assert (shorter.max_length, shorter.stride) == (32, 4)


@pytest.mark.parametrize(("architecture", "names", "expected"), [
    ("bert", ["input_ids", "token_type_ids", "attention_mask"], True),
    ("bert", ["input_ids", "attention_mask"], False),
    ("mpnet", ["input_ids", "token_type_ids", "attention_mask"], False),
    ("distilbert", ["input_ids", "token_type_ids", "attention_mask"], False),
])  # fmt: skip
def test_token_types_are_used_if_both_model_and_tokenizer_have_them(
    architecture: str, names: list[str], expected: bool, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    body: Any = load_body(with_inputs(make_encoder(architecture), tmp_path / "model", names))
    assert body[0].uses_token_types == expected
    ids = torch.tensor([[2, 7, 3, 8, 3]])
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    without, with_types = (
        body({**features, **types})["token_embeddings"]
        for types in ({}, {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1]])})
    )
    assert torch.equal(without, with_types) != expected


def test_positions_of_a_roberta_start_after_the_padding(make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_inputs(make_encoder("roberta", pad_token_id=1), tmp_path / "model", None)
    body = load_body(folder)
    assert body.max_seq_length == 78  # of 80 positions
    assert BodyWindows(body, config(max_length=384)).max_length == 78
