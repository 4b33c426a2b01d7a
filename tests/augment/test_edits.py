"""Tests of the edits that create augmented texts, and of word replacement by a masked language model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_body, newswire
from hypothesis import example, given
from hypothesis import strategies as st

from setfit_kd.augment.edits import EDITS, augment
from setfit_kd.augment.fill_mask import FillMask, load_fill_mask
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


def test_delete_removes_one_of_two_words() -> None:
    assert {apply_edit("delete", "a b", seed) for seed in range(500)} == {"a", "b"}


def test_delete_removes_one_word_in_ten() -> None:
    text = " ".join(map(str, range(1000)))
    lengths = [len((apply_edit("delete", text, seed) or "").split()) for seed in range(20)]
    assert np.mean(lengths) == pytest.approx(900, abs=10)


@given(WORDS, SEED)
def test_swap_keeps_every_word(text: str, seed: int) -> None:
    swapped = apply_edit("swap", text, seed) or ""
    assert Counter(swapped.split()) == Counter(text.split())
    assert changed_words(swapped, text) <= 2 * max(1, round(len(text.split()) / 10))


@pytest.mark.parametrize(("n_words", "pairs"), [(2, 1), (14, 1), (16, 2), (1000, 100)])
def test_swap_swaps_one_pair_per_ten_words(n_words: int, pairs: int) -> None:
    text = " ".join(map(str, range(n_words)))
    n_moved = [changed_words(apply_edit("swap", text, seed) or "", text) for seed in range(20)]
    assert min(n_moved) > 0
    assert 1.8 * pairs <= max(n_moved) <= 2 * pairs


@given(st.lists(WORD | st.sampled_from(["one.", "Why?", "“Ja!”"]), min_size=1, max_size=40).map(" ".join))
def test_reversing_sentences_keeps_every_word(text: str) -> None:
    reversed_text = apply_edit("sentences", text)
    assert Counter((text if reversed_text is None else reversed_text).split()) == Counter(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rain fell. Play stopped!  Why? ", "Why? Play stopped! Rain fell."),
        ('"No." He left\n(at last.) Then: “Ja!” Ende', 'Ende Then: “Ja!” He left\n(at last.) "No."'),
        ("It cost approx. five euros", None),
        ("It cost 3.5 euros.", None),
        ("no end at all", None),
    ],
)
def test_sentences_are_reversed(text: str, expected: str | None) -> None:
    assert apply_edit("sentences", text) == expected


@given(WORDS, WORDS)
def test_crossover_joins_half_of_each_text(text: str, other: str) -> None:
    first, second, crossed = text.split(), other.split(), (apply_edit("crossover", text, other=other) or "").split()
    assert crossed == first[: len(first) // 2] + second[len(second) // 2 :]
    assert set(crossed[:1]) == set(first[:1])
    assert crossed[-1] == second[-1]


# All edits together


def test_augment_creates_the_requested_number_of_new_texts() -> None:
    augmented = augment(TEXTS, 500, seed=0)
    assert len(augmented) == 500
    assert len({normalize(text) for text in [*augmented, *TEXTS]}) == 500 + len(TEXTS)
    assert augment(TEXTS, 0, seed=0) == []


def test_same_seed_creates_same_texts() -> None:
    assert augment(TEXTS, 50, seed=3) == augment(TEXTS, 50, seed=3)
    assert not set(augment(TEXTS, 50, seed=3)) & set(augment(TEXTS, 50, seed=4)) - reversed_texts()


def reversed_texts() -> set[str]:
    return {text for text in (apply_edit("sentences", text) for text in TEXTS) if text}


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_hash_seed_has_no_effect(hash_seed: str) -> None:
    code = """
import json, sys
from setfit_kd.augment import augment
print(json.dumps(augment(*json.load(sys.stdin), seed=5)))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([TEXTS, 40]),
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stdout) == augment(TEXTS, 40, seed=5)


@pytest.mark.parametrize("rewrite", [str, str.upper, lambda text: f" {text.replace(' ', '  ')}\n"])
def test_forbidden_texts_are_never_created(rewrite: Callable[[str], str]) -> None:
    texts = ["Rain stops play", "Rain delays the start"]
    forbidden = augment(texts, 1000, seed=0)[::2]
    augmented = {normalize(text) for text in augment(texts, 1000, seed=0, forbidden=map(rewrite, forbidden))}
    assert len(forbidden) > 10
    assert len(augmented) > 10
    assert augmented.isdisjoint(map(normalize, forbidden))


def test_augment_returns_fewer_texts_if_no_more_are_possible() -> None:
    assert sorted(augment(["b a"], 10, seed=0)) == ["a", "a b", "b"]
    assert sorted(augment(["b a", "B  A", "word"], 10, seed=0)) == ["a", "a b", "b"]


@pytest.mark.parametrize(
    "texts", [[], [""], ["word", "Wort"], ["雨で試合が中止になった。", "新しい法律が可決された。"], ["a \u200b"]]
)
def test_single_words_are_not_augmented(texts: list[str]) -> None:
    assert augment(texts, 10, seed=0) == []


@given(st.lists(st.text(max_size=20), max_size=5), SEED)
def test_augment_accepts_any_text(texts: list[str], seed: int) -> None:
    augmented = augment(texts, 5, seed=seed, forbidden=texts[:1])
    keys = [normalize(text) for text in augmented]
    assert all(keys)
    assert len({*keys, *map(normalize, texts)}) == len(keys) + len(set(map(normalize, texts)))


@pytest.fixture
def edit_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the texts created by each edit, and append a distinct suffix to each text."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[[str, str, np.random.Generator], str | None]:
        edit = EDITS[name]

        def edit_and_count(text: str, other: str, rng: np.random.Generator) -> str | None:
            new = edit(text, other, rng)
            counts[name] += new is not None
            return new and f"{new} {name}{counts[name]}"

        return edit_and_count

    for name in EDITS:
        monkeypatch.setitem(EDITS, name, counted(name))
    return counts


def test_edits_are_used_evenly(edit_counts: Counter[str]) -> None:
    to_fill: list[str] = []

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        to_fill.extend(texts)
        return [f"{text} filled" for text in texts]

    texts = [f"Text {row} is here. It is long." for row in range(100)]
    assert len(augment(texts, 100, seed=0, fill=fill)) == 100
    assert edit_counts == dict.fromkeys(EDITS, 20)
    assert len(to_fill) == 20


def test_single_sentences_get_other_edits(edit_counts: Counter[str]) -> None:
    texts = [*(f"Text {row} is here" for row in range(97)), "One. Two.", "Three. Four.", "Five. Six."]
    assert len(augment(texts, 100, seed=0)) == 100
    assert edit_counts["sentences"] == 3
    assert max(edit_counts.values()) <= 33


def test_texts_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    to_fill: list[str] = []
    for name in EDITS:
        monkeypatch.setitem(EDITS, name, lambda text, other, rng: None)

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        to_fill.extend(texts)
        return list(texts)

    assert augment(TEXTS, len(TEXTS), seed=0, fill=fill) == []
    assert to_fill[: len(TEXTS)] != TEXTS
    assert sorted(to_fill[: len(TEXTS)]) == sorted(TEXTS)


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
    assert len(augment(TEXTS, 100, seed=0, fill=lambda texts, _: list(texts))) == 100
    assert sorted(augment(["b a"], 10, seed=0, fill=lambda texts, _: list(texts))) == ["a", "a b", "b"]


# Word replacement by a masked language model


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random masked language model with 64 positions."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "masked-lm"
    plain = make_body(folder.with_name("body"), layers=1).with_name("body-plain")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(plain)).save_pretrained(folder)
    return folder


@pytest.fixture
def fill(masked_lm: Path) -> FillMask:
    return load_fill_mask(masked_lm, device=CPU, batch_size=8)


def set_logits(fill: FillMask, words: dict[str, float]) -> None:
    """Set the logits of some words at all positions."""
    bias = fill._model.cls.predictions.bias
    with torch.no_grad():
        for word, logit in words.items():
            bias[fill._tokenizer.token_to_id(word)] = logit


LIKELY = ["was", "are", "has", "his", "her", "its", "they", "from", "that", "with"]
"""Ten words of the tiny vocabulary, as many as there are candidates per word."""


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
        matches = [
            (row, word)
            for row in range(len(words))
            for word in LIKELY
            if new == fill_template(template, [*words[:row], word, *words[row + 1 :]])
        ]
        assert len(matches) == 1, new
        replaced.add(matches[0][0])
    assert replaced == set(range(len(words)))


def test_about_one_word_in_seven_is_replaced(fill: FillMask) -> None:
    text = " ".join(["rain"] * 40)
    changed = [sum(word != "rain" for word in new.split()) for new in fill([text] * 5, 0)]
    assert changed == [6] * 5
    assert all(
        changed_words(*pair) == 1 for pair in zip(fill(["rain play", "rain"], 0), ["rain play", "rain"], strict=True)
    )


def test_replacements_are_sampled_from_ten_most_probable_words(fill: FillMask) -> None:
    set_logits(fill, {"rain": 200, "##a": 200, "[SEP]": 200, "[MASK]": 200, ",": 200, "[UNK]": 200})
    set_logits(fill, {**dict.fromkeys(LIKELY, 100 - math.log(3)), LIKELY[0]: 100 + math.log(3), "and": 98})
    counts = Counter(fill(["Rain"] * 600, 0))
    assert counts.keys() == set(LIKELY)
    assert counts[LIKELY[0]] == pytest.approx(300, abs=50)


def test_each_word_is_replaced_by_one_mask_token(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[torch.Tensor] = []
    forward = fill._model.forward

    def spy(input_ids: torch.Tensor, **rest: Any) -> Any:
        inputs.append(input_ids[0])
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(fill._model, "forward", spy)
    words = ["the", "qqqq,", "and"]
    masked = ["[MASK] qqqq, and", "the [MASK], and", "the qqqq, [MASK]"]
    replaced = set()
    for seed in range(20):
        [new] = fill([" ".join(words)], seed)
        [row] = [row for row, pair in enumerate(zip(words, new.split(), strict=True)) if len(set(pair)) == 2]
        assert inputs[-1].tolist() == fill._tokenizer.encode(masked[row]).ids
        replaced.add(row)
    assert replaced == {0, 1, 2}


def test_result_depends_on_seed_but_not_on_batch_size(fill: FillMask, masked_lm: Path) -> None:
    new = fill(TEXTS, 7)
    assert all(old != text for old, text in zip(TEXTS, new, strict=True))
    assert new == fill(TEXTS, 7)
    assert new == load_fill_mask(masked_lm, device=CPU, batch_size=3)(TEXTS, 7)
    assert sum(a == b for a, b in zip(new, fill(TEXTS, 8), strict=True)) <= 1


def test_texts_are_batched_by_length(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    forward = fill._model.forward

    def spy(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        widths.append(input_ids.shape[1])
        assert torch.equal(attention_mask, (input_ids != 0).long())
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(fill._model, "forward", spy)
    new = fill([" ".join(["rain"] * (1 + row * 7 % 40)) for row in range(40)], 0)
    assert widths == [42, 34, 26, 18, 10]
    assert [len(text.split()) for text in new] == [1 + row * 7 % 40 for row in range(40)]


def test_padding_of_the_tokenizer_is_disabled(fill: FillMask, masked_lm: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(masked_lm, "padding")
    tokenizer: Any = AutoTokenizer.from_pretrained("padding")
    tokenizer.backend_tokenizer.enable_padding(length=30)
    Path("padding/tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    assert load_fill_mask(Path("padding"), device=CPU)(TEXTS, 0) == fill(TEXTS, 0)


def test_words_beyond_the_maximum_length_are_kept(fill: FillMask) -> None:
    text = " ".join(["rain"] * 55 + ["x" * 90] + ["rain"] * 100)
    new = [text.split() for text in fill([text] * 20, 0)]
    assert all(words[55:] == text.split()[55:] for words in new)
    assert any(words[54] != "rain" for words in new)


def test_texts_without_words_are_unchanged(fill: FillMask) -> None:
    assert fill([], 0) == []
    texts = ["", "  ", "?!", "雨", "[MASK] [SEP]"]
    assert fill(texts, 0) == texts
    [_, middle, _] = fill(["rain", "…", "play"], 0)
    assert middle == "…"


@given(text=st.text(max_size=30))
@example("日本 rain 語")
def test_fill_mask_accepts_any_text(shared_fill: FillMask, text: str) -> None:
    assert len(shared_fill([text, "rain"], 0)) == 2


@pytest.fixture(scope="module")
def shared_fill(masked_lm: Path) -> FillMask:
    return load_fill_mask(masked_lm, device=CPU)


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
    assert [event.after.batch_size for event in events] == [8, 4, 2]  # the first retry keeps the size
    assert sizes[-1] == 2


def test_augment_replaces_words(fill: FillMask) -> None:
    augmented = augment(TEXTS, 100, seed=0, fill=fill)
    known = {word for text in TEXTS for word in text.split()}
    assert len({normalize(text) for text in [*augmented, *TEXTS]}) == 100 + len(TEXTS)
    # A fifth of the texts are created by replacing words; a few replacements are known words.
    assert sum(not known.issuperset(text.split()) for text in augmented) >= 18
    assert augmented == augment(TEXTS, 100, seed=0, fill=fill)


# Other kinds of tokenizers


def other_tokenizer(kind: str) -> Any:
    """Create a tokenizer of whole words that marks white space as byte-level BPE or SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast as _Fast

    mark, pre_tokenizer, decoder = {
        "byte-level": ("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "metaspace": ("▁", pre_tokenizers.Metaspace(), decoders.Metaspace()),
    }[kind]
    words = [*"abcdefghijklmnop", "ing", "rain", "Rain", "play", "stops"]
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        ",",
        '"',
        ".",
        "'s",
        f'{mark}"',
        *words,
        *(mark + word for word in words if word != "ing"),
    ]
    vocabulary: Any = [(piece, -1.0 / len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    make_fast: Any = _Fast
    return make_fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )


def other_fill(folder: Path, kind: str) -> FillMask:
    """Create a random masked language model for 16 tokens with such a tokenizer."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = other_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=18,
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    return load_fill_mask(folder, device=CPU)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_white_space_is_kept_if_tokens_contain_it(kind: str, tmp_path: Path) -> None:
    fill = other_fill(tmp_path, kind)
    text = 'Rain  "stops" play, rain.' + " rain" * 20
    template = '\0  "\0" \0, \0.' + " \0" * 20
    seen: list[set[str]] = [set() for _ in range(24)]
    for new in fill([text] * 100, 0):
        words = new.replace('"', " ").replace(",", " ").replace(".", " ").split()
        assert new == fill_template(template, words)
        for row, word in enumerate(words):
            seen[row].add(word)
    assert [len(words) > 1 for words in seen[:5]] == [True] * 5
    assert [len(words) for words in seen[-10:]] == [1] * 10
    assert set().union(*seen) <= {*"abcdefghijklmnop", "rain", "Rain", "play", "stops"}


@pytest.mark.parametrize(("likely", "position"), [("Ġplay", 1), ("play", 0)])
def test_words_after_white_space_have_other_tokens(likely: str, position: int, tmp_path: Path) -> None:
    fill = other_fill(tmp_path, "byte-level")
    with torch.no_grad():
        fill._model.lm_head.bias[fill._tokenizer.token_to_id(likely)] = 100
    words: list[set[str]] = [set(), set()]
    for new in fill(["rain's rain"] * 100, 0):
        assert new.split()[0].endswith("'s")
        words[0].add(new.split()[0][:-2])
        words[1].add(new.split()[1])
    assert words[position] == {"rain", "play"}
    assert len(words[1 - position]) > 5


# Folders without a usable model


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def remove_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    encoder = {name: weight for name, weight in weights.items() if name.startswith("bert.")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})


def remove_mask_token(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


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
        (shutil.rmtree, "Cannot load .* as a masked language model"),
        (remove_weights, "Cannot load .* as a masked language model"),
        (
            lambda folder: change_config(folder, architectures=["BertModel"]),
            "Expected a masked language model in .*, got BertModel",
        ),
        (lambda folder: change_config(folder, model_type="gpt2", architectures=None), "Cannot load .* as a masked"),
        (remove_head, "lacks weights of a masked language model, such as cls.predictions"),
        (remove_mask_token, "has no mask token"),
        (use_slow_tokenizer, "not a fast tokenizer"),
        (keep_few_words, "too few whole words"),
    ],
)
def test_folder_without_masked_language_model_is_rejected(
    masked_lm: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(masked_lm, "damaged")
    damage(Path("damaged"))
    with pytest.raises(ModelError, match=message) as error:
        load_fill_mask(Path("damaged"), device=CPU)
    assert "masked language model in the transformers format" in (error.value.hint or "")


def test_sentence_transformer_is_rejected(tiny_teacher: Path) -> None:
    with pytest.raises(ModelError, match=r"Expected a masked language model in .*, got BertModel"):
        load_fill_mask(tiny_teacher, device=CPU)


def test_fp16_model_is_loaded_as_fp32(masked_lm: Path) -> None:
    from transformers import AutoModelForMaskedLM

    shutil.copytree(masked_lm, "half")
    AutoModelForMaskedLM.from_pretrained("half").half().save_pretrained("half")
    fill = load_fill_mask(Path("half"), device=CPU)
    assert fill._model.dtype == torch.float32
    assert fill(["Rain stops play"], 0) != ["Rain stops play"]
