"""Several labels per text, from the data to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import FAST
from setfit import SetFitModel
from synthetic import LABEL_NAMES, WORDS

from setfit_kd import RunResult, distill, load
from setfit_kd.config.run import FinetuneRunConfig
from setfit_kd.data.labeled_set import encode_labels
from setfit_kd.data.sources import read
from setfit_kd.export.bundle import export_bundle
from setfit_kd.finetune.run import finetune_run
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import head_task, head_thresholds
from setfit_kd.models.thresholds import fit_thresholds
from setfit_kd.runtime.classify import Classifier
from setfit_kd.tasks.classification import MULTI_LABEL

NAMES = sorted(LABEL_NAMES)
Row = dict[str, Any]


def rows(n: int, seed: int) -> list[Row]:
    """Texts with words of zero to three topics, and their topics as labels."""
    rng = np.random.default_rng(seed)
    topics = [sorted(rng.choice(4, size=rng.choice(4, p=(0.1, 0.5, 0.3, 0.1)), replace=False)) for _ in range(n)]
    words = [[word for topic in some for word in rng.choice(WORDS[topic].split(), 2)] for some in topics]
    return [
        {"text": f"{' '.join(chosen)} number {seed}{i}", "label": [LABEL_NAMES[topic] for topic in some]}
        for i, (chosen, some) in enumerate(zip(words, topics, strict=True))
    ]


def write(path: Path, content: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    content = {
        "labeled": rows(120, 1),
        "unlabeled": [{"text": row["text"]} for row in rows(80, 2)],
        "eval": rows(60, 3),
    }
    return {name: write(folder / f"{name}.jsonl", some) for name, some in content.items()}


SETTINGS: dict[str, Any] = {**FAST, "teacher_steps": 30, "teacher_learning_rate": 3e-3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def result(files: dict[str, Path], models: dict[str, Path], tiny_teacher: Path, tmp_path_factory: Any) -> RunResult:
    settings = {**SETTINGS, "teacher": str(tiny_teacher), "student": ("layers:1", "static:16")}
    settings["output_dir"] = tmp_path_factory.mktemp("runs") / "run"
    return distill(files["labeled"], files["unlabeled"], files["eval"], **settings)


def test_models_learn_labels_and_run_is_complete(result: RunResult) -> None:
    assert result.signals.task is MULTI_LABEL
    prevalence = np.mean([len(row["label"]) for row in rows(60, 3)]) / 4
    for name, evaluation in result.evaluations.items():
        everywhere = 2 * prevalence / (1 + prevalence)  # F1 of a label that is predicted for all texts
        assert evaluation.quality.macro_f1 > everywhere + 0.1, name
        assert evaluation.thresholds is not None
    assert result.output_dir is not None
    report = (result.output_dir / "report.html").read_text()
    assert "macro-F1" in report
    assert "co-occurrence" in report.lower()


def test_resumed_run_loads_all_stages(result: RunResult, trained_steps: list[int]) -> None:
    resumed = distill(resume=result.output_dir)
    assert trained_steps == []
    for name, evaluation in result.evaluations.items():
        np.testing.assert_array_equal(resumed.evaluations[name].predicted, evaluation.predicted)


@pytest.mark.parametrize(("student", "format_"), [("layers-1", "onnx"), ("static-16", "static")])
def test_saved_students_predict_alike_everywhere(result: RunResult, student: str, format_: str, tmp_path: Path) -> None:
    assert result.output_dir is not None
    folder, texts = result.output_dir / "students" / student, [row["text"] for row in rows(60, 3)]
    model = load(folder, device="cpu")
    expected = result.evaluations[f"students/{student}"]
    assert head_task(model.model_head) is MULTI_LABEL
    np.testing.assert_array_equal(head_thresholds(model.model_head), expected.thresholds)
    np.testing.assert_allclose(predict_proba(model, texts), expected.probabilities, atol=1e-5)
    setfit = SetFitModel.from_pretrained(str(folder), multi_target_strategy="one-vs-rest", device="cpu")
    probabilities = np.asarray(setfit.predict_proba(texts))
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(setfit.predict(texts)), probabilities > 0.5)
    bundle = tmp_path / "bundle"
    export_bundle(model, bundle, texts=[row["text"] for row in rows(40, 2)], format=format_)
    labels = [[NAMES.index(name) for name in some] for some in Classifier(bundle).predict(texts)]
    assert labels == [np.flatnonzero(row).tolist() for row in expected.predicted]


def test_predictions_are_signals_for_another_student(
    result: RunResult, files: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    predictions = tmp_path / "predictions.jsonl"
    teacher = str(result.output_dir) + "/teacher"
    predicted = invoke("predict", teacher, "--input", files["unlabeled"], "--output", predictions, "--device", "cpu")
    assert predicted.exit_code == 0, predicted.output
    first = json.loads(predictions.read_text().splitlines()[0])
    assert set(first) == {"text", "labels", "probabilities"}
    assert set(first["probabilities"]) == set(LABEL_NAMES)
    other = distill(
        signals=str(predictions), eval=files["eval"], student=str(tiny_student), **{**SETTINGS, "shots": None}
    )
    assert other.evaluations["student"].quality.macro_f1 > 0


def test_transformers_and_estimates(files: dict[str, Path], models: dict[str, Path], tiny_student: Path) -> None:
    settings = {**SETTINGS, "teacher": f"transformer:{tiny_student}", "student": "layers:1", "calibrate": True}
    settings["thresholds"] = "recall=0.9"
    result = distill(files["labeled"], files["unlabeled"], **settings)
    assert set(result.estimates) == {"teacher", "student"}
    assert result.student.model_body[0].task is MULTI_LABEL


def test_search_runs_end_to_end(files: dict[str, Path], tiny_teacher: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "teacher": str(tiny_teacher), "student": "layers:1", "search": 1}
    settings["teacher_steps"] = 4
    pool = [row["text"] for row in rows(170, 2)]  # enough to hold some out
    trials = distill(files["labeled"], pool, files["eval"], **settings, output_dir=tmp_path / "r").trials
    assert {stage: len(each) for stage, each in trials.items()} == {"teacher": 1, "student": 1}
    assert 0 < trials["student"][0].loss < 1
    assert 0 < trials["teacher"][0].loss < 4 * np.log(2), "cross-entropy of four labels, at least as good as by chance"
    assert "Search for settings" in (tmp_path / "r" / "report.html").read_text()


def test_finetuned_model_has_thresholds_for_the_validation_texts(
    files: dict[str, Path], models: dict[str, Path], tiny_student: Path, tmp_path: Path
) -> None:
    sources = {"labeled": str(files["labeled"]), "model": str(tiny_student)}
    settings = {"device": "cpu", "precision": "fp32", "learning_rate": 3e-3, "epochs": 4}
    result = finetune_run(
        FinetuneRunConfig.of(**sources, **settings, validation=str(files["eval"]), output_dir=tmp_path / "a")
    )
    validation, loaded = encode_labels(read(files["eval"], label_column="label")), load(tmp_path / "a", device="cpu")
    probabilities = predict_proba(loaded, validation.texts)
    fitted = fit_thresholds(probabilities, "f1", targets=validation.targets, label_names=NAMES)
    assert head_thresholds(loaded.model_head) == pytest.approx(fitted, abs=1e-4)
    assert result.validation is not None
    best = max(result.history, key=lambda entry: entry["f1-macro"])
    assert result.validation.quality.scores == pytest.approx({n: v for n, v in best.items() if n != "step"}, abs=1e-6)
    assert "f1-micro" in best
    assert "top_k=None" in (tmp_path / "a" / "README.md").read_text()
    finetune_run(FinetuneRunConfig.of(**sources, **settings, steps=1, output_dir=tmp_path / "b"))
    assert head_thresholds(load(tmp_path / "b", device="cpu").model_head) is None
    finetune_run(FinetuneRunConfig.of(**sources, **settings, steps=1, thresholds=0.3, output_dir=tmp_path / "c"))
    assert head_thresholds(load(tmp_path / "c", device="cpu").model_head) == pytest.approx([0.3] * len(NAMES))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda row: {**row, "label": row["label"] if len(row["text"]) % 2 else ",".join(row["label"])}, ("row",)),
        (lambda row: {**row, "label": []}, ("labels",)),
        (lambda row: {**row, "label": [*row["label"], "all"]}, ("'all'",)),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(
    change: Any, fragments: tuple[str, ...], tiny_teacher: Path, tmp_path: Path
) -> None:
    labeled = write(tmp_path / "labeled.jsonl", list(map(change, rows(30, 1))))
    options = "--teacher", tiny_teacher, "--student", "layers:0", "--output-dir", tmp_path / "run"
    assert_refused(invoke("run", "--labeled", labeled, *options), *fragments)
