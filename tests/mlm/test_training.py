"""Masked language modeling: masks, loss, distillation, training and evaluation."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import newswire
from sentence_transformers import SentenceTransformer
from synthetic import raise_at_step
from torch.nn.functional import cosine_similarity, kl_div, log_softmax
from transformers import AutoModelForMaskedLM

from setfit_kd.config.mlm import MlmConfig
from setfit_kd.errors import DataError, ModelError
from setfit_kd.mlm.data import MaskedDataset, Words
from setfit_kd.mlm.loss import IGNORED, MaskedLanguageLoss
from setfit_kd.mlm.train import evaluate_mlm, fit_mlm_head, pretrain_body
from setfit_kd.mlm.vocabulary import add_words
from setfit_kd.models.token_model import check_same_tokens, load_token_model
from setfit_kd.student.kinds import create_token_body

TEXTS = [row["text"] for row in newswire("train")[:40]]
HELD_OUT = [row["text"] for row in newswire("eval")[:10]]
QUICK: dict[str, Any] = {
    **{"device": "cpu", "precision": "fp32", "batch_size": 4, "max_length": 32, "dropout": False},
    **{"learning_rate": 1e-2, "steps": 6},
}


@pytest.fixture
def body(masked_lm: Path) -> SentenceTransformer:
    return load_token_model(masked_lm, "fill-mask")


@pytest.fixture(scope="module")
def teacher(masked_lm: Path) -> SentenceTransformer:
    """Masked language model with other weights, whose predictions are far from uniform."""
    teacher = load_token_model(masked_lm, "fill-mask")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return teacher.eval()


def config(**settings: Any) -> MlmConfig:
    return MlmConfig.of(**{**QUICK, **settings})


def features(body: SentenceTransformer, rows: list[int], **settings: Any) -> dict[str, torch.Tensor]:
    columns: dict[str, torch.Tensor] = MaskedDataset(body, TEXTS, config(**settings)).__getitems__(rows)["features"][0]
    return columns


def weights(body: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in body.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *, atol: float = 0) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# Masks


def test_packed_blocks_are_the_tokens_of_all_texts(body: SentenceTransformer) -> None:
    tokenizer = body.tokenizer
    dataset = MaskedDataset(body, TEXTS, config(steps=None, epochs=2))
    n = len(dataset) // 2
    blocks: set[tuple[int, ...]] = set()
    for row in range(n):
        (block,) = dataset.__getitems__([row])["features"]
        original = torch.where(block["labels"] == IGNORED, block["input_ids"], block["labels"])[0].tolist()
        assert (original[0], original[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        blocks.add(tuple(original[1:-1]))
    expected = [token for text in TEXTS for token in tokenizer(text)["input_ids"][1:]]  # each text ends with [SEP]
    assert blocks == {tuple(expected[i : i + 30]) for i in range(0, len(expected), 30)}


def test_each_text_is_a_block_without_packing(body: SentenceTransformer) -> None:
    dataset = MaskedDataset(body, [*TEXTS, ""], config(steps=None, epochs=1, pack=False))
    assert len(dataset) == len(TEXTS)
    (columns,) = dataset.__getitems__(list(range(len(TEXTS))))["features"]
    expected = sorted(min(len(body.tokenizer(text)["input_ids"]), 32) for text in TEXTS)
    assert sorted(columns["attention_mask"].sum(dim=1).tolist()) == expected
    assert columns["labels"][columns["attention_mask"] == 0].eq(IGNORED).all()


def test_masks_depend_only_on_seed_and_row(body: SentenceTransformer) -> None:
    first = features(body, [3, 5])
    assert torch.equal(first["input_ids"][1], features(body, [5])["input_ids"][0])
    assert not torch.equal(first["labels"], features(body, [3, 5], seed=1)["labels"])
    dataset = MaskedDataset(body, TEXTS[:1], config(steps=None, epochs=2, pack=False))
    both = dataset.__getitems__([0, 1])["features"][0]["labels"]
    assert not torch.equal(both[0], both[1]), "each epoch must have other masks"


def test_chosen_tokens_are_masked_replaced_or_kept(body: SentenceTransformer) -> None:
    dataset = MaskedDataset(body, TEXTS, config(steps=None, epochs=40))
    (columns,) = dataset.__getitems__(list(range(len(dataset))))["features"]
    ids, labels = columns["input_ids"], columns["labels"]
    is_target = labels != IGNORED
    special = torch.isin(ids, torch.tensor([2, 3])) & columns["attention_mask"].bool()
    assert is_target.sum() / (columns["attention_mask"].bool() & ~special).sum() == pytest.approx(0.15, abs=0.01)
    masked, kept = ids[is_target] == body.tokenizer.mask_token_id, ids[is_target] == labels[is_target]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    replaced = ids[is_target][~masked & ~kept]
    assert not set(replaced.tolist()) & set(body.tokenizer.all_special_ids)
    assert len(set(replaced.tolist())) > 100
    assert not torch.isin(labels, torch.tensor([0, 2, 3, 4])).any(), "special tokens must not be predicted"


@pytest.mark.parametrize("whole_words", [True, False])
def test_tokens_of_a_word_are_masked_together(whole_words: bool, body: SentenceTransformer) -> None:
    text = "zebrafish qatarx zebrafish qatarx zebrafish qatarx"
    tokens, spans = body.tokenizer(text)["input_ids"], body.tokenizer(text).word_ids()
    dataset = MaskedDataset(
        body, [text], config(whole_words=whole_words, pack=False, max_length=64, mask_probability=0.3)
    )
    (columns,) = dataset.__getitems__([0])["features"]
    chosen = columns["labels"][0] != IGNORED
    by_word = [{bool(chosen[i]) for i in range(len(tokens)) if spans[i] == word} for word in range(6)]
    assert all(len(values) == 1 for values in by_word) is whole_words
    assert not whole_words or by_word.count({True}) in (1, 2)  # 30% of 6 words


# Loss


def test_loss_is_that_of_transformers(body: SentenceTransformer, masked_lm: Path) -> None:
    model: Any = AutoModelForMaskedLM.from_pretrained(masked_lm)
    columns = features(body, [0, 1, 2])
    expected = model.eval()(**columns).loss
    loss = MaskedLanguageLoss(body)([columns], torch.zeros(3))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = dict(body[0].model.named_parameters())  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def expected_loss(body: Any, teacher: Any, columns: dict[str, torch.Tensor], *, cosine_weight: float) -> float:
    """Distillation loss at alpha 0.25 and T 3 from the outputs of the transformers models, token by token."""
    inputs = {name: columns[name] for name in ("input_ids", "attention_mask")}
    student, target = (x[0].model(**inputs, output_hidden_states=True) for x in (body, teacher))
    hard, soft, cosines = list[float](), list[float](), list[float]()
    for row, token in columns["attention_mask"].nonzero().tolist():
        left, right = (output.hidden_states[-1][row, token] for output in (student, target))
        cosines.append(1 - float(cosine_similarity(left, right, dim=0)))
        label = int(columns["labels"][row, token])
        if label != IGNORED:
            logits = [output.logits[row, token] for output in (student, target)]
            hard.append(-float(log_softmax(logits[0], dim=0)[label]))
            p, q = (log_softmax(x / 3, dim=0) for x in logits)
            soft.append(9 * float(kl_div(p, q, log_target=True, reduction="sum")))
    return 0.25 * float(np.mean(hard)) + 0.75 * float(np.mean(soft)) + cosine_weight * float(np.mean(cosines))


@pytest.mark.parametrize("cosine_weight", [0.0, 2.0])
def test_distillation_loss_and_gradient(
    cosine_weight: float, body: SentenceTransformer, teacher: SentenceTransformer
) -> None:
    columns = features(body, [0, 1, 2, 3], pack=False, max_length=64)  # of different lengths
    assert not columns["attention_mask"].all()
    expected = expected_loss(body, teacher, columns, cosine_weight=cosine_weight)
    options: dict[str, Any] = {"teacher": teacher, "temperature": 3.0, "alpha": 0.25, "cosine_weight": cosine_weight}
    gradients = []
    for size in (None, 1, 3):
        body.zero_grad()
        loss = MaskedLanguageLoss(body, micro_batch_size=size, **options)
        teacher.train()
        value = loss([columns], torch.zeros(4))
        assert value.item() == pytest.approx(expected, rel=1e-4)
        value.backward()
        gradients.append({name: p.grad.clone() for name, p in body.named_parameters() if p.grad is not None})
        assert not teacher.training
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert teacher not in list(loss.modules())
    for other in gradients[1:]:
        assert_equal(gradients[0], other, atol=1e-5)


def test_no_cosine_loss_between_different_dimensions(
    body: SentenceTransformer, make_encoder: Callable[..., Path]
) -> None:
    wide = load_token_model(make_encoder("bert", hidden_size=32), "fill-mask")
    columns = features(body, [0, 1])
    losses = [MaskedLanguageLoss(body, teacher=wide, cosine_weight=w)([columns], torch.zeros(2)) for w in (0.0, 5.0)]
    assert torch.equal(*losses)


def test_teacher_with_another_vocabulary_is_refused(body: SentenceTransformer, teacher: SentenceTransformer) -> None:
    check_same_tokens(teacher, body, TEXTS)
    word = "zebrafish"
    add_words(body, [word])
    check_same_tokens(teacher, body, TEXTS)
    with pytest.raises(
        ModelError, match=r"tokenize 'a zebrafish' differently: .*##h \[SEP\], the student's \[CLS\] a zebrafish"
    ):
        check_same_tokens(teacher, body, [*TEXTS[:5], f"a {word}"])
    with pytest.raises(ModelError, match="differently"):
        pretrain_body(body, [word, *TEXTS], teacher=teacher, **QUICK)


def test_teacher_without_a_head_is_refused(body: SentenceTransformer, tiny_student: Path) -> None:
    headless = load_token_model(tiny_student, "fill-mask")
    with pytest.raises(ModelError, match="no head"):
        pretrain_body(body, TEXTS, teacher=headless, **QUICK)


# Training


def test_training_improves_held_out_words_and_keeps_the_maximum_length(body: SentenceTransformer) -> None:
    before, limit = evaluate_mlm(body, HELD_OUT), body.max_seq_length
    trained = pretrain_body(body, TEXTS, **{**QUICK, "steps": 20})
    after = evaluate_mlm(body, HELD_OUT)
    assert trained.model_body is body
    assert len(trained.loss_curve_) == 20
    assert body.max_seq_length == limit
    assert after["bits_per_character"] < 0.9 * before["bits_per_character"]


def test_student_approaches_the_teacher(teacher: SentenceTransformer) -> None:
    student, before = create_token_body("layers:1", "fill-mask", teacher=teacher), weights(teacher)
    divergence = MaskedLanguageLoss(student, teacher=teacher, alpha=0.0, temperature=1.0, cosine_weight=0.0)
    columns = features(student, list(range(8)), seed=1)
    start = divergence([columns], torch.zeros(8)).item()
    pretrain_body(student, TEXTS, teacher=teacher, **{**QUICK, "steps": 20})
    assert divergence([columns], torch.zeros(8)).item() < 0.7 * start
    assert_equal(before, weights(teacher))


def test_resumed_training_equals_an_uninterrupted_one(
    body: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {**QUICK, "dropout": True, "checkpoint_seconds": 1e-9}
    other = copy.deepcopy(body)
    pretrain_body(other, TEXTS, **options)
    with monkeypatch.context() as patch:
        raise_at_step(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain_body(body, TEXTS, checkpoints=tmp_path, **options)
    with caplog.at_level(logging.INFO):
        pretrain_body(body, TEXTS, checkpoints=tmp_path, **options)
    assert "Resuming from step 3" in caplog.text
    assert_equal(weights(body), weights(other))


def test_out_of_memory_uses_micro_batches(
    body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, forward_batch_sizes: list[int]
) -> None:
    other = copy.deepcopy(body)
    pretrain_body(other, TEXTS, **QUICK)
    sum_loss = MaskedLanguageLoss.sum_loss

    def fail(self: Any, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(columns["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum_loss(self, columns)

    monkeypatch.setattr(MaskedLanguageLoss, "sum_loss", fail)
    forward_batch_sizes.clear()
    pretrain_body(body, TEXTS, **QUICK)
    assert max(forward_batch_sizes) == 2
    assert_equal(weights(body), weights(other), atol=1e-4)


def test_only_a_missing_head_is_trained(tiny_student: Path) -> None:
    body = load_token_model(tiny_student, "fill-mask")
    module: Any = body[0]
    assert not module.has_head
    before, loss = weights(body), evaluate_mlm(body, HELD_OUT)["loss"]
    fit_mlm_head(body, TEXTS, config=config(head_steps=8))
    assert module.has_head
    assert evaluate_mlm(body, HELD_OUT)["loss"] < loss
    changed = {name for name, value in weights(body).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".cls." in name for name in changed)
    assert all(parameter.requires_grad for parameter in body.parameters())


def test_texts_without_tokens_are_refused(body: SentenceTransformer) -> None:
    with pytest.raises(DataError, match="no tokens to predict"):
        pretrain_body(body, ["", " "], **QUICK)
    with pytest.raises(DataError, match="no words to predict"):
        evaluate_mlm(body, [""])


# Evaluation


def make_uniform(body: SentenceTransformer) -> int:
    """Make all tokens equally likely; return their number."""
    decoder = body[0].model.get_output_embeddings()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.zero_()
    return int(decoder.weight.shape[0])


def test_bits_per_character_of_a_uniform_model(body: SentenceTransformer) -> None:
    texts = ["Zebrafish, the goal!", "öffnung"]
    for words in ([], ["zebrafish"]):
        if words:
            add_words(body, words)
        size = make_uniform(body)
        n_tokens = sum(len(body.tokenizer(text)["input_ids"]) - 2 for text in texts)
        metrics = evaluate_mlm(body, texts, config=config(mask_probability=0.999))  # all words
        assert metrics["loss"] == pytest.approx(math.log(size))
        assert metrics["perplexity"] == pytest.approx(size, rel=1e-4)
        n_characters = len("Zebrafish,thegoal!öffnung")
        assert metrics["bits_per_character"] == pytest.approx(n_tokens * math.log2(size) / n_characters)


def test_characters_with_several_tokens_are_counted_once() -> None:
    spans = np.array([[0, 1], [1, 2], [1, 2], [2, 5]])  # the second character has two tokens, the last one a space
    words = Words(np.arange(4), np.array([0, 0, 0, 1]), spans)
    counts = [words.count_characters("aé bc", np.arange(4) < n) for n in range(5)]
    assert counts == [0, 1, 2, 2, 4]


def test_evaluation_depends_neither_on_batches_nor_on_the_previous_mode(body: SentenceTransformer) -> None:
    expected = evaluate_mlm(body, HELD_OUT)
    body.train()
    assert evaluate_mlm(body, HELD_OUT, config=config(max_length=64, encode_batch_size=1)) == pytest.approx(
        expected, rel=1e-5
    )
    assert evaluate_mlm(body, HELD_OUT, config=config(max_length=64, seed=1)) != pytest.approx(expected, rel=1e-3)


def test_long_texts_are_truncated_after_the_words_are_chosen(
    body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, seen = " ".join(HELD_OUT), list[dict[str, torch.Tensor]]()
    sum_loss = MaskedLanguageLoss.sum_loss

    def record(self: Any, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(columns)
        return sum_loss(self, columns)

    monkeypatch.setattr(MaskedLanguageLoss, "sum_loss", record)
    for length in (16, 64):
        evaluate_mlm(body, [text], config=config(max_length=length))
    short, long = (columns["labels"][0] for columns in seen)
    assert torch.equal(short[:15], long[:15])
    mask = long != IGNORED
    assert seen[1]["input_ids"][0][mask].eq(body.tokenizer.mask_token_id).all()
