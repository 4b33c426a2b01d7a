"""Refining a teacher's head on the unlabeled pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import newswire

from setfit_kd.config.stages import SignalsConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.models.encode import embed, head_proba, predict_proba
from setfit_kd.models.heads import fit_head
from setfit_kd.models.io import new_model
from setfit_kd.models.temperature import at_temperature
from setfit_kd.teacher import self_training
from setfit_kd.teacher.scoring import refine_and_score
from setfit_kd.teacher.self_training import MAX_NEIGHBORS, refine
from setfit_kd.utils import arrays

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

Floats = npt.NDArray[np.float32]

METHODS = ["self-training", "label-spreading"]
SHOTS, WIDTH = 2, 32


class Clusters:
    """Gaussian clusters, one per class: labeled embeddings, a large pool and a test set."""

    def __init__(self, body: SentenceTransformer, *, classes: int, pool: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centers = 4 * np.eye(WIDTH)[:classes]

        def draw(n: int) -> tuple[Floats, npt.NDArray[np.int64]]:
            labels = np.arange(n) % classes
            return (centers[labels] + rng.normal(size=(n, WIDTH))).astype(np.float32), labels

        self.names = tuple("abcde"[:classes])
        self.labeled_embeddings, labels = draw(SHOTS * classes)
        self.labeled = LabeledSet([f"labeled {i}" for i in range(len(labels))], labels, self.names)
        self.pool, _ = draw(pool)
        self.test, self.test_labels = draw(600)
        self.teacher = new_model(body, self.names)
        self.teacher.model_head = fit_head(self.labeled_embeddings, np.eye(classes)[labels])

    def refine(self, method: str, pool: npt.NDArray[np.floating] | None = None, **settings: Any) -> SetFitModel:
        pool = self.pool if pool is None else pool
        return refine(self.teacher, self.labeled, self.labeled_embeddings, pool, method=method, **settings)

    def accuracy(self, model: SetFitModel) -> float:
        return float((head_proba(model, self.test).argmax(axis=1) == self.test_labels).mean())


def is_finite(model: SetFitModel) -> bool:
    return bool(np.isfinite(model.model_head.coef_).all() and np.isfinite(model.model_head.intercept_).all())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_refining_improves_accuracy(student_body: SentenceTransformer, method: str, classes: int) -> None:
    error_rates = np.zeros(2)
    for seed in range(5):
        clusters = Clusters(student_body, classes=classes, seed=seed)
        refined = clusters.refine(method)
        np.testing.assert_allclose(head_proba(refined, clusters.test).sum(axis=1), 1, atol=1e-5)
        error_rates += 1 - clusters.accuracy(clusters.teacher), 1 - clusters.accuracy(refined)
    assert error_rates[1] < 0.85 * error_rates[0]


@pytest.mark.parametrize("method", METHODS)
def test_refined_teacher_has_new_head_and_same_body(student_body: SentenceTransformer, method: str) -> None:
    clusters = Clusters(student_body, classes=3)
    clusters.teacher.normalize_embeddings = True
    head = clusters.teacher.model_head
    before = head.coef_.copy(), head.intercept_.copy()
    refined = clusters.refine(method)
    assert refined is not clusters.teacher
    assert refined.model_body is clusters.teacher.model_body
    assert tuple(refined.labels) == clusters.names
    assert refined.normalize_embeddings
    assert clusters.teacher.model_head is head
    np.testing.assert_array_equal(head.coef_, before[0])
    np.testing.assert_array_equal(head.intercept_, before[1])
    assert np.abs(refined.model_head.coef_ - head.coef_).max() > 1e-3


def test_method_none_returns_the_teacher(student_body: SentenceTransformer) -> None:
    clusters = Clusters(student_body, classes=3)
    assert clusters.refine("none") is clusters.teacher


@pytest.mark.parametrize("method", METHODS)
def test_empty_pool_returns_the_teacher(student_body: SentenceTransformer, method: str) -> None:
    clusters = Clusters(student_body, classes=3)
    assert clusters.refine(method, clusters.pool[:0]) is clusters.teacher


@pytest.mark.parametrize("size", [1, 2, MAX_NEIGHBORS - 7, MAX_NEIGHBORS])
@pytest.mark.parametrize("method", METHODS)
def test_refining_works_with_small_pool(student_body: SentenceTransformer, method: str, size: int) -> None:
    clusters = Clusters(student_body, classes=3, pool=size)
    refined = clusters.refine(method)
    assert is_finite(refined)
    np.testing.assert_allclose(head_proba(refined, clusters.test).sum(axis=1), 1, atol=1e-5)
    if method == "self-training":  # label spreading needs more neighbors
        assert clusters.accuracy(refined) > clusters.accuracy(clusters.teacher) - 0.02


@pytest.mark.parametrize("method", METHODS)
def test_refined_head_predicts_gold_labels(student_body: SentenceTransformer, method: str) -> None:
    clusters = Clusters(student_body, classes=5)
    predicted = head_proba(clusters.refine(method), clusters.labeled_embeddings).argmax(axis=1)
    np.testing.assert_array_equal(predicted, clusters.labeled.labels)


@pytest.mark.parametrize("method", METHODS)
def test_head_c_is_used(student_body: SentenceTransformer, method: str) -> None:
    clusters = Clusters(student_body, classes=3)
    norms = [np.abs(clusters.refine(method, head_c=c).model_head.coef_).sum() for c in (1e-3, 10.0)]
    assert norms[0] < norms[1] / 5


@pytest.mark.parametrize("method", METHODS)
def test_large_pool_is_sampled_by_seed(
    student_body: SentenceTransformer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = Clusters(student_body, classes=3)
    pool_rows: list[Floats] = []
    original_fit_head = fit_head

    def record(rows: Floats, *arguments: Any, **settings: Any) -> Any:
        pool_rows.append(rows[len(clusters.labeled_embeddings) :])
        return original_fit_head(rows, *arguments, **settings)

    monkeypatch.setattr(self_training, "MAX_TEXTS", 50)
    monkeypatch.setattr(self_training, "fit_head", record)
    samples = []
    for seed in (1, 1, 2):
        clusters.refine(method, seed=seed)
        samples.append(pool_rows[-1])
    index_of = {row.tobytes(): i for i, row in enumerate(clusters.pool)}
    rows = [[index_of[row.tobytes()] for row in sample] for sample in samples]
    assert all(len(set(sample)) == 50 for sample in rows)
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == sorted(rows[0])
    assert max(rows[0]) > 300  # not only the beginning of the pool


@pytest.mark.parametrize("method", METHODS)
def test_small_pool_does_not_depend_on_seed(
    student_body: SentenceTransformer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = Clusters(student_body, classes=3)
    monkeypatch.setattr(self_training, "MAX_TEXTS", len(clusters.pool))
    first, second = (clusters.refine(method, seed=seed).model_head.coef_ for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_texts_that_no_label_spreads_to_have_no_weight(student_body: SentenceTransformer) -> None:
    clusters = Clusters(student_body, classes=3)
    # A distant cluster with more texts than neighbors, so that none of their neighbors is labeled.
    island = (np.random.default_rng(0).normal(size=(3 * MAX_NEIGHBORS, WIDTH)) - 500).astype(np.float32)
    expected = clusters.refine("label-spreading")
    refined = clusters.refine("label-spreading", np.vstack([clusters.pool, island]))
    assert is_finite(refined)
    np.testing.assert_allclose(head_proba(refined, clusters.test), head_proba(expected, clusters.test), atol=0.02)
    island_only = clusters.refine("label-spreading", island)
    assert is_finite(island_only)
    assert clusters.accuracy(island_only) == pytest.approx(clusters.accuracy(clusters.teacher), abs=0.02)


@pytest.mark.parametrize("probabilities", [np.zeros((4, 3)), np.full((4, 3), 1e-300), np.eye(4, 3)])
def test_zero_probabilities_give_finite_head(student_body: SentenceTransformer, probabilities: Floats) -> None:
    clusters = Clusters(student_body, classes=3, pool=4)
    gold = np.eye(3)[clusters.labeled.labels]
    options = self_training._HeadOptions(10.0, balance=False)
    head = self_training._fit(gold, clusters.labeled_embeddings, probabilities, clusters.pool, options)
    assert np.isfinite(head.coef_).all()
    assert np.isfinite(head.intercept_).all()
    gold_only = fit_head(clusters.labeled_embeddings, gold, np.full(len(gold), self_training.GOLD_WEIGHT))
    assert np.allclose(head.coef_, gold_only.coef_, atol=1e-3) is bool(probabilities.max() < 1)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_can_be_memory_mapped_in_half_precision(
    student_body: SentenceTransformer, method: str, tmp_path: Path
) -> None:
    clusters = Clusters(student_body, classes=3)
    half_precision = [clusters.pool.astype(np.float16), clusters.labeled_embeddings.astype(np.float16)]
    mapped = []
    for i, rows in enumerate(half_precision):
        np.save(tmp_path / f"{i}.npy", rows)
        mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    from_disk = refine(clusters.teacher, clusters.labeled, mapped[1], mapped[0], method=method)
    pool, labeled = (rows.astype(np.float32) for rows in half_precision)
    from_memory = refine(clusters.teacher, clusters.labeled, labeled, pool, method=method)
    np.testing.assert_allclose(from_disk.model_head.coef_, from_memory.model_head.coef_, atol=1e-4)


# With a transformer body


POOL = [row["text"] for row in newswire("train")[:60]]


def make_teacher(body: SentenceTransformer) -> tuple[SetFitModel, LabeledSet]:
    rows = newswire("eval")[:16]
    names = tuple(sorted({row["label"] for row in rows}))
    labels = np.array([names.index(row["label"]) for row in rows])
    labeled = LabeledSet([row["text"] for row in rows], labels, names)
    teacher = new_model(body, names)
    teacher.model_head = fit_head(embed(body, labeled.texts), np.eye(len(names))[labels])
    return teacher, labeled


@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "mapped"])
def test_signals_of_refined_teacher_cover_pool_and_labeled_texts(
    teacher_body: SentenceTransformer, method: str, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mapped:
        monkeypatch.setattr(arrays, "MAX_IN_MEMORY_BYTES", 100)
    teacher, labeled = make_teacher(teacher_body)
    config = SignalsConfig.of(refine=method, cache=False)
    refined, signals = refine_and_score(teacher, labeled, POOL, config=config, origin="a body")
    assert (refined is teacher) is (method == "none")
    assert signals.texts == POOL + labeled.texts
    assert signals.label_names == labeled.label_names
    assert signals.origin == "a body"
    assert signals.embeddings is not None
    assert signals.embeddings.dtype == (np.float16 if mapped else np.float32)
    tolerance = 2e-3 if mapped else 1e-5
    np.testing.assert_allclose(signals.embeddings, embed(teacher_body, signals.texts), atol=tolerance)
    calibrated = at_temperature(signals.probabilities, signals.temperature)
    np.testing.assert_allclose(calibrated, head_proba(refined, signals.embeddings), atol=1e-5)
    np.testing.assert_allclose(calibrated, predict_proba(refined, signals.texts), atol=10 * tolerance)
    assert (signals.temperature == 1) is (method == "none")
    if method != "none":
        assert np.abs(signals.probabilities - head_proba(teacher, signals.embeddings)).max() > 0.01
        gold, pool = embed(teacher_body, labeled.texts), embed(teacher_body, POOL)
        expected = refine(teacher, labeled, np.asarray(gold), np.asarray(pool), method=method)
        np.testing.assert_allclose(signals.probabilities, head_proba(expected, signals.embeddings), atol=0.02)


def test_seed_and_head_c_are_passed_to_refine(
    teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, labeled = make_teacher(teacher_body)
    monkeypatch.setattr(self_training, "MAX_TEXTS", 20)
    heads = [
        refine_and_score(teacher, labeled, POOL, cache=False, **settings)[0].model_head
        for settings in ({"seed": 1}, {"seed": 2}, {"seed": 1, "head_c": 1e-3})
    ]
    assert not np.allclose(heads[0].coef_, heads[1].coef_)
    assert np.abs(heads[2].coef_).sum() < np.abs(heads[0].coef_).sum() / 5
