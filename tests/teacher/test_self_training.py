"""A teacher's head, bettered by a pool that nobody labeled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import newswire

from setfit_kd.config import SignalsConfig
from setfit_kd.data import LabeledSet
from setfit_kd.models import embed, fit_head, head_proba, new_model, predict_proba
from setfit_kd.models.temperature import at_temperature
from setfit_kd.teacher import refine_and_score
from setfit_kd.teacher.self_training import NEIGHBOURS, refine
from setfit_kd.utils import arrays

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

import setfit_kd.teacher.self_training as refining

Floats = npt.NDArray[np.float32]

METHODS = ["self-training", "label-spreading"]
SHOTS, WIDTH = 2, 32


class World:
    """Gaussian clusters, one a class: a few of them labeled, a large pool, and texts for measuring."""

    def __init__(self, body: SentenceTransformer, *, classes: int, pool: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centres = 4 * np.eye(WIDTH)[:classes]

        def draw(n: int) -> tuple[Floats, npt.NDArray[np.int64]]:
            labels = np.arange(n) % classes
            return (centres[labels] + rng.normal(size=(n, WIDTH))).astype(np.float32), labels

        self.names = tuple("abcde"[:classes])
        self.few, labels = draw(SHOTS * classes)
        self.labeled = LabeledSet([f"few {i}" for i in range(len(labels))], labels, self.names)
        self.pool, _ = draw(pool)
        self.test, self.answers = draw(600)
        self.teacher = new_model(body, self.names)
        self.teacher.model_head = fit_head(self.few, np.eye(classes)[labels])

    def refined(self, method: str, pool: npt.NDArray[np.floating] | None = None, **settings: Any) -> SetFitModel:
        pool = self.pool if pool is None else pool
        return refine(self.teacher, self.labeled, self.few, pool, method=method, **settings)

    def accuracy(self, model: SetFitModel) -> float:
        return float((head_proba(model, self.test).argmax(axis=1) == self.answers).mean())


def finite(model: SetFitModel) -> bool:
    return bool(np.isfinite(model.model_head.coef_).all() and np.isfinite(model.model_head.intercept_).all())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_makes_a_teacher_more_accurate(student_body: SentenceTransformer, method: str, classes: int) -> None:
    mistaken = np.zeros(2)
    for seed in range(5):
        world = World(student_body, classes=classes, seed=seed)
        refined = world.refined(method)
        np.testing.assert_allclose(head_proba(refined, world.test).sum(axis=1), 1, atol=1e-5)
        mistaken += 1 - world.accuracy(world.teacher), 1 - world.accuracy(refined)
    assert mistaken[1] < 0.85 * mistaken[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_refined_teacher_has_a_head_of_its_own_and_the_same_body(
    student_body: SentenceTransformer, method: str
) -> None:
    world = World(student_body, classes=3)
    world.teacher.normalize_embeddings = True
    head = world.teacher.model_head
    before = head.coef_.copy(), head.intercept_.copy()
    refined = world.refined(method)
    assert refined is not world.teacher
    assert refined.model_body is world.teacher.model_body
    assert tuple(refined.labels) == world.names
    assert refined.normalize_embeddings
    assert world.teacher.model_head is head
    np.testing.assert_array_equal(head.coef_, before[0])
    np.testing.assert_array_equal(head.intercept_, before[1])
    assert np.abs(refined.model_head.coef_ - head.coef_).max() > 1e-3


def test_none_is_the_teacher_itself(student_body: SentenceTransformer) -> None:
    world = World(student_body, classes=3)
    assert world.refined("none") is world.teacher


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_pool_has_nothing_to_say(student_body: SentenceTransformer, method: str) -> None:
    world = World(student_body, classes=3)
    assert world.refined(method, world.pool[:0]) is world.teacher


@pytest.mark.parametrize("size", [1, 2, NEIGHBOURS - 7, NEIGHBOURS])
@pytest.mark.parametrize("method", METHODS)
def test_a_small_pool_will_do(student_body: SentenceTransformer, method: str, size: int) -> None:
    world = World(student_body, classes=3, pool=size)
    refined = world.refined(method)
    assert finite(refined)
    np.testing.assert_allclose(head_proba(refined, world.test).sum(axis=1), 1, atol=1e-5)
    if method == "self-training":  # of nearest neighbours, small pools have too few that are near
        assert world.accuracy(refined) > world.accuracy(world.teacher) - 0.02


@pytest.mark.parametrize("method", METHODS)
def test_gold_labels_hold_against_the_pool(student_body: SentenceTransformer, method: str) -> None:
    world = World(student_body, classes=5)
    said = head_proba(world.refined(method), world.few).argmax(axis=1)
    np.testing.assert_array_equal(said, world.labeled.labels)


@pytest.mark.parametrize("method", METHODS)
def test_the_strength_of_the_head_is_passed_on(student_body: SentenceTransformer, method: str) -> None:
    world = World(student_body, classes=3)
    lengths = [np.abs(world.refined(method, head_c=c).model_head.coef_).sum() for c in (1e-3, 10.0)]
    assert lengths[0] < lengths[1] / 5


@pytest.mark.parametrize("method", METHODS)
def test_of_a_pool_too_large_a_part_is_drawn_by_the_seed(
    student_body: SentenceTransformer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(student_body, classes=3)
    seen: list[Floats] = []
    fit = fit_head

    def record(rows: Floats, *arguments: Any, **settings: Any) -> Any:
        seen.append(rows[len(world.few) :])
        return fit(rows, *arguments, **settings)

    monkeypatch.setattr(refining, "MOST_TEXTS", 50)
    monkeypatch.setattr(refining, "fit_head", record)
    drawn = []
    for seed in (1, 1, 2):
        world.refined(method, seed=seed)
        drawn.append(seen[-1])
    number = {row.tobytes(): i for i, row in enumerate(world.pool)}
    rows = [[number[row.tobytes()] for row in draw] for draw in drawn]
    assert all(len(set(part)) == 50 for part in rows)
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == sorted(rows[0])
    assert max(rows[0]) > 300  # not the beginning of the pool


@pytest.mark.parametrize("method", METHODS)
def test_of_a_pool_that_is_not_too_large_the_seed_draws_nothing(
    student_body: SentenceTransformer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(student_body, classes=3)
    monkeypatch.setattr(refining, "MOST_TEXTS", len(world.pool))
    one, other = (world.refined(method, seed=seed).model_head.coef_ for seed in (1, 2))
    np.testing.assert_array_equal(one, other)


def test_texts_that_no_label_reaches_count_for_nothing(student_body: SentenceTransformer) -> None:
    world = World(student_body, classes=3)
    # So many, so near each other and so far from all labels that none of their neighbours has one.
    island = (np.random.default_rng(0).normal(size=(3 * NEIGHBOURS, WIDTH)) - 500).astype(np.float32)
    alone, beside = world.refined("label-spreading"), world.refined("label-spreading", np.vstack([world.pool, island]))
    assert finite(beside)
    np.testing.assert_allclose(head_proba(beside, world.test), head_proba(alone, world.test), atol=0.02)
    nowhere = world.refined("label-spreading", island)
    assert finite(nowhere)
    assert world.accuracy(nowhere) == pytest.approx(world.accuracy(world.teacher), abs=0.02)


@pytest.mark.parametrize("said", [np.zeros((4, 3)), np.full((4, 3), 1e-300), np.eye(4, 3)])
def test_labels_that_vanish_leave_everything_finite(student_body: SentenceTransformer, said: Floats) -> None:
    world = World(student_body, classes=3, pool=4)
    gold = np.eye(3)[world.labeled.labels]
    head = refining._fit(gold, world.few, said, world.pool, refining._Head(10.0, balance=False))
    assert np.isfinite(head.coef_).all()
    assert np.isfinite(head.intercept_).all()
    without = fit_head(world.few, gold, np.full(len(gold), refining.GOLD_WEIGHT))
    assert np.allclose(head.coef_, without.coef_, atol=1e-3) is bool(said.max() < 1)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_may_stay_in_half_precision_on_disk(
    student_body: SentenceTransformer, method: str, tmp_path: Path
) -> None:
    world = World(student_body, classes=3)
    halves = [world.pool.astype(np.float16), world.few.astype(np.float16)]
    mapped = []
    for i, rows in enumerate(halves):
        np.save(tmp_path / f"{i}.npy", rows)
        mapped.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    of_disk = refine(world.teacher, world.labeled, mapped[1], mapped[0], method=method)
    of_memory = refine(
        world.teacher, world.labeled, halves[1].astype(np.float32), halves[0].astype(np.float32), method=method
    )
    np.testing.assert_allclose(of_disk.model_head.coef_, of_memory.model_head.coef_, atol=1e-4)


# With a real body


POOL = [row["text"] for row in newswire("train")[:60]]


def teacher_of(body: SentenceTransformer) -> tuple[SetFitModel, LabeledSet]:
    rows = newswire("eval")[:16]
    names = tuple(sorted({row["label"] for row in rows}))
    labels = np.array([names.index(row["label"]) for row in rows])
    labeled = LabeledSet([row["text"] for row in rows], labels, names)
    teacher = new_model(body, names)
    teacher.model_head = fit_head(embed(body, labeled.texts), np.eye(len(names))[labels])
    return teacher, labeled


@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("large", [False, True], ids=["in memory", "mapped"])
def test_signals_are_the_refined_teachers_on_the_pool_and_then_the_labeled_texts(
    teacher_body: SentenceTransformer, method: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(arrays, "MAPPED_BYTES", 100)
    teacher, labeled = teacher_of(teacher_body)
    config = SignalsConfig.of(refine=method, cache=False)
    refined, signals = refine_and_score(teacher, labeled, POOL, config=config, origin="a body")
    assert (refined is teacher) is (method == "none")
    assert signals.texts == POOL + labeled.texts
    assert signals.label_names == labeled.label_names
    assert signals.origin == "a body"
    assert signals.embeddings is not None
    assert signals.embeddings.dtype == (np.float16 if large else np.float32)
    tolerance = 2e-3 if large else 1e-5
    np.testing.assert_allclose(signals.embeddings, embed(teacher_body, signals.texts), atol=tolerance)
    meant = at_temperature(signals.probabilities, signals.temperature)
    np.testing.assert_allclose(meant, head_proba(refined, signals.embeddings), atol=1e-5)
    np.testing.assert_allclose(meant, predict_proba(refined, signals.texts), atol=10 * tolerance)
    assert (signals.temperature == 1) is (method == "none")
    if method != "none":
        assert np.abs(signals.probabilities - head_proba(teacher, signals.embeddings)).max() > 0.01
        gold, pool = embed(teacher_body, labeled.texts), embed(teacher_body, POOL)
        expected = refine(teacher, labeled, np.asarray(gold), np.asarray(pool), method=method)
        np.testing.assert_allclose(signals.probabilities, head_proba(expected, signals.embeddings), atol=0.02)


def test_a_run_passes_its_seed_and_strength_on(
    teacher_body: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, labeled = teacher_of(teacher_body)
    monkeypatch.setattr(refining, "MOST_TEXTS", 20)
    heads = [
        refine_and_score(teacher, labeled, POOL, cache=False, **settings)[0].model_head
        for settings in ({"seed": 1}, {"seed": 2}, {"seed": 1, "head_c": 1e-3})
    ]
    assert not np.allclose(heads[0].coef_, heads[1].coef_)
    assert np.abs(heads[2].coef_).sum() < np.abs(heads[0].coef_).sum() / 5
