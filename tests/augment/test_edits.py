"""Tests of the edits that create augmented texts, and of word replacement by a masked language model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import newswire
from hypothesis import given
from hypothesis import strategies as st

from setfit_kd.augment.edits import EDITS, augment
from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.data.splits import normalize
from setfit_kd.errors import ModelError
from setfit_kd.memory.backoff import shared_backoff

CPU = torch.device("cpu")
TEXTS = [row["text"] for row in newswire("train")[:60]]
WORD = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)
WORDS = st.lists(WORD, min_size=2, max_size=40).map(" ".join)
SEED = st.integers(0, 2**32 - 1)


def apply_edit(name: str, text: str, seed: int = 0, other: str = "") -> str | None:
    return EDITS[name](text, other or text, np.random.default_rng(seed))


def changed_words(first: str, second: str) -> int:
    return sum(a != b for a, b in zip(first.split(), second.split(), strict=True))


# Single edits


@given(WORDS, SEED)
def test_delete_removes_some_words_and_keeps_the_order(text: str, seed: int) -> None:
    words, remaining = text.split(), (apply_edit("delete", text, seed) or "").split()
    iterator: Iterator[str] = iter(words)
    assert 0 < len(remaining) < len(words)
    assert all(word in iterator for word in remaining)


def test_delete_removes_one_word_in_ten() -> None:
    text = " ".join(map(str, range(1000)))
    lengths = [len((apply_edit("delete", text, seed) or "").split()) for seed in range(20)]
    assert np.mean(lengths) == pytest.approx(900, abs=10)


@pytest.mark.parametrize(("n_words", "pairs"), [(2, 1), (16, 2), (1000, 100)])
def test_swap_swaps_one_pair_per_ten_words(n_words: int, pairs: int) -> None:
    text = " ".join(map(str, range(n_words)))
    swapped = [apply_edit("swap", text, seed) or "" for seed in range(20)]
    assert all(Counter(new.split()) == Counter(text.split()) for new in swapped)
    n_moved = [changed_words(new, text) for new in swapped]
    assert min(n_moved) > 0
    assert 1.8 * pairs <= max(n_moved) <= 2 * pairs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rain fell. Play stopped!  Why? ", "Why? Play stopped! Rain fell."),
        ('"No." He left\n(at last.) Then: “Ja!” Ende', 'Ende Then: “Ja!” He left\n(at last.) "No."'),
        ("It cost approx. five euros", None),
        ("no end at all", None),
    ],
)
def test_sentences_are_reversed(text: str, expected: str | None) -> None:
    assert apply_edit("sentences", text) == expected


@given(WORDS, WORDS)
def test_crossover_joins_half_of_each_text(text: str, other: str) -> None:
    first, second, crossed = text.split(), other.split(), (apply_edit("crossover", text, other=other) or "").split()
    assert crossed == first[: len(first) // 2] + second[len(second) // 2 :]


# All edits together


def test_augment_creates_the_requested_number_of_new_texts() -> None:
    augmented = augment(TEXTS, 500, seed=3)
    assert len({normalize(text) for text in [*augmented, *TEXTS]}) == 500 + len(TEXTS)
    assert augmented == augment(TEXTS, 500, seed=3)
    assert len(set(augmented) & set(augment(TEXTS, 500, seed=4))) < 150  # such as reversed sentences
    assert augment(TEXTS, 0, seed=0) == []


def test_forbidden_texts_are_never_created() -> None:
    texts = ["Rain stops play", "Rain delays the start"]
    forbidden = [f" {text.upper().replace(' ', '  ')}\n" for text in augment(texts, 1000, seed=0)[::2]]
    augmented = {normalize(text) for text in augment(texts, 1000, seed=0, forbidden=forbidden)}
    assert min(len(forbidden), len(augmented)) > 10
    assert augmented.isdisjoint(map(normalize, forbidden))


def test_augment_returns_fewer_texts_if_no_more_are_possible() -> None:
    assert sorted(augment(["b a"], 10, seed=0)) == ["a", "a b", "b"]
    assert sorted(augment(["b a", "B  A", "word"], 10, seed=0)) == ["a", "a b", "b"]


def test_single_words_are_not_augmented() -> None:
    for texts in ([], [""], ["word", "Wort"], ["雨で試合が中止になった。", "新しい法律が可決された。"], ["a \u200b"]):
        assert augment(texts, 10, seed=0) == []


@given(st.lists(st.text(max_size=20), max_size=5), SEED)
def test_augment_accepts_any_text(texts: list[str], seed: int) -> None:
    augmented = augment(texts, 5, seed=seed, forbidden=texts[:1])
    keys = [normalize(text) for text in augmented]
    assert all(keys)
    assert len({*keys, *map(normalize, texts)}) == len(keys) + len(set(map(normalize, texts)))


def test_edits_and_texts_are_used_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(name: str, text: str, _: str, rng: np.random.Generator) -> str:
        return f"{text} {rng.random()} {name}"

    for name in EDITS:
        monkeypatch.setitem(EDITS, name, partial(edit, name))
    texts = [f"text {row} " for row in range(100)]
    augmented = augment(texts, 100, seed=0, fill=lambda texts, _: [f"{text} replace" for text in texts])
    assert Counter(text.split()[-1] for text in augmented) == dict.fromkeys([*EDITS, "replace"], 20)
    drawn = [text.split()[1] for text in augmented]
    assert drawn[:80] != sorted(drawn[:80], key=int)
    assert sorted(drawn, key=int) == [str(row) for row in range(100)]


def test_fill_is_called_once_and_again_only_for_failed_texts() -> None:
    calls: list[tuple[int, int]] = []

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        calls.append((len(texts), seed))
        return [f"{text} {seed}" if row % 4 else text for row, text in enumerate(texts)]

    assert len(augment(TEXTS, 200, seed=0, fill=fill)) == 200
    assert calls[0][0] == pytest.approx(40, abs=10)
    assert sum(count for count, _ in calls[1:]) <= 10
    assert len({seed for _, seed in calls}) == len(calls)


def test_augment_ends_if_fill_never_changes_a_text() -> None:
    assert sorted(augment(["b a"], 10, seed=0, fill=lambda texts, _: list(texts))) == ["a", "a b", "b"]


# Word replacement by a masked language model

LIKELY = ["was", "are", "has", "his", "her", "its", "they", "from", "that", "with"]
"""Ten words of the tiny vocabulary, as many as there are candidates per word."""


@pytest.fixture
def fill(masked_lm: Path) -> FillMask:
    return FillMask(masked_lm, device=CPU, batch_size=8)


def set_logits(fill: FillMask, words: dict[str, float]) -> None:
    """Set the logits of some words at all positions."""
    bias = fill._model.get_output_embeddings().bias
    with torch.no_grad():
        for word, logit in words.items():
            bias[fill._tokenizer.convert_tokens_to_ids(word)] = logit


def fill_template(template: str, words: Sequence[str]) -> str:
    """Replace the null characters with the words."""
    return "".join(part + word for part, word in zip(template.split("\0"), [*words, ""], strict=True))


def test_only_words_are_replaced(fill: FillMask) -> None:
    set_logits(fill, dict.fromkeys(LIKELY, 100.0))
    text = '"Rain  (stops)\tplay," said ÉMILE:\n\n stop — "now"... '
    template = '"\0  (\0)\t\0," \0 \0:\n\n \0 — "\0"... '
    words = ["Rain", "stops", "play", "said", "ÉMILE", "stop", "now"]
    replaced = set()
    for seed in range(40):
        [new] = fill([text], seed)
        for row, word in product(range(len(words)), LIKELY):
            if new == fill_template(template, [*words[:row], word, *words[row + 1 :]]):
                break
        else:
            pytest.fail(f"not one word was replaced: {new}")
        replaced.add(row)
    assert replaced == set(range(len(words)))


def test_about_one_word_in_seven_is_replaced(fill: FillMask) -> None:
    texts = [" ".join(["rain"] * 40), "rain play", "rain"]
    assert [changed_words(*pair) for pair in zip(fill(texts, 0), texts, strict=True)] == [6, 1, 1]


def test_replacements_are_sampled_from_ten_most_probable_words(fill: FillMask) -> None:
    set_logits(fill, {"rain": 200, "##a": 200, "[SEP]": 200, "[MASK]": 200, ",": 200, "[UNK]": 200})
    set_logits(fill, {**dict.fromkeys(LIKELY, 100 - math.log(3)), LIKELY[0]: 100 + math.log(3), "and": 98})
    counts = Counter(fill(["Rain"] * 600, 0))
    assert counts.keys() == set(LIKELY)
    assert counts[LIKELY[0]] == pytest.approx(300, abs=50)


def test_result_depends_on_seed_but_not_on_batch_size(fill: FillMask, masked_lm: Path) -> None:
    new = fill(TEXTS, 7)
    assert all(old != text for old, text in zip(TEXTS, new, strict=True))
    assert new == fill(TEXTS, 7)
    assert new == FillMask(masked_lm, device=CPU, batch_size=3)(TEXTS, 7)
    assert sum(a == b for a, b in zip(new, fill(TEXTS, 8), strict=True)) <= 1


def test_words_beyond_the_maximum_length_are_kept(fill: FillMask) -> None:
    text = " ".join(["rain"] * 55 + ["x" * 90] + ["rain"] * 100)
    new = [text.split() for text in fill([text] * 20, 0)]
    assert all(words[55:] == text.split()[55:] for words in new)
    assert any(words[54] != "rain" for words in new)


def test_texts_without_words_are_unchanged(fill: FillMask) -> None:
    assert fill([], 0) == []
    texts = ["", "  ", "🙂", "[MASK] [SEP]", "…"]
    assert fill(texts, 0) == texts


def test_out_of_memory_backs_off(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, forward, sizes = fill(TEXTS, 1), fill._model.forward, []

    def limited_forward(input_ids: torch.Tensor, **rest: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(fill._model, "forward", limited_forward)
    with shared_backoff() as events:
        assert fill(TEXTS, 1) == expected
    assert [event["to"]["texts"] for event in events] == [8, 4, 2]  # the first retry keeps the size
    assert sizes[-1] == 2


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_white_space_is_kept_if_tokens_contain_it(kind: str, tmp_path: Path) -> None:
    """Tokenizers of whole words that mark white space as byte-level BPE or SentencePiece does, for 16 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast as _Fast
    from transformers import RobertaConfig, RobertaForMaskedLM

    mark, pre_tokenizer, decoder = {
        "byte-level": ("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "metaspace": ("▁", pre_tokenizers.Metaspace(), decoders.Metaspace()),
    }[kind]
    words = [*"abcdefghijklmnop", "rain", "Rain", "play", "stops"]
    special, punctuation = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], [",", '"', ".", f'{mark}"']
    pieces = [*special, *punctuation, "ing", *words, *(mark + word for word in words)]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 / len(piece)) for piece in pieces], 3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    make_fast: Any = _Fast
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
    make_fast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=len(pieces) + 3, max_position_embeddings=18, **sizes)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)

    fill = FillMask(tmp_path, device=CPU)
    text = 'Rain  "stops" play, rain.' + " rain" * 20
    template = '\0  "\0" \0, \0.' + " \0" * 20
    augmented = fill([text] * 100, 0)
    new_words = [re.findall(r"\w+", new) for new in augmented]
    assert augmented == [fill_template(template, row) for row in new_words]
    seen = [set(column) for column in zip(*new_words, strict=True)]
    assert min(map(len, seen[:5])) > 1
    assert max(map(len, seen[-10:])) == 1
    assert set().union(*seen) <= set(words)


# Folders without a usable model


def change_json(folder: Path, name: str, **settings: Any) -> None:
    content = {**json.loads((folder / name).read_text()), **settings}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def remove_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    encoder = {name: weight for name, weight in weights.items() if name.startswith("bert.")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})


def use_slow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))


def keep_few_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: row for word, row in words.items() if row < 5 or word in LIKELY}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "Cannot load .* as a masked language model"),
        (lambda folder: change_json(folder, "config.json", model_type="gpt2"), "Cannot load .* as a masked"),
        (remove_head, "lacks weights of a masked language model: cls.predictions"),
        (lambda folder: change_json(folder, "tokenizer_config.json", mask_token=None), "has no mask or padding token"),
        (use_slow_tokenizer, "is not fast"),
        (keep_few_words, "too few whole words"),
    ],
)
def test_folder_without_masked_language_model_is_rejected(
    masked_lm: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(masked_lm, "damaged")
    damage(Path("damaged"))
    with pytest.raises(ModelError, match=message) as error:
        FillMask(Path("damaged"), device=CPU)
    assert "masked language model in the transformers format" in (error.value.hint or "")


def test_fp16_model_is_loaded_as_fp32(masked_lm: Path) -> None:
    from transformers import AutoModelForMaskedLM

    shutil.copytree(masked_lm, "half")
    AutoModelForMaskedLM.from_pretrained("half").half().save_pretrained("half")
    assert FillMask(Path("half"), device=CPU)._model.dtype == torch.float32
