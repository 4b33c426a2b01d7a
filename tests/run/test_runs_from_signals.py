"""Runs that start from signals in a file instead of a teacher and a pool."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import FAST, newswire
from synthetic import equal_weights, weights

from setfit_kd import RunConfig, RunResult, distill, load
from setfit_kd.cli import main
from setfit_kd.config.presets import preset, read_config
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.models.encode import predict_proba
from setfit_kd.report.comparison import compare
from setfit_kd.report.render import verdict
from setfit_kd.report.summary import read_summary

if TYPE_CHECKING:
    from setfit import SetFitModel

LABEL_NAMES = ["World", "Business", "Sports", "Sci/Tech"]
"""Label names in the order of the file, which is not alphabetical; the texts cycle through them."""
ROWS = [
    row
    for group in zip(
        *([row for row in newswire("train") if row["label"] == name] for name in LABEL_NAMES), strict=False
    )
    for row in group
][:48]
HELD_OUT = newswire("eval")
GOLD_PROBABILITY = 0.7
UNIFORM_OVERLAP = 1 / len(LABEL_NAMES) + (1 - GOLD_PROBABILITY)
"""Overlap of uniform predictions with the file; see `overlap`."""

Row = dict[str, Any]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def make_signals(row: dict[str, str], gold_probability: float = GOLD_PROBABILITY) -> Row:
    rest = (1 - gold_probability) / (len(LABEL_NAMES) - 1)
    return {
        "text": row["text"],
        "probabilities": {name: gold_probability if name == row["label"] else rest for name in LABEL_NAMES},
    }


def make_embedding(row: dict[str, str], index: int) -> list[float]:
    """Return an embedding with one direction per label, plus a small component that depends on the text."""
    vector = np.eye(len(LABEL_NAMES))[LABEL_NAMES.index(row["label"])]
    return [*vector.tolist(), 0.1 * (index % 7)]


SIGNALS = [make_signals(row) for row in ROWS]
OTHER_LABELED = [
    *({**row, "text": row["text"].upper() + "\u200b"} for row in ROWS[:8]),
    *(row for row in newswire("train")[-40:] if row not in ROWS),
]
"""Labels of some texts of the file, spelled differently, and of texts that it does not contain."""
SIGNALS_WITH_EMBEDDINGS = [
    {**signals, "embedding": make_embedding(row, index)}
    for index, (row, signals) in enumerate(zip(ROWS, SIGNALS, strict=True))
]


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
        write_jsonl(folder / "eval.jsonl", HELD_OUT[:24]),
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


# Students of the signals in a file


def test_run_has_a_student_and_no_teacher(plain: FinishedRun) -> None:
    files = {"config.yaml", "run.json", "run.log", "metrics.json", "report.html", ".lock"}
    assert {path.name for path in plain.folder.iterdir()} == {*files, "student", "evaluation"}
    assert plain.result.teacher is None
    assert list(plain.result.evaluations) == list(read_json(plain.folder / "metrics.json")) == ["student"]
    assert plain.result.evaluations["student"].quality.agreement is None
    assert plain.result.metrics["student"]["against"] == {}
    signals = plain.result.signals
    assert signals.texts == [row["text"] for row in ROWS]
    expected = [[row["probabilities"][name] for name in LABEL_NAMES] for row in SIGNALS]
    np.testing.assert_allclose(signals.probabilities, expected, atol=1e-6)
    counts = read_json(plain.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["evaluation"]) == (0, 48, 24)
    # The classes have the order of the file.
    assert list(signals.label_names) == load(plain.folder, device="cpu").labels == LABEL_NAMES
    assert list(plain.result.evaluations["student"].quality.classes) == LABEL_NAMES


def test_default_objective_uses_embeddings(run: Run, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "signals.jsonl", SIGNALS_WITH_EMBEDDINGS)
    students = {
        objective: weights(run(path, objective=objective).student)
        for objective in (None, "similarity", "similarity,soft-labels=3")
    }
    assert equal_weights(students[None], students["similarity,soft-labels=3"])
    assert not equal_weights(students[None], students["similarity"])


def test_default_objective_without_embeddings_is_soft_labels(run: Run, files: Files, plain: FinishedRun) -> None:
    assert plain.result.config.objective is None
    assert equal_weights(weights(run(files.signals, objective="soft-labels").student), weights(plain.result.student))
    for objective in ("similarity", "pairs"):
        with pytest.raises(DataError, match=r"signals\.jsonl have no embeddings, which the objective needs") as raised:
            run(files.signals, objective=objective)
        assert "--objective soft-labels" in str(raised.value.hint)


def overlap(student: SetFitModel) -> float:
    """Return the mean overlap (0 to 1) of a student's probabilities with those of the file."""
    probabilities = np.array([[row["probabilities"][name] for name in LABEL_NAMES] for row in SIGNALS])
    predicted = predict_proba(student, [row["text"] for row in ROWS])
    return float(np.minimum(predicted, probabilities).sum(axis=1).mean())


@pytest.mark.parametrize("student", ["static:8@TEACHER", "layers:3,0@TEACHER", "transformer:MODEL"])
def test_student_bodies_that_need_no_teacher_learn_the_signals(
    student: str, run: Run, files: Files, tiny_student: Path, tiny_teacher: Path
) -> None:
    name = student.replace("MODEL", str(tiny_student)).replace("TEACHER", str(tiny_teacher))
    result = run(files.signals, student=name, learning_rate=1e-2, epochs=12)
    assert list(result.students) == [name]
    assert overlap(result.student) > UNIFORM_OVERLAP + 0.1


@pytest.mark.parametrize("student", ["layers:2", "static:8"])
def test_students_made_from_the_teacher_are_refused(student: str, run: Run, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run has no teacher") as raised:
        run(files.signals, student=student, output_dir=tmp_path / "run")
    assert "layers:3@NAME" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


# Gold labels


def test_gold_labels_add_a_baseline(with_gold: FinishedRun, plain: FinishedRun) -> None:
    assert list(with_gold.result.evaluations) == ["baseline", "student"]
    assert (with_gold.folder / "baseline").is_dir()
    assert set(with_gold.result.metrics["student"]["against"]) == {"baseline"}
    assert list(plain.result.evaluations) == ["student"]
    # The labeled texts stay in the pool.
    counts = read_json(with_gold.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["pool_labeled"]) == (16, 48, 0)


@pytest.mark.parametrize("has_eval", [False, True])
def test_no_baseline_without_evaluation_set_or_if_disabled(
    has_eval: bool, run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.run.stages.train_teacher", refuse)
    settings = {"eval": files.eval, "baseline": False} if has_eval else {}
    result = run(files.signals, labeled=files.labeled, **settings)
    assert list(result.evaluations) == ["student"] * has_eval


def test_gold_labels_correct_errors_in_the_signals(run: Run, files: Files, tmp_path: Path) -> None:
    next_label = {name: LABEL_NAMES[(index + 1) % len(LABEL_NAMES)] for index, name in enumerate(LABEL_NAMES)}
    labeled = write_jsonl(tmp_path / "labeled.jsonl", [{**row, "label": next_label[row["label"]]} for row in ROWS[:24]])

    def accuracy(**settings: Any) -> float:
        student = run(files.signals, labeled=labeled, epochs=8, learning_rate=1e-2, **settings).student
        predicted = student.predict([row["text"] for row in ROWS[:24]])
        return float(np.mean([label == next_label[row["label"]] for label, row in zip(predicted, ROWS, strict=False)]))

    assert accuracy(alpha=1.0, gold_weight=9.0) > 0.9
    assert accuracy(alpha=0.0, gold_weight=0.0) < 0.1


def test_other_label_order_gives_the_same_result(run: Run, files: Files, with_gold: FinishedRun) -> None:
    sources = {name: as_dataset(getattr(files, name), sorted(LABEL_NAMES)) for name in ("labeled", "eval")}
    evaluations = run(files.signals, **sources).evaluations
    for name in ("baseline", "student"):
        expected = with_gold.result.evaluations[name]
        assert evaluations[name].quality == expected.quality
        np.testing.assert_allclose(evaluations[name].probabilities, expected.probabilities, atol=1e-6)


def as_dataset(path: Path, names: list[str]) -> Any:
    """Read rows as a data set with integer labels that index ``names``."""
    from datasets import ClassLabel, Dataset

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    columns = {key: [row[key] for row in rows] for key in ("text", "label")}
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names))


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        ("labeled", [*ROWS[:8], {"text": "a", "label": "Weather"}], "has labels .*: 'Weather'"),
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


# Leaks, duplicates and sampling


def test_leak_guard_removes_evaluation_texts(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaked = [ROWS[3], {**ROWS[5], "text": f"  {ROWS[5]['text'].upper()}\u200b "}]
    held_out = write_jsonl(tmp_path / "eval.jsonl", [*leaked, *HELD_OUT[:10]])
    result = run(
        write_jsonl(tmp_path / "signals.jsonl", SIGNALS_WITH_EMBEDDINGS), eval=held_out, output_dir=tmp_path / "run"
    )
    expected = [row for index, row in enumerate(SIGNALS_WITH_EMBEDDINGS) if index not in (3, 5)]
    assert result.signals.texts == [row["text"] for row in expected]
    np.testing.assert_allclose(
        result.signals.probabilities,
        [[row["probabilities"][name] for name in LABEL_NAMES] for row in expected],
        atol=1e-6,
    )
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


# Settings that cannot be combined


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"unlabeled": ["a text", "another"]}, "Signals contain their own pool texts", "--unlabeled"),
        ({"augment": 5}, "augment: cannot be combined with signals", None),
        ({"seeds": 2}, "requires an evaluation set", "--eval"),
    ],
)
def test_incompatible_settings_are_refused(
    settings: dict[str, Any], message: str, hint: str | None, run: Run, files: Files, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        run(files.signals, **settings, output_dir=tmp_path / "run")
    assert hint is None or hint in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


# The command line


def command(signals: Path, student: Path, folder: Path) -> list[object]:
    settings = {name.replace("_", "-"): value for name, value in FAST.items() if name != "shots"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return ["run", *flags, "--batch-size", 16, "--signals", signals, "--student", student, "--output-dir", folder]


def test_command_equals_the_python_function(
    plain: FinishedRun, files: Files, tiny_student: Path, tmp_path: Path
) -> None:
    arguments = [*command(files.signals, tiny_student, tmp_path / "run"), "--eval", files.eval]
    planned = invoke(*arguments, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    rows = [line.split() for line in planned.stdout.rpartition("steps")[2].strip().splitlines()]
    assert rows == [["student", "48", "3"], ["evaluation", "24"]]
    assert not (tmp_path / "run").exists()
    result = invoke(*arguments)
    assert equal_weights(*(weights(load(path, device="cpu")) for path in (tmp_path / "run", plain.folder)))
    assert f"setfit-kd predict {tmp_path / 'run'}" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if line.count("%") > 1] == ["student"]
    assert "teacher" not in result.stdout  # no empty column
    written = read_config(tmp_path / "run" / "config.yaml")  # without data of the preset
    sources = [written[name] for name in ("labeled", "unlabeled", "signals", "eval")]
    assert sources == [None, None, str(files.signals), str(files.eval)]


def test_bundle_is_checked_on_the_texts_of_the_signals(plain: FinishedRun, files: Files, tmp_path: Path) -> None:
    result = invoke("export", plain.folder, "--format", "onnx", "--output-dir", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert read_json(tmp_path / "bundle/manifest.json")["parity"]["texts"] == len(SIGNALS)
    assert "Warning" not in result.stderr
    folder = shutil.copytree(plain.folder, tmp_path / "run")
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(settings.replace(str(files.signals), "missing.jsonl"), encoding="utf-8")
    refused = invoke("export", folder, "--output-dir", tmp_path / "other")
    assert refused.exit_code == 2
    assert "missing.jsonl" in refused.stderr
    assert "--unlabeled" in refused.stderr


def test_signals_replace_the_data_of_the_preset() -> None:
    name = "newswire"
    config = RunConfig.resolve(preset(name), {"signals": "signals.jsonl"})
    assert config.signals == "signals.jsonl"
    assert (config.labeled, config.unlabeled, config.eval, config.shots, config.pool_size) == (None,) * 5
    assert config.teacher == RunConfig.of(teacher=preset(name)["teacher"]).teacher  # not data, so kept; it is not used


@pytest.mark.parametrize("labeled", [None, ROWS[:16], OTHER_LABELED], ids=["without-gold", "with-gold", "other-texts"])
def test_dry_run_lists_the_steps_of_the_run(
    labeled: list[Row] | None, files: Files, tiny_student: Path, tmp_path: Path, trained_steps: list[int]
) -> None:
    from setfit_kd.run.dry_run import plan
    from setfit_kd.run.inputs import prepare_run
    from setfit_kd.run.pipeline import run as run_pipeline

    names = [f"static:4@{tiny_student}", f"transformer:{tiny_student}"]
    settings = {**FAST, "shots": None, "batch_size": 16, "signals": str(files.signals), "eval": str(files.eval)}
    gold = labeled and str(write_jsonl(tmp_path / "gold.jsonl", labeled))
    config = RunConfig.of(**settings, student=names, labeled=gold)
    planned = plan(config, prepare_run(config))
    assert ("baseline" in [stage.name for stage in planned]) == (labeled is not None)
    run_pipeline(config)
    assert len(trained_steps) == sum(stage.steps for stage in planned)


# Stages that a resumed run repeats


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This must not be called.")


@pytest.fixture
def copied(with_gold: FinishedRun, files: Files, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run with gold labels, and of its signals file."""
    folder = Path(shutil.copytree(with_gold.folder, tmp_path / "run"))
    return folder, Path(shutil.copy(files.signals, tmp_path / "signals.jsonl"))


def test_same_signals_in_another_file_repeat_no_stage(
    copied: tuple[Path, Path], with_gold: FinishedRun, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = copied
    for name in ("train_student", "train_teacher", "evaluate"):
        monkeypatch.setattr(f"setfit_kd.run.stages.{name}", refuse)
    distill(resume=folder, signals=str(file), labeled=files.labeled, eval=files.eval)
    assert (folder / "metrics.json").read_bytes() == (with_gold.folder / "metrics.json").read_bytes()


def test_changed_signals_repeat_the_student_but_not_the_baseline(
    copied: tuple[Path, Path], run: Run, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    folder, file = copied
    write_jsonl(file, SIGNALS_WITH_EMBEDDINGS)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        result = run(file, resume=folder, labeled=files.labeled, eval=files.eval)
    assert "Stage baseline: loaded from" in caplog.text
    assert "Stage student: loaded from" not in caplog.text
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


# Reports and comparisons


@pytest.mark.parametrize("name", ["plain", "with_gold"])
def test_report_has_no_teacher(name: str, request: pytest.FixtureRequest, files: Files) -> None:
    finished: FinishedRun = request.getfixturevalue(name)
    text = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert f"Signals {files.signals}; student" in text
    body = text[text.index("<body>") :]
    assert not [heading for heading in re.findall(r"<h\d>(.*?)</h\d>", body) if "teacher" in heading]
    assert not re.search(r"<th[^>]*>(agreement|speedup)", body)
    assert "Comparison" in body
    assert "Errors with the highest confidence" in body


def test_verdict_is_about_the_student_only(plain: FinishedRun, with_gold: FinishedRun) -> None:
    accuracy = plain.result.evaluations["student"].quality.accuracy
    assert verdict(read_summary(plain.folder)) == f"The student has an accuracy of {accuracy:.1%}."
    text = verdict(read_summary(with_gold.folder))
    assert re.fullmatch(r"The student has an accuracy of \S+%\. Its accuracy is .* trained on the labels only.*", text)


@pytest.fixture(scope="module")
def teacher_run(files: Files, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher and the same evaluation texts and label order."""
    folder = tmp_path_factory.mktemp("runs") / "teacher-run"
    labeled, held_out = (as_dataset(path, LABEL_NAMES) for path in (files.labeled, files.eval))
    settings = {**FAST, "shots": None, "batch_size": 16, "cache": False, "student": "static:4"}
    pool = [row["text"] for row in ROWS[16:]]
    distill(labeled, pool, held_out, **settings, teacher=str(tiny_teacher), output_dir=folder)
    return folder


def test_runs_with_and_without_a_teacher_can_be_compared(plain: FinishedRun, teacher_run: Path) -> None:
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
        rows = [line for line in result.stdout.splitlines() if "%" in line]
        assert len(rows) == 4
