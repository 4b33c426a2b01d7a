"""The losses against plain loops, and the samplers against what they promise."""

from __future__ import annotations

import doctest
from collections import Counter
from importlib import import_module
from itertools import permutations
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from setfit_kd.objectives import (
    ContrastiveObjective,
    Objective,
    PairsObjective,
    SimilarityObjective,
    balanced_batches,
    draw_pairs,
)
from setfit_kd.objectives.base import cosine_matrix

Floats = npt.NDArray[np.float64]
NO_BODY: Any = nn.Identity()

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
batch_sizes = st.integers(2, 9)
dimensions = st.integers(2, 6)


def gaussian(seed: int, rows: int, columns: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def similarity(teacher: Floats) -> SimilarityObjective:
    return SimilarityObjective(NO_BODY, teacher.astype(np.float32))


def contrastive_loss(rows: Tensor, labels: Tensor) -> Tensor:
    return ContrastiveObjective(NO_BODY).loss([rows], labels)


def gradient(loss: Tensor, rows: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss, rows)
    return slope


# Similarity


@few
@given(seeds, batch_sizes, dimensions, dimensions)
def test_similarity_is_the_mean_over_ordered_pairs_of_different_texts(seed: int, n: int, d: int, e: int) -> None:
    student, teacher = gaussian(seed, n, d), gaussian(seed + 1, n, e)
    expected = np.mean(
        [
            (cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])) ** 2
            for i in range(n)
            for j in range(n)
            if i != j
        ]
    )
    loss = similarity(teacher).loss([torch.tensor(student)], torch.arange(n))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@few
@given(seeds, batch_sizes, dimensions, st.integers(0, 4))
def test_similarity_is_zero_for_the_same_angles_in_another_basis_length_and_dimension(
    seed: int, n: int, d: int, extra: int
) -> None:
    teacher = gaussian(seed, n, d)
    basis, _ = np.linalg.qr(gaussian(seed + 1, d + extra, d))
    lengths = np.random.default_rng(seed + 2).uniform(0.1, 10, size=(n, 1))
    student = lengths * (teacher @ basis.T)
    assert similarity(teacher).loss([torch.tensor(student)], torch.arange(n)).item() < 1e-9


@few
@given(seeds, batch_sizes, dimensions)
def test_similarity_is_positive_once_one_angle_differs(seed: int, n: int, d: int) -> None:
    teacher = gaussian(seed, n, d)
    student = teacher.copy()
    student[0] = -student[0]
    gap = max(abs(cosine(teacher[0], teacher[j])) for j in range(1, n))
    loss = similarity(teacher).loss([torch.tensor(student)], torch.arange(n)).item()
    assert loss >= 0.9 * 2 * (2 * gap) ** 2 / (n * (n - 1))


@few
@given(seeds, batch_sizes, dimensions)
def test_similarity_does_not_depend_on_the_order_of_the_batch(seed: int, n: int, d: int) -> None:
    teacher, student = gaussian(seed, n + 3, d), torch.tensor(gaussian(seed + 1, n, d))
    rng = np.random.default_rng(seed)
    labels, turn = torch.tensor(rng.permutation(n + 3)[:n]), torch.tensor(rng.permutation(n))
    objective = similarity(teacher)
    there, back = objective.loss([student], labels), objective.loss([student[turn]], labels[turn])
    assert there.item() == pytest.approx(back.item(), rel=1e-4, abs=1e-7)


def test_similarity_targets_are_the_cosines_of_the_rows_that_the_labels_name() -> None:
    teacher = gaussian(0, 10, 4)
    labels = [7, 2, 2, 9]
    targets = similarity(teacher).targets(torch.tensor(labels))
    expected = [[cosine(teacher[i], teacher[j]) for j in labels] for i in labels]
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)


@few
@given(seeds, batch_sizes, dimensions)
def test_no_gradient_comes_from_the_diagonal(seed: int, n: int, d: int) -> None:
    teacher = gaussian(seed, n, d)
    rows = torch.tensor(gaussian(seed + 1, n, d + 1), requires_grad=True)
    ours = gradient(similarity(teacher).loss([rows], torch.arange(n)), rows)

    free = rows.detach().clone().requires_grad_()
    unit = free / free.norm(dim=1, keepdim=True)
    target = torch.tensor([[cosine(teacher[i], teacher[j]) for j in range(n)] for i in range(n)])
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    total = sum(((unit[i] @ unit[j] - target[i, j]) ** 2 for i, j in pairs), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(ours, gradient(total / len(pairs), free), rtol=1e-3, atol=1e-5)


def test_the_diagonal_of_the_cosines_has_no_gradient() -> None:
    rows = torch.tensor(gaussian(0, 5, 3), requires_grad=True)
    assert gradient(cosine_matrix(rows).diagonal().sum(), rows).abs().max().item() < 1e-12


def test_similarity_of_an_exact_copy_has_neither_loss_nor_gradient() -> None:
    teacher = gaussian(0, 6, 3)
    rows = torch.tensor(teacher, requires_grad=True)
    loss = similarity(teacher).loss([rows], torch.arange(6))
    assert loss.item() < 1e-12
    assert gradient(loss, rows).abs().max().item() < 1e-6


def test_an_embedding_of_zeros_gives_a_finite_loss_and_gradient() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, -1.0]], requires_grad=True)
    loss = similarity(gaussian(0, 3, 2)).loss([rows], torch.arange(3))
    assert loss.isfinite()
    assert gradient(loss, rows).isfinite().all()


# Contrast


@few
@given(seeds, batch_sizes, dimensions, st.integers(1, 4))
def test_contrast_is_the_mean_within_plus_the_mean_across(seed: int, n: int, d: int, classes: int) -> None:
    rows = gaussian(seed, n, d)
    labels = np.random.default_rng(seed).integers(classes, size=n)
    within, across = [], []
    for i in range(n):
        for j in range(i):
            if labels[i] == labels[j]:
                within.append((1 - cosine(rows[i], rows[j])) ** 2)
            else:
                across.append(cosine(rows[i], rows[j]) ** 2)
    expected = sum(float(np.mean(part)) for part in (within, across) if part)
    assert contrastive_loss(torch.tensor(rows), torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-12)


@few
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_class_sizes_do_not_weigh(sizes: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    collapsed = torch.ones(len(labels), 3, dtype=torch.float64)
    apart = torch.eye(len(labels), dtype=torch.float64)
    ideal = torch.eye(len(sizes), dtype=torch.float64)[labels]
    assert contrastive_loss(collapsed, labels).item() == pytest.approx(1)
    assert contrastive_loss(apart, labels).item() == pytest.approx(float(max(sizes) > 1))
    assert contrastive_loss(ideal, labels).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([0, 0, 0], 0.0, id="one class only"),
        pytest.param([0, 1, 2], 1.0, id="all different"),
        pytest.param([0], 0.0, id="a single text"),
    ],
)
def test_batches_without_one_kind_of_pair_have_a_finite_loss_and_gradient(labels: list[int], expected: float) -> None:
    rows = torch.ones(len(labels), 2, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(rows, torch.tensor(labels))
    assert loss.item() == pytest.approx(expected)
    assert gradient(loss, rows).isfinite().all()


def test_a_step_down_the_contrast_draws_classes_together_and_apart() -> None:
    rows = torch.tensor(gaussian(0, 8, 4), requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    before = contrastive_loss(rows, labels)
    after = contrastive_loss((rows - 0.1 * gradient(before, rows)).detach(), labels)
    assert after.item() < before.item()


# Pairs


@few
@given(seeds, batch_sizes, dimensions)
def test_pairs_loss_is_the_mean_squared_difference(seed: int, n: int, d: int) -> None:
    left, right = gaussian(seed, n, d), gaussian(seed + 1, n, d)
    targets = np.random.default_rng(seed).uniform(-1, 1, size=n)
    expected = np.mean([(cosine(left[i], right[i]) - targets[i]) ** 2 for i in range(n)])
    loss = PairsObjective(NO_BODY).loss([torch.tensor(left), torch.tensor(right)], torch.tensor(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@few
@given(seeds, st.integers(2, 30), dimensions, st.integers(1, 5))
def test_drawn_pairs_are_of_different_texts_with_their_cosines(seed: int, n: int, d: int, each: int) -> None:
    embeddings = gaussian(seed, n, d).astype(np.float32)
    left, right, cosines = draw_pairs(embeddings, pairs_per_text=each, seed=seed)
    assert Counter(left.tolist()) == dict.fromkeys(range(n), each)
    assert (left != right).all()
    assert set(right.tolist()) <= set(range(n))
    wide = embeddings.astype(np.float64)
    expected = [cosine(wide[i], wide[j]) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    assert np.abs(cosines).max() <= 1


def test_two_texts_pair_with_each_other() -> None:
    left, right, _ = draw_pairs(np.eye(2, dtype=np.float32), pairs_per_text=2, seed=0)
    assert left.tolist() == [0, 0, 1, 1]
    assert right.tolist() == [1, 1, 0, 0]


def test_every_other_text_can_be_the_partner() -> None:
    left, right, _ = draw_pairs(np.eye(5, dtype=np.float32), pairs_per_text=200, seed=0)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == set(permutations(range(5), 2))


def test_pairs_follow_the_seed() -> None:
    embeddings = gaussian(0, 20, 3).astype(np.float32)
    first, again, other = (draw_pairs(embeddings, pairs_per_text=3, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


# Balanced batches

CLASS_SIZES = [
    pytest.param([8, 8, 8, 8], 16, id="even"),
    pytest.param([30, 2, 7], 16, id="uneven"),
    pytest.param([5, 5, 5], 64, id="fewer texts than a batch"),
    pytest.param([2, 2], 4, id="smallest"),
    pytest.param([3] * 150, 64, id="150 classes by twos"),
    pytest.param([20, 20, 20], 17, id="an odd batch"),
]


def labels_of(sizes: list[int]) -> npt.NDArray[np.int64]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(labels).astype(np.int64)


@pytest.mark.parametrize(("sizes", "batch_size"), CLASS_SIZES)
def test_batches_are_even_and_never_repeat_a_text(sizes: list[int], batch_size: int) -> None:
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
def test_the_texts_of_a_class_come_equally_often(sizes: list[int], batch_size: int) -> None:
    labels = labels_of(sizes)
    drawn = Counter(row for batch in balanced_batches(labels, batch_size=batch_size, steps=60, seed=0) for row in batch)
    for label in range(len(sizes)):
        counts = [drawn[row] for row in np.flatnonzero(labels == label).tolist()]
        assert max(counts) - min(counts) <= 1


def test_all_of_many_classes_get_their_turn() -> None:
    labels = labels_of([3] * 150)
    batches = balanced_batches(labels, batch_size=64, steps=60, seed=0)
    assert {int(label) for batch in batches for label in labels[batch]} == set(range(150))


@few
@given(seeds, st.lists(st.integers(2, 12), min_size=2, max_size=12), st.integers(4, 20))
def test_batches_hold_for_any_sizes(seed: int, sizes: list[int], batch_size: int) -> None:
    labels = labels_of(sizes)
    batches = balanced_batches(labels, batch_size=batch_size, steps=7, seed=seed)
    assert batches == balanced_batches(labels, batch_size=batch_size, steps=7, seed=seed)
    for batch in batches:
        assert 2 <= len(batch) == len(set(batch)) <= batch_size
        assert max(Counter(labels[batch].tolist()).values()) >= 2


def test_another_seed_gives_other_batches() -> None:
    labels = labels_of([8, 8])
    first, other = (balanced_batches(labels, batch_size=8, steps=5, seed=seed) for seed in (0, 1))
    assert first != other


# Dropout, and what the docstrings show


class _Dropping(nn.Module):
    """Stands for a body: drops half of its input and gives the rest back."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.drop(features["rows"])}


OBJECTIVES = [
    pytest.param(lambda body, **k: SimilarityObjective(body, np.eye(6, dtype=np.float32), **k), 1, id="similarity"),
    pytest.param(ContrastiveObjective, 1, id="contrastive"),
    pytest.param(PairsObjective, 2, id="pairs"),
]


@pytest.mark.parametrize(("make", "columns"), OBJECTIVES)
@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_on_only_when_asked_for(make: Any, columns: int, dropout: bool) -> None:
    torch.manual_seed(0)
    body = _Dropping()
    objective: Objective = make(body, dropout=dropout) if dropout else make(body)
    features = [{"rows": torch.tensor(gaussian(column, 6, 32)).float()} for column in range(columns)]
    losses = set()
    for _ in range(4):
        objective.train()
        body.train()
        losses.add(objective(features, torch.tensor([0, 1, 0, 1, 2, 2])).item())
    assert (len(losses) > 1) is dropout


@pytest.mark.parametrize(("make", "columns"), OBJECTIVES)
def test_forward_keeps_the_features_it_was_given(make: Any, columns: int) -> None:
    features = [{"rows": torch.tensor(gaussian(column, 6, 8)).float()} for column in range(columns)]
    make(_Dropping())(features, torch.tensor([0, 1, 0, 1, 2, 2]))
    assert [set(column) for column in features] == [{"rows"}] * columns


@pytest.mark.parametrize("name", ["contrastive", "pairs", "similarity"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    results = doctest.testmod(import_module(f"setfit_kd.objectives.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


LONG_AND_SHORT = [" ".join(["word"] * (1 + 7 * i % 40)) + f" number {i}" for i in range(37)]


def plain_forward(body: SentenceTransformer) -> Tensor:
    return cast("Tensor", body(body.preprocess(LONG_AND_SHORT))["sentence_embedding"])


@pytest.mark.parametrize("part", [1, 8, 16, 37, 64])
def test_embedding_by_parts_changes_neither_embeddings_nor_gradients(
    teacher_body: SentenceTransformer, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.objectives.base.CPU_PART", part)
    teacher_body.double().eval()
    objective = PairsObjective(teacher_body)
    weights = torch.randn(len(LONG_AND_SHORT), 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes = []
    for embeddings in (plain_forward(teacher_body), objective.embed(teacher_body.preprocess(LONG_AND_SHORT))):
        gradients = torch.autograd.grad(
            (embeddings * weights).sum(), list(teacher_body.parameters()), allow_unused=True
        )
        outcomes.append([embeddings.detach(), *(gradient for gradient in gradients if gradient is not None)])
    for ours, plain in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-8)


def test_embedding_by_parts_leaves_left_padding_alone(teacher_body: SentenceTransformer) -> None:
    teacher_body.eval()
    teacher_body.tokenizer.padding_side = "left"
    features = teacher_body.preprocess(LONG_AND_SHORT)
    assert not features["attention_mask"][:, 0].all()
    torch.testing.assert_close(PairsObjective(teacher_body).embed(features), plain_forward(teacher_body))
