"""Runs that start from signals in a file instead of a teacher and a pool."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import FAST, newswire
from synthetic import equal_weights, weights

from setfit_kd import RunConfig, RunResult, distill, load
from setfit_kd.config.presets import preset, read_config
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.models.encode import predict_proba
from setfit_kd.report.render import verdict
from setfit_kd.report.summary import compare, read_summary
from setfit_kd.run.dry_run import plan
from setfit_kd.run.inputs import prepare_run
from setfit_kd.run.pipeline import run as run_pipeline

LABEL_NAMES = ["World", "Business", "Sports", "Sci/Tech"]
"""Label names in the order of the file, which is not alphabetical; the texts cycle through them."""
_BY_LABEL = [[row for row in newswire("train") if row["label"] == name] for name in LABEL_NAMES]
ROWS = [row for group in zip(*_BY_LABEL, strict=False) for row in group][:48]

Row = dict[str, Any]


SIGNALS: list[Row] = [
    {"text": row["text"], "probabilities": {name: 0.7 if name == row["label"] else 0.1 for name in LABEL_NAMES}}
    for row in ROWS
]
OTHER_LABELED = [
    *({**row, "text": row["text"].upper() + "\u200b"} for row in ROWS[:8]),
    *(row for row in newswire("train")[-40:] if row not in ROWS),
]
"""Labels of some texts of the file, spelled differently, and of texts that it does not contain."""
SIGNALS_WITH_EMBEDDINGS = [
    {**signals, "embedding": [*np.eye(4)[LABEL_NAMES.index(row["label"])], 0.1 * (index % 7)]}
    for index, (row, signals) in enumerate(zip(ROWS, SIGNALS, strict=True))
]
"""Embeddings with one direction per label, plus a small component that depends on the text."""


def probabilities(rows: list[Row]) -> Any:
    return np.array([list(row["probabilities"].values()) for row in rows])


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Files:
    """Input files."""

    signals: Path
    labeled: Path
    eval: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    return Files(
        write_jsonl(folder / "signals.jsonl", SIGNALS),
        write_jsonl(folder / "labeled.jsonl", ROWS[:16]),
        write_jsonl(folder / "eval.jsonl", newswire("eval")[:24]),
    )


Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(tiny_student: Path) -> Run:
    def run(signals: Path, **settings: Any) -> RunResult:
        base = {**FAST, "shots": None, "batch_size": 16, "signals": str(signals), "student": str(tiny_student)}
        return distill(**{**base, **settings})

    return run


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    result: RunResult


@pytest.fixture(scope="module")
def plain(run: Run, files: Files, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run with signals and an evaluation set only."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return FinishedRun(folder, run(files.signals, eval=files.eval, output_dir=folder, teacher="/is/ignored"))


@pytest.fixture(scope="module")
def with_gold(run: Run, files: Files, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The same run with gold labels for some of the texts."""
    folder = tmp_path_factory.mktemp("runs") / "with-gold"
    return FinishedRun(folder, run(files.signals, eval=files.eval, labeled=files.labeled, output_dir=folder))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_run_has_a_student_and_no_teacher(plain: FinishedRun) -> None:
    files = {"config.yaml", "run.json", "run.log", "metrics.json", "report.html", ".lock"}
    assert {path.name for path in plain.folder.iterdir()} == {*files, "student", "evaluation"}
    assert list(plain.result.evaluations) == list(read_json(plain.folder / "metrics.json")) == ["student"]
    assert plain.result.evaluations["student"].quality.agreement is None
    assert plain.result.metrics["student"]["against"] == {}
    signals = plain.result.signals
    assert signals.texts == [row["text"] for row in ROWS]
    np.testing.assert_allclose(signals.probabilities, probabilities(SIGNALS), atol=1e-6)
    counts = read_json(plain.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["evaluation"]) == (0, 48, 24)
    assert list(signals.label_names) == load(plain.folder, device="cpu").labels == LABEL_NAMES  # as in the file


def test_default_objective(run: Run, files: Files, plain: FinishedRun, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "signals.jsonl", SIGNALS_WITH_EMBEDDINGS)
    objectives = (None, "similarity", "similarity,soft-labels=3")
    default, similarity, with_soft_labels = (weights(run(path, objective=name).student) for name in objectives)
    assert equal_weights(default, with_soft_labels)
    assert not equal_weights(default, similarity)
    # Without embeddings:
    assert equal_weights(weights(run(files.signals, objective="soft-labels").student), weights(plain.result.student))
    for objective in ("similarity", "pairs"):
        with pytest.raises(DataError, match=r"(?s)have no embeddings, which .*--objective soft-labels"):
            run(files.signals, objective=objective)


def test_student_bodies_that_need_no_teacher_learn_the_signals(
    run: Run, files: Files, tiny_student: Path, tiny_teacher: Path
) -> None:
    names = [f"static:8@{tiny_teacher}", f"layers:3,0@{tiny_teacher}", f"transformer:{tiny_student}"]
    result = run(files.signals, student=names, learning_rate=1e-2, epochs=15)
    assert list(result.students) == names
    for student in result.students.values():
        predicted = predict_proba(student, [row["text"] for row in ROWS])
        overlap = np.minimum(predicted, probabilities(SIGNALS)).sum(axis=1).mean()
        assert overlap > 0.25 + 0.3 + 0.1  # uniform predictions have an overlap of 0.55


def test_students_made_from_the_teacher_are_refused(run: Run, files: Files, tmp_path: Path) -> None:
    for student in ("layers:2", "static:8"):
        with pytest.raises(ConfigError, match=r"There is no teacher.*\n.*layers:3@NAME"):
            run(files.signals, student=student, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gold_labels_add_a_baseline(
    with_gold: FinishedRun, run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(with_gold.result.evaluations) == ["baseline", "student"]
    assert set(with_gold.result.metrics["student"]["against"]) == {"baseline"}
    # The labeled texts stay in the pool.
    counts = read_json(with_gold.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["pool_labeled"]) == (16, 48, 0)
    # There is no baseline if it is disabled or cannot be evaluated.
    monkeypatch.setattr("setfit_kd.run.stages.train_teacher", refuse)
    for settings in ({"eval": files.eval, "baseline": False}, {}):
        result = run(files.signals, labeled=files.labeled, **settings)
        assert list(result.evaluations) == ["student"] * ("eval" in settings)


def test_gold_labels_correct_errors_in_the_signals(run: Run, files: Files, tmp_path: Path) -> None:
    next_label = {name: LABEL_NAMES[(index + 1) % len(LABEL_NAMES)] for index, name in enumerate(LABEL_NAMES)}
    labeled = write_jsonl(tmp_path / "labeled.jsonl", [{**row, "label": next_label[row["label"]]} for row in ROWS[:24]])

    def accuracy(**settings: Any) -> float:
        student = run(files.signals, labeled=labeled, epochs=8, learning_rate=1e-2, **settings).student
        predicted = student.predict([row["text"] for row in ROWS[:24]])
        return float(np.mean([label == next_label[row["label"]] for label, row in zip(predicted, ROWS, strict=False)]))

    assert accuracy(alpha=1.0, gold_weight=9.0) > 0.9
    assert accuracy(alpha=0.0, gold_weight=0.0) < 0.1


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        ("eval", [*ROWS[:8], {"text": "a", "label": "Weather"}], "has labels .*: 'Weather'"),
        ("labeled", [row for row in ROWS if row["label"] != "World"], "label 'World', got 0"),
    ],
)
def test_other_classes_than_those_of_the_signals_are_refused(
    source: str, rows: list[Row], message: str, run: Run, files: Files, tmp_path: Path
) -> None:
    sources = {"eval": files.eval, source: write_jsonl(tmp_path / "x.jsonl", rows)}
    with pytest.raises(DataError, match=message):
        run(files.signals, **sources, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_leak_guard_removes_evaluation_texts(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaked = [ROWS[3], {**ROWS[5], "text": f"  {ROWS[5]['text'].upper()}\u200b "}]
    held_out = write_jsonl(tmp_path / "eval.jsonl", [*leaked, *newswire("eval")[:10]])
    signals = write_jsonl(tmp_path / "signals.jsonl", SIGNALS_WITH_EMBEDDINGS)
    result = run(signals, eval=held_out, output_dir=tmp_path / "run")
    expected = [row for index, row in enumerate(SIGNALS_WITH_EMBEDDINGS) if index not in (3, 5)]
    assert result.signals.texts == [row["text"] for row in expected]
    np.testing.assert_allclose(result.signals.probabilities, probabilities(expected), atol=1e-6)
    embeddings = np.asarray(result.signals.embeddings)
    np.testing.assert_allclose(embeddings, [row["embedding"] for row in expected], atol=1e-6)
    assert "Leak guard: removed 2 pool texts that are also in the evaluation set." in caplog.messages
    assert read_json(tmp_path / "run/run.json")["data"]["pool_leaks"] == 2


def test_fewer_signals_than_a_batch_are_refused(run: Run, files: Files, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", SIGNALS[:9])
    with pytest.raises(DataError, match="Expected at least one batch of 16 training texts, got 9"):
        run(few, labeled=files.labeled)  # labeled texts without signals do not count
    with pytest.raises(DataError, match="The pool is empty"):
        run(few, eval=write_jsonl(tmp_path / "eval.jsonl", ROWS[:9]))


def test_incompatible_settings_are_refused(run: Run, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Signals contain their own pool texts"):
        run(files.signals, unlabeled=["a text", "another"], output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="augment: cannot be combined with signals"):
        run(files.signals, augment=5, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command_equals_the_python_function(
    plain: FinishedRun, files: Files, tiny_student: Path, tmp_path: Path
) -> None:
    settings = {**FAST, "batch_size": 16, "signals": files.signals, "eval": files.eval, "student": tiny_student}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value and name != "shots"]
    arguments = ["run", *flags, "--output-dir", tmp_path / "run"]
    planned = invoke(*arguments, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    rows = [line.split() for line in planned.stdout.rpartition("steps")[2].strip().splitlines()]
    assert rows == [["student", "48", "3"], ["evaluation", "24"]]
    assert not (tmp_path / "run").exists()
    result = invoke(*arguments)
    assert equal_weights(*(weights(load(path, device="cpu")) for path in (tmp_path / "run", plain.folder)))
    assert [line.split()[0] for line in result.stdout.splitlines() if line.count("%") > 1] == ["student"]
    assert "teacher" not in result.stdout  # no empty column
    written = read_config(tmp_path / "run" / "config.yaml")  # without data of the preset
    sources = [written[name] for name in ("labeled", "unlabeled", "signals", "eval")]
    assert sources == [None, None, str(files.signals), str(files.eval)]


def test_bundle_is_checked_on_the_texts_of_the_signals(plain: FinishedRun, files: Files, tmp_path: Path) -> None:
    result = invoke("export", plain.folder, "--format", "onnx", "--output-dir", tmp_path / "bundle")
    assert read_json(tmp_path / "bundle/manifest.json")["parity"]["texts"] == len(SIGNALS)
    assert "Warning" not in result.stderr
    folder = shutil.copytree(plain.folder, tmp_path / "run")
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(settings.replace(str(files.signals), "missing.jsonl"), encoding="utf-8")
    assert_refused(invoke("export", folder, "--output-dir", tmp_path / "other"), "missing.jsonl", "--unlabeled")


def test_signals_replace_the_data_of_the_preset() -> None:
    config = RunConfig.resolve(preset("newswire"), {"signals": "signals.jsonl"})
    assert config.signals == "signals.jsonl"
    assert (config.labeled, config.unlabeled, config.eval, config.shots, config.pool_size) == (None,) * 5


@pytest.mark.parametrize("labeled", [None, OTHER_LABELED], ids=["without-gold", "with-gold"])
def test_dry_run_lists_the_steps_of_the_run(
    labeled: list[Row] | None, files: Files, tiny_student: Path, tmp_path: Path, trained_steps: list[int]
) -> None:
    names = [f"static:4@{tiny_student}", f"transformer:{tiny_student}"]
    settings = {**FAST, "shots": None, "batch_size": 16, "signals": str(files.signals), "eval": str(files.eval)}
    gold = labeled and str(write_jsonl(tmp_path / "gold.jsonl", labeled))
    config = RunConfig.of(**settings, student=names, labeled=gold)
    planned = plan(config, prepare_run(config))
    assert ("baseline" in [stage.name for stage in planned]) == (labeled is not None)
    run_pipeline(config)
    assert len(trained_steps) == sum(stage.steps for stage in planned)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This must not be called.")


def test_changed_signals_repeat_the_student_and_the_calibration_of_the_baseline(
    with_gold: FinishedRun, run: Run, files: Files, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(with_gold.folder, tmp_path / "run"))
    file = Path(shutil.copy(files.signals, tmp_path / "signals.jsonl"))  # the same signals repeat no stage
    with monkeypatch.context() as patch:
        for name in ("train_student", "train_teacher", "evaluate"):
            patch.setattr(f"setfit_kd.run.stages.{name}", refuse)
        distill(resume=folder, signals=str(file), labeled=files.labeled, eval=files.eval)
    assert (folder / "metrics.json").read_bytes() == (with_gold.folder / "metrics.json").read_bytes()
    write_jsonl(file, SIGNALS_WITH_EMBEDDINGS)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        result = run(file, resume=folder, labeled=files.labeled, eval=files.eval)
    assert not re.search("Stage (baseline|student): loaded from", caplog.text)
    fresh = run(file, labeled=files.labeled, baseline=False)
    assert equal_weights(weights(load(folder, device="cpu")), weights(fresh.student))
    assert list(result.evaluations) == ["baseline", "student"]


def test_changed_texts_repeat_a_static_student_of_another_model(
    run: Run, files: Files, tiny_teacher: Path, tmp_path: Path
) -> None:
    settings = {"labeled": files.labeled, "eval": files.eval, "student": f"static:4@{tiny_teacher}"}
    run(files.signals, **settings, output_dir=tmp_path / "run")
    fewer = write_jsonl(tmp_path / "fewer.jsonl", SIGNALS[: len(SIGNALS) // 2])
    run(fewer, **settings, resume=tmp_path / "run")
    run(fewer, **settings, output_dir=tmp_path / "fresh")
    for name in ("student", "baseline"):
        bodies = [weights(load(tmp_path / folder / name, device="cpu")) for folder in ("run", "fresh")]
        assert equal_weights(*bodies), name


def test_report_has_no_teacher(plain: FinishedRun, with_gold: FinishedRun, files: Files) -> None:
    text = (with_gold.folder / "report.html").read_text(encoding="utf-8")
    assert f"Signals {files.signals}; student" in text
    body = text[text.index("<body>") :]
    headings = re.findall(r"<h\d>(.*?)</h\d>", body)
    assert {"Comparison", "Errors with the highest confidence"} <= set(headings)
    assert not [heading for heading in headings if "teacher" in heading]
    assert not re.search(r"<th[^>]*>(agreement|speedup)", body)
    accuracy = plain.result.evaluations["student"].quality.accuracy
    assert verdict(read_summary(plain.folder)) == f"The student has an accuracy of {accuracy:.1%}."
    text = verdict(read_summary(with_gold.folder))
    assert re.fullmatch(r"The student has an accuracy of \S+%\. Its accuracy is .* trained on the labels only.*", text)


def test_runs_with_and_without_a_teacher_can_be_compared(
    plain: FinishedRun, files: Files, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher_run, pool = tmp_path / "teacher-run", [row["text"] for row in ROWS[16:]]
    settings = {**FAST, "shots": None, "batch_size": 16, "cache": False, "student": "static:4"}
    distill(files.labeled, pool, files.eval, **settings, teacher=str(tiny_teacher), output_dir=teacher_run)
    first, *others = compared = compare([plain.folder, teacher_run])
    names = [(plain.folder, "student"), *((teacher_run, name) for name in ("teacher", "baseline", "student"))]
    assert [(model.run, model.name) for model in compared] == names
    assert first.difference is None
    for model in others:
        expected = model.evaluation.quality.accuracy - first.evaluation.quality.accuracy
        assert model.difference is not None
        assert model.difference.value == pytest.approx(expected)
    for order in ([plain.folder, teacher_run], [teacher_run, plain.folder]):
        result = invoke("compare", *order)
        assert result.exit_code == 0, result.output
        assert len([line for line in result.stdout.splitlines() if "%" in line]) == 4
