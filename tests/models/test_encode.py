"""Tokenizing once, batches of similar length, and the choice of the forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import newswire
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, StaticEmbedding
from synthetic import few_labels
from tokenizers import Tokenizer

from setfit_kd.models import encode, tokens
from setfit_kd.models.bodies import load_body
from setfit_kd.models.encode import choose_forward, embed, predict_proba
from setfit_kd.models.forward import ForwardPass
from setfit_kd.models.heads import fit_head
from setfit_kd.models.io import new_model
from setfit_kd.models.tokens import tokenize
from setfit_kd.signals import embedding_cache
from setfit_kd.teacher import scoring
from setfit_kd.teacher.scoring import score
from setfit_kd.utils.arrays import iter_batches

if TYPE_CHECKING:
    from setfit import SetFitModel

TEXTS = [*(row["text"] for row in newswire("train")[:300]), "", "goal " * 500]


def make_body(kind: str, folder: Path) -> SentenceTransformer:
    """Load a body, with a tokenizer that pads left, or with another kind of input module."""
    body = load_body(folder)
    if kind == "left":
        body.tokenizer.padding_side = "left"
    elif kind == "static":
        backend = Tokenizer.from_str(body.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        weights = np.random.default_rng(0).normal(size=(len(body.tokenizer), 8)).astype(np.float32)
        return SentenceTransformer(modules=[StaticEmbedding(backend, embedding_weights=weights)], device="cpu")
    elif kind == "bag of words":
        return SentenceTransformer(modules=[BoW(vocab=["goal", "vote", "rain"])], device="cpu")
    return body


@pytest.mark.parametrize("kind", ["right", "left", "static", "bag of words"])
def test_tokens_give_the_features_of_the_body(kind: str, tiny_student: Path) -> None:
    body = make_body(kind, tiny_student)
    for rows in ([3, 0, 301], [300], [301, 300, 7, 7]):
        features = tokenize(body, TEXTS).take(np.array(rows)).features(body)
        expected = body.preprocess([TEXTS[row] for row in rows])
        assert set(expected) - set(features) <= {"token_type_ids"}  # which are all zero
        for name, value in features.items():
            assert value == expected[name] if isinstance(value, str | list) else torch.equal(value, expected[name])
    if kind != "left":  # the positions of a text in this network depend on the padding
        body.truncate_dim = 5
        np.testing.assert_allclose(embed(body, TEXTS), body.encode(TEXTS), atol=1e-5)


def test_texts_are_tokenized_once_by_equal_tokenizers(
    tiny_student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    preprocess = SentenceTransformer.preprocess

    def count(self: SentenceTransformer, texts: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(len(texts) if len(texts) > 1 else 0)
        return preprocess(self, texts, *arguments, **options)

    def n_tokenized(body: SentenceTransformer, texts: list[str]) -> int:
        counts.clear()
        embed(body, texts)
        assert len(tokenize(body, texts)) == len(texts)
        return sum(counts)

    monkeypatch.setattr(SentenceTransformer, "preprocess", count)
    monkeypatch.setattr(tokens, "_cache", type(tokens._cache)())
    monkeypatch.setattr(tokens, "_MIN_CACHED_TEXTS", 300)
    student, teacher = load_body(tiny_student), load_body(tiny_teacher)
    assert n_tokenized(student, TEXTS) == len(TEXTS)
    assert n_tokenized(teacher, TEXTS) == 0  # the same tokenizer
    assert n_tokenized(teacher, TEXTS[1:]) == len(TEXTS) - 1
    assert n_tokenized(teacher, TEXTS[:299]) == 2 * 299  # too few
    embed(teacher, TEXTS[2:], cache_tokens=False)
    assert n_tokenized(teacher, TEXTS[2:]) == len(TEXTS) - 2
    teacher.max_seq_length = 8
    assert n_tokenized(teacher, TEXTS) == len(TEXTS)
    monkeypatch.setattr(tokens, "MAX_CACHED_TOKENS", 9 * len(TEXTS))
    student.max_seq_length = 7
    assert n_tokenized(student, TEXTS) == len(TEXTS)
    assert len(tokens._cache) == 1  # without the earlier ones, which are too many
    student.max_seq_length = 64
    assert n_tokenized(student, TEXTS) == 2 * len(TEXTS)  # too many to keep


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 9), st.sampled_from([1, 50, 1000, math.inf]))
def test_batches_have_similar_lengths_and_respect_the_limits(lengths: list[int], texts: int, n_tokens: float) -> None:
    batches = list(iter_batches(np.array(lengths, np.int64), texts, n_tokens))
    flat = [lengths[row] for batch in batches for row in batch]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert flat == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) <= texts
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= n_tokens


@pytest.fixture
def model(student_body: SentenceTransformer) -> SetFitModel:
    labeled = few_labels()
    model = new_model(student_body, labeled.label_names)
    model.model_head = fit_head(embed(student_body, labeled.texts), labeled.targets)
    return model


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes are tried on any number of texts, and count as faster than single precision."""
    monkeypatch.setattr(encode, "_MIN_SECONDS", dict.fromkeys(encode._MIN_SECONDS, 0.0))
    monkeypatch.setattr(encode, "_MIN_SPEEDUP", 0.0)


@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize(("limit", "method"), [(1e-1, "bf16"), (1e-5, "onnx"), (-1.0, "fp32")])
def test_forward_pass_must_agree_with_single_precision(
    limit: float, method: str, model: SetFitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(encode, "MAX_DIFFERENCE", limit)
    assert choose_forward(model, TEXTS).method == method
    expected, result = predict_proba(model, TEXTS), predict_proba(model, TEXTS, forward=choose_forward(model, TEXTS))
    assert np.abs(result - expected).max(axis=1).mean() <= max(limit, 0)
    assert (result == expected).all() == (method == "fp32")
    assert torch.get_float32_matmul_precision() == "highest"


def test_forward_pass_must_pay(model: SetFitModel, always_faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_forward(model, TEXTS[:100]).method == "fp32"
    monkeypatch.setattr(encode, "_MIN_SECONDS", dict.fromkeys(encode._MIN_SECONDS, 1e6))
    assert choose_forward(model, TEXTS).method == "fp32"
    assert choose_forward(model, TEXTS, n_texts=10**12).method == "bf16"
    monkeypatch.setattr(encode, "_MIN_SPEEDUP", math.inf)
    assert choose_forward(model, TEXTS, n_texts=10**12).method == "fp32"


@pytest.mark.usefixtures("always_faster")
def test_cached_embeddings_of_another_forward_pass_are_not_exact(
    model: SetFitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETFIT_KD_CACHE", str(tmp_path))
    monkeypatch.setattr(encode, "MAX_DIFFERENCE", 1.0)
    fast = score(model, TEXTS, cache=True)
    exact = score(model, TEXTS, cache=True, exact=True)
    assert fast.embeddings is not None
    assert exact.embeddings is not None
    assert 0 < np.abs(fast.embeddings - exact.embeddings).max() < 0.1
    np.testing.assert_array_equal(exact.embeddings, embed(model.model_body, TEXTS))
    for module in (embedding_cache, scoring):
        monkeypatch.setattr(module, "embed", None)  # nothing is computed again
    np.testing.assert_array_equal(score(model, TEXTS, cache=True).embeddings, exact.embeddings)


def test_half_precision_that_overflows_is_not_used(
    model: SetFitModel, always_faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: Any, features: Any) -> torch.Tensor:
        embeddings = forward(self, features)
        return embeddings if self.method == "fp32" else embeddings * math.inf

    forward = ForwardPass.__call__
    monkeypatch.setattr(encode, "MAX_DIFFERENCE", 1.0)
    monkeypatch.setattr(encode, "_FASTER", {"cpu": ("bf16",)})
    expected = embed(model.model_body, TEXTS)
    monkeypatch.setattr(ForwardPass, "__call__", overflow)
    assert choose_forward(model, TEXTS).method == "fp32"
    result = embed(model.model_body, TEXTS, forward=ForwardPass(model.model_body, "bf16"))  # repeated in fp32
    np.testing.assert_array_equal(result, expected)
