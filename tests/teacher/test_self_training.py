"""Refining a teacher's head on the unlabeled pool by self-training, and scoring the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import newswire
from scipy.special import softmax

from setfit_kd import train_teacher
from setfit_kd.config.stages import SignalsConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.models.encode import embed, head_proba, predict_proba
from setfit_kd.models.heads import at_temperature, balanced_weights, fit_head, head_logits
from setfit_kd.models.io import new_model
from setfit_kd.tasks.classification import SINGLE_LABEL
from setfit_kd.teacher import scoring
from setfit_kd.teacher.scoring import refine_and_score, self_train
from setfit_kd.utils import arrays

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

WIDTH = 32
POOL = [row["text"] for row in newswire("train")[:60]]


class Clusters:
    """Gaussian clusters, one per class: two labels per class, a pool and a test set."""

    def __init__(self, *, classes: int, pool: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def draw(n: int) -> tuple[Any, Any]:
            labels = np.arange(n) % classes
            return (4 * np.eye(WIDTH)[labels] + rng.normal(size=(n, WIDTH))).astype(np.float32), labels

        self.labeled, self.labels = draw(2 * classes)
        self.gold = np.eye(classes)[self.labels]
        self.pool, _ = draw(pool)
        self.test, self.test_labels = draw(600)

    def accuracy(self, head: Any) -> float:
        return float(head.score(self.test, self.test_labels))


@pytest.mark.parametrize("classes", [2, 5])
def test_self_training_improves_accuracy(classes: int) -> None:
    error_rates = np.zeros(2)
    for seed in range(5):
        clusters = Clusters(classes=classes, seed=seed)
        refined, _ = self_train(clusters.labeled, clusters.gold, clusters.pool)
        np.testing.assert_array_equal(refined.predict(clusters.labeled), clusters.labels)
        error_rates += [1 - clusters.accuracy(head) for head in (fit_head(clusters.labeled, clusters.gold), refined)]
    assert error_rates[1] < 0.85 * error_rates[0]


def test_self_training_works_with_one_text() -> None:
    clusters = Clusters(classes=3, pool=1)
    head, logits = self_train(clusters.labeled, clusters.gold, clusters.pool)
    assert logits.shape == (1, 3)
    assert np.isfinite(head.coef_).all()
    assert clusters.accuracy(head) > clusters.accuracy(fit_head(clusters.labeled, clusters.gold)) - 0.02


def test_pool_is_labeled_by_heads_that_were_fitted_on_other_texts() -> None:
    """Labels of random points are as uncertain as predictions for new ones, not memorized."""
    rng = np.random.default_rng(0)
    labeled, pool, new = (rng.normal(size=(n, 60)) for n in (20, 100, 400))
    head, logits = self_train(labeled, np.eye(2)[np.arange(20) % 2], pool, C=100.0)
    memorized, honest, unseen = (
        softmax(rows, axis=1).max(axis=1).mean() for rows in (head_logits(head, pool), logits, head_logits(head, new))
    )
    assert abs(honest - unseen) < 0.3 * (memorized - unseen)


def make_teacher(body: SentenceTransformer) -> tuple[SetFitModel, LabeledSet]:
    rows = newswire("eval")[:16]
    names = tuple(sorted({row["label"] for row in rows}))
    labeled = LabeledSet([row["text"] for row in rows], np.array([names.index(row["label"]) for row in rows]), names)
    teacher = new_model(body, names)
    teacher.normalize_embeddings = True
    teacher.model_head = fit_head(embed(body, labeled.texts, normalize=True), labeled.targets)
    return teacher, labeled


@pytest.mark.parametrize(("method", "mapped"), [("none", False), ("self-training", False), ("self-training", True)])
def test_signals_of_refined_teacher_cover_pool_and_labeled_texts(
    teacher_body: SentenceTransformer, method: str, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mapped:
        monkeypatch.setattr(arrays, "MAX_IN_MEMORY_BYTES", 100)
    teacher, labeled = make_teacher(teacher_body)
    coef = teacher.model_head.coef_.copy()
    config = SignalsConfig.of(refine=method, cache=False)
    refined, signals = refine_and_score(teacher, labeled, POOL, config=config, origin="a body")
    assert (refined is teacher) is (method == "none") is (signals.temperature == 1)
    assert refined.model_body is teacher_body
    assert refined.normalize_embeddings
    assert tuple(refined.labels or ()) == signals.label_names == labeled.label_names
    assert signals.texts == POOL + labeled.texts
    assert signals.origin == "a body"
    assert signals.embeddings is not None
    assert signals.embeddings.dtype == (np.float16 if mapped else np.float32)
    tolerance = 2e-3 if mapped else 1e-5
    expected = embed(teacher_body, signals.texts, normalize=True)
    np.testing.assert_allclose(signals.embeddings, expected, atol=tolerance)
    gold, pool = slice(len(POOL), None), slice(len(POOL))
    calibrated, predicted = (
        at_temperature(signals.probabilities, signals.temperature),
        predict_proba(refined, signals.texts),
    )
    np.testing.assert_allclose(calibrated[gold], predicted[gold], atol=10 * tolerance)
    np.testing.assert_array_equal(teacher.model_head.coef_, coef)
    if method != "none":
        options: dict[str, Any] = {"C": config.soft_labels_c}
        options["class_weights"] = balanced_weights(labeled.counts, config.balance)
        head, logits = self_train(expected[gold], labeled.targets, expected[pool], **options)
        np.testing.assert_allclose(signals.probabilities[gold], head.predict_proba(expected[gold]), atol=10 * tolerance)
        np.testing.assert_allclose(signals.probabilities[pool], softmax(logits, axis=1), atol=10 * tolerance)
        assert np.abs(signals.probabilities - head_proba(teacher, signals.embeddings)).max() > 0.01


def test_augmented_texts_are_scored_but_not_used_to_refine(
    teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, labeled = make_teacher(teacher_body)
    train = Mock(side_effect=self_train)
    monkeypatch.setattr(scoring, "self_train", train)
    refined, signals = refine_and_score(teacher, labeled, POOL[:20], augmented=POOL[20:25], cache=False)
    assert signals.texts == [*POOL[:25], *labeled.texts]
    assert len(train.call_args.args[2]) == 20
    calibrated = at_temperature(signals.probabilities[20:], signals.temperature)
    np.testing.assert_allclose(calibrated, predict_proba(refined, signals.texts[20:]), atol=1e-4)


def test_teacher_is_not_refined_on_empty_pool(teacher_body: SentenceTransformer) -> None:
    teacher, labeled = make_teacher(teacher_body)
    refined, signals = refine_and_score(teacher, labeled, [], cache=False)
    assert refined is teacher
    assert signals.texts == labeled.texts


def test_large_pool_is_sampled_by_seed_and_settings_are_used(
    teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, labeled = make_teacher(teacher_body)
    train = Mock(side_effect=self_train)
    monkeypatch.setattr(scoring, "self_train", train)
    monkeypatch.setattr(scoring, "MAX_TEXTS", 20)
    runs: list[dict[str, Any]] = [{"seed": 1}, {"seed": 1}, {"seed": 2, "head_c": 1e-3, "balance": 1}]
    for settings in runs:
        _, signals = refine_and_score(teacher, labeled, POOL, cache=False, **settings)
    index_of = {row.tobytes(): i for i, row in enumerate(np.asarray(signals.embeddings))}
    rows = [[index_of[row.tobytes()] for row in call.args[2]] for call in train.call_args_list]
    assert [len(set(sample)) for sample in rows] == [20] * 3
    assert rows[0] == rows[1] == sorted(rows[0]) != rows[2]
    assert 40 < max(rows[0]) < len(POOL)  # not only the beginning of the pool
    options: Any = dict(train.call_args.kwargs)
    np.testing.assert_array_equal(options.pop("class_weights"), balanced_weights(labeled.counts, 1))
    assert options == {"initial": None, "task": SINGLE_LABEL, "C": 1e-3, "seed": 2}


@pytest.mark.parametrize("balance", [0, 0.5])
def test_trained_head_weights_rare_classes(
    teacher_body: SentenceTransformer, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Mock(side_effect=fit_head)
    monkeypatch.setattr("setfit_kd.teacher.trainer.fit_head", fit)
    labeled = LabeledSet(POOL[:6], np.array([0, 0, 0, 0, 1, 1]), ("a", "b"))
    train_teacher(labeled, teacher_body, device="cpu", precision="fp32", teacher_steps=1, balance=balance)
    np.testing.assert_array_equal(fit.call_args.kwargs["class_weights"], balanced_weights(labeled.counts, balance))
