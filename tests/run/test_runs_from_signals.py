"""Runs that start from signals in a file instead of a teacher and a pool."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from setfit_kd.report.render import render_card, verdict
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


def write_columns(path: Path, rows: list[Row]) -> Path:
    """Write signals with one column per label, as CSV, TSV or Parquet."""
    flat = [
        {
            "text": row["text"],
            **{f"probability_{name}": value for name, value in row["probabilities"].items()},
            **({"embedding": row["embedding"]} if "embedding" in row else {}),
        }
        for row in rows
    ]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(flat), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(flat)
    return path


def write(path: Path, rows: list[Row]) -> Path:
    return (write_jsonl if path.suffix == ".jsonl" else write_columns)(path, rows)


@dataclass(frozen=True)
class Files:
    """Input files."""

    signals: Path
    with_embeddings: Path
    labeled: Path
    eval: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    return Files(
        write_jsonl(folder / "signals.jsonl", SIGNALS),
        write_jsonl(folder / "with-embeddings.jsonl", SIGNALS_WITH_EMBEDDINGS),
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
    return FinishedRun(folder, run(files.signals, eval=files.eval, output_dir=folder))


@pytest.fixture(scope="module")
def with_gold(run: Run, files: Files, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The same run with gold labels for some of the texts."""
    folder = tmp_path_factory.mktemp("runs") / "with-gold"
    return FinishedRun(folder, run(files.signals, eval=files.eval, labeled=files.labeled, output_dir=folder))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Students of the signals in a file


def test_run_has_a_student_and_no_teacher(plain: FinishedRun) -> None:
    assert {path.name for path in plain.folder.iterdir()} == {
        *("config.yaml", "run.json", "run.log", "metrics.json", "report.html", "report.md"),
        *("student", "evaluation", ".lock"),
    }
    assert plain.result.teacher is None
    assert list(plain.result.evaluations) == list(read_json(plain.folder / "metrics.json")) == ["student"]
    assert plain.result.evaluations["student"].quality.agreement is None
    assert plain.result.metrics["student"]["against"] == {}


def test_classes_have_the_order_of_the_file(plain: FinishedRun) -> None:
    assert list(plain.result.signals.label_names) == LABEL_NAMES
    assert load(plain.folder, device="cpu").labels == LABEL_NAMES
    assert list(plain.result.evaluations["student"].quality.classes) == LABEL_NAMES


def test_pool_contains_the_texts_of_the_file(plain: FinishedRun) -> None:
    signals = plain.result.signals
    assert signals.texts == [row["text"] for row in ROWS]
    expected = [[row["probabilities"][name] for name in LABEL_NAMES] for row in SIGNALS]
    np.testing.assert_allclose(signals.probabilities, expected, atol=1e-6)
    counts = read_json(plain.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["evaluation"]) == (0, 48, 24)


@pytest.mark.parametrize("extension", ["parquet", "csv", "tsv"])
def test_all_file_formats_give_the_same_student(extension: str, run: Run, plain: FinishedRun, tmp_path: Path) -> None:
    result = run(write(tmp_path / f"signals.{extension}", SIGNALS))
    assert result.signals.embeddings is None
    assert equal_weights(weights(result.student), weights(plain.result.student))


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_default_objective_uses_embeddings(extension: str, run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / f"signals.{extension}", SIGNALS_WITH_EMBEDDINGS)
    students = {
        objective: weights(run(path, objective=objective).student)
        for objective in (None, "similarity", "similarity,soft-labels=3")
    }
    assert equal_weights(students[None], students["similarity,soft-labels=3"])
    assert not equal_weights(students[None], students["similarity"])


def test_default_objective_without_embeddings_is_soft_labels(run: Run, files: Files, plain: FinishedRun) -> None:
    assert plain.result.config.objective is None
    assert equal_weights(weights(run(files.signals, objective="soft-labels").student), weights(plain.result.student))
    for objective in ("similarity", "embedding", "soft-labels,similarity", "pairs"):
        with pytest.raises(DataError, match=r"signals\.jsonl have no embeddings, which the objective needs") as raised:
            run(files.signals, objective=objective)
        assert "--objective soft-labels" in str(raised.value.hint)


def test_objective_that_needs_embeddings_is_refused_before_training(run: Run, files: Files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="have no embeddings"):
        run(files.signals, objective="similarity", eval=files.eval, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


def overlap(student: SetFitModel) -> float:
    """Return the mean overlap (0 to 1) of a student's probabilities with those of the file."""
    probabilities = np.array([[row["probabilities"][name] for name in LABEL_NAMES] for row in SIGNALS])
    predicted = predict_proba(student, [row["text"] for row in ROWS])
    return float(np.minimum(predicted, probabilities).sum(axis=1).mean())


@pytest.mark.parametrize(
    "student", ["MODEL", "static:8@TEACHER", "layers:2@TEACHER", "layers:3,0@TEACHER", "transformer:MODEL"]
)
def test_student_bodies_that_need_no_teacher_learn_the_signals(
    student: str, run: Run, files: Files, tiny_student: Path, tiny_teacher: Path
) -> None:
    name = student.replace("MODEL", str(tiny_student)).replace("TEACHER", str(tiny_teacher))
    result = run(files.signals, student=name, learning_rate=1e-2, epochs=12)
    assert list(result.students) == [name]
    assert overlap(result.student) > UNIFORM_OVERLAP + 0.1


@pytest.mark.parametrize("student", ["layers:2", "layers:0,1", "static", "static:8"])
def test_students_made_from_the_teacher_are_refused(student: str, run: Run, files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run has no teacher") as raised:
        run(files.signals, student=student, output_dir=tmp_path / "run")
    assert "layers:3@NAME" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_several_students_can_be_trained(run: Run, files: Files, tiny_student: Path, tmp_path: Path) -> None:
    names = [str(tiny_student), f"static:4@{tiny_student}"]
    result = run(files.signals, student=names, eval=files.eval, output_dir=tmp_path / "run")
    assert list(result.evaluations) == ["students/student", "students/static-4-student"]
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert text.count("Errors with the highest confidence") == 2


def test_teacher_setting_is_ignored(run: Run, files: Files) -> None:
    run(files.signals, teacher="/there/is/no/such/model")


# Gold labels


def test_gold_labels_add_a_baseline(with_gold: FinishedRun, plain: FinishedRun) -> None:
    assert list(with_gold.result.evaluations) == ["baseline", "student"]
    assert (with_gold.folder / "baseline").is_dir()
    assert set(with_gold.result.metrics["student"]["against"]) == {"baseline"}
    assert list(plain.result.evaluations) == ["student"]


@pytest.mark.parametrize("has_eval", [False, True])
def test_no_baseline_without_evaluation_set_or_if_disabled(
    has_eval: bool, run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.run.student_stages.train_teacher", refuse)
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


def test_labeled_texts_stay_in_the_pool(with_gold: FinishedRun) -> None:
    assert len(with_gold.result.signals) == 48
    counts = read_json(with_gold.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["pool_labeled"]) == (16, 48, 0)


def test_shots_are_drawn_from_the_labeled_texts(run: Run, files: Files) -> None:
    result = run(files.signals, labeled=files.labeled, shots=2, output_dir=Path("run"))
    counts = read_json(Path("run/run.json"))["data"]
    assert (counts["labeled"], counts["pool"]) == (8, 48)
    assert len(result.signals) == 48


@pytest.mark.parametrize("source", ["labeled", "eval"])
def test_other_label_order_gives_the_same_result(source: str, run: Run, files: Files, with_gold: FinishedRun) -> None:
    sources = {
        "labeled": files.labeled,
        "eval": files.eval,
        source: as_dataset(getattr(files, source), sorted(LABEL_NAMES)),
    }
    evaluations = run(files.signals, **sources).evaluations
    for name in ("baseline", "student"):
        expected = with_gold.result.evaluations[name]
        assert evaluations[name].quality == expected.quality
        np.testing.assert_allclose(evaluations[name].probabilities, expected.probabilities, atol=1e-6)


def dataset(columns: dict[str, list[str]], names: list[str]) -> Any:
    """Create a data set with integer labels that index ``names``."""
    from datasets import ClassLabel, Dataset

    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names))


@pytest.mark.parametrize("source", ["labeled", "eval"])
def test_label_that_is_not_in_the_signals_is_refused(source: str, run: Run, files: Files, tmp_path: Path) -> None:
    unknown = write_jsonl(tmp_path / "x.jsonl", [*ROWS[:8], {"text": "a text", "label": "Weather"}])
    with pytest.raises(DataError, match=r"x\.jsonl has labels .* training set: 'Weather'; expected one of 'World'"):
        run(files.signals, **{"eval": files.eval, source: unknown}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_class_in_the_labeled_texts_is_refused(run: Run, files: Files, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "x.jsonl", [row for row in ROWS if row["label"] != "World"])
    with pytest.raises(DataError, match="label 'World', got 0"):
        run(files.signals, labeled=few, eval=files.eval, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


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


def test_first_of_duplicate_texts_is_used(run: Run, tmp_path: Path) -> None:
    with_space = {**make_signals(ROWS[2], 0.4), "text": f"{ROWS[2]['text']} "}
    rows = [*SIGNALS, SIGNALS[0], with_space, make_signals(ROWS[1], 0.3)]
    result = run(write_jsonl(tmp_path / "signals.jsonl", rows), output_dir=tmp_path / "run")
    assert result.signals.texts == [row["text"] for row in ROWS]
    np.testing.assert_allclose(result.signals.probabilities.max(axis=1), GOLD_PROBABILITY, atol=1e-6)
    assert read_json(tmp_path / "run/run.json")["data"]["pool_duplicates"] == 3


def test_smaller_sample_is_a_subset_of_a_larger_one(run: Run, files: Files) -> None:
    samples = {size: run(files.with_embeddings, pool_size=size).signals for size in (20, 30)}
    assert {size: len(signals) for size, signals in samples.items()} == {20: 20, 30: 30}
    assert set(samples[20].texts) < set(samples[30].texts)
    rows = {row["text"]: row for row in SIGNALS_WITH_EMBEDDINGS}
    for signals in samples.values():
        expected = [[rows[text]["probabilities"][name] for name in LABEL_NAMES] for text in signals.texts]
        np.testing.assert_allclose(signals.probabilities, expected, atol=1e-6)
        embeddings = np.asarray(signals.embeddings)
        np.testing.assert_allclose(embeddings, [rows[text]["embedding"] for text in signals.texts], atol=1e-6)
    assert set(run(files.signals, pool_size=20, seed=1).signals.texts) != set(samples[20].texts)


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
        ({"unlabeled": "bundled:newswire"}, "Signals contain their own pool texts", "--unlabeled"),
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


def test_pool_passed_as_an_object_is_refused(run: Run, files: Files) -> None:
    with pytest.raises(ConfigError, match="Signals contain their own pool texts"):
        run(files.signals, unlabeled=["a text", "another"])


# The command line


@pytest.fixture(scope="module")
def by_command(files: Files, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "by-command"
    result = invoke(*command(files.signals, tiny_student, folder), "--eval", files.eval)
    assert result.exit_code == 0, result.output
    return folder, result


def command(signals: Path, student: Path, folder: Path) -> list[object]:
    settings = {name.replace("_", "-"): value for name, value in FAST.items() if name != "shots"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return ["run", *flags, "--batch-size", 16, "--signals", signals, "--student", student, "--output-dir", folder]


def test_command_equals_the_python_function(by_command: tuple[Path, Result], plain: FinishedRun) -> None:
    folder, command_result = by_command
    models = [load(path, device="cpu") for path in (folder, plain.folder)]
    assert equal_weights(*map(weights, models))
    assert f"setfit-kd predict {folder}" in command_result.stdout
    rows = [line.split()[0] for line in command_result.stdout.splitlines() if line.count("%") > 1]
    assert rows == ["student"]
    assert "teacher" not in command_result.stdout  # no empty column


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


@pytest.mark.parametrize("name", ["newswire", "ag_news"])
def test_signals_replace_the_data_of_the_preset(name: str) -> None:
    config = RunConfig.resolve(preset(name), {"signals": "signals.jsonl"})
    assert config.signals == "signals.jsonl"
    assert (config.labeled, config.unlabeled, config.eval, config.shots, config.pool_size) == (None,) * 5
    assert config.teacher == RunConfig.of(teacher=preset(name)["teacher"]).teacher  # not data, so kept; it is not used


def test_written_settings_contain_no_data_of_the_preset(by_command: tuple[Path, Result], files: Files) -> None:
    written = read_config(by_command[0] / "config.yaml")
    assert (written["labeled"], written["unlabeled"]) == (None, None)
    assert (written["signals"], written["eval"]) == (str(files.signals), str(files.eval))


def test_dry_run_lists_no_teacher(files: Files, tiny_student: Path, tmp_path: Path) -> None:
    planned = invoke(*command(files.signals, tiny_student, tmp_path / "run"), "--eval", files.eval, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    rows = [line.split() for line in planned.stdout.rpartition("steps")[2].strip().splitlines()]
    assert rows == [["student", "48", "3"], ["evaluation", "24"]]
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"Cannot read .*signals\.jsonl: No such file or directory\."),
        ([], r".*signals\.jsonl is empty\."),
        ([{"text": "a", "label": "b"}], r".*signals\.jsonl has the columns 'text', 'label'\."),
        (
            [*SIGNALS[:2], {**SIGNALS[2], "probabilities": {"World": 1.0}}, {**SIGNALS[3], "text": " "}],
            r".*signals\.jsonl, line 3: the label '.*' is only in the first row; line 4: the text is empty\.",
        ),
        (
            [*SIGNALS[:4], {**SIGNALS[5], "probabilities": dict.fromkeys(LABEL_NAMES, 0.5)}],
            r".*signals\.jsonl, line 5: the probabilities must sum to 1, got 2\.",
        ),
    ],
)
def test_unusable_file_is_reported_in_two_lines(
    rows: list[Row] | None, message: str, tiny_student: Path, tmp_path: Path
) -> None:
    if rows is not None:
        write_jsonl(tmp_path / "signals.jsonl", rows)
    result = invoke(*command(tmp_path / "signals.jsonl", tiny_student, tmp_path / "run"))
    assert result.exit_code == DataError.exit_code
    lines = result.stderr.strip().splitlines()
    assert re.fullmatch(f"Error: {message}", lines[-2])
    assert len(lines) == 2
    assert not (tmp_path / "run").exists()


def test_error_for_a_student_of_the_teacher_has_a_hint(files: Files, tmp_path: Path) -> None:
    result = invoke(*command(files.signals, Path("layers:2"), tmp_path / "run"))
    assert result.exit_code == ConfigError.exit_code
    assert "Name a model, as in layers:3@NAME or static@NAME." in result.stderr.splitlines()


# Stages that a resumed run repeats


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This must not be called.")


@pytest.fixture
def copied(with_gold: FinishedRun, files: Files, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run with gold labels, and of its signals file."""
    folder = Path(shutil.copytree(with_gold.folder, tmp_path / "run"))
    return folder, Path(shutil.copy(files.signals, tmp_path / "signals.jsonl"))


@pytest.mark.parametrize("moved", [False, True])
def test_same_signals_repeat_no_stage(
    moved: bool, copied: tuple[Path, Path], with_gold: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = copied
    for name in ("train_student", "train_teacher", "evaluate"):
        monkeypatch.setattr(f"setfit_kd.run.student_stages.{name}", refuse)
    distill(resume=folder, **({"signals": str(file), "labeled": read_config(folder / "config.yaml")["labeled"],
                               "eval": read_config(folder / "config.yaml")["eval"]} if moved else {}))  # fmt: skip
    assert (folder / "metrics.json").read_bytes() == (with_gold.folder / "metrics.json").read_bytes()


def change_a_probability(rows: list[Row]) -> None:
    rows[7].update(make_signals(ROWS[7], 0.75))


def add_an_embedding(rows: list[Row]) -> None:
    for row, with_embedding in zip(rows, SIGNALS_WITH_EMBEDDINGS, strict=True):
        row["embedding"] = with_embedding["embedding"]


@pytest.mark.parametrize("change", [change_a_probability, add_an_embedding])
def test_changed_signals_repeat_the_student_but_not_the_baseline(
    change: Callable[[list[Row]], None],
    copied: tuple[Path, Path],
    run: Run,
    files: Files,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, file = copied
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    change(rows)
    write_jsonl(file, rows)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        result = run(file, resume=folder, labeled=files.labeled, eval=files.eval)
    assert "Stage baseline: loaded from" in caplog.text
    assert "Stage student: loaded from" not in caplog.text
    fresh = run(file, labeled=files.labeled, baseline=False)
    assert equal_weights(weights(load(folder, device="cpu")), weights(fresh.student))
    assert list(result.evaluations) == ["baseline", "student"]


def test_changed_gold_labels_repeat_the_student(
    copied: tuple[Path, Path], run: Run, files: Files, tmp_path: Path
) -> None:
    folder, _ = copied
    changed = write_jsonl(tmp_path / "changed.jsonl", [{**ROWS[0], "label": ROWS[1]["label"]}, *ROWS[1:16]])
    assert ROWS[0]["label"] != ROWS[1]["label"]
    result = run(files.signals, resume=folder, labeled=changed, eval=files.eval)
    assert equal_weights(weights(result.student), weights(run(files.signals, labeled=changed, baseline=False).student))


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


def test_run_with_teacher_can_be_resumed_with_signals(
    run: Run, files: Files, teacher_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher_run, tmp_path / "run")
    run(files.signals, resume=folder, eval=files.eval)
    assert not any((folder / name).exists() for name in ("teacher", "signals", "baseline"))
    assert list(read_json(folder / "metrics.json")) == ["student"]


# Reports and comparisons


@pytest.mark.parametrize("name", ["plain", "with_gold"])
@pytest.mark.parametrize("kind", ["report.md", "report.html"])
def test_report_has_no_teacher(name: str, kind: str, request: pytest.FixtureRequest, files: Files) -> None:
    finished: FinishedRun = request.getfixturevalue(name)
    text = (finished.folder / kind).read_text(encoding="utf-8").replace("\\", "")
    assert f"Signals {files.signals}; student" in text
    body = text[text.index("<body>") :] if kind == "report.html" else text
    for heading in re.findall(r"<h\d>(.*?)</h\d>|^#+ (.*)$", body, re.MULTILINE):
        assert "teacher" not in "".join(heading)
    for column in ("agreement", "speedup"):
        assert not re.search(rf"\| {column}|<th[^>]*>{column}", body)
    assert "Comparison" in body
    assert "Errors with the highest confidence" in body


def test_comparison_note_does_not_mention_missing_columns(plain: FinishedRun) -> None:
    assert "Agreement" not in (plain.folder / "report.md").read_text(encoding="utf-8")


def test_verdict_is_about_the_student_only(plain: FinishedRun, with_gold: FinishedRun) -> None:
    accuracy = plain.result.evaluations["student"].quality.accuracy
    assert verdict(read_summary(plain.folder)) == f"The student has an accuracy of {accuracy:.1%}."
    text = verdict(read_summary(with_gold.folder))
    assert re.fullmatch(r"The student has an accuracy of \S+%\. Its accuracy is .* trained on the labels only.*", text)


def test_model_card_names_the_signals_file(plain: FinishedRun, files: Files) -> None:
    summary = read_summary(plain.folder)
    text = render_card(summary, summary.config.student[0]).replace("\\", "")
    assert "distilled by setfit-kd from the probabilities of signals.jsonl for 48 texts." in text
    assert str(files.signals.parent) not in text


def test_several_seeds_work_without_a_teacher(run: Run, files: Files, tmp_path: Path) -> None:
    result = run(files.signals, eval=files.eval, seeds=2, pool_size=30, output_dir=tmp_path / "run")
    assert result.over_seeds["student"].against == {}
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    accuracies = [evaluations["student"].quality.accuracy for evaluations in result.by_seed.values()]
    assert "Results over 2 seeds" in text
    mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"Over 2 seeds, the accuracy of the student is {mean:.1f} ± {std:.1f}%." in text


def as_dataset(path: Path, names: list[str]) -> Any:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return dataset({"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}, names)


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
    names = [(plain.folder, "student"), (teacher_run, "teacher"), (teacher_run, "student")]
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
        assert len(rows) == 3


def test_runs_with_different_label_order_can_be_compared(
    plain: FinishedRun, run: Run, files: Files, tmp_path: Path
) -> None:
    reordered = [{**row, "probabilities": dict(reversed(row["probabilities"].items()))} for row in SIGNALS]
    run(write_jsonl(tmp_path / "signals.jsonl", reordered), eval=files.eval, output_dir=tmp_path / "run")
    first, second = compare([plain.folder, tmp_path / "run"])
    assert second.difference is not None
    expected = second.evaluation.quality.accuracy - first.evaluation.quality.accuracy
    assert second.difference.value == pytest.approx(expected)


def test_predict_uses_the_student(plain: FinishedRun, tmp_path: Path) -> None:
    predicted = invoke("predict", plain.folder, ROWS[0]["text"], "--device", "cpu")
    assert predicted.exit_code == 0, predicted.output
    prediction = json.loads(predicted.stdout)
    expected = predict_proba(plain.result.student, [ROWS[0]["text"]])[0]
    assert list(prediction["probabilities"]) == LABEL_NAMES
    assert list(prediction["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
