"""Tests of runs with augmented texts: which are created, which are kept, and which are created again on resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import FAST, Run, newswire

from setfit_kd import RunConfig, RunResult, TeacherSignals, distill
from setfit_kd.augment.edits import augment, drop_uncertain
from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.data.splits import normalize
from setfit_kd.errors import ConfigError, ModelError
from setfit_kd.models.heads import at_temperature
from setfit_kd.run.inputs import load_run_data
from setfit_kd.run.stage_cache import StageCache
from setfit_kd.run.stages import Stages

N_AUGMENTED = 40
TRAIN = newswire("train")
LABELED, POOL = TRAIN[:24], [row["text"] for row in TRAIN[24:54]]


def augment_unrestricted() -> list[str]:
    """Augment the data of the runs without forbidden texts."""
    return augment([*POOL, *(row["text"] for row in LABELED)], N_AUGMENTED, seed=0)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> dict[str, Any]:
    """Settings of a run whose evaluation set contains texts that would otherwise be created."""
    folder = tmp_path_factory.mktemp("data")
    leaked = [{"text": f" {text.upper()}", "label": "World"} for text in augment_unrestricted()[::4]]
    return {
        **FAST,
        "labeled": write(folder / "labeled.jsonl", LABELED),
        "unlabeled": write(folder / "pool.jsonl", [{"text": text} for text in POOL]),
        "eval": write(folder / "eval.jsonl", [*newswire("eval")[:10], *leaked]),
        "teacher": str(tiny_teacher),
        "student": "static:4",
        "shots": None,
        "batch_size": 16,
        "baseline": False,
        "cache": False,
        "augment": N_AUGMENTED,
        "augment_confidence": 0.0,
    }


def read_augmented(folder: Path) -> list[str]:
    lines = (folder / "augmented" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class AugmentedRun(NamedTuple):
    """A run with an augmented pool that kept every text, and the teacher's confidence in each of them."""

    folder: Path
    result: RunResult
    texts: list[str]
    confidence: npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def augmented(run: Run, tmp_path_factory: pytest.TempPathFactory) -> AugmentedRun:
    folder = tmp_path_factory.mktemp("runs") / "augmented"
    result = run(output_dir=folder)
    signals = TeacherSignals.load(folder / "signals")
    assert signals.temperature != 1
    rows = slice(len(POOL), len(POOL) + N_AUGMENTED)
    confidence = at_temperature(signals.probabilities[rows], signals.temperature).max(axis=1)
    return AugmentedRun(folder, result, read_augmented(folder), confidence)


@pytest.fixture
def run_copy(augmented: AugmentedRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(augmented.folder, tmp_path / "run"))


@contextmanager
def forbid_calls(*names: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(f"setfit_kd.run.stages.{name}", Mock(side_effect=AssertionError("unexpected call")))
        yield


AUGMENT, TEACHER, SCORES, STUDENT = "augment", "train_teacher", "refine_and_score", "train_student"


def test_augmented_texts_are_new_and_part_of_the_signals(augmented: AugmentedRun, base: dict[str, Any]) -> None:
    expected = [*POOL, *augmented.texts, *(row["text"] for row in LABELED)]
    assert TeacherSignals.load(augmented.folder / "signals").texts == augmented.result.signals.texts == expected
    keys = {normalize(text) for text in augmented.texts}
    held_out = [json.loads(line)["text"] for line in Path(base["eval"]).read_text(encoding="utf-8").splitlines()]
    known = {normalize(text) for text in (*POOL, *held_out, *(row["text"] for row in LABELED))}
    assert known & {normalize(text) for text in augment_unrestricted()}, "the test needs forbidden texts"
    assert len(augmented.texts) == len(keys) == N_AUGMENTED
    assert not known & keys


def test_no_text_is_forbidden_without_evaluation_set(base: dict[str, Any]) -> None:
    config = RunConfig.of(**{**base, "eval": None})
    assert Stages(config, load_run_data(config), StageCache(None)).augment(None) == augment_unrestricted()


def test_augmentation_can_be_turned_off(run: Run, run_copy: Path) -> None:
    result = run(augment=0, resume=run_copy)
    assert result.signals.texts == [*POOL, *(row["text"] for row in LABELED)]
    assert not (run_copy / "augmented").exists()


@pytest.mark.parametrize(("pool_size", "augmented"), [(None, 7 * 54), (6, 7 * 30)])
def test_small_pools_are_augmented_by_default(
    base: dict[str, Any], pool_size: int | None, augmented: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig.of(**{**base, "augment": None, "pool_size": pool_size})
    with caplog.at_level(logging.INFO, "setfit_kd"):
        texts = Stages(config, load_run_data(config), StageCache(None)).augment(None)
    assert len(texts) == augmented
    assert f"{augmented} augmented texts are added (none with --augment 0)." in caplog.text


def test_default_run_counts_augmented_texts_and_estimates_on_the_pool_only(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    predict = Stages._predict_proba

    def record(self: Stages, model: Any, texts: list[str], description: str) -> Any:
        compared.extend(texts)
        return predict(self, model, texts, description)

    monkeypatch.setattr(Stages, "_predict_proba", record)
    settings = {**base, "augment": None, "eval": None, "calibrate": True, "output_dir": tmp_path / "run"}
    result = distill(**settings)
    assert len(result.signals) - len(POOL) - len(LABELED) == 7 * 54
    assert json.loads((tmp_path / "run/run.json").read_bytes())["data"]["augmented"] == 7 * 54
    assert compared
    assert set(compared) <= set(POOL)


def test_large_pools_and_signals_are_not_augmented_by_default(base: dict[str, Any]) -> None:
    config = RunConfig.of(**{**base, "augment": None})
    assert [config.n_augmented(n) for n in (0, 100, 125, 999, 1000, 10_000)] == [0, 700, 875, 1, 0, 0]
    assert RunConfig.of(signals="signals.jsonl", student="static").n_augmented(10) == 0


def test_too_few_possible_texts_are_a_warning(
    base: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = write(tmp_path / "short.jsonl", [{"text": f"{a} {b}", "label": a} for a in "ab" for b in "cd"])
    config = RunConfig.of(
        **{**base, "labeled": short, "unlabeled": None, "eval": None, "augment": 900, "batch_size": 4}
    )
    n = len(Stages(config, load_run_data(config), StageCache(None)).augment(None))
    assert caplog.messages[-1] == f"Could create only {n} of 900 augmented texts."


def test_uncertain_augmented_texts_are_dropped(
    augmented: AugmentedRun, run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    min_confidence = float(np.quantile(augmented.confidence, 0.25))
    with caplog.at_level(logging.INFO, "setfit_kd"), forbid_calls(AUGMENT, TEACHER, SCORES):
        result = distill(resume=run_copy, augment_confidence=min_confidence)
    pairs = zip(augmented.texts, augmented.confidence, strict=True)
    kept = [text for text, confidence in pairs if confidence >= min_confidence]
    assert 0 < len(kept) < N_AUGMENTED
    assert result.signals.texts == [*POOL, *kept, *(row["text"] for row in LABELED)]
    unfiltered = TeacherSignals.load(run_copy / "signals")
    rows = [unfiltered.texts.index(text) for text in result.signals.texts]
    np.testing.assert_array_equal(result.signals.probabilities, unfiltered.probabilities[rows])
    np.testing.assert_array_equal(np.asarray(result.signals.embeddings), np.asarray(unfiltered.embeddings)[rows])
    assert f"The teacher is confident about {len(kept)} of {N_AUGMENTED} augmented texts." in caplog.messages
    assert "Stage student: loaded from" not in caplog.text


@pytest.mark.parametrize(
    ("rows", "min_confidence", "temperature", "kept"),
    [
        (range(1, 4), 0.75, 1, [0, 1, 3, 4]),  # 0.75 is enough, for the second label too
        (range(1, 4), 0.6, 4, [0, 3, 4]),  # calibrated, the confidence is 0.57, 0.53 and 0.62
        (range(0), 1, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_only_augmented_rows_are_dropped(rows: range, min_confidence: float, temperature: int, kept: list[int]) -> None:
    probabilities = np.array([[value, 1 - value] for value in (0.5, 0.75, 0.6, 0.125, 0.55)], np.float32)
    texts = [f"text {row}" for row in range(5)]
    signals = TeacherSignals(texts, probabilities, ("a", "b"), probabilities, temperature=temperature)
    result = drop_uncertain(signals, rows, min_confidence=min_confidence)
    assert result.texts == [texts[row] for row in kept]
    np.testing.assert_array_equal(result.probabilities, probabilities[kept])


def test_damaged_texts_are_created_again_identically(
    augmented: AugmentedRun, run_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_copy / "augmented/texts.jsonl").write_text('"cut o')
    with forbid_calls(TEACHER, SCORES, STUDENT):
        distill(resume=run_copy)
    assert "Running stage augmented again" in caplog.text
    assert read_augmented(run_copy) == augmented.texts


def test_masked_language_model_creates_some_texts(base: dict[str, Any], masked_lm: Path) -> None:
    config = RunConfig.of(**base, augment_model=str(masked_lm))
    data = load_run_data(config)
    assert data.evaluation is not None
    texts = Stages(config, data, StageCache(None)).augment(masked_lm)
    fill = FillMask(masked_lm, device=torch.device("cpu"))
    originals = [*data.pool, *data.labeled.texts]
    assert texts == augment(originals, N_AUGMENTED, seed=0, forbidden=data.evaluation.texts, fill=fill)
    known = {word for text in originals for word in text.split()}
    assert len({word for text in texts for word in text.split()} - known) > 10


def test_resume_removes_texts_of_a_new_evaluation_set(run_copy: Path, augmented: AugmentedRun, tmp_path: Path) -> None:
    leaked = [{"text": text.upper(), "label": "World"} for text in augmented.texts[:3]]
    result = distill(resume=run_copy, eval=write(tmp_path / "other.jsonl", [*newswire("eval")[:10], *leaked]))
    assert not set(augmented.texts[:3]) & {*read_augmented(run_copy), *result.signals.texts}


def test_changed_model_creates_texts_again(run_copy: Path, masked_lm: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(masked_lm, tmp_path / "model"))
    with forbid_calls(TEACHER):
        result = distill(resume=run_copy, augment=20, augment_model=str(model))
    assert result.signals.texts[len(POOL) : -len(LABELED)] == read_augmented(run_copy)
    assert len(read_augmented(run_copy)) == 20
    assert str(model) in (run_copy / "report.html").read_text(encoding="utf-8")
    assert json.loads((run_copy / "run.json").read_bytes())["seconds"]["augmented"] >= 0
    (model / "note.txt").write_text("trained further")
    with forbid_calls(AUGMENT), pytest.raises(AssertionError, match="unexpected call"):
        distill(resume=run_copy)


def test_labeled_texts_are_augmented_without_a_pool(run: Run) -> None:
    result = run(unlabeled=None, batch_size=32)
    assert len(LABELED) < 32 < len(result.signals)


def test_model_without_masked_language_model_is_rejected(run: Run, tiny_student: Path, tmp_path: Path) -> None:
    model = str(tiny_student.with_name("student-plain"))
    with forbid_calls(TEACHER), pytest.raises(ModelError, match="masked language model"):
        run(augment_model=model, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": 5, "signals": "signals.jsonl"}, "augment: cannot be combined with signals"),
        ({"augment_model": "a-model"}, "augment_model: set augment to the number"),
        ({"augment": 5, "augment_confidence": 1.5}, "augment_confidence: "),
        ({"augment": 5, "augment_model": " "}, "augment_model: must not be empty"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of(**settings)
