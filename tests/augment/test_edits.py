"""New texts out of given ones: by words, by sentences, and by a masked language model."""

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

from setfit_kd.augment import augment, load_fill_mask
from setfit_kd.augment.edits import METHODS
from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.data import normalise
from setfit_kd.errors import ModelError
from setfit_kd.memory import shared_backoff

CPU = torch.device("cpu")
TEXTS = [row["text"] for row in newswire("train")[:60]]
WORD = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)
WORDS = st.lists(WORD, min_size=2, max_size=40).map(" ".join)
SEED = st.integers(0, 2**32 - 1)


def one_by(name: str, text: str, seed: int = 0, other: str = "") -> str | None:
    return METHODS[name](text, other or text, np.random.default_rng(seed))


def distance_in_words(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one.split(), other.split(), strict=True))


# Each method


@given(WORDS, SEED)
def test_delete_drops_some_words_and_keeps_some(text: str, seed: int) -> None:
    words, kept = text.split(), (one_by("delete", text, seed) or "").split()
    rest: Iterator[str] = iter(words)
    assert 0 < len(kept) < len(words)
    assert all(word in rest for word in kept)  # in their order


def test_delete_keeps_one_of_two_words() -> None:
    assert {one_by("delete", "a b", seed) for seed in range(500)} == {"a", "b"}


def test_delete_drops_one_word_in_ten() -> None:
    text = " ".join(map(str, range(1000)))
    kept = [len((one_by("delete", text, seed) or "").split()) for seed in range(20)]
    assert np.mean(kept) == pytest.approx(900, abs=10)


@given(WORDS, SEED)
def test_swap_keeps_every_word(text: str, seed: int) -> None:
    swapped = one_by("swap", text, seed) or ""
    assert Counter(swapped.split()) == Counter(text.split())
    assert distance_in_words(swapped, text) <= 2 * max(1, round(len(text.split()) / 10))


@pytest.mark.parametrize(("n_words", "pairs"), [(2, 1), (14, 1), (16, 2), (1000, 100)])
def test_swap_is_of_one_pair_for_every_ten_words(n_words: int, pairs: int) -> None:
    text = " ".join(map(str, range(n_words)))
    moved = [distance_in_words(one_by("swap", text, seed) or "", text) for seed in range(20)]
    assert min(moved) > 0
    assert 1.8 * pairs <= max(moved) <= 2 * pairs


@given(st.lists(WORD | st.sampled_from(["one.", "Why?", "“Ja!”"]), min_size=1, max_size=40).map(" ".join))
def test_sentences_keep_every_word(text: str) -> None:
    turned = one_by("sentences", text)
    assert Counter((text if turned is None else turned).split()) == Counter(text.split())


@pytest.mark.parametrize(
    ("text", "turned"),
    [
        ("Rain fell. Play stopped!  Why? ", "Why? Play stopped! Rain fell."),
        ('"No." He left\n(at last.) Then: “Ja!” Ende', 'Ende Then: “Ja!” He left\n(at last.) "No."'),
        ("It cost approx. five euros", None),
        ("It cost 3.5 euros.", None),
        ("no end at all", None),
    ],
)
def test_sentences_come_in_reverse_order(text: str, turned: str | None) -> None:
    assert one_by("sentences", text) == turned


@given(WORDS, WORDS)
def test_crossover_is_half_of_each(text: str, other: str) -> None:
    first, second, crossed = text.split(), other.split(), (one_by("crossover", text, other=other) or "").split()
    assert crossed == first[: len(first) // 2] + second[len(second) // 2 :]
    assert set(crossed[:1]) == set(first[:1])
    assert crossed[-1] == second[-1]


# All together


def test_as_many_as_asked_for_and_all_of_them_new() -> None:
    made = augment(TEXTS, 500, seed=0)
    assert len(made) == 500
    assert len({normalise(text) for text in [*made, *TEXTS]}) == 500 + len(TEXTS)
    assert augment(TEXTS, 0, seed=0) == []


def test_the_seed_decides() -> None:
    assert augment(TEXTS, 50, seed=3) == augment(TEXTS, 50, seed=3)
    assert not set(augment(TEXTS, 50, seed=3)) & set(augment(TEXTS, 50, seed=4)) - reversed_texts()


def reversed_texts() -> set[str]:
    return {text for text in (one_by("sentences", text) for text in TEXTS) if text}


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_hash_seed_decides_nothing(hash_seed: str) -> None:
    code = """
import json, sys
from setfit_kd.data.augmentation import augment
print(json.dumps(augment(*json.load(sys.stdin), seed=5)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([TEXTS, 40]),
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == augment(TEXTS, 40, seed=5)


@pytest.mark.parametrize("written", [str, str.upper, lambda text: f" {text.replace(' ', '  ')}\n"])
def test_what_is_forbidden_never_comes_out(written: Callable[[str], str]) -> None:
    texts = ["Rain stops play", "Rain delays the start"]
    forbidden = augment(texts, 1000, seed=0)[::2]
    made = {normalise(text) for text in augment(texts, 1000, seed=0, forbidden=map(written, forbidden))}
    assert len(forbidden) > 10
    assert len(made) > 10
    assert made.isdisjoint(map(normalise, forbidden))


def test_fewer_where_there_is_no_more() -> None:
    assert sorted(augment(["b a"], 10, seed=0)) == ["a", "a b", "b"]
    assert sorted(augment(["b a", "B  A", "word"], 10, seed=0)) == ["a", "a b", "b"]


@pytest.mark.parametrize(
    "texts", [[], [""], ["word", "Wort"], ["雨で試合が中止になった。", "新しい法律が可決された。"], ["a \u200b"]]
)
def test_nothing_comes_of_single_words(texts: list[str]) -> None:
    assert augment(texts, 10, seed=0) == []


@given(st.lists(st.text(max_size=20), max_size=5), SEED)
def test_no_text_crashes_it(texts: list[str], seed: int) -> None:
    made = augment(texts, 5, seed=seed, forbidden=texts[:1])
    keys = [normalise(text) for text in made]
    assert all(keys)
    assert len({*keys, *map(normalise, texts)}) == len(keys) + len(set(map(normalise, texts)))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a method has made a text; each signs what it makes."""
    found: Counter[str] = Counter()

    def signed(name: str) -> Callable[[str, str, np.random.Generator], str | None]:
        method = METHODS[name]

        def make(text: str, other: str, rng: np.random.Generator) -> str | None:
            new = method(text, other, rng)
            found[name] += new is not None
            return new and f"{new} {name}{found[name]}"

        return make

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, signed(name))
    return found


def test_methods_are_used_evenly(used: Counter[str]) -> None:
    handed: list[str] = []

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        handed.extend(texts)
        return [f"{text} filled" for text in texts]

    texts = [f"Text {row} is here. It is long." for row in range(100)]
    assert len(augment(texts, 100, seed=0, fill=fill)) == 100
    assert used == dict.fromkeys(METHODS, 20)
    assert len(handed) == 20


def test_a_text_of_one_sentence_is_left_to_other_methods(used: Counter[str]) -> None:
    texts = [*(f"Text {row} is here" for row in range(97)), "One. Two.", "Three. Four.", "Five. Six."]
    assert len(augment(texts, 100, seed=0)) == 100
    assert used["sentences"] == 3
    assert max(used.values()) <= 33


def test_texts_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[str] = []
    for name in METHODS:
        monkeypatch.setitem(METHODS, name, lambda text, other, rng: None)

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        handed.extend(texts)
        return list(texts)

    assert augment(TEXTS, len(TEXTS), seed=0, fill=fill) == []
    assert handed[: len(TEXTS)] != TEXTS
    assert sorted(handed[: len(TEXTS)]) == sorted(TEXTS)


def test_replacing_is_asked_for_once_and_again_for_what_failed() -> None:
    calls: list[tuple[int, int]] = []

    def fill(texts: Sequence[str], seed: int) -> list[str]:
        calls.append((len(texts), seed))
        return [f"{text} {seed}" if row % 4 else text for row, text in enumerate(texts)]

    made = augment(TEXTS, 200, seed=0, fill=fill)
    assert len(made) == 200
    assert calls[0][0] == pytest.approx(40, abs=10)
    assert sum(count for count, _ in calls[1:]) <= 10
    assert len({seed for _, seed in calls}) == len(calls)


def test_replacing_that_never_works_ends() -> None:
    assert len(augment(TEXTS, 100, seed=0, fill=lambda texts, _: list(texts))) == 100
    assert sorted(augment(["b a"], 10, seed=0, fill=lambda texts, _: list(texts))) == ["a", "a b", "b"]


# Words replaced by a masked language model


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random masked language model of 64 positions."""
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


def favour(fill: FillMask, words: dict[str, float]) -> None:
    """Make a model hold these words probable everywhere, by their logits."""
    bias = fill._model.cls.predictions.bias
    with torch.no_grad():
        for word, logit in words.items():
            bias[fill._reader.token_to_id(word)] = logit


LIKELY = ["was", "are", "has", "his", "her", "its", "they", "from", "that", "with"]
"""Words of the tiny vocabulary, as many as are drawn from."""


def filled_in(spaced: str, words: Sequence[str]) -> str:
    """The words in place of the zeros."""
    return "".join(part + word for part, word in zip(spaced.split("\0"), [*words, ""], strict=True))


def test_only_words_are_replaced(fill: FillMask) -> None:
    favour(fill, dict.fromkeys(LIKELY, 100.0))
    text = '"Rain  (stops)\tplay," said ÉMILE:\n\n stop — "now"... '
    spaced = '"\0  (\0)\t\0," \0 \0:\n\n \0 — "\0"... '
    words = ["Rain", "stops", "play", "said", "ÉMILE", "stop", "now"]
    replaced = set()
    for seed in range(40):
        [new] = fill([text], seed)
        fits = [
            (row, word)
            for row in range(len(words))
            for word in LIKELY
            if new == filled_in(spaced, [*words[:row], word, *words[row + 1 :]])
        ]
        assert len(fits) == 1, new
        replaced.add(fits[0][0])
    assert replaced == set(range(len(words)))


def test_about_one_word_in_seven_is_replaced(fill: FillMask) -> None:
    text = " ".join(["rain"] * 40)
    changed = [sum(word != "rain" for word in new.split()) for new in fill([text] * 5, 0)]
    assert changed == [6] * 5
    assert all(
        distance_in_words(*pair) == 1
        for pair in zip(fill(["rain play", "rain"], 0), ["rain play", "rain"], strict=True)
    )


def test_what_comes_in_a_words_place_is_drawn_by_probability_from_ten_others(fill: FillMask) -> None:
    favour(fill, {"rain": 200, "##a": 200, "[SEP]": 200, "[MASK]": 200, ",": 200, "[UNK]": 200})
    favour(fill, {**dict.fromkeys(LIKELY, 100 - math.log(3)), LIKELY[0]: 100 + math.log(3), "and": 98})
    drawn = Counter(fill(["Rain"] * 600, 0))
    assert drawn.keys() == set(LIKELY)
    assert drawn[LIKELY[0]] == pytest.approx(300, abs=50)


def test_the_model_reads_one_mask_in_place_of_a_word(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    forward = fill._model.forward

    def spy(input_ids: torch.Tensor, **rest: Any) -> Any:
        read.append(input_ids[0])
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(fill._model, "forward", spy)
    words = ["the", "qqqq,", "and"]
    masked = ["[MASK] qqqq, and", "the [MASK], and", "the qqqq, [MASK]"]
    replaced = set()
    for seed in range(20):
        [new] = fill([" ".join(words)], seed)
        [row] = [row for row, pair in enumerate(zip(words, new.split(), strict=True)) if len(set(pair)) == 2]
        assert read[-1].tolist() == fill._reader.encode(masked[row]).ids
        replaced.add(row)
    assert replaced == {0, 1, 2}


def test_the_seed_decides_and_the_batch_does_not(fill: FillMask, masked_lm: Path) -> None:
    new = fill(TEXTS, 7)
    assert all(old != text for old, text in zip(TEXTS, new, strict=True))
    assert new == fill(TEXTS, 7)
    assert new == load_fill_mask(masked_lm, device=CPU, batch_size=3)(TEXTS, 7)
    assert sum(a == b for a, b in zip(new, fill(TEXTS, 8), strict=True)) <= 1


def test_texts_of_like_length_are_read_together(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_tokenizer_that_pads_is_kept_from_it(fill: FillMask, masked_lm: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(masked_lm, "padding")
    tokenizer: Any = AutoTokenizer.from_pretrained("padding")
    tokenizer.backend_tokenizer.enable_padding(length=30)
    Path("padding/tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    assert load_fill_mask(Path("padding"), device=CPU)(TEXTS, 0) == fill(TEXTS, 0)


def test_words_beyond_what_is_read_stay(fill: FillMask) -> None:
    text = " ".join(["rain"] * 55 + ["x" * 90] + ["rain"] * 100)
    new = [text.split() for text in fill([text] * 20, 0)]
    assert all(words[55:] == text.split()[55:] for words in new)
    assert any(words[54] != "rain" for words in new)


def test_nothing_to_replace(fill: FillMask) -> None:
    assert fill([], 0) == []
    nothing = ["", "  ", "?!", "雨", "[MASK] [SEP]"]
    assert fill(nothing, 0) == nothing
    [_, middle, _] = fill(["rain", "…", "play"], 0)
    assert middle == "…"


@given(text=st.text(max_size=30))
@example("日本 rain 語")
def test_replacing_crashes_on_no_text(any_fill: FillMask, text: str) -> None:
    assert len(any_fill([text, "rain"], 0)) == 2


@pytest.fixture(scope="module")
def any_fill(masked_lm: Path) -> FillMask:
    return load_fill_mask(masked_lm, device=CPU)


def test_out_of_memory_steps_down(fill: FillMask, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, forward, sizes = fill(TEXTS, 1), fill._model.forward, []

    def short_of_memory(input_ids: torch.Tensor, **rest: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(fill._model, "forward", short_of_memory)
    with shared_backoff() as events:
        assert fill(TEXTS, 1) == expected
    assert [event.after.size for event in events] == [8, 4, 2]  # at first the same once more
    assert sizes[-1] == 2


def test_augmenting_by_replacing(fill: FillMask) -> None:
    made = augment(TEXTS, 100, seed=0, fill=fill)
    known = {word for text in TEXTS for word in text.split()}
    assert len({normalise(text) for text in [*made, *TEXTS]}) == 100 + len(TEXTS)
    assert sum(not known.issuperset(text.split()) for text in made) >= 18  # a fifth, but for known words drawn
    assert made == augment(TEXTS, 100, seed=0, fill=fill)


# Tokenizers of other kinds


def other_tokenizer(kind: str) -> Any:
    """Of whole words, with white space marked as byte-level BPE or as SentencePiece does."""
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
    """A random masked language model with such a tokenizer that reads 16 tokens."""
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
def test_white_space_in_tokens_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    fill = other_fill(tmp_path, kind)
    text = 'Rain  "stops" play, rain.' + " rain" * 20
    spaced = '\0  "\0" \0, \0.' + " \0" * 20
    seen: list[set[str]] = [set() for _ in range(24)]
    for new in fill([text] * 100, 0):
        words = new.replace('"', " ").replace(",", " ").replace(".", " ").split()
        assert new == filled_in(spaced, words)
        for row, word in enumerate(words):
            seen[row].add(word)
    assert [len(words) > 1 for words in seen[:5]] == [True] * 5
    assert [len(words) for words in seen[-10:]] == [1] * 10
    assert set().union(*seen) <= {*"abcdefghijklmnop", "rain", "Rain", "play", "stops"}


@pytest.mark.parametrize(("likely", "sure"), [("Ġplay", 1), ("play", 0)])
def test_a_word_behind_white_space_is_another_token(likely: str, sure: int, tmp_path: Path) -> None:
    fill = other_fill(tmp_path, "byte-level")
    with torch.no_grad():
        fill._model.lm_head.bias[fill._reader.token_to_id(likely)] = 100
    drawn: list[set[str]] = [set(), set()]
    for new in fill(["rain's rain"] * 100, 0):
        assert new.split()[0].endswith("'s")
        drawn[0].add(new.split()[0][:-2])
        drawn[1].add(new.split()[1])
    assert drawn[sure] == {"rain", "play"}
    assert len(drawn[1 - sure]) > 5


# Folders that hold no such model


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def of_architecture(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def without_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    encoder = {name: weight for name, weight in weights.items() if name.startswith("bert.")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})


def without_mask(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def slow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))


def of_few_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: row for word, row in words.items() if row < 5 or word in LIKELY}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (shutil.rmtree, "does not load as a masked language model"),
        (without_weights, "does not load as a masked language model"),
        (
            lambda folder: of_architecture(folder, architectures=["BertModel"]),
            "no masked language model but a BertModel",
        ),
        (lambda folder: of_architecture(folder, model_type="gpt2", architectures=None), "does not load as a masked"),
        (without_head, "lacks weights of a masked language model, such as cls.predictions"),
        (without_mask, "has no mask token"),
        (slow_tokenizer, "not a fast one"),
        (of_few_words, "too few whole words"),
    ],
)
def test_folders_that_hold_no_masked_language_model(
    masked_lm: Path, spoil: Callable[[Path], object], match: str
) -> None:
    shutil.copytree(masked_lm, "spoilt")
    spoil(Path("spoilt"))
    with pytest.raises(ModelError, match=match) as error:
        load_fill_mask(Path("spoilt"), device=CPU)
    assert "masked language model in the format of transformers" in (error.value.hint or "")


def test_a_body_is_no_masked_language_model(tiny_teacher: Path) -> None:
    with pytest.raises(ModelError, match="no masked language model but a BertModel"):
        load_fill_mask(tiny_teacher, device=CPU)


def test_half_precision_is_made_single(masked_lm: Path) -> None:
    from transformers import AutoModelForMaskedLM

    shutil.copytree(masked_lm, "half")
    AutoModelForMaskedLM.from_pretrained("half").half().save_pretrained("half")
    fill = load_fill_mask(Path("half"), device=CPU)
    assert fill._model.dtype == torch.float32
    assert fill(["Rain stops play"], 0) != ["Rain stops play"]
