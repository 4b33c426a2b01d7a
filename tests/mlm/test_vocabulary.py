"""Added words: choosing and reading them, tokens of all other texts, and the new rows of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODERS, newswire
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from setfit_kd.errors import DataError
from setfit_kd.mlm.vocabulary import add_words, choose_words, read_words
from setfit_kd.models.token_model import load_token_model

WORDS = ["zebrafish", "qatarx", "öffnung", "b2b2b"]  # in the form in which BERT normalizes them: offnung
NORMALIZED = ["zebrafish", "qatarx", "offnung", "b2b2b"]


def byte_level_tokenizer() -> Any:
    """Tokenizer like RoBERTa's, in which a space is part of the next token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder, backend.post_processor = (
        decoders.ByteLevel(),
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0)),
    )
    tokens = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, **tokens)


@pytest.fixture(scope="module")
def bert(masked_lm: Path) -> SentenceTransformer:
    return load_token_model(masked_lm, "fill-mask")


@pytest.fixture(scope="module")
def roberta(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    folder, tokenizer = tmp_path_factory.mktemp("roberta"), byte_level_tokenizer()
    AutoModelForMaskedLM.from_pretrained(make_encoder("roberta")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_token_model(folder, "fill-mask")


def ids(tokenizer: Any, text: str) -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizers(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, int]]:
    """Tokenizer before and after adding words, and the ids of the words."""
    body = copy.deepcopy(request.getfixturevalue(request.param))
    before = copy.deepcopy(body.tokenizer)
    words = NORMALIZED if request.param == "bert" else WORDS
    add_words(body, words)
    numbers = {word: len(before) + row for row, word in enumerate(WORDS)}
    return before, body.tokenizer, numbers


OTHER = [
    "a",
    "the",
    "goal",
    "zebra",
    "fish",
    "don't",
    "co-op",
    "3.5",
    "zebrafishes",
    "xzebrafish",
    "qatarx_",
    "b2b2b2b",
]
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*WORDS, *OTHER]), min_size=1, max_size=8))
def test_only_added_words_are_tokenized_differently(
    tokenizers: tuple[Any, Any, dict[str, int]], words: list[str]
) -> None:
    before, after, numbers = tokenizers
    expected = ids(before, "a")
    for word in words:
        expected += [numbers[word]] if word in numbers else ids(before, f" {word}")
    assert ids(after, " ".join(["a", *words])) == expected


@settings(max_examples=40)
@given(ANY_TEXT, st.sampled_from(WORDS), st.sampled_from("abz09_é"))
def test_any_text_without_added_words_keeps_its_tokens(
    tokenizers: tuple[Any, Any, dict[str, int]], text: str, word: str, letter: str
) -> None:
    before, after, _ = tokenizers
    for longer in (text, f"{text} {word}{letter} {text}", f"{letter}{word} {text}"):
        assert ids(after, longer) == ids(before, longer)


@pytest.mark.parametrize("text", ["({})", "{},", "«{}»", "{}-{}", "{}'s", "\t{}\n", "1 {} 2"])
def test_added_word_is_one_token_next_to_punctuation(tokenizers: tuple[Any, Any, dict[str, int]], text: str) -> None:
    _, after, numbers = tokenizers
    for word, number in numbers.items():
        tokens = ids(after, text.replace("{}", word))
        assert tokens.count(number) == text.count("{}")


def test_words_that_save_most_tokens_are_chosen(bert: SentenceTransformer) -> None:
    # Without a word for them in the vocabulary, every letter is a token.
    texts = ["Zebrafish zebrafish, zebrafish!", "qatarx qatarx qatarx qatarx", "b2b2b", "the 20201 20201 20201 a_b the"]
    lengths = {word: len(ids(bert.tokenizer, word)) for word in ("zebrafish", "qatarx", "b2b2b")}
    saved = {
        "zebrafish": 3 * (lengths["zebrafish"] - 1),
        "qatarx": 4 * (lengths["qatarx"] - 1),
        "b2b2b": lengths["b2b2b"] - 1,
    }
    expected = sorted(saved, key=lambda word: -saved[word])
    assert expected[0] == "zebrafish"
    assert choose_words(texts, bert.tokenizer, 5) == expected
    assert choose_words(texts, bert.tokenizer, 2) == expected[:2]
    assert choose_words(["the goal"], bert.tokenizer, 2) == []


def test_chosen_words_of_a_byte_level_tokenizer_are_text(roberta: SentenceTransformer) -> None:
    assert choose_words(["ab öffnung öffnung"], roberta.tokenizer, 1) == ["öffnung"]


def test_words_are_read_from_a_file(bert: SentenceTransformer, tmp_path: Path) -> None:
    unknown = "עברית"  # of letters that are not in the vocabulary
    assert bert.tokenizer.tokenize(unknown) == ["[UNK]"]
    (tmp_path / "words.txt").write_text("\n".join([*WORDS, unknown]) + "\n", encoding="utf-8")
    assert read_words(tmp_path / "words.txt", bert.tokenizer) == [*NORMALIZED, unknown]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("qatarx\nQatarx\n", r"words\.txt, line 2: 'Qatarx' is the same word as in line 1"),
        ("qatarx\n\nb2b2b", r"line 2: expected one word, got ''"),
        ("qatarx \n", r"line 1: expected one word, got 'qatarx '"),
        ("two words\nco-op\n.\n1234\n", r"line 1: expected one word, .*; line 2: .*; line 3: .* and 1 more"),
        ("qatarx\nthe", r"line 2: 'the' is already in the vocabulary"),
        ("", r"words\.txt is empty"),
    ],
)
def test_unusable_words_are_refused(content: str, message: str, bert: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_words(tmp_path / "words.txt", bert.tokenizer)


@pytest.mark.parametrize("name", ["missing.txt", "words.csv"])
def test_file_of_words_must_be_a_text_file(name: str, bert: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "words.csv").touch()
    with pytest.raises(DataError, match="No such text file"):
        read_words(tmp_path / name, bert.tokenizer)


@pytest.mark.parametrize(
    ("architecture", "tied"), [*((name, True) for name in sorted(ENCODERS)), ("bert", False), ("roberta", False)]
)
def test_new_rows_are_means_and_the_model_loads_without_us(
    architecture: str, tied: bool, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    body = load_token_model(make_encoder(architecture, tie_word_embeddings=tied), "fill-mask")
    module: Any = body[0]
    decoder = module.model.get_output_embeddings()
    with torch.no_grad():
        decoder.bias.normal_()
    text, old = newswire("train")[0]["text"], len(body.tokenizer)
    inputs = body.tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    logits = module.model.eval()(**inputs).logits
    pieces = [ids(body.tokenizer, word) for word in NORMALIZED]
    assert min(map(len, pieces)) > 1
    add_words(body, NORMALIZED)
    module.save(str(tmp_path / "model"))
    model: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) == old + len(WORDS)
    assert tokenizer.backend_tokenizer.to_str() == body.tokenizer.backend_tokenizer.to_str()
    assert tokenizer.tokenize(" ".join(NORMALIZED)) == NORMALIZED
    inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    torch.testing.assert_close(model.eval()(**inputs).logits[..., :old], logits)
    decoder = model.get_output_embeddings()
    for table in (model.get_input_embeddings().weight, decoder.weight, decoder.bias):
        for row, tokens in enumerate(pieces, old):
            torch.testing.assert_close(table[row], table[tokens].mean(dim=0))
    assert (decoder.weight is model.get_input_embeddings().weight) is tied
