"""Runs that start from anybody's signals in the place of a teacher and a pool."""

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
from synthetic import same, weights

from setfit_kd import RunConfig, RunResult, distill, load
from setfit_kd.cli import main
from setfit_kd.config import preset, read_config
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.models import predict_proba
from setfit_kd.report import compare, read_summary, verdict
from setfit_kd.report.render import card

if TYPE_CHECKING:
    from setfit import SetFitModel

NAMES = ["World", "Business", "Sports", "Sci/Tech"]
"""In an order of the file's own; the texts come in turn."""
ROWS = [
    row
    for of_each in zip(*([row for row in newswire("train") if row["label"] == name] for name in NAMES), strict=False)
    for row in of_each
][:48]
HELD_OUT = newswire("eval")
SHARE = 0.7
"""The probability of the gold label."""
UNIFORM = 1 / len(NAMES) + (1 - SHARE)
"""How much of what the file says a student says that knows nothing."""

Row = dict[str, Any]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told_of(row: dict[str, str], share: float = SHARE) -> Row:
    rest = (1 - share) / (len(NAMES) - 1)
    return {
        "text": row["text"],
        "probabilities": {name: share if name == row["label"] else rest for name in NAMES},
    }


def embedding_of(row: dict[str, str], place: int) -> list[float]:
    """A direction a label, and a little of another for each text."""
    vector = np.eye(len(NAMES))[NAMES.index(row["label"])]
    return [*vector.tolist(), 0.1 * (place % 7)]


SAID = [told_of(row) for row in ROWS]
ELSEWHERE = [
    *({**row, "text": row["text"].upper() + "\u200b"} for row in ROWS[:8]),
    *(row for row in newswire("train")[-40:] if row not in ROWS),
]
"""Labels of some of the texts, written otherwise, and of texts that the file lacks."""
SAID_WITH_EMBEDDINGS = [
    {**said, "embedding": embedding_of(row, place)} for place, (row, said) in enumerate(zip(ROWS, SAID, strict=True))
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_columns(path: Path, rows: list[Row]) -> Path:
    """A column a label, as CSV, TSV or Parquet."""
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
class Given:
    """Files to start from."""

    said: Path
    with_embeddings: Path
    labeled: Path
    eval: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    return Given(
        write_jsonl(folder / "said.jsonl", SAID),
        write_jsonl(folder / "with-embeddings.jsonl", SAID_WITH_EMBEDDINGS),
        write_jsonl(folder / "labeled.jsonl", ROWS[:16]),
        write_jsonl(folder / "eval.jsonl", HELD_OUT[:24]),
    )


Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(tiny_student: Path) -> Run:
    def run(signals: Path, **others: Any) -> RunResult:
        base = {**FAST, "shots": None, "batch_size": 16, "signals": str(signals), "student": str(tiny_student)}
        return distill(**{**base, **others})

    return run


@dataclass(frozen=True)
class Finished:
    folder: Path
    result: RunResult


@pytest.fixture(scope="module")
def plain(run: Run, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with nothing but signals and an evaluation set."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return Finished(folder, run(given.said, eval=given.eval, output_dir=folder))


@pytest.fixture(scope="module")
def with_gold(run: Run, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same with gold labels of some of the texts."""
    folder = tmp_path_factory.mktemp("runs") / "with-gold"
    return Finished(folder, run(given.said, eval=given.eval, labeled=given.labeled, output_dir=folder))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# What a run makes of a file


def test_there_is_a_student_and_no_teacher(plain: Finished) -> None:
    assert {path.name for path in plain.folder.iterdir()} == {
        *("config.yaml", "run.json", "run.log", "metrics.json", "report.html", "report.md"),
        *("student", "evaluation", ".lock"),
    }
    assert plain.result.teacher is None
    assert list(plain.result.evaluations) == list(read_json(plain.folder / "metrics.json")) == ["student"]
    assert plain.result.evaluations["student"].quality.agreement is None
    assert plain.result.metrics["student"]["against"] == {}


def test_the_classes_are_those_of_the_file_in_its_order(plain: Finished) -> None:
    assert list(plain.result.signals.label_names) == NAMES
    assert load(plain.folder, device="cpu").labels == NAMES
    assert list(plain.result.evaluations["student"].quality.classes) == NAMES


def test_the_pool_are_the_texts_of_the_file(plain: Finished) -> None:
    signals = plain.result.signals
    assert signals.texts == [row["text"] for row in ROWS]
    expected = [[said["probabilities"][name] for name in NAMES] for said in SAID]
    np.testing.assert_allclose(signals.probabilities, expected, atol=1e-6)
    counts = read_json(plain.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["evaluation"]) == (0, 48, 24)


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_student(ending: str, run: Run, plain: Finished, tmp_path: Path) -> None:
    result = run(write(tmp_path / f"said.{ending}", SAID))
    assert result.signals.embeddings is None
    assert same(weights(result.student), weights(plain.result.student))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_with_embeddings_the_student_learns_how_texts_lie(ending: str, run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / f"said.{ending}", SAID_WITH_EMBEDDINGS)
    students = {
        objective: weights(run(path, objective=objective).student)
        for objective in (None, "similarity", "similarity,soft-labels=3")
    }
    assert same(students[None], students["similarity,soft-labels=3"])
    assert not same(students[None], students["similarity"])


def test_without_embeddings_the_objective_becomes_soft_labels(run: Run, given: Given, plain: Finished) -> None:
    assert plain.result.config.objective is None
    assert same(weights(run(given.said, objective="soft-labels").student), weights(plain.result.student))
    for objective in ("similarity", "embedding", "soft-labels,similarity", "pairs"):
        with pytest.raises(DataError, match=r"said\.jsonl hold no embeddings, which the objective needs") as raised:
            run(given.said, objective=objective)
        assert "--objective soft-labels" in str(raised.value.hint)


def test_an_objective_without_its_embeddings_is_refused_before_anything_is_made(
    run: Run, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="hold no embeddings"):
        run(given.said, objective="similarity", eval=given.eval, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


def shared(student: SetFitModel) -> float:
    """How much of what a student says of the texts is what the file says."""
    said = np.array([[row["probabilities"][name] for name in NAMES] for row in SAID])
    return float(np.minimum(predict_proba(student, [row["text"] for row in ROWS]), said).sum(axis=1).mean())


@pytest.mark.parametrize(
    "student", ["MODEL", "static:8@TEACHER", "layers:2@TEACHER", "layers:3,0@TEACHER", "transformer:MODEL"]
)
def test_any_body_of_its_own_learns_what_the_file_says(
    student: str, run: Run, given: Given, tiny_student: Path, tiny_teacher: Path
) -> None:
    name = student.replace("MODEL", str(tiny_student)).replace("TEACHER", str(tiny_teacher))
    result = run(given.said, student=name, learning_rate=1e-2, epochs=12)
    assert list(result.students) == [name]
    assert shared(result.student) > UNIFORM + 0.1


@pytest.mark.parametrize("student", ["layers:2", "layers:0,1", "static", "static:8"])
def test_what_is_made_of_the_teacher_cannot_be_made_without_one(
    student: str, run: Run, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="There is no teacher to make the student of") as raised:
        run(given.said, student=student, output_dir=tmp_path / "run")
    assert "layers:3@NAME" in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_several_students_learn_from_one_file(run: Run, given: Given, tiny_student: Path, tmp_path: Path) -> None:
    names = [str(tiny_student), f"static:4@{tiny_student}"]
    result = run(given.said, student=names, eval=given.eval, output_dir=tmp_path / "run")
    assert list(result.evaluations) == ["students/student", "students/static-4-student"]
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert text.count("The most confident errors") == 2


def test_no_teacher_is_looked_for(run: Run, given: Given) -> None:
    run(given.said, teacher="/there/is/no/such/model")


# Gold labels


def test_gold_labels_make_a_baseline(with_gold: Finished, plain: Finished) -> None:
    assert list(with_gold.result.evaluations) == ["baseline", "student"]
    assert (with_gold.folder / "baseline").is_dir()
    assert set(with_gold.result.metrics["student"]["against"]) == {"baseline"}
    assert list(plain.result.evaluations) == ["student"]


@pytest.mark.parametrize("has_eval", [False, True])
def test_without_evaluation_or_wish_there_is_no_baseline(
    has_eval: bool, run: Run, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setfit_kd.run.student_stages.train_teacher", refuse)
    others = {"eval": given.eval, "baseline": False} if has_eval else {}
    result = run(given.said, labeled=given.labeled, **others)
    assert list(result.evaluations) == ["student"] * has_eval


def test_gold_labels_count_where_the_file_is_wrong(run: Run, given: Given, tmp_path: Path) -> None:
    turned = {name: NAMES[(place + 1) % len(NAMES)] for place, name in enumerate(NAMES)}
    labeled = write_jsonl(tmp_path / "labeled.jsonl", [{**row, "label": turned[row["label"]]} for row in ROWS[:24]])

    def share_of_gold(**settings: Any) -> float:
        student = run(given.said, labeled=labeled, epochs=8, learning_rate=1e-2, **settings).student
        said = student.predict([row["text"] for row in ROWS[:24]])
        return float(np.mean([label == turned[row["label"]] for label, row in zip(said, ROWS, strict=False)]))

    assert share_of_gold(alpha=1.0, gold_weight=9.0) > 0.9
    assert share_of_gold(alpha=0.0, gold_weight=0.0) < 0.1


def test_labeled_texts_stay_among_the_signals(with_gold: Finished) -> None:
    assert len(with_gold.result.signals) == 48
    counts = read_json(with_gold.folder / "run.json")["data"]
    assert (counts["labeled"], counts["pool"], counts["pool_labeled"]) == (16, 48, 0)


def test_shots_are_drawn_from_the_labels(run: Run, given: Given) -> None:
    result = run(given.said, labeled=given.labeled, shots=2, output_dir=Path("run"))
    counts = read_json(Path("run/run.json"))["data"]
    assert (counts["labeled"], counts["pool"]) == (8, 48)
    assert len(result.signals) == 48


@pytest.mark.parametrize("which", ["labeled", "eval"])
def test_the_order_of_the_labels_is_the_files(which: str, run: Run, given: Given, with_gold: Finished) -> None:
    others = {"labeled": given.labeled, "eval": given.eval, which: as_dataset(getattr(given, which), sorted(NAMES))}
    result = run(given.said, **others)
    of, before = (found.evaluations for found in (result, with_gold.result))
    for name in ("baseline", "student"):
        assert of[name].quality == before[name].quality
        np.testing.assert_allclose(of[name].probabilities, before[name].probabilities, atol=1e-6)


def dataset(columns: dict[str, list[str]], names: list[str]) -> Any:
    """A data set whose labels are numbers of an order of its own."""
    from datasets import ClassLabel, Dataset

    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names))


@pytest.mark.parametrize("which", ["labeled", "eval"])
def test_a_label_that_the_file_lacks_is_refused(which: str, run: Run, given: Given, tmp_path: Path) -> None:
    strange = write_jsonl(tmp_path / "x.jsonl", [*ROWS[:8], {"text": "a text", "label": "Weather"}])
    with pytest.raises(DataError, match=r"x\.jsonl has labels that the training set lacks: 'Weather'; known: 'World'"):
        run(given.said, **{"eval": given.eval, which: strange}, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_of_too_few_classes_are_refused_before_anything_is_made(run: Run, given: Given, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "x.jsonl", [row for row in ROWS if row["label"] != "World"])
    with pytest.raises(DataError, match="label 'World' occurs in no text"):
        run(given.said, labeled=few, eval=given.eval, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


# Leaks, duplicates, draws


def test_texts_of_the_evaluation_set_are_taken_out(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaked = [ROWS[3], {**ROWS[5], "text": f"  {ROWS[5]['text'].upper()}\u200b "}]
    held_out = write_jsonl(tmp_path / "eval.jsonl", [*leaked, *HELD_OUT[:10]])
    result = run(write_jsonl(tmp_path / "said.jsonl", SAID_WITH_EMBEDDINGS), eval=held_out, output_dir=tmp_path / "run")
    left = [row for place, row in enumerate(SAID_WITH_EMBEDDINGS) if place not in (3, 5)]
    assert result.signals.texts == [row["text"] for row in left]
    np.testing.assert_allclose(
        result.signals.probabilities, [[row["probabilities"][name] for name in NAMES] for row in left], atol=1e-6
    )
    found = np.asarray(result.signals.embeddings)
    np.testing.assert_allclose(found, [row["embedding"] for row in left], atol=1e-6)
    assert "Leak guard: 2 pool texts are in the evaluation set and were taken out." in caplog.messages
    assert read_json(tmp_path / "run/run.json")["data"]["pool_leaks"] == 2


def test_of_texts_that_stand_twice_the_first_is_taken(run: Run, tmp_path: Path) -> None:
    other = {**told_of(ROWS[2], 0.4), "text": f"{ROWS[2]['text']} "}
    twice = [*SAID, SAID[0], other, told_of(ROWS[1], 0.3)]
    result = run(write_jsonl(tmp_path / "said.jsonl", twice), output_dir=tmp_path / "run")
    assert result.signals.texts == [row["text"] for row in ROWS]
    np.testing.assert_allclose(result.signals.probabilities.max(axis=1), SHARE, atol=1e-6)
    assert read_json(tmp_path / "run/run.json")["data"]["pool_duplicates"] == 3


def test_so_many_signals_are_drawn_and_a_smaller_draw_is_part_of_a_larger_one(run: Run, given: Given) -> None:
    drawn = {size: run(given.with_embeddings, pool_size=size).signals for size in (20, 30)}
    assert {size: len(signals) for size, signals in drawn.items()} == {20: 20, 30: 30}
    assert set(drawn[20].texts) < set(drawn[30].texts)
    told = {row["text"]: row for row in SAID_WITH_EMBEDDINGS}
    for signals in drawn.values():
        expected = [[told[text]["probabilities"][name] for name in NAMES] for text in signals.texts]
        np.testing.assert_allclose(signals.probabilities, expected, atol=1e-6)
        found = np.asarray(signals.embeddings)
        np.testing.assert_allclose(found, [told[text]["embedding"] for text in signals.texts], atol=1e-6)
    assert set(run(given.said, pool_size=20, seed=1).signals.texts) != set(drawn[20].texts)


def test_too_few_signals_for_a_batch_are_refused(run: Run, given: Given, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", SAID[:9])
    with pytest.raises(DataError, match="There are 9 texts to learn from, fewer than one batch of 16"):
        run(few, labeled=given.labeled)  # labels without signals fill no batch
    with pytest.raises(DataError, match="No pool text is left"):
        run(few, eval=write_jsonl(tmp_path / "eval.jsonl", ROWS[:9]))


# What does not go together


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"unlabeled": "bundled:newswire"}, "Signals bring their own texts", "--unlabeled"),
        ({"augment": 5}, "augment: with signals from elsewhere, there is no teacher", None),
        ({"seeds": 2}, "nothing to measure them on", "--eval"),
    ],
)
def test_what_does_not_go_with_signals_is_refused(
    settings: dict[str, Any], message: str, hint: str | None, run: Run, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        run(given.said, **settings, output_dir=tmp_path / "run")
    assert hint is None or hint in str(raised.value.hint)
    assert not (tmp_path / "run").exists()


def test_a_pool_given_as_an_object_is_refused_too(run: Run, given: Given) -> None:
    with pytest.raises(ConfigError, match="Signals bring their own texts"):
        run(given.said, unlabeled=["a text", "another"])


# The command line


@pytest.fixture(scope="module")
def by_command(given: Given, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "by-command"
    done = invoke(*command(given.said, tiny_student, folder), "--eval", given.eval)
    assert done.exit_code == 0, done.output
    return folder, done


def command(signals: Path, student: Path, folder: Path) -> list[object]:
    settings = {name.replace("_", "-"): value for name, value in FAST.items() if name != "shots"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return ["run", *flags, "--batch-size", 16, "--signals", signals, "--student", student, "--output-dir", folder]


def test_the_command_does_what_python_does(by_command: tuple[Path, Result], plain: Finished) -> None:
    folder, done = by_command
    models = [load(path, device="cpu") for path in (folder, plain.folder)]
    assert same(*map(weights, models))
    assert f"setfit-kd predict {folder}" in done.stdout
    rows = [line.split()[0] for line in done.stdout.splitlines() if "%" in line]
    assert rows == ["student"]
    assert "teacher" not in done.stdout  # a column with nothing in it


def test_a_bundle_is_checked_on_the_texts_of_the_signals(plain: Finished, given: Given, tmp_path: Path) -> None:
    done = invoke("export", plain.folder, "--format", "onnx", "--output-dir", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
    assert read_json(tmp_path / "bundle/manifest.json")["parity"]["texts"] == len(SAID)
    assert "Warning" not in done.stderr
    gone = shutil.copytree(plain.folder, tmp_path / "run")
    settings = (gone / "config.yaml").read_text(encoding="utf-8")
    (gone / "config.yaml").write_text(settings.replace(str(given.said), "gone.jsonl"), encoding="utf-8")
    refused = invoke("export", gone, "--output-dir", tmp_path / "other")
    assert refused.exit_code == 2
    assert "gone.jsonl" in refused.stderr
    assert "--unlabeled" in refused.stderr


@pytest.mark.parametrize("name", ["newswire", "ag_news"])
def test_signals_drop_the_data_of_the_preset(name: str) -> None:
    config = RunConfig.resolve(preset(name), {"signals": "said.jsonl"})
    assert config.signals == "said.jsonl"
    assert (config.labeled, config.unlabeled, config.eval, config.shots, config.pool_size) == (None,) * 5
    assert config.teacher == RunConfig.of(teacher=preset(name)["teacher"]).teacher  # which is not data, and not used


def test_the_settings_of_the_command_hold_no_data_of_the_preset(by_command: tuple[Path, Result], given: Given) -> None:
    written = read_config(by_command[0] / "config.yaml")
    assert (written["labeled"], written["unlabeled"]) == (None, None)
    assert (written["signals"], written["eval"]) == (str(given.said), str(given.eval))


def test_a_plan_tells_of_no_teacher(given: Given, tiny_student: Path, tmp_path: Path) -> None:
    planned = invoke(*command(given.said, tiny_student, tmp_path / "run"), "--eval", given.eval, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    rows = [line.split() for line in planned.stdout.rpartition("steps")[2].strip().splitlines()]
    assert rows == [["student", "48", "3"], ["evaluation", "24"]]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labeled", [None, ROWS[:16], ELSEWHERE], ids=["without", "with-gold", "elsewhere"])
def test_the_plan_is_what_is_trained(
    labeled: list[Row] | None, given: Given, tiny_student: Path, tmp_path: Path, trained: list[int]
) -> None:
    from setfit_kd.run import plan, prepare_run
    from setfit_kd.run import run as run_pipeline

    names = [f"static:4@{tiny_student}", f"transformer:{tiny_student}"]
    settings = {**FAST, "shots": None, "batch_size": 16, "signals": str(given.said), "eval": str(given.eval)}
    gold = labeled and str(write_jsonl(tmp_path / "gold.jsonl", labeled))
    config = RunConfig.of(**settings, student=names, labeled=gold)
    planned = plan(config, prepare_run(config))
    assert ("baseline" in [stage.stage for stage in planned]) == (labeled is not None)
    run_pipeline(config)
    assert len(trained) == sum(stage.steps for stage in planned)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"Cannot read .*said\.jsonl: No such file or directory\."),
        ([], r".*said\.jsonl is empty\."),
        ([{"text": "a", "label": "b"}], r".*said\.jsonl has the columns 'text', 'label'\."),
        (
            [*SAID[:2], {**SAID[2], "probabilities": {"World": 1.0}}, {**SAID[3], "text": " "}],
            r".*said\.jsonl, line 3: the label '.*' is only in the first row; line 4: the text is empty\.",
        ),
        (
            [*SAID[:4], {**SAID[5], "probabilities": dict.fromkeys(NAMES, 0.5)}],
            r".*said\.jsonl, line 5: the probabilities sum to 2\.",
        ),
    ],
)
def test_a_file_that_cannot_be_used_ends_in_two_lines(
    rows: list[Row] | None, message: str, tiny_student: Path, tmp_path: Path
) -> None:
    if rows is not None:
        write_jsonl(tmp_path / "said.jsonl", rows)
    done = invoke(*command(tmp_path / "said.jsonl", tiny_student, tmp_path / "run"))
    assert done.exit_code == DataError.exit_code
    told = done.stderr.strip().splitlines()
    assert re.fullmatch(f"Error: {message}", told[-2])
    assert len(told) == 2
    assert not (tmp_path / "run").exists()


def test_a_student_of_the_teacher_ends_in_two_lines(given: Given, tmp_path: Path) -> None:
    done = invoke(*command(given.said, Path("layers:2"), tmp_path / "run"))
    assert done.exit_code == ConfigError.exit_code
    assert "Name the model: layers:3@NAME, or static@NAME." in done.stderr.splitlines()


# What a resumed run does again


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("This was made before.")


@pytest.fixture
def copied(with_gold: Finished, given: Given, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run with gold labels, and of the file that it was made from."""
    folder = Path(shutil.copytree(with_gold.folder, tmp_path / "run"))
    return folder, Path(shutil.copy(given.said, tmp_path / "said.jsonl"))


@pytest.mark.parametrize("moved", [False, True])
def test_from_the_same_signals_nothing_is_made_anew(
    moved: bool, copied: tuple[Path, Path], with_gold: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = copied
    for name in ("train_student", "train_teacher", "evaluate"):
        monkeypatch.setattr(f"setfit_kd.run.student_stages.{name}", refuse)
    distill(resume=folder, **({"signals": str(file), "labeled": read_config(folder / "config.yaml")["labeled"],
                               "eval": read_config(folder / "config.yaml")["eval"]} if moved else {}))  # fmt: skip
    assert (folder / "metrics.json").read_bytes() == (with_gold.folder / "metrics.json").read_bytes()


def change_a_probability(rows: list[Row]) -> None:
    rows[7].update(told_of(ROWS[7], 0.75))


def add_an_embedding(rows: list[Row]) -> None:
    for row, other in zip(rows, SAID_WITH_EMBEDDINGS, strict=True):
        row["embedding"] = other["embedding"]


@pytest.mark.parametrize("change", [change_a_probability, add_an_embedding])
def test_from_other_signals_the_student_is_made_anew_and_the_baseline_is_not(
    change: Callable[[list[Row]], None],
    copied: tuple[Path, Path],
    run: Run,
    given: Given,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, file = copied
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    change(rows)
    write_jsonl(file, rows)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        result = run(file, resume=folder, labeled=given.labeled, eval=given.eval)
    assert "Stage baseline: taken from" in caplog.text
    assert "Stage student: taken from" not in caplog.text
    fresh = run(file, labeled=given.labeled, baseline=False)
    assert same(weights(load(folder, device="cpu")), weights(fresh.student))
    assert list(result.evaluations) == ["baseline", "student"]


def test_with_other_gold_labels_the_student_is_made_anew(
    copied: tuple[Path, Path], run: Run, given: Given, tmp_path: Path
) -> None:
    folder, _ = copied
    mended = write_jsonl(tmp_path / "mended.jsonl", [{**ROWS[0], "label": ROWS[1]["label"]}, *ROWS[1:16]])
    assert ROWS[0]["label"] != ROWS[1]["label"]
    result = run(given.said, resume=folder, labeled=mended, eval=given.eval)
    assert same(weights(result.student), weights(run(given.said, labeled=mended, baseline=False).student))


def test_a_static_body_of_another_model_is_made_anew_for_other_texts(
    run: Run, given: Given, tiny_teacher: Path, tmp_path: Path
) -> None:
    every = {"labeled": given.labeled, "eval": given.eval, "student": f"static:4@{tiny_teacher}"}
    run(given.said, **every, output_dir=tmp_path / "run")
    fewer = write_jsonl(tmp_path / "fewer.jsonl", SAID[: len(SAID) // 2])
    run(fewer, **every, resume=tmp_path / "run")
    run(fewer, **every, output_dir=tmp_path / "fresh")
    for name in ("student", "baseline"):
        bodies = [weights(load(tmp_path / place / name, device="cpu")) for place in ("run", "fresh")]
        assert same(*bodies), name


def test_an_ordinary_run_becomes_one_of_signals(run: Run, given: Given, ordinary: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ordinary, tmp_path / "run")
    run(given.said, resume=folder, eval=given.eval)
    assert not any((folder / name).exists() for name in ("teacher", "signals", "baseline"))
    assert list(read_json(folder / "metrics.json")) == ["student"]


# What is told


@pytest.mark.parametrize("name", ["plain", "with_gold"])
@pytest.mark.parametrize("kind", ["report.md", "report.html"])
def test_the_report_tells_of_no_teacher(name: str, kind: str, request: pytest.FixtureRequest, given: Given) -> None:
    finished: Finished = request.getfixturevalue(name)
    text = (finished.folder / kind).read_text(encoding="utf-8").replace("\\", "")
    assert f"Signals {given.said}; student" in text
    body = text[text.index("<body>") :] if kind == "report.html" else text
    for heading in re.findall(r"<h\d>(.*?)</h\d>|^#+ (.*)$", body, re.MULTILINE):
        assert "teacher" not in "".join(heading)
    for column in ("as teacher", "to teacher"):
        assert not re.search(rf"\| {column}|<th[^>]*>{column}", body)
    assert "Comparison" in body
    assert "The most confident errors" in body


def test_the_note_below_the_comparison_explains_no_column_that_is_not_there(plain: Finished) -> None:
    assert "as teacher" not in (plain.folder / "report.md").read_text(encoding="utf-8")


def test_the_verdict_is_of_the_student_alone(plain: Finished, with_gold: Finished) -> None:
    accuracy = plain.result.evaluations["student"].quality.accuracy
    assert verdict(read_summary(plain.folder)) == f"The student is right on {accuracy:.1%} of the texts."
    told = verdict(read_summary(with_gold.folder))
    assert re.fullmatch(r"The student is right on \S+% of the texts\. It is .* trained on the labels alone.*\.", told)


def test_a_model_card_tells_where_the_signals_are_from(plain: Finished, given: Given) -> None:
    account = read_summary(plain.folder)
    text = card(account, account.config.student[0]).replace("\\", "")
    assert "distilled by setfit-kd from the probabilities of said.jsonl for 48 texts." in text
    assert str(given.said.parent) not in text


def test_several_seeds_without_a_teacher(run: Run, given: Given, tmp_path: Path) -> None:
    result = run(given.said, eval=given.eval, seeds=2, pool_size=30, output_dir=tmp_path / "run")
    assert result.over_seeds["student"].against == {}
    text = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    accuracies = [of["student"].quality.accuracy for of in result.by_seed.values()]
    assert "Over 2 seeds" in text
    assert f"Over 2 seeds it has {100 * np.mean(accuracies):.1f} ± {100 * np.std(accuracies, ddof=1):.1f} %." in text


def as_dataset(path: Path, names: list[str]) -> Any:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return dataset({"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}, names)


@pytest.fixture(scope="module")
def ordinary(given: Given, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher, evaluated on the same texts, with the labels in the same order."""
    folder = tmp_path_factory.mktemp("runs") / "ordinary"
    few, held_out = (as_dataset(path, NAMES) for path in (given.labeled, given.eval))
    settings = {**FAST, "shots": None, "batch_size": 16, "cache": False, "student": "static:4"}
    distill(few, [row["text"] for row in ROWS[16:]], held_out, **settings, teacher=str(tiny_teacher), output_dir=folder)
    return folder


def test_runs_with_and_without_a_teacher_are_compared(plain: Finished, ordinary: Path) -> None:
    found = compare([plain.folder, ordinary])
    names = [(plain.folder, "student"), (ordinary, "teacher"), (ordinary, "student")]
    assert [(of.run, of.name) for of in found] == names
    assert found[0].difference is None
    for other in found[1:]:
        less = other.evaluation.quality.accuracy - found[0].evaluation.quality.accuracy
        assert other.difference is not None
        assert other.difference.value == pytest.approx(less)
    for order in ([plain.folder, ordinary], [ordinary, plain.folder]):
        done = invoke("compare", *order)
        assert done.exit_code == 0, done.output
        rows = [line for line in done.stdout.splitlines() if "%" in line]
        assert len(rows) == 3


def test_runs_are_compared_whatever_the_order_of_their_labels(
    plain: Finished, run: Run, given: Given, tmp_path: Path
) -> None:
    turned = [{**row, "probabilities": dict(reversed(row["probabilities"].items()))} for row in SAID]
    run(write_jsonl(tmp_path / "said.jsonl", turned), eval=given.eval, output_dir=tmp_path / "run")
    found = compare([plain.folder, tmp_path / "run"])
    less = found[1].evaluation.quality.accuracy - found[0].evaluation.quality.accuracy
    assert found[1].difference is not None
    assert found[1].difference.value == pytest.approx(less)


def test_the_student_is_used_like_any_other(plain: Finished, tmp_path: Path) -> None:
    predicted = invoke("predict", plain.folder, ROWS[0]["text"], "--device", "cpu")
    assert predicted.exit_code == 0, predicted.output
    said = json.loads(predicted.stdout)
    expected = predict_proba(plain.result.student, [ROWS[0]["text"]])[0]
    assert list(said["probabilities"]) == NAMES
    assert list(said["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
