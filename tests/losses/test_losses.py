"""Losses against naive implementations, gradient caching against whole batches, and samplers."""

from __future__ import annotations

import doctest
from collections import Counter
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from setfit_kd.losses.base import BatchLoss, cosine_matrix
from setfit_kd.losses.contrastive import ContrastiveLoss, balanced_batches
from setfit_kd.losses.embedding import EmbeddingLoss
from setfit_kd.losses.pairs import PairSimilarityLoss, draw_pairs
from setfit_kd.losses.similarity import SimilarityLoss
from setfit_kd.losses.soft_labels import NO_GOLD, SoftLabelLoss
from setfit_kd.losses.weighted_sum import WeightedSumLoss

Floats = npt.NDArray[np.float64]
NO_BODY: Any = nn.Identity()

few_examples = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
batch_sizes = st.integers(2, 9)
dimensions = st.integers(2, 6)


def gaussian(seed: int, rows: int, columns: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return cast("Floats", powers / powers.sum(axis=1, keepdims=True))


def similarity(teacher: Floats, weights: Any = None) -> SimilarityLoss:
    weights = None if weights is None else np.asarray(weights, np.float32)
    return SimilarityLoss(NO_BODY, teacher.astype(np.float32), weights=weights)


def soft_label_loss(probabilities: Floats, **options: Any) -> SoftLabelLoss:
    """Soft-label loss in double precision that uses embeddings as logits."""
    k = probabilities.shape[1]
    loss_fn = SoftLabelLoss(NO_BODY, probabilities.astype(np.float32), dimension=k, **options).double()
    loss_fn.init_head(np.eye(k), np.zeros(k))
    return loss_fn


def contrastive_loss(rows: Tensor, labels: Tensor) -> Tensor:
    return ContrastiveLoss(NO_BODY).compute_loss([rows], labels)


def gradient(loss: Tensor, rows: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, rows)
    return grad


# Similarity loss


@few_examples
@given(seeds, batch_sizes, dimensions, dimensions)
def test_similarity_loss_is_mean_over_pairs_of_different_texts(seed: int, n: int, d: int, e: int) -> None:
    student, teacher = gaussian(seed, n, d), gaussian(seed + 1, n, e)
    expected = np.mean(
        [
            (cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])) ** 2
            for i in range(n)
            for j in range(n)
            if i != j
        ]
    )
    loss = similarity(teacher).compute_loss([torch.tensor(student)], torch.arange(n))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@few_examples
@given(seeds, batch_sizes, dimensions, st.integers(0, 4))
def test_similarity_loss_is_zero_for_equal_angles_in_another_basis_and_dimension(
    seed: int, n: int, d: int, extra: int
) -> None:
    teacher = gaussian(seed, n, d)
    basis, _ = np.linalg.qr(gaussian(seed + 1, d + extra, d))
    lengths = np.random.default_rng(seed + 2).uniform(0.1, 10, size=(n, 1))
    student = lengths * (teacher @ basis.T)
    assert similarity(teacher).compute_loss([torch.tensor(student)], torch.arange(n)).item() < 1e-9


@few_examples
@given(seeds, batch_sizes, dimensions)
def test_similarity_loss_is_positive_if_an_angle_differs(seed: int, n: int, d: int) -> None:
    teacher = gaussian(seed, n, d)
    student = teacher.copy()
    student[0] = -student[0]
    gap = max(abs(cosine(teacher[0], teacher[j])) for j in range(1, n))
    loss = similarity(teacher).compute_loss([torch.tensor(student)], torch.arange(n)).item()
    assert loss >= 0.9 * 2 * (2 * gap) ** 2 / (n * (n - 1))


@few_examples
@given(seeds, batch_sizes, dimensions)
def test_similarity_loss_is_independent_of_batch_order(seed: int, n: int, d: int) -> None:
    teacher, student = gaussian(seed, n + 3, d), torch.tensor(gaussian(seed + 1, n, d))
    rng = np.random.default_rng(seed)
    labels, order = torch.tensor(rng.permutation(n + 3)[:n]), torch.tensor(rng.permutation(n))
    loss_fn = similarity(teacher)
    loss, permuted = loss_fn.compute_loss([student], labels), loss_fn.compute_loss([student[order]], labels[order])
    assert loss.item() == pytest.approx(permuted.item(), rel=1e-4, abs=1e-7)


def test_similarity_targets_are_cosines_of_the_rows_in_labels() -> None:
    teacher = gaussian(0, 10, 4)
    labels = [7, 2, 2, 9]
    targets = similarity(teacher).targets(torch.tensor(labels))
    expected = [[cosine(teacher[i], teacher[j]) for j in labels] for i in labels]
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)


@few_examples
@given(seeds, batch_sizes, dimensions)
def test_similarity_gradient_ignores_the_diagonal(seed: int, n: int, d: int) -> None:
    teacher = gaussian(seed, n, d)
    rows = torch.tensor(gaussian(seed + 1, n, d + 1), requires_grad=True)
    result = gradient(similarity(teacher).compute_loss([rows], torch.arange(n)), rows)

    copied = rows.detach().clone().requires_grad_()
    unit = copied / copied.norm(dim=1, keepdim=True)
    target = torch.tensor([[cosine(teacher[i], teacher[j]) for j in range(n)] for i in range(n)])
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    total = sum(((unit[i] @ unit[j] - target[i, j]) ** 2 for i, j in pairs), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(result, gradient(total / len(pairs), copied), rtol=1e-3, atol=1e-5)


def test_diagonal_of_cosine_matrix_has_no_gradient() -> None:
    rows = torch.tensor(gaussian(0, 5, 3), requires_grad=True)
    assert gradient(cosine_matrix(rows).diagonal().sum(), rows).abs().max().item() < 1e-12


def test_similarity_loss_and_gradient_are_zero_for_a_copy() -> None:
    teacher = gaussian(0, 6, 3)
    rows = torch.tensor(teacher, requires_grad=True)
    loss = similarity(teacher).compute_loss([rows], torch.arange(6))
    assert loss.item() < 1e-12
    assert gradient(loss, rows).abs().max().item() < 1e-6


def test_zero_embedding_has_finite_loss_and_gradient() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, -1.0]], requires_grad=True)
    loss = similarity(gaussian(0, 3, 2)).compute_loss([rows], torch.arange(3))
    assert loss.isfinite()
    assert gradient(loss, rows).isfinite().all()


@few_examples
@given(seeds, batch_sizes, dimensions, dimensions)
def test_pair_weight_is_product_of_text_weights(seed: int, n: int, d: int, e: int) -> None:
    student, teacher = gaussian(seed, n, d), gaussian(seed + 1, n + 3, e)
    rng = np.random.default_rng(seed)
    weights, labels = rng.uniform(0.1, 3, n + 3), rng.permutation(n + 3)[:n]
    numerator = denominator = 0.0
    for i, j in permutations(range(n), 2):
        weight = weights[labels[i]] * weights[labels[j]]
        numerator += weight * (cosine(student[i], student[j]) - cosine(teacher[labels[i]], teacher[labels[j]])) ** 2
        denominator += weight
    loss = similarity(teacher, weights).compute_loss([torch.tensor(student)], torch.tensor(labels))
    assert loss.item() == pytest.approx(numerator / denominator, rel=1e-4, abs=1e-6)


@few_examples
@given(seeds, batch_sizes, dimensions, st.floats(1e-6, 1e6))
def test_equal_weights_match_no_weights(seed: int, n: int, d: int, weight: float) -> None:
    student, teacher, labels = torch.tensor(gaussian(seed, n, d)).float(), gaussian(seed + 1, n, d), torch.arange(n)
    weighted, plain = (
        similarity(teacher, weights).compute_loss([student], labels) for weights in (np.full(n, weight), None)
    )
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-4)


def test_text_of_weight_zero_is_ignored() -> None:
    teacher, labels = gaussian(0, 6, 3), torch.arange(6)
    rows = torch.tensor(gaussian(1, 6, 3), requires_grad=True)
    weights = np.array([1, 2, 0, 3, 0.5, 1])
    loss, others = similarity(teacher, weights).compute_loss([rows], labels), labels[labels != 2]
    without = similarity(teacher, weights).compute_loss([rows[others]], others)
    assert loss.item() == pytest.approx(without.item(), rel=1e-6)
    grad = gradient(loss, rows)
    assert not grad[2].any()
    torch.testing.assert_close(grad[others], gradient(without, rows)[others])


@pytest.mark.parametrize("weights", [[0, 0, 0], [0, 2, 0]], ids=["all texts of weight zero", "all but one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_zero_if_all_pair_weights_are_zero(weights: list[float], dtype: Any) -> None:
    rows = torch.tensor(gaussian(1, 3, 4), dtype=dtype, requires_grad=True)
    loss = similarity(gaussian(0, 3, 2), weights).compute_loss([rows], torch.arange(3))
    assert loss.item() == 0
    assert (gradient(loss, rows) == 0).all()


# Contrastive loss


@few_examples
@given(seeds, batch_sizes, dimensions, st.integers(1, 4))
def test_contrastive_loss_is_mean_within_plus_mean_across_classes(seed: int, n: int, d: int, classes: int) -> None:
    rows = gaussian(seed, n, d)
    labels = np.random.default_rng(seed).integers(classes, size=n)
    within, across = [], []
    for i in range(n):
        for j in range(i):
            if labels[i] == labels[j]:
                within.append((1 - cosine(rows[i], rows[j])) ** 2)
            else:
                across.append(cosine(rows[i], rows[j]) ** 2)
    expected = sum(float(np.mean(terms)) for terms in (within, across) if terms)
    assert contrastive_loss(torch.tensor(rows), torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-12)


@few_examples
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_contrastive_loss_is_independent_of_class_sizes(sizes: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    collapsed = torch.ones(len(labels), 3, dtype=torch.float64)
    orthogonal = torch.eye(len(labels), dtype=torch.float64)
    ideal = torch.eye(len(sizes), dtype=torch.float64)[labels]
    assert contrastive_loss(collapsed, labels).item() == pytest.approx(1)
    assert contrastive_loss(orthogonal, labels).item() == pytest.approx(float(max(sizes) > 1))
    assert contrastive_loss(ideal, labels).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([0, 0, 0], 0.0, id="one class only"),
        pytest.param([0, 1, 2], 1.0, id="all different"),
        pytest.param([0], 0.0, id="a single text"),
    ],
)
def test_contrastive_loss_is_finite_without_pairs_within_or_across_classes(labels: list[int], expected: float) -> None:
    rows = torch.ones(len(labels), 2, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(rows, torch.tensor(labels))
    assert loss.item() == pytest.approx(expected)
    assert gradient(loss, rows).isfinite().all()


def test_gradient_step_reduces_contrastive_loss() -> None:
    rows = torch.tensor(gaussian(0, 8, 4), requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    before = contrastive_loss(rows, labels)
    after = contrastive_loss((rows - 0.1 * gradient(before, rows)).detach(), labels)
    assert after.item() < before.item()


# Pair loss


@few_examples
@given(seeds, batch_sizes, dimensions)
def test_pair_loss_is_mean_squared_difference_of_cosines(seed: int, n: int, d: int) -> None:
    left, right = gaussian(seed, n, d), gaussian(seed + 1, n, d)
    targets = np.random.default_rng(seed).uniform(-1, 1, size=n)
    expected = np.mean([(cosine(left[i], right[i]) - targets[i]) ** 2 for i in range(n)])
    loss = PairSimilarityLoss(NO_BODY).compute_loss([torch.tensor(left), torch.tensor(right)], torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@few_examples
@given(seeds, st.integers(2, 30), dimensions, st.integers(1, 5))
def test_draw_pairs_returns_different_texts_and_their_cosines(seed: int, n: int, d: int, pairs_per_text: int) -> None:
    embeddings = gaussian(seed, n, d).astype(np.float32)
    left, right, cosines = draw_pairs(embeddings, pairs_per_text=pairs_per_text, seed=seed)
    assert Counter(left.tolist()) == dict.fromkeys(range(n), pairs_per_text)
    assert (left != right).all()
    assert set(right.tolist()) <= set(range(n))
    wide = embeddings.astype(np.float64)
    expected = [cosine(wide[i], wide[j]) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert np.abs(cosines).max() <= 1


def test_draw_pairs_uses_only_selected_rows() -> None:
    rows = np.array([4, 1, 7])
    left, right, cosines = draw_pairs(np.eye(9, dtype=np.float32), pairs_per_text=5, seed=0, rows=rows)
    assert set(left) == set(right) == set(rows)
    np.testing.assert_array_equal(left != right, True)
    np.testing.assert_array_equal(cosines, 0)
    left, right, _ = draw_pairs(np.eye(2, dtype=np.float32), pairs_per_text=2, seed=0)
    assert left.tolist() == [0, 0, 1, 1]
    assert right.tolist() == [1, 1, 0, 0]


def test_draw_pairs_draws_all_possible_pairs() -> None:
    left, right, _ = draw_pairs(np.eye(5, dtype=np.float32), pairs_per_text=200, seed=0)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == set(permutations(range(5), 2))


def test_draw_pairs_is_deterministic_for_a_seed() -> None:
    embeddings = gaussian(0, 20, 3).astype(np.float32)
    first, same_seed, other_seed = (
        draw_pairs(embeddings, pairs_per_text=3, seed=seed)[1].tolist() for seed in (1, 1, 2)
    )
    assert first == same_seed
    assert first != other_seed


# Embedding loss


@few_examples
@given(seeds, batch_sizes, dimensions, dimensions)
def test_embedding_loss_is_mean_cosine_distance_after_projection(seed: int, n: int, d: int, e: int) -> None:
    student, teacher = gaussian(seed, n, d), gaussian(seed + 1, n + 3, e)
    labels = np.random.default_rng(seed).permutation(n + 3)[:n]
    loss_fn = EmbeddingLoss(NO_BODY, teacher, dimension=d).double()
    matrices = [parameter.detach().numpy() for parameter in loss_fn.parameters()]
    projected = student @ matrices[0].T if matrices else student
    expected = np.mean([1 - cosine(projected[i], teacher[labels[i]]) for i in range(n)])
    loss = loss_fn.compute_loss([torch.tensor(student)], torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_embedding_loss_is_zero_for_equal_directions() -> None:
    teacher, lengths = gaussian(0, 6, 4), np.random.default_rng(0).uniform(0.1, 10, size=(6, 1))
    loss_fn = EmbeddingLoss(NO_BODY, teacher, dimension=4)
    rows = torch.tensor(lengths * teacher, requires_grad=True)
    loss = loss_fn.compute_loss([rows], torch.arange(6))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, rows).abs().max().item() < 1e-6


def test_embedding_loss_trains_a_projection_only_if_dimensions_differ() -> None:
    teacher = gaussian(0, 6, 4)
    assert not list(EmbeddingLoss(NO_BODY, teacher, dimension=4).parameters())
    loss_fn = EmbeddingLoss(NO_BODY, teacher, dimension=3).double()
    ((name, matrix),) = loss_fn.named_parameters()
    assert (name, tuple(matrix.shape)) == ("projection.weight", (4, 3))
    torch.autograd.backward(loss_fn.compute_loss([torch.tensor(gaussian(1, 6, 3))], torch.arange(6)))
    assert matrix.grad is not None
    assert matrix.grad.abs().max().item() > 1e-3


# Soft-label loss


@few_examples
@given(seeds, st.lists(st.booleans(), min_size=1, max_size=9), st.integers(2, 5), st.floats(0.25, 20), st.floats(0, 1))
def test_soft_label_loss_is_weighted_sum_of_divergence_and_cross_entropy(
    seed: int, has_gold: list[bool], k: int, temperature: float, alpha: float
) -> None:
    n, d = len(has_gold), 4
    rows, coef, intercept = gaussian(seed, n, d), gaussian(seed + 1, k, d), gaussian(seed + 2, 1, k)[0]
    probabilities = softmax(2 * gaussian(seed + 3, n + 3, k)).astype(np.float32)
    rng = np.random.default_rng(seed)
    labels, gold = rng.permutation(n + 3)[:n], np.full(n + 3, NO_GOLD)
    gold[labels] = np.where(has_gold, rng.integers(k, size=n), NO_GOLD)
    loss_fn = SoftLabelLoss(
        NO_BODY, probabilities, dimension=d, gold=gold, temperature=temperature, alpha=alpha
    ).double()
    loss_fn.init_head(coef, intercept)

    logits, losses = rows @ coef.T + intercept, []
    teacher = softmax(np.log(probabilities[labels].astype(np.float64)) / temperature)
    divergence = (teacher * np.log(teacher / softmax(logits / temperature))).sum(axis=1)
    for i, label in enumerate(gold[labels]):
        share = 0 if label == NO_GOLD else alpha
        losses.append((1 - share) * temperature**2 * divergence[i] - share * np.log(softmax(logits)[i, label]))
    loss = loss_fn.compute_loss([torch.tensor(rows)], torch.tensor(labels))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-9)


def test_soft_label_loss_at_temperature_1_is_kl_divergence() -> None:
    probabilities, logits = softmax(gaussian(0, 7, 3)), torch.tensor(gaussian(1, 7, 3))
    expected = nn.functional.kl_div(logits.log_softmax(dim=1), torch.tensor(probabilities), reduction="batchmean")
    loss = soft_label_loss(probabilities).compute_loss([logits], torch.arange(7))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_texts_without_gold_label_use_only_the_soft_labels(alpha: float) -> None:
    probabilities, logits = softmax(gaussian(0, 4, 3)), torch.tensor(gaussian(1, 4, 3))
    gold = np.array([0, NO_GOLD, 2, NO_GOLD])
    loss_fns = [soft_label_loss(probabilities, gold=gold, alpha=alpha), soft_label_loss(probabilities, alpha=alpha)]
    for label, equal in enumerate(gold == NO_GOLD):
        losses = [loss_fn.compute_loss([logits[[label]]], torch.tensor([label])).item() for loss_fn in loss_fns]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) is bool(equal)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 100.0])
def test_soft_label_loss_and_gradient_are_zero_for_the_teachers_logits(temperature: float) -> None:
    probabilities = softmax(3 * gaussian(0, 6, 4))
    logits = np.log(probabilities.astype(np.float32).astype(np.float64)) + gaussian(1, 6, 1)
    rows = torch.tensor(logits, requires_grad=True)
    loss = soft_label_loss(probabilities, temperature=temperature).compute_loss([rows], torch.arange(6))
    assert loss.item() == pytest.approx(0, abs=1e-10)
    assert gradient(loss, rows).abs().max().item() < 1e-10


@pytest.mark.parametrize("temperature", [100.0, 1000.0])
def test_soft_label_gradient_scale_is_independent_of_temperature(temperature: float) -> None:
    n, k = 6, 4
    student, teacher = (
        logits - logits.mean(axis=1, keepdims=True) for logits in (gaussian(0, n, k), gaussian(1, n, k))
    )
    rows = torch.tensor(student, requires_grad=True)
    loss = soft_label_loss(softmax(teacher), temperature=temperature).compute_loss([rows], torch.arange(n))
    grad, limit = n * gradient(loss, rows).numpy(), (student - teacher) / k
    assert np.linalg.norm(grad - limit) < 0.03 * np.linalg.norm(limit)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_label_loss_is_finite_for_zero_probabilities(temperature: float, dtype: torch.dtype) -> None:
    loss_fn = soft_label_loss(np.eye(3), temperature=temperature).to(dtype)
    rows = torch.tensor(gaussian(0, 3, 3), dtype=dtype, requires_grad=True)
    loss = loss_fn.compute_loss([rows], torch.arange(3))
    assert loss.isfinite()
    assert gradient(loss, rows).isfinite().all()
    if temperature == 1:
        assert loss.item() == pytest.approx(nn.functional.cross_entropy(rows, torch.arange(3)).item(), rel=1e-5)


def test_soft_label_head_is_initialized_and_trained() -> None:
    loss_fn = SoftLabelLoss(NO_BODY, np.full((5, 3), 1 / 3, np.float32), dimension=2)
    coef, intercept = gaussian(0, 3, 2), gaussian(1, 1, 3)[0]
    loss_fn.init_head(coef, intercept)
    np.testing.assert_allclose(loss_fn.head.weight.detach(), coef, rtol=1e-6)
    np.testing.assert_allclose(loss_fn.head.bias.detach(), intercept, rtol=1e-6)
    torch.autograd.backward(loss_fn.compute_loss([torch.tensor(gaussian(2, 5, 2)).float()], torch.arange(5)))
    for parameter in (loss_fn.head.weight, loss_fn.head.bias):
        assert parameter.grad is not None
        assert parameter.grad.abs().max().item() > 1e-3


# Balanced batches

CLASS_SIZES = [
    pytest.param([8, 8, 8, 8], 16, id="even"),
    pytest.param([30, 2, 7], 16, id="uneven"),
    pytest.param([5, 5, 5], 64, id="fewer texts than a batch"),
    pytest.param([2, 2], 4, id="smallest"),
    pytest.param([3] * 150, 64, id="150 classes"),
    pytest.param([20, 20, 20], 17, id="odd batch size"),
]


def labels_of(sizes: list[int]) -> npt.NDArray[np.int64]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(labels).astype(np.int64)


@pytest.mark.parametrize(("sizes", "batch_size"), CLASS_SIZES)
def test_balanced_batches_are_even_and_never_repeat_a_text(sizes: list[int], batch_size: int) -> None:
    labels = labels_of(sizes)
    batches = balanced_batches(labels, batch_size=batch_size, steps=30, seed=3)
    assert len(batches) == 30
    n_classes = min(len(sizes), batch_size // 2)
    low, high = batch_size // n_classes, -(-batch_size // n_classes)
    for batch in batches:
        assert len(batch) == len(set(batch)) <= batch_size
        counts = Counter(labels[batch].tolist())
        assert len(counts) == n_classes
        assert all(min(low, sizes[label]) <= count <= min(high, sizes[label]) for label, count in counts.items())


@pytest.mark.parametrize(("sizes", "batch_size"), CLASS_SIZES)
def test_balanced_batches_use_texts_of_a_class_equally_often(sizes: list[int], batch_size: int) -> None:
    labels = labels_of(sizes)
    n_uses = Counter(
        row for batch in balanced_batches(labels, batch_size=batch_size, steps=60, seed=0) for row in batch
    )
    for label in range(len(sizes)):
        counts = [n_uses[row] for row in np.flatnonzero(labels == label).tolist()]
        assert max(counts) - min(counts) <= 1


def test_balanced_batches_cover_all_classes() -> None:
    labels = labels_of([3] * 150)
    batches = balanced_batches(labels, batch_size=64, steps=60, seed=0)
    assert {int(label) for batch in batches for label in labels[batch]} == set(range(150))


@few_examples
@given(seeds, st.lists(st.integers(2, 12), min_size=2, max_size=12), st.integers(4, 20))
def test_balanced_batches_are_deterministic_for_a_seed(seed: int, sizes: list[int], batch_size: int) -> None:
    labels = labels_of(sizes)
    batches = balanced_batches(labels, batch_size=batch_size, steps=7, seed=seed)
    assert batches == balanced_batches(labels, batch_size=batch_size, steps=7, seed=seed)
    for batch in batches:
        assert 2 <= len(batch) == len(set(batch)) <= batch_size
        assert max(Counter(labels[batch].tolist()).values()) >= 2


def test_balanced_batches_differ_between_seeds() -> None:
    labels = labels_of([8, 8])
    first, second = (balanced_batches(labels, batch_size=8, steps=5, seed=seed) for seed in (0, 1))
    assert first != second


# All losses


POOL = gaussian(0, 12, 5).astype(np.float32)
WEIGHTS = np.random.default_rng(0).uniform(0.1, 3, 12).astype(np.float32)
PROBABILITIES = softmax(gaussian(1, 12, 3)).astype(np.float32)
GOLD = np.where(np.arange(12) % 2, np.arange(12) % 3, NO_GOLD)


def sum_of_three(body: Any, **options: Any) -> WeightedSumLoss:
    parts: list[tuple[float, BatchLoss]] = [
        (1.0, SimilarityLoss(body, POOL)),
        (0.5, SoftLabelLoss(body, PROBABILITIES, dimension=32, gold=GOLD)),
        (2.0, EmbeddingLoss(body, POOL, dimension=32)),
    ]
    return WeightedSumLoss(body, parts, **options)


# Each loss takes embeddings of dimension 32 and labels from 0 to 11.
LOSSES = [
    pytest.param(lambda body, **k: SimilarityLoss(body, POOL, **k), 1, id="similarity"),
    pytest.param(lambda body, **k: SimilarityLoss(body, POOL, weights=WEIGHTS, **k), 1, id="weighted similarity"),
    pytest.param(lambda body, **k: EmbeddingLoss(body, gaussian(0, 12, 32), dimension=32, **k), 1, id="embedding"),
    pytest.param(lambda body, **k: EmbeddingLoss(body, POOL, dimension=32, **k), 1, id="projected embedding"),
    pytest.param(
        lambda body, **k: SoftLabelLoss(body, PROBABILITIES, dimension=32, temperature=2, **k),
        1,
        id="soft labels",
    ),
    pytest.param(
        lambda body, **k: SoftLabelLoss(body, PROBABILITIES, dimension=32, gold=GOLD, **k), 1, id="soft and gold"
    ),
    pytest.param(ContrastiveLoss, 1, id="contrastive"),
    pytest.param(PairSimilarityLoss, 2, id="pairs"),
    pytest.param(sum_of_three, 1, id="weighted sum"),
]


class _DropoutBody(nn.Module):
    """Body that applies dropout to its input and writes the result into the features."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["sentence_embedding"] = self.drop(features["rows"])
        return features


class _LayerBody(nn.Module):
    """Body with a single layer that records its inputs."""

    def __init__(self, layer: nn.Module, passes: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.passes = layer, passes

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.passes.append(features["rows"])
        return {"sentence_embedding": self.layer(features["rows"])}


class _RecordingArray:
    """Array that records which rows are read."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array, self.shape = array, array.shape
        self.read_rows: set[int] = set()

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        self.read_rows |= set(rows.tolist())
        return self.array[rows]


@pytest.mark.parametrize(("make", "columns"), LOSSES)
@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_by_default(make: Any, columns: int, dropout: bool) -> None:
    torch.manual_seed(0)
    body = _DropoutBody()
    loss_fn: BatchLoss = make(body, dropout=dropout) if dropout else make(body)
    features = [{"rows": torch.tensor(gaussian(column, 6, 32)).float()} for column in range(columns)]
    losses = set()
    for _ in range(4):
        loss_fn.train()
        body.train()
        losses.add(loss_fn(features, torch.tensor([0, 1, 0, 1, 2, 2])).item())
    assert (len(losses) > 1) is dropout


@pytest.mark.parametrize(("make", "columns"), LOSSES)
def test_forward_does_not_modify_its_features(make: Any, columns: int) -> None:
    features = [{"rows": torch.tensor(gaussian(column, 6, 32)).float()} for column in range(columns)]
    make(_DropoutBody())(features, torch.tensor([0, 1, 0, 1, 2, 2]))
    assert [set(column) for column in features] == [{"rows"}] * columns


@pytest.mark.parametrize(
    ("make", "array"),
    [
        pytest.param(lambda array: SimilarityLoss(NO_BODY, array), POOL, id="similarity"),
        pytest.param(lambda array: SimilarityLoss(NO_BODY, POOL, weights=array), WEIGHTS, id="weights"),
        pytest.param(lambda array: EmbeddingLoss(NO_BODY, array, dimension=5), POOL, id="embedding"),
        pytest.param(lambda array: SoftLabelLoss(NO_BODY, array, dimension=5), PROBABILITIES, id="soft labels"),
        pytest.param(lambda array: SoftLabelLoss(NO_BODY, PROBABILITIES, dimension=5, gold=array), GOLD, id="gold"),
    ],
)
def test_only_rows_in_labels_are_read(make: Any, array: npt.NDArray[Any]) -> None:
    recording = _RecordingArray(array)
    make(recording).compute_loss([torch.tensor(gaussian(0, 4, 5)).float()], torch.tensor([7, 2, 11, 2]))
    assert recording.read_rows == {2, 7, 11}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda teacher: SimilarityLoss(NO_BODY, teacher), id="similarity"),
        pytest.param(lambda teacher: EmbeddingLoss(NO_BODY, teacher, dimension=5), id="embedding"),
    ],
)
def test_teacher_embeddings_can_be_memory_mapped_in_half_precision(make: Any, tmp_path: Path) -> None:
    on_disk: Any = np.memmap(tmp_path / "embeddings", dtype=np.float16, mode="w+", shape=POOL.shape)
    on_disk[:] = POOL
    rows, labels = torch.tensor(gaussian(1, 4, 5)).float(), torch.tensor([7, 2, 11, 0])
    loss = make(on_disk).compute_loss([rows], labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        make(POOL.astype(np.float16).astype(np.float32)).compute_loss([rows], labels).item()
    )
    assert loss.item() == pytest.approx(make(POOL).compute_loss([rows], labels).item(), rel=1e-2)


@pytest.mark.parametrize(("make", "columns"), LOSSES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_embeddings_is_float32(make: Any, columns: int, half: torch.dtype) -> None:
    torch.manual_seed(0)
    loss_fn = make(NO_BODY)
    rows = [torch.tensor(gaussian(column, 6, 32)).to(half) for column in range(columns)]
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    expected = loss_fn.compute_loss([column.float() for column in rows], labels).item()
    for module in (loss_fn, loss_fn.to(half)):
        loss = module.compute_loss(rows, labels)
        assert loss.dtype == torch.float32
    # Only the layers of the loss compute in half precision.
    tolerance = 2e-2 if list(loss_fn.parameters()) else 1e-6
    assert loss.item() == pytest.approx(expected, rel=tolerance)


@few_examples
@given(seeds, st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_weighted_sum_loss_is_the_weighted_sum_of_its_losses(seed: int, weights: list[float]) -> None:
    rows, labels = [torch.tensor(gaussian(seed, 6, 32)).float()], torch.arange(6)
    parts = [cast("BatchLoss", part) for part in sum_of_three(NO_BODY).parts]
    loss = WeightedSumLoss(NO_BODY, list(zip(weights, parts, strict=True))).compute_loss(rows, labels)
    expected = sum(weight * part.compute_loss(rows, labels).item() for weight, part in zip(weights, parts, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_weighted_sum_loss_embeds_once_and_trains_all_parameters() -> None:
    body, rows = nn.Linear(32, 32), torch.tensor(gaussian(0, 6, 32)).float()
    passes: list[Tensor] = []
    wrapped: Any = _LayerBody(body, passes)
    loss_fn = sum_of_three(wrapped)
    loss_fn([{"rows": rows}], torch.arange(6)).backward()
    assert len(passes) == 1
    parameters = list(loss_fn.parameters())
    own_names = {name.partition("parts.")[2] for name, _ in loss_fn.named_parameters() if name.startswith("parts.")}
    assert own_names == {"1.head.weight", "1.head.bias", "2.projection.weight"}
    assert len(parameters) == len({id(parameter) for parameter in parameters}) == len(own_names) + 2
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_weighted_sum_loss_ignores_the_options_of_its_losses() -> None:
    body: Any = _DropoutBody()
    loss_fn = WeightedSumLoss(body, [(1.0, SimilarityLoss(body, POOL, dropout=True))])
    features = [{"rows": torch.tensor(gaussian(0, 6, 32)).float()}]
    assert len({loss_fn(features, torch.arange(6)).item() for _ in range(3)}) == 1


@pytest.mark.parametrize("name", ["contrastive", "embedding", "pairs", "similarity", "soft_labels", "weighted_sum"])
def test_docstring_examples_run(name: str) -> None:
    results = doctest.testmod(import_module(f"setfit_kd.losses.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


# Chunks and micro-batches

LONG_AND_SHORT = [" ".join(["word"] * (1 + 7 * i % 40)) + f" number {i}" for i in range(37)]


def plain_forward(body: SentenceTransformer) -> Tensor:
    return cast("Tensor", body(body.preprocess(LONG_AND_SHORT))["sentence_embedding"])


@pytest.mark.parametrize("chunk_size", [1, 8, 16, 37, 64])
def test_chunk_size_does_not_change_embeddings_or_gradients(
    teacher_body: SentenceTransformer, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.losses.base.CPU_CHUNK", chunk_size)
    teacher_body.double().eval()
    loss_fn = PairSimilarityLoss(teacher_body)
    weights = torch.randn(len(LONG_AND_SHORT), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for embeddings in (plain_forward(teacher_body), loss_fn.embed(teacher_body.preprocess(LONG_AND_SHORT))):
        gradients = torch.autograd.grad(
            (embeddings * weights).sum(), list(teacher_body.parameters()), allow_unused=True
        )
        results.append([embeddings.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for result, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 8])
def test_left_padded_texts_are_embedded_in_chunks(
    teacher_body: SentenceTransformer, micro_batch_size: int | None
) -> None:
    teacher_body.eval()
    teacher_body.tokenizer.padding_side = "left"
    features = teacher_body.preprocess(LONG_AND_SHORT)
    assert not features["attention_mask"][:, 0].all()
    loss_fn = PairSimilarityLoss(teacher_body, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(loss_fn.embed(features), plain_forward(teacher_body))


UNEVEN = LONG_AND_SHORT[:19]
LABELS = torch.arange(19) * 7 % 12


def flat_gradient(loss: Tensor, loss_fn: nn.Module) -> Tensor:
    """Concatenate the gradients of all parameters; unused parameters have zeros."""
    parameters = list(loss_fn.parameters())
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def columns_of(body: SentenceTransformer, columns: int) -> list[dict[str, Tensor]]:
    return [body.preprocess(texts) for texts in (UNEVEN, UNEVEN[::-1])[:columns]]


weak_reference: Any = StorageWeakRef
"""Weak reference to the storage of a tensor, which autograd may keep through another tensor."""


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
        self.outputs[-1].append(weak_reference(output.untyped_storage()))
        if first:
            self.in_memory.append(self.n_in_memory())

    def n_in_memory(self) -> int:
        return sum(not all(output.expired() for output in outputs) for outputs in self.outputs)


@pytest.mark.parametrize(("make", "columns"), LOSSES)
def test_micro_batches_do_not_change_loss_or_gradient(
    teacher_body: SentenceTransformer, make: Any, columns: int
) -> None:
    torch.manual_seed(0)
    loss_fn = make(teacher_body).double().eval()
    features = columns_of(teacher_body, columns)
    expected_loss = loss_fn.compute_loss(
        [teacher_body(dict(column))["sentence_embedding"] for column in features], LABELS
    )
    expected = flat_gradient(expected_loss, loss_fn)
    for loss_fn.micro_batch_size in (1, 3, 8, None):
        loss = loss_fn(features, LABELS)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        assert relative_error(flat_gradient(loss, loss_fn), expected) < 1e-6


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize(("make", "columns"), [(PairSimilarityLoss, 2), (sum_of_three, 1)], ids=["pairs", "sum"])
def test_micro_batches_reuse_dropout_masks_in_the_backward_pass(
    teacher_body: SentenceTransformer,
    make: Any,
    columns: int,
    micro_batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss_fn = make(teacher_body, dropout=True, micro_batch_size=micro_batch_size).double()
    features = columns_of(teacher_body, columns)

    def compute_gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return flat_gradient(loss_fn(features, LABELS), loss_fn)

    result = compute_gradient(0)
    monkeypatch.setattr("setfit_kd.losses.base.checkpoint", lambda function, *inputs, **_: function(*inputs))
    expected, other_seed = compute_gradient(0), compute_gradient(1)
    assert relative_error(result, expected) < 1e-6
    assert relative_error(other_seed, expected) > 1e-2


def test_micro_batches_work_with_frozen_word_embeddings(
    teacher_body: SentenceTransformer,
) -> None:
    transformer: Any = teacher_body[0]
    table = transformer.auto_model.get_input_embeddings().requires_grad_(False).weight
    PairSimilarityLoss(teacher_body, micro_batch_size=8)(columns_of(teacher_body, 2), LABELS).backward()
    assert table.grad is None
    assert transformer.auto_model.encoder.layer[0].attention.self.query.weight.grad.any()


@pytest.mark.parametrize(("micro_batch_size", "n_passes"), [(1, 19), (8, 3), (None, 2)])
def test_micro_batches_are_embedded_once_without_gradients(
    teacher_body: SentenceTransformer, micro_batch_size: int | None, n_passes: int
) -> None:
    loss_fn = SimilarityLoss(teacher_body, POOL, micro_batch_size=micro_batch_size)
    features, passes = columns_of(teacher_body, 1), _ForwardPasses(teacher_body)
    with torch.no_grad():
        loss = loss_fn(features, LABELS)
    assert len(passes.in_memory) == n_passes
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(loss_fn(features, LABELS).item(), rel=1e-4)


@pytest.mark.parametrize(("make", "columns"), [(PairSimilarityLoss, 2), (sum_of_three, 1)], ids=["pairs", "sum"])
@pytest.mark.parametrize("dropout", [False, True])
def test_only_activations_of_one_micro_batch_are_in_memory(
    teacher_body: SentenceTransformer, make: Any, columns: int, dropout: bool
) -> None:
    loss_fn = make(teacher_body, dropout=dropout, micro_batch_size=3)
    passes = _ForwardPasses(teacher_body)
    loss = loss_fn(columns_of(teacher_body, columns), LABELS)
    assert len(passes.in_memory) == 7 * columns
    assert passes.n_in_memory() == 0
    loss.backward()
    assert len(passes.in_memory) == 2 * 7 * columns
    assert passes.n_in_memory() == 0
    assert set(passes.in_memory) == {1}


def test_without_micro_batches_all_activations_are_in_memory(teacher_body: SentenceTransformer) -> None:
    passes = _ForwardPasses(teacher_body)
    loss = SimilarityLoss(teacher_body, POOL)(columns_of(teacher_body, 1), LABELS)
    assert passes.n_in_memory() == len(passes.in_memory) == 2
    loss.backward()
    assert len(passes.in_memory) == 2
    assert passes.n_in_memory() == 0
