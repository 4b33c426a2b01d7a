"""Losses against naive implementations, gradient caching against whole batches, and samplers."""

from __future__ import annotations

import doctest
from collections import Counter
from importlib import import_module
from itertools import permutations
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from setfit_kd.losses.base import BatchLoss
from setfit_kd.losses.contrastive import ContrastiveLoss, balanced_batches
from setfit_kd.losses.cross_entropy import CrossEntropyLoss
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.pairs import PairSimilarityLoss, draw_pairs
from setfit_kd.losses.ranking import RankingLoss, distinct_batches
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL

Floats = npt.NDArray[np.float64]
NO_BODY = nn.Identity()

few_examples = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
batch_sizes = st.integers(2, 9)
dimensions = st.integers(2, 6)


def gaussian(seed: int, rows: int, columns: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def gradient(loss: Tensor, rows: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, rows)
    return grad


# Values


@few_examples
@given(seeds, batch_sizes, dimensions, dimensions, st.sampled_from([None, 1e-6, 1.0, 1e6]))
def test_similarity_loss_and_gradient_are_weighted_means_over_pairs_of_different_texts(
    seed: int, n: int, d: int, e: int, scale: float | None
) -> None:
    teacher, rng = gaussian(seed + 1, n + 3, e), np.random.default_rng(seed)
    labels, weights = rng.permutation(n + 3)[:n], rng.uniform(0.1, 3, n + 3) * (scale or 1)
    weights[labels[2:3]] = 0
    rows = torch.tensor(gaussian(seed, n, d), requires_grad=True)
    options = {} if scale is None else {"weights": weights.astype(np.float32)}
    loss = SimilarityLoss(NO_BODY, teacher.astype(np.float32), **options).compute_loss([rows], torch.tensor(labels))

    unit = rows / rows.norm(dim=1, keepdim=True)
    numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
    for i, j in permutations(range(n), 2):
        weight = 1 if scale is None else weights[labels[i]] * weights[labels[j]] / scale**2
        numerator = numerator + weight * (unit[i] @ unit[j] - cosine(teacher[labels[i]], teacher[labels[j]])) ** 2
        denominator += weight
    expected = numerator / denominator
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient(loss, rows), gradient(expected, rows), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [0, 0, 0], [0, 2, 0]])
def test_similarity_loss_is_finite_for_zero_embeddings_and_zero_weights(weights: Any) -> None:
    weights = None if weights is None else np.array(weights, np.float32)
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, -1.0]], requires_grad=True)
    loss = SimilarityLoss(NO_BODY, gaussian(0, 3, 2), weights=weights).compute_loss([rows], torch.arange(3))
    assert loss.isfinite()
    assert gradient(loss, rows).isfinite().all()
    assert (loss.item() == 0) is (weights is not None)


@few_examples
@given(seeds, st.integers(1, 9), dimensions, st.integers(1, 4))
def test_contrastive_loss_is_mean_within_plus_mean_across_classes(seed: int, n: int, d: int, classes: int) -> None:
    rows, labels = gaussian(seed, n, d), np.random.default_rng(seed).integers(classes, size=n)
    within: list[float] = []
    across: list[float] = []
    for i in range(n):
        for j in range(i):
            is_same = labels[i] == labels[j]
            (within if is_same else across).append((float(is_same) - cosine(rows[i], rows[j])) ** 2)
    expected = sum(float(np.mean(terms)) for terms in (within, across) if terms)
    embeddings = torch.tensor(rows, requires_grad=True)
    loss = ContrastiveLoss(NO_BODY).compute_loss([embeddings], torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert gradient(loss, embeddings).isfinite().all()


@few_examples
@given(seeds, st.integers(2, 9), st.integers(1, 4))
def test_contrastive_loss_of_several_labels_weights_pairs_by_jaccard_similarity(
    seed: int, n: int, classes: int
) -> None:
    rows, labels = gaussian(seed, n, 5), np.random.default_rng(seed).integers(2, size=(n, classes)).astype(bool)
    sets = [set(np.flatnonzero(row)) for row in labels]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    same = np.array([len(sets[i] & sets[j]) / len(sets[i] | sets[j]) if sets[i] | sets[j] else 1 for i, j in pairs])
    cosines = np.array([cosine(rows[i], rows[j]) for i, j in pairs])
    terms = ((same, (1 - cosines) ** 2), (1 - same, cosines**2))
    expected = sum((weights * values).sum() / weights.sum() for weights, values in terms if weights.sum())
    loss = ContrastiveLoss(NO_BODY).compute_loss([torch.tensor(rows)], torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    one_hot = np.eye(3, dtype=bool)[np.arange(n) % 3]  # with one label per text, the same as for classes
    losses = [
        ContrastiveLoss(NO_BODY).compute_loss([torch.tensor(rows)], torch.tensor(y))
        for y in (one_hot, np.arange(n) % 3)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item())


@few_examples
@given(seeds, batch_sizes, dimensions)
def test_pair_loss_is_mean_squared_difference_of_cosines(seed: int, n: int, d: int) -> None:
    left, right = gaussian(seed, n, d), gaussian(seed + 1, n, d)
    targets = np.random.default_rng(seed).uniform(-1, 1, size=n)
    expected = np.mean([(cosine(left[i], right[i]) - targets[i]) ** 2 for i in range(n)])
    loss = PairSimilarityLoss(NO_BODY).compute_loss([torch.tensor(left), torch.tensor(right)], torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@few_examples
@given(seeds, batch_sizes, dimensions, dimensions)
def test_embedding_loss_is_mean_cosine_distance_after_projection(seed: int, n: int, d: int, e: int) -> None:
    student, teacher = gaussian(seed, n, d), gaussian(seed + 1, n + 3, e)
    labels = np.random.default_rng(seed).permutation(n + 3)[:n]
    loss_fn = EmbeddingLoss(NO_BODY, teacher, dimension=d).double()
    matrices = {name: parameter.detach().numpy() for name, parameter in loss_fn.named_parameters()}
    assert set(matrices) == (set() if d == e else {"projection.weight"})
    projected = student if d == e else student @ matrices["projection.weight"].T
    expected = np.mean([1 - cosine(projected[i], teacher[labels[i]]) for i in range(n)])
    loss = loss_fn.compute_loss([torch.tensor(student)], torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@few_examples
@given(
    seeds,
    st.lists(st.booleans(), min_size=1, max_size=9),
    st.integers(2, 5),
    st.floats(0.25, 20),
    st.floats(0, 1),
    st.booleans(),
)
def test_soft_label_loss_is_weighted_sum_of_divergence_and_cross_entropy(
    seed: int, has_gold: list[bool], k: int, temperature: float, alpha: float, is_multi_label: bool
) -> None:
    n, d = len(has_gold), 4
    rows, coef, intercept = gaussian(seed, n, d), gaussian(seed + 1, k, d), gaussian(seed + 2, 1, k)[0]
    task = MULTI_LABEL if is_multi_label else SINGLE_LABEL
    probabilities = task.to_probabilities(2 * gaussian(seed + 3, n + 3, k)).astype(np.float32)
    rng = np.random.default_rng(seed)
    labels, gold = rng.permutation(n + 3)[:n], np.full(n + 3, NO_GOLD)
    gold[labels] = np.where(has_gold, rng.integers(4, size=n), NO_GOLD)
    targets = rng.integers(2, size=(4, k)) if is_multi_label else np.eye(k)[rng.integers(k, size=4)]
    options: Any = {"gold": gold if any(has_gold) else None, "gold_targets": targets, "is_multi_label": is_multi_label}
    options |= {"temperature": temperature, "alpha": alpha}
    loss_fn = SoftLabelLoss(NO_BODY, probabilities, dimension=d, **options).double()
    loss_fn.init_head(coef, intercept)

    logits, losses = rows @ coef.T + intercept, []
    teacher_logits = task.to_logits(probabilities[labels]) / temperature
    teacher = task.to_probabilities(teacher_logits)
    # The divergence is the cross-entropy minus the entropy.
    divergence = task.cross_entropy(logits / temperature, teacher) - task.cross_entropy(teacher_logits, teacher)
    for i, row in enumerate(gold[labels]):
        share = 0 if row == NO_GOLD else alpha
        hard = task.cross_entropy(logits[i : i + 1], targets[row][None])[0]
        losses.append((1 - share) * temperature**2 * divergence[i] + share * hard)
    loss = loss_fn.compute_loss([torch.tensor(rows)], torch.tensor(labels))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
def test_soft_label_loss_is_finite_for_zero_probabilities(temperature: float) -> None:
    loss_fn = SoftLabelLoss(NO_BODY, np.eye(3, dtype=np.float32), dimension=3, temperature=temperature)
    loss_fn.init_head(np.eye(3), np.zeros(3))
    rows = torch.tensor(gaussian(0, 3, 3), dtype=torch.float32, requires_grad=True)
    loss = loss_fn.compute_loss([rows], torch.arange(3))
    assert loss.isfinite()
    assert gradient(loss, rows).isfinite().all()
    if temperature == 1:
        assert loss.item() == pytest.approx(nn.functional.cross_entropy(rows, torch.arange(3)).item(), rel=1e-5)


@few_examples
@given(seeds, batch_sizes, st.integers(0, 4), dimensions)
def test_ranking_loss_is_cross_entropy_over_all_positives_and_negatives(seed: int, n: int, m: int, d: int) -> None:
    anchors, positives, negatives = gaussian(seed, n, d), gaussian(seed + 1, n, d), gaussian(seed + 2, m, d)
    expected = 0.0
    for i, anchor in enumerate(anchors):
        logits = [20 * cosine(anchor, candidate) for candidate in (*positives, *negatives)]
        expected -= float(np.log(softmax(logits)[i])) / n
    columns = [torch.tensor(column) for column in (anchors, positives, negatives)[: 3 if m else 2]]
    loss = RankingLoss(NO_BODY).compute_loss(columns, torch.zeros(n))
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@few_examples
@given(seeds, batch_sizes, dimensions, st.integers(2, 4))
def test_pair_classification_loss_is_cross_entropy_on_both_embeddings_and_their_difference(
    seed: int, n: int, d: int, k: int
) -> None:
    u, v, labels = gaussian(seed, n, d), gaussian(seed + 1, n, d), np.random.default_rng(seed).integers(k, size=n)
    loss_fn = CrossEntropyLoss(NO_BODY, torch.nn.Linear(3 * d, k)).double()
    coef, intercept = (parameter.detach().numpy() for parameter in loss_fn.head.parameters())
    probabilities = softmax(np.hstack([u, v, abs(u - v)]) @ coef.T + intercept, axis=1)
    loss = loss_fn.compute_loss([torch.tensor(u), torch.tensor(v)], torch.tensor(labels))
    assert loss.item() == pytest.approx(-np.log(probabilities[np.arange(n), labels]).mean(), rel=1e-6)


# Samplers


@few_examples
@given(seeds, st.integers(1, 30), st.integers(1, 12), st.integers(2, 7), st.integers(1, 3))
def test_distinct_batches_share_no_key_and_use_rows_once_per_epoch(
    seed: int, n: int, n_keys: int, batch_size: int, epochs: int
) -> None:
    keys = np.random.default_rng(seed).integers(-1, n_keys, size=(n, 3))
    batches = distinct_batches(keys, batch_size=batch_size, epochs=epochs, seed=seed)
    has_pairs = any(len(batch) > 1 for batch in batches)
    for batch in batches:
        assert has_pairs < len(batch) <= batch_size
        used = [key for row in batch for key in {*keys[row].tolist()} - {-1}]
        assert len(used) == len(set(used))
    n_uses = Counter(row for batch in batches for row in batch)
    assert set(n_uses) <= set(range(n))
    assert all(n_uses[row] == epochs or (has_pairs and n_uses[row] < epochs) for row in range(n))
    assert distinct_batches(keys, batch_size=batch_size, epochs=epochs, seed=seed) == batches


@pytest.mark.parametrize(("n", "sizes"), [(20, [8, 8, 4]), (17, [8, 8]), (1, [1])])
def test_distinct_batches_are_full_and_random_without_a_last_batch_of_one_row(n: int, sizes: list[int]) -> None:
    keys = np.arange(n)[:, None]
    first, second = (distinct_batches(keys, batch_size=8, epochs=2, seed=seed) for seed in (0, 1))
    assert [len(batch) for batch in first] == sizes * 2
    assert Counter(row for batch in first for row in batch).most_common(1)[0][1] <= 2
    assert n == 1 or (first != second and first[: len(sizes)] != first[len(sizes) :])


@few_examples
@given(seeds, st.integers(2, 30), dimensions, st.integers(1, 5), st.booleans())
def test_draw_pairs_returns_different_texts_and_their_cosines(
    seed: int, n: int, d: int, pairs_per_text: int, all_rows: bool
) -> None:
    embeddings = gaussian(seed, n if all_rows else n + 4, d).astype(np.float32)
    rows = np.arange(n) if all_rows else np.random.default_rng(seed).permutation(n + 4)[:n]
    options: dict[str, Any] = {"pairs_per_text": pairs_per_text, "rows": None if all_rows else rows}
    left, right, cosines = draw_pairs(embeddings, seed=seed, **options)
    assert Counter(left.tolist()) == dict.fromkeys(rows.tolist(), pairs_per_text)
    assert (left != right).all()
    assert set(right.tolist()) <= set(rows.tolist())
    wide = embeddings.astype(np.float64)
    expected = [cosine(wide[i], wide[j]) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert np.abs(cosines).max() <= 1
    np.testing.assert_array_equal(draw_pairs(embeddings, seed=seed, **options)[1], right)


def test_draw_pairs_draws_all_possible_pairs_depending_on_the_seed() -> None:
    first, second = (draw_pairs(np.eye(5, dtype=np.float32), pairs_per_text=200, seed=seed)[:2] for seed in (0, 1))
    assert set(zip(*(side.tolist() for side in first), strict=True)) == set(permutations(range(5), 2))
    assert first[1].tolist() != second[1].tolist()


def test_balanced_batches_of_several_labels_have_every_label_and_texts_without_any() -> None:
    labels = np.random.default_rng(0).random((200, 5)) < [0.5, 0.3, 0.1, 0.05, 0.02]
    for batch in balanced_batches(labels, batch_size=24, steps=20, seed=0):
        assert len(batch) == len(set(batch)) <= 24
        assert labels[batch].any(axis=0).all()
        assert (~labels[batch].any(axis=1)).sum() >= 4


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        pytest.param([30, 2, 7], 16, id="uneven"),
        pytest.param([5, 5, 5], 64, id="fewer texts than a batch"),
        pytest.param([3] * 150, 64, id="150 classes"),
        pytest.param([20, 20, 20], 17, id="odd batch size"),
    ],
)
def test_balanced_batches_are_even_and_use_all_texts_equally_often(sizes: list[int], batch_size: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    batches, repeated, other_seed = (
        balanced_batches(labels, batch_size=batch_size, steps=60, seed=seed) for seed in (3, 3, 4)
    )
    assert len(batches) == 60
    assert batches == repeated
    assert batches != other_seed
    n_classes = min(len(sizes), batch_size // 2)
    low, high = batch_size // n_classes, -(-batch_size // n_classes)
    for batch in batches:
        assert len(batch) == len(set(batch)) <= batch_size
        counts = Counter(labels[batch].tolist())
        assert len(counts) == n_classes
        assert all(min(low, sizes[label]) <= count <= min(high, sizes[label]) for label, count in counts.items())
    n_uses = Counter(row for batch in batches for row in batch)
    for label in range(len(sizes)):
        uses = [n_uses[row] for row in np.flatnonzero(labels == label).tolist()]
        assert 0 < max(uses) <= min(uses) + 1


# All losses

POOL = gaussian(0, 12, 5).astype(np.float32)
WEIGHTS = np.random.default_rng(0).uniform(0.1, 3, 12).astype(np.float32)
PROBABILITIES = softmax(gaussian(1, 12, 3), axis=1).astype(np.float32)
GOLD: dict[str, Any] = {"gold": np.where(np.arange(12) % 2, np.arange(12) % 3, NO_GOLD), "gold_targets": np.eye(3)}


def weighted_sum(body: nn.Module, **options: Any) -> WeightedSumLoss:
    soft_labels = SoftLabelLoss(body, PROBABILITIES, dimension=32, **GOLD)
    embedding = EmbeddingLoss(body, POOL, dimension=32, dropout=True)  # an option that is ignored
    return WeightedSumLoss(body, [(1.0, SimilarityLoss(body, POOL)), (0.5, soft_labels), (2.0, embedding)], **options)


# Each loss takes embeddings of dimension 32 and labels from 0 to 11.
LOSSES = [
    pytest.param(lambda body, **k: SimilarityLoss(body, POOL, weights=WEIGHTS, **k), 1, id="similarity"),
    pytest.param(lambda body, **k: EmbeddingLoss(body, gaussian(0, 12, 32), dimension=32, **k), 1, id="embedding"),
    pytest.param(lambda body, **k: EmbeddingLoss(body, POOL, dimension=32, **k), 1, id="projected embedding"),
    pytest.param(lambda body, **k: SoftLabelLoss(body, PROBABILITIES, dimension=32, **GOLD, **k), 1, id="soft"),
    pytest.param(lambda body, **k: CrossEntropyLoss(body, nn.Linear(32, 12), **k), 1, id="cross-entropy"),
    pytest.param(ContrastiveLoss, 1, id="contrastive"),
    pytest.param(PairSimilarityLoss, 2, id="pairs"),
    pytest.param(RankingLoss, 2, id="ranking"),
    pytest.param(RankingLoss, 3, id="ranking with negatives"),
    pytest.param(lambda body, **k: CrossEntropyLoss(body, torch.nn.Linear(96, 12), **k), 2, id="pair classes"),
    pytest.param(weighted_sum, 1, id="weighted sum"),
]
LABELS = torch.tensor([0, 1, 0, 1, 2, 2])


def rows_of_width_32(columns: int) -> list[Tensor]:
    return [torch.tensor(gaussian(column, 6, 32)).float() for column in range(columns)]


class _DropoutBody(nn.Module):
    """Body that applies a layer and dropout to its input, and writes the result into the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.n_passes = nn.Linear(32, 32), nn.Dropout(0.5), 0

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.n_passes += 1
        features["sentence_embedding"] = self.drop(self.layer(features["rows"]))
        return features


@pytest.mark.parametrize(("make", "columns"), LOSSES)
@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_by_default_and_features_are_not_modified(make: Any, columns: int, dropout: bool) -> None:
    torch.manual_seed(0)
    body = _DropoutBody()
    loss_fn: BatchLoss = make(body, dropout=dropout) if dropout else make(body)
    features = [{"rows": rows} for rows in rows_of_width_32(columns)]
    losses = set()
    for _ in range(4):
        loss_fn.train()
        losses.add(loss_fn(features, LABELS).item())
    assert (len(losses) > 1) is dropout
    assert [set(column) for column in features] == [{"rows"}] * columns
    assert body.n_passes == 4 * columns
    torch.autograd.backward(loss_fn(features, LABELS))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss_fn.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda array: SimilarityLoss(NO_BODY, array),
        lambda array: EmbeddingLoss(NO_BODY, array, dimension=5),
        lambda array: SoftLabelLoss(NO_BODY, array, dimension=5),
    ],
    ids=["similarity", "embedding", "soft labels"],
)
def test_teacher_arrays_can_be_in_half_precision_and_only_rows_in_labels_are_read(make: Any) -> None:
    half, labels = softmax(POOL, axis=1).astype(np.float16), torch.tensor([7, 2, 11, 2])
    array = MagicMock(shape=half.shape, __getitem__=Mock(side_effect=half.__getitem__))
    torch.manual_seed(0)
    rows = [torch.tensor(gaussian(0, 4, 5)).float()]
    loss = make(array).compute_loss(rows, labels)
    assert {row for call in array.__getitem__.call_args_list for row in call.args[0].tolist()} == {2, 7, 11}
    torch.manual_seed(0)
    torch.testing.assert_close(loss, make(half.astype(np.float32)).compute_loss(rows, labels))


@pytest.mark.parametrize(("make", "columns"), LOSSES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_embeddings_is_float32(make: Any, columns: int, half: torch.dtype) -> None:
    torch.manual_seed(0)
    loss_fn = make(NO_BODY)
    rows = [column.to(half) for column in rows_of_width_32(columns)]
    expected = loss_fn.compute_loss([column.float() for column in rows], LABELS).item()
    for module in (loss_fn, loss_fn.to(half)):
        loss = module.compute_loss(rows, LABELS)
        assert loss.dtype == torch.float32
    # Only the layers of the loss compute in half precision.
    tolerance = 2e-2 if list(loss_fn.parameters()) else 1e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance)


def test_weighted_sum_loss_is_the_weighted_sum_of_its_losses() -> None:
    parts: list[tuple[float, BatchLoss]] = [(0.5, SimilarityLoss(NO_BODY, POOL)), (2.0, ContrastiveLoss(NO_BODY))]
    rows = rows_of_width_32(1)
    expected = sum(weight * part.compute_loss(rows, LABELS).item() for weight, part in parts)
    assert WeightedSumLoss(NO_BODY, parts).compute_loss(rows, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_docstring_examples_run() -> None:
    names = "contrastive cross_entropy embedding pairs ranking similarity soft_labels weighted_sum"
    for name in names.split():
        results = doctest.testmod(import_module(f"setfit_kd.losses.{name}"))
        assert results.attempted > 0
        assert results.failed == 0


# Chunks and micro-batches

TEXTS = [" ".join(["word"] * (1 + 7 * i % 40)) + f" number {i}" for i in range(19)]
TEXT_LABELS = torch.arange(19) * 7 % 12


def flat_gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """Concatenate the gradients of all parameters; unused parameters have zeros."""
    grads = torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def columns_of(body: SentenceTransformer, columns: int) -> list[dict[str, Tensor]]:
    return [body.preprocess(texts) for texts in (TEXTS, TEXTS[::-1], TEXTS[5:8])[:columns]]


class _ForwardPasses:
    """Layer outputs of every forward pass, and the number of passes in memory at the start of each."""

    def __init__(self, body: SentenceTransformer) -> None:
        self.outputs: list[list[Any]] = []
        self.in_memory: list[int] = []
        transformer: Any = body[0]
        for number, layer in enumerate(transformer.auto_model.encoder.layer):
            layer.register_forward_hook(lambda _, __, output, first=number == 0: self.record(output, first))

    def record(self, output: Tensor, first: bool) -> None:
        if first:
            self.outputs.append([])
        # Refer to the storage, which autograd may keep through another tensor.
        self.outputs[-1].append(cast("Any", StorageWeakRef)(output.untyped_storage()))
        if first:
            self.in_memory.append(self.n_in_memory())

    def n_in_memory(self) -> int:
        return sum(not all(output.expired() for output in outputs) for outputs in self.outputs)


@pytest.mark.parametrize(("padding_side", "n_tokens"), [("right", 1), ("right", 1000), ("left", 50)])
def test_chunk_size_does_not_change_embeddings(
    teacher_body: SentenceTransformer, n_tokens: int, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.losses.base.CPU_TOKENS", n_tokens)
    teacher_body.double().eval()
    teacher_body.tokenizer.padding_side = padding_side
    features = teacher_body.preprocess(TEXTS)
    assert bool(features["attention_mask"][:, 0].all()) is (padding_side == "right")
    expected = teacher_body(dict(features))["sentence_embedding"]
    for micro_batch_size in (None, 3):
        result = PairSimilarityLoss(teacher_body, micro_batch_size=micro_batch_size).embed(features)
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("make", "columns"), LOSSES)
def test_chunks_and_micro_batches_do_not_change_loss_or_gradient(
    teacher_body: SentenceTransformer, make: Any, columns: int
) -> None:
    torch.manual_seed(0)
    loss_fn = make(teacher_body).double().eval()
    features = columns_of(teacher_body, columns)
    embeddings = [teacher_body(dict(column))["sentence_embedding"] for column in features]
    expected_loss = loss_fn.compute_loss(embeddings, TEXT_LABELS)
    expected = flat_gradient(expected_loss, loss_fn)
    for loss_fn.micro_batch_size in (1, 8, None):
        loss = loss_fn(features, TEXT_LABELS)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        assert relative_error(flat_gradient(loss, loss_fn), expected) < 1e-6


@pytest.mark.parametrize(("make", "columns"), [(PairSimilarityLoss, 2), (weighted_sum, 1)], ids=["pairs", "sum"])
def test_micro_batches_reuse_dropout_masks_in_the_backward_pass(
    teacher_body: SentenceTransformer, make: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_fn = make(teacher_body, dropout=True, micro_batch_size=8).double()
    features = columns_of(teacher_body, columns)

    def compute_gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return flat_gradient(loss_fn(features, TEXT_LABELS), loss_fn)

    result = compute_gradient(0)
    monkeypatch.setattr("setfit_kd.losses.base.checkpoint", lambda function, *inputs, **_: function(*inputs))
    expected, other_seed = compute_gradient(0), compute_gradient(1)
    assert relative_error(result, expected) < 1e-6
    assert relative_error(other_seed, expected) > 1e-2


@pytest.mark.parametrize(("make", "columns"), [(PairSimilarityLoss, 2), (weighted_sum, 1)], ids=["pairs", "sum"])
@pytest.mark.parametrize(("micro_batch_size", "n_passes"), [(3, 7), (None, 2)])
def test_only_activations_of_one_micro_batch_are_in_memory(
    teacher_body: SentenceTransformer, make: Any, columns: int, micro_batch_size: Any, n_passes: int
) -> None:
    """The word embeddings are frozen; gradients must reach the first layer nevertheless."""
    transformer: Any = teacher_body[0]
    transformer.auto_model.get_input_embeddings().requires_grad_(False)
    loss_fn = make(teacher_body, dropout=True, micro_batch_size=micro_batch_size)
    passes, n_passes = _ForwardPasses(teacher_body), n_passes * columns
    loss = loss_fn(columns_of(teacher_body, columns), TEXT_LABELS)
    assert len(passes.in_memory) == n_passes
    assert passes.n_in_memory() == (0 if micro_batch_size else n_passes)
    loss.backward()
    assert transformer.auto_model.encoder.layer[0].attention.self.query.weight.grad.any()
    assert len(passes.in_memory) == (2 * n_passes if micro_batch_size else n_passes)
    assert passes.n_in_memory() == 0
    assert max(passes.in_memory) == (1 if micro_batch_size else n_passes)
    with torch.no_grad():
        loss_fn(columns_of(teacher_body, columns), TEXT_LABELS)
    assert len(passes.in_memory) == (3 * n_passes if micro_batch_size else 2 * n_passes)
