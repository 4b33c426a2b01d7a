"""Runs that distil question answering and masked language models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import newswire
from synthetic import WORDS, raise_at_step
from torch import OutOfMemoryError
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering

from setfit_kd.config.task_runs import TASK_RUNS
from setfit_kd.run.task_run import TaskRunResult, run_task
from setfit_kd.run_folder.manifest import Manifest

QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
TASKS = ("qa", "mlm")


def questions(n: int, seed: int) -> list[dict[str, Any]]:
    """Questions about a word of a context, which is the answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        words = list(dict.fromkeys(rng.choice(" ".join(WORDS).split(), 8)))
        context, answer = " ".join(words), words[number % len(words)]
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": f"{seed}-{number}", "question": f"where {answer}", "context": context, "answers": answers})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, masked_lm: Path) -> dict[str, Any]:
    """Settings of a run for each task."""
    folder = tmp_path_factory.mktemp("files")
    texts = {"unlabeled": newswire("train")[:40], "eval": newswire("eval")[:10]}
    pool = [{key: row[key] for key in ("id", "question", "context")} for row in questions(8, 2)]
    sets = {"labeled": questions(24, 1), "unlabeled": pool, "eval": questions(8, 3)}
    return {
        "qa": {
            **QUICK,
            **{name: write(folder / f"qa-{name}.jsonl", rows) for name, rows in sets.items()},
            "teacher": str(tiny_teacher),
            "student": "layers:2",
            "max_length": 64,
            "stride": 8,
        },
        "mlm": {
            **QUICK,
            **{name: write(folder / f"mlm-{name}.jsonl", rows) for name, rows in texts.items()},
            "teacher": str(masked_lm),
            "student": "layers:1",
            "max_length": 32,
        },
    }


def run(task: str, settings: dict[str, Any], folder: Path, **changes: Any) -> TaskRunResult:
    return run_task(TASK_RUNS[task].of(**{**settings[task], "output_dir": folder, **changes}))


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a finished run for each task."""
    folders = {task: tmp_path_factory.mktemp("runs") / task for task in TASKS}
    for task, folder in folders.items():
        run(task, settings, folder)
    return folders


@pytest.mark.parametrize("task", TASKS)
def test_run_is_complete_and_resumes(task: str, finished: dict[str, Path], trained_steps: list[int]) -> None:
    metrics = json.loads((finished[task] / "metrics.json").read_text())
    assert set(metrics) == {"teacher", "baseline", "student"}
    assert all(np.isfinite(np.hstack(list(values.values()))).all() for values in metrics.values())
    assert metrics["student"] != metrics["baseline"]
    assert Manifest.read(finished[task]).evaluated == list(metrics)
    loaders: dict[str, Any] = {"qa": AutoModelForQuestionAnswering, "mlm": AutoModelForMaskedLM}
    student = loaders[task].from_pretrained(finished[task] / "student")
    assert student.config.num_hidden_layers == {"qa": 2, "mlm": 1}[task]
    (finished[task] / "report.html").unlink()
    resumed = invoke("run", "--resume", finished[task])
    assert resumed.exit_code == 0, resumed.output
    assert trained_steps == []
    page = (finished[task] / "report.html").read_text()
    assert "of the student is" in page
    assert ("(95%: " in page) == (task == "qa")
    rewritten = invoke("report", finished[task])
    assert rewritten.exit_code == 0, rewritten.output
    assert "of the student is" in rewritten.stdout


@pytest.mark.parametrize("task", TASKS)
def test_interrupted_run_continues(
    task: str, settings: dict[str, Any], finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption is in the middle of the last training."""
    folder, every_step = tmp_path / "run", 1e-9
    stages = json.loads((finished[task] / "run.json").read_text())["stages"]
    steps = [len(stages[path]["losses"]) for path in ("teacher", "baseline", "student") if stages[path]["losses"]]
    with monkeypatch.context() as patch:
        raise_at_step(patch, sum(steps[:-1]) + 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(task, settings, folder, checkpoint_seconds=every_step)
    assert not (folder / "student").exists()
    resumed = invoke("run", "--resume", folder)
    assert resumed.exit_code == 0, resumed.output
    assert "--resume" not in resumed.stderr
    expected = json.loads((finished[task] / "metrics.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    for model, values in expected.items():
        numbers, expected_numbers = (np.hstack(list(figures.values())) for figures in (metrics[model], values))
        assert numbers == pytest.approx(expected_numbers, rel=1e-4), model


@pytest.mark.parametrize("task", TASKS)
def test_step_without_memory_is_repeated(
    task: str, settings: dict[str, Any], finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_at_step(monkeypatch, 2, OutOfMemoryError)
    run(task, settings, tmp_path / "run", baseline=False, dropout=False)
    events = json.loads((tmp_path / "run" / "run.json").read_text())["out_of_memory"]
    assert [event["step"] for event in events] == [2]
    assert "Out of memory" in (tmp_path / "run" / "report.html").read_text()


def test_trained_teacher_keeps_its_weights_and_settings(
    settings: dict[str, Any], finished: dict[str, Path], tmp_path: Path
) -> None:
    given, file = tmp_path / "given", "question_answering.json"
    shutil.copytree(finished["qa"] / "teacher", given)
    saved = {**json.loads((given / file).read_text()), "null_threshold": -100.0, "max_length": 48}
    (given / file).write_text(json.dumps(saved))
    result = run("qa", settings, tmp_path / "run", teacher=str(given))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["teacher"]["losses"] == []
    assert json.loads((tmp_path / "run" / "teacher" / file).read_text()) == saved
    assert result.metrics["teacher"]["f1"] == 0  # it gives no answers
    assert result.teacher.model_body.device.type == "cpu"


def test_threshold_is_chosen_on_validation_questions(settings: dict[str, Any], tmp_path: Path) -> None:
    unanswerable = [{**row, "answers": {"text": [], "answer_start": []}} for row in questions(8, 4)]
    rows = [*questions(8, 5), *unanswerable]
    result = run(
        "qa", settings, tmp_path / "run", validation=write(tmp_path / "validation.jsonl", rows), baseline=False
    )
    assert result.student.null_threshold is not None
    assert set(result.metrics) == {"teacher", "student"}


@pytest.mark.parametrize(
    ("task", "changes", "trained"),
    [
        ("qa", ("--temperature", 3), {"student"}),
        ("qa", ("--stride", 4, "--batch-size", 4), {"teacher", "baseline", "student"}),
        ("mlm", ("--cosine-weight", 0.5, "--head-c", 2), {"student"}),
        ("mlm", ("--steps", 2), {"baseline", "student"}),
    ],
)
def test_only_stages_that_depend_on_a_setting_run_again(
    task: str, changes: tuple[object, ...], trained: set[str], finished: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished[task], tmp_path / "run"))
    before = json.loads((folder / "run.json").read_text())["stages"]
    resumed = invoke("run", "--resume", folder, *changes)
    assert resumed.exit_code == 0, resumed.output
    after = json.loads((folder / "run.json").read_text())["stages"]
    again = {path for path in ("teacher", "baseline", "student") if after[path]["inputs"] != before[path]["inputs"]}
    assert again - ({"teacher"} if task == "mlm" else set()) == trained


def test_student_answers_questions(finished: dict[str, Path], settings: dict[str, Any]) -> None:
    answer = invoke("predict", finished["qa"], "where goal", "team goal bank", "--device", "cpu")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["answer"] in "team goal bank"
    evaluated = invoke("evaluate", finished["qa"], "--eval", settings["qa"]["eval"], "--device", "cpu", "--json")
    expected = json.loads((finished["qa"] / "metrics.json").read_text())["student"]
    assert json.loads(evaluated.stdout)["f1"] == pytest.approx(expected["f1"])


def test_task_of_a_resumed_run_cannot_change(finished: dict[str, Path]) -> None:
    assert_refused(invoke("run", "--resume", finished["qa"], "--task", "mlm"), "is a run of the task qa")
    assert_refused(invoke("run", "--resume", finished["qa"], "--output-dir", "other"), "--output-dir")
    Path("settings.yaml").write_text("task: [qa]")
    assert_refused(invoke("run", "--config", "settings.yaml"), "Unknown task")


def test_other_commands_say_what_a_run_distils(finished: dict[str, Path]) -> None:
    for task, kind in (("qa", "question answering"), ("mlm", "a masked language model")):
        assert_refused(invoke("compare", finished[task]), f"distils {kind}; only runs of classification", "report")
    kind = "is a masked language model, not a classifier"
    for command in (("predict", "a text"), ("export", "--output-dir", "bundle"), ("push", "me/model"), ("benchmark",)):
        assert_refused(invoke(command[0], finished["mlm"], *command[1:]), kind, "setfit-kd finetune")
    assert_refused(invoke("evaluate", finished["mlm"], "--eval", "bundled:newswire"), kind)
    assert_refused(invoke("benchmark", finished["qa"]), "is a question answering model, not a", "setfit-kd predict")


@pytest.mark.parametrize(
    ("task", "flags", "fragments"),
    [
        ("qa", ("--shots", 4), ("shots: unknown setting",)),
        ("qa", ("--student", "static:16"), ("static:16", "each token")),
        ("qa", ("--preset", "newswire"), ("--preset",)),
        ("mlm", ("--labeled", "few.csv"), ("labeled: unknown setting",)),
        ("mlm", ("--unlabeled", "missing.txt"), ("missing.txt",)),
        ("mlm", ("--teacher", "a", "--teacher", "b"), ("teacher",)),
    ],
)
def test_unusable_settings(
    task: str, flags: tuple[object, ...], fragments: tuple[str, ...], settings: dict[str, Any]
) -> None:
    names = [name for name in ("labeled", "unlabeled", "eval", "teacher") if name in settings[task]]
    given = [part for name in names if f"--{name}" not in flags for part in (f"--{name}", settings[task][name])]
    assert_refused(invoke("run", "--task", task, *given, "--output-dir", "run", *flags), *fragments)
    assert not Path("run").exists()
