"""The finetune command: sources, output folder and metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import newswire
from safetensors.torch import load_file, save_file
from synthetic import equal_weights, raise_at_step, weight_distance, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from setfit_kd import evaluate, load
from setfit_kd.config.run import FinetuneRunConfig
from setfit_kd.errors import DataError, OutputError, SetFitKDError
from setfit_kd.finetune.run import FinetuneResult, finetune_run

if TYPE_CHECKING:
    from setfit import SetFitModel

NAMES = ["Business", "Sci/Tech", "Sports", "World"]
SPLITS = {"train": newswire("train")[:40], "validation": newswire("train")[40:60], "test": newswire("eval")[:20]}
QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "epochs": 3, "batch_size": 8, "learning_rate": 1e-3}
EVERY_STEP = 1e-9

Row = dict[str, str]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def make_splits(make_columns: Callable[[list[Row]], dict[str, list[Any]]]) -> Any:
    """Create a `datasets.DatasetDict` of the splits, with integer labels."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    types = {"text": Value("string"), "label": ClassLabel(names=NAMES)}
    splits = {}
    for split, rows in SPLITS.items():
        columns = {**make_columns(rows), "label": [NAMES.index(row["label"]) for row in rows]}
        features = Features({name: types.get(name, List(Value("int32"))) for name in columns})
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def get_texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


def write_rows(path: Path, rows: list[Row], change: Callable[[str], str] = str) -> str:
    lines = [json.dumps({"text": change(row["text"]), "label": row["label"]}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    """Folder with a transformer, and the same texts as files and as a data set folder with splits."""
    folder = tmp_path_factory.mktemp("files")
    for split, rows in SPLITS.items():
        write_rows(folder / f"{split}.jsonl", rows)
    make_splits(lambda rows: {"text": get_texts(rows)}).save_to_disk(folder / "splits")
    model = shutil.copytree(tiny_student.with_name(f"{tiny_student.name}-plain"), folder / "model")
    # With larger weights, the predictions of the random model differ more between texts.
    weights = load_file(model / "model.safetensors")
    scaled = {name: 15 * value if value.ndim > 1 else value for name, value in weights.items()}
    save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_settings(files: Path, folder: Path | None, **settings: Any) -> dict[str, Any]:
    roles = {"labeled": "train", "validation": "validation", "eval": "test"}
    sources = {name: str(files / f"{split}.jsonl") for name, split in roles.items()}
    return {"model": str(files / "model"), **sources, "output_dir": folder, **QUICK, **settings}


def run_finetune(files: Path, folder: Path, **settings: Any) -> FinetuneResult:
    return finetune_run(FinetuneRunConfig.of(**make_settings(files, folder, **settings)))


def command(files: Path, folder: Path | None, **settings: Any) -> list[str]:
    options = make_settings(files, folder, **settings)
    arguments = ["finetune", options.pop("model")]
    for name, value in options.items():
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return arguments


class FinishedRun(NamedTuple):
    """A finished run by the command: its folder, output and metrics, and the model as loaded from the folder."""

    folder: Path
    stdout: str
    metrics: Any
    model: SetFitModel


@pytest.fixture(scope="module")
def by_command(files: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("models") / "by-command"
    result = invoke(*command(files, folder), "--json")
    assert result.exit_code == 0, result.output
    return FinishedRun(folder, result.stdout, read_json(folder / "metrics.json"), load(folder, device="cpu"))


# Output folder


def test_folder_contains_model_and_metrics(by_command: FinishedRun, files: Path) -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json"}
    assert {path.name for path in by_command.folder.iterdir()} == names
    assert {path.name for path in by_command.folder.parent.iterdir()} == {"by-command"}
    metrics = by_command.metrics
    assert list(metrics) == ["evaluation", "validation", "leaks", "validation_history", "settings", "files"]
    assert set(metrics["files"]) == names
    assert metrics["validation"] is None
    assert json.loads(by_command.stdout) == {
        name: value for name, value in metrics.items() if name not in ("settings", "files")
    }
    expected = FinetuneRunConfig.of(**make_settings(files, by_command.folder))
    assert FinetuneRunConfig.of(**metrics["settings"]) == expected
    model = AutoModelForSequenceClassification.from_pretrained(by_command.folder)
    assert model.config.id2label == dict(enumerate(NAMES))


def test_metrics_are_measured_on_validation_and_evaluation_texts(by_command: FinishedRun, files: Path) -> None:
    metrics = by_command.metrics["evaluation"]
    expected = evaluate(by_command.model, str(files / "test.jsonl")).quality
    assert metrics["confusion"] == expected.confusion
    assert sum(map(sum, metrics["confusion"])) == len(SPLITS["test"])
    assert {name: metrics[name] for name in expected.scores} == pytest.approx(expected.scores)
    assert {"accuracy", "f1-macro", "f1-weighted"} <= metrics.keys()
    assert metrics["megabytes"] > 0
    history = by_command.metrics["validation_history"]
    assert [entry["step"] for entry in history] == [5, 10, 15]  # one per epoch
    for entry in history:
        assert set(entry) == {"step", "accuracy", "f1-macro", "f1-weighted"}


def test_validation_metrics_of_the_best_weights_are_shown_without_evaluation_texts(files: Path, tmp_path: Path) -> None:
    settings = {"eval_steps": 2, "metric": "f1-macro", "patience": 9}
    result = invoke(*command(files, tmp_path / "out", eval=None, **settings))
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'} (validation)" in result.stdout
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert [entry["step"] for entry in metrics["validation_history"]] == [*range(2, 15, 2), 15]
    scores = [entry["f1-macro"] for entry in metrics["validation_history"]]
    assert scores[-1] < max(scores), "the last weights must not be the best"
    assert (metrics["evaluation"], metrics["validation"]["f1-macro"]) == (None, pytest.approx(max(scores)))
    evaluation = evaluate(load(tmp_path / "out", device="cpu"), str(files / "validation.jsonl"))
    assert evaluation.quality.scores["f1-macro"] == pytest.approx(max(scores))


def test_no_metrics_without_validation_and_evaluation_texts(files: Path, tmp_path: Path) -> None:
    result = invoke(*command(files, tmp_path / "out", validation=None, eval=None, steps=1))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f'To use it: setfit-kd predict {tmp_path / "out"} "..."']
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["evaluation"], metrics["validation"], metrics["validation_history"]) == (None, None, [])


# Sources


def test_splits_of_a_folder_are_read_by_role(files: Path, by_command: FinishedRun, tmp_path: Path) -> None:
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(files / "splits"))
    result = invoke(*command(files, tmp_path / "out", **sources))
    assert result.exit_code == 0, result.output
    assert equal_weights(weights(load(tmp_path / "out", device="cpu")), weights(by_command.model))
    metrics, expected = read_json(tmp_path / "out" / "metrics.json"), by_command.metrics
    assert metrics["validation_history"] == expected["validation_history"]
    for name in ("accuracy", "f1-macro", "f1-weighted"):
        assert f"{expected['evaluation'][name]:.1%}" in result.stdout
        assert name in result.stdout


@pytest.mark.parametrize("options", [{"add_special_tokens": False}, {"padding": "max_length"}], ids=str)
def test_tokenized_texts_are_decoded(options: Any, files: Path, by_command: FinishedRun, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(files / "model")

    def columns(rows: list[Row]) -> dict[str, list[Any]]:
        encoded = tokenizer(get_texts(rows), truncation=True, **options)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    make_splits(columns).save_to_disk(tmp_path / "tokens")
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(tmp_path / "tokens"))
    result = run_finetune(files, tmp_path / "out", **sources)
    assert equal_weights(weights(result.model), weights(by_command.model))


def test_tokens_of_another_tokenizer_are_refused(files: Path, tmp_path: Path) -> None:
    vocabulary: dict[str, int] = json.loads((files / "model" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    # Sequences of word endings that this tokenizer does not produce.
    endings = [token for piece, token in vocabulary.items() if piece.startswith("##")]
    rng = np.random.default_rng(0)
    splits = make_splits(lambda rows: {"input_ids": [rng.choice(endings, 20).tolist() for _ in rows]})
    splits.save_to_disk(tmp_path / "tokens")
    result = invoke(*command(files, tmp_path / "out", labeled=tmp_path / "tokens"))
    assert_refused(result, f"do not match the tokenizer in {files / 'model'}")
    assert not (tmp_path / "out").exists()


def test_column_names_can_be_set(files: Path, by_command: FinishedRun, tmp_path: Path) -> None:
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("labeled", "validation", "eval")}
    for path, split in zip(sources.values(), SPLITS, strict=True):
        text = (files / f"{split}.jsonl").read_text(encoding="utf-8")
        Path(path).write_text(text.replace('"text":', '"headline":').replace('"label":', '"topic":'))
    result = run_finetune(files, tmp_path / "out", **sources, text_column="headline", label_column="topic")
    assert equal_weights(weights(result.model), weights(by_command.model))


def test_leak_guard_removes_held_out_texts(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(text: str) -> str:
        return text.upper() + "\u200b"

    train, validation, test = SPLITS.values()
    sources = {
        "labeled": write_rows(tmp_path / "train.jsonl", [*train, *validation[:2], *test[:3]], change),
        "validation": write_rows(tmp_path / "validation.jsonl", [*validation, *test[2:4]], change),
    }
    result = run_finetune(files, tmp_path / "out", steps=1, **sources)
    assert result.leaks == read_json(tmp_path / "out" / "metrics.json")["leaks"] == {"labeled": 5, "validation": 2}
    assert result.evaluation is not None
    assert len(result.evaluation.gold) == len(test)
    assert "removed 2 validation texts that are also in the evaluation set." in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": "test"}, r"test\.jsonl without .* of the evaluation set: no texts are left"),
        ({"eval": "train"}, r"train\.jsonl without .* of the validation or evaluation set: .*, got 0"),
        ({"metric": "f1-binary"}, r"The metric f1-binary requires 2 classes, got 4\."),
        ({"validation": None, "patience": 1}, "patience requires validation texts"),
        ({"validation": None, "thresholds": "recall=0.9"}, "thresholds requires validation texts"),
        ({"metric": "f1-micro"}, "f1-micro is for several labels"),
    ],
)
def test_data_that_does_not_fit_the_settings_is_refused(
    settings: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    paths = {name: str(files / f"{value}.jsonl") for name, value in settings.items() if value in ("test", "train")}
    with pytest.raises(SetFitKDError, match=message):
        run_finetune(files, tmp_path / "out", **{**settings, **paths})
    assert not (tmp_path / "out").exists()


def test_binary_f1_requires_validation_texts_of_the_second_class(tmp_path: Path, files: Path) -> None:
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate("nnyyny")]
    parts = {"labeled": rows[:4], "validation": rows[4:], "eval": rows[5:]}
    sources = {name: write_rows(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()}
    with pytest.raises(DataError, match="no texts are left to compute f1-binary"):
        run_finetune(files, tmp_path / "out", **sources, metric="f1-binary")


# Settings


def test_mistakes_are_reported_before_torch_is_imported(files: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.doc").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    mistakes: dict[str, dict[str, Any]] = {
        "labeled: is required": {"labeled": None},
        "output_dir: is required": {"folder": None},
        "epochs: ": {"epochs": 0},
        "model: must not be empty": {"model": " "},
        "extension '.doc' is not supported": {"labeled": tmp_path / "texts.doc"},
        "No such file": {"eval": tmp_path / "missing.csv"},
        "is not empty": {"folder": tmp_path / "full"},
    }
    program = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom setfit_kd.cli import main\n"
        "for line in sys.stdin: print(CliRunner().invoke(main, json.loads(line)).output.splitlines()[0])\n"
        "print('torch' in sys.modules)"
    )
    commands = [command(files, **{"folder": tmp_path / "out", **settings}) for settings in mistakes.values()]
    lines = "".join(json.dumps(arguments) + "\n" for arguments in commands)
    process = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, text=True, check=True)
    *messages, torch_is_imported = process.stdout.splitlines()
    assert torch_is_imported == "False"
    for message, expected in zip(messages, mistakes, strict=True):
        assert message.startswith("Error: ")
        assert expected in message


# Folders


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_model_is_replaced_only_with_overwrite(files: Path, by_command: FinishedRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    (folder / "notes.txt").write_text("mine")
    (folder / "data").mkdir()
    (folder / "data" / "more.txt").write_text("also mine")
    (folder / "spare.bin").write_text("part of the earlier model")
    metrics = {**by_command.metrics, "files": [*by_command.metrics["files"], "spare.bin"]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    checkpoints = tmp_path / "out.checkpoints"
    checkpoints.mkdir()
    (checkpoints / "kept.txt").write_text("mine")
    before = contents(folder)
    assert_refused(invoke(*command(files, folder)), f"The folder {folder} is not empty.", "pass --overwrite")
    assert contents(folder) == before
    replaced = invoke(*command(files, folder, steps=1), "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    other_files = {"notes.txt": b"mine", "data/more.txt": b"also mine"}
    assert contents(folder).keys() == contents(by_command.folder).keys() | other_files.keys()
    assert other_files.items() <= contents(folder).items()
    assert contents(checkpoints) == {"kept.txt": b"mine"}
    assert weight_distance(weights(load(folder, device="cpu")), weights(by_command.model)) > 0


@pytest.mark.parametrize("function", ["training_step", "finetune.run.save_model", "utils.output_folder.write_text"])
def test_interruption_or_failed_write_keeps_the_earlier_model(
    function: str, files: Path, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    before = contents(tmp_path)

    if function == "training_step":
        raise_at_step(monkeypatch, 1, KeyboardInterrupt)
    else:
        error = OSError(28, "No space left on device")
        monkeypatch.setattr(f"setfit_kd.{function}", Mock(side_effect=error))
    with pytest.raises((OSError, OutputError, KeyboardInterrupt)):
        run_finetune(files, folder, steps=1, overwrite=True)
    after = {name: content for name, content in contents(tmp_path).items() if "checkpoints" not in name}
    assert after == before


@pytest.mark.parametrize("name", [".", "../a/b"])
def test_model_is_written_to_current_and_missing_folders(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_finetune(files, Path(name), steps=1, validation=None, eval=None)
    assert load((tmp_path / "here" / name).resolve(), device="cpu").labels == NAMES
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "a"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("out", "is a file, not a folder"), ("out/other/config.json", "was not written by `setfit-kd finetune`")],
)
def test_folders_and_files_of_others_are_never_replaced(name: str, message: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=message):
            run_finetune(files, tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


# Interruptions


def test_resumed_training_equals_an_uninterrupted_one(
    files: Path, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that do not affect the model may change."""
    folder, checkpoints = tmp_path / "out", tmp_path / "out.checkpoints"
    with monkeypatch.context() as patch:
        raise_at_step(patch, 9, KeyboardInterrupt)
        assert invoke(*command(files, folder, checkpoint_seconds=EVERY_STEP)).exit_code == 130
    assert not folder.exists()
    assert any(checkpoints.rglob("whole.json"))
    with monkeypatch.context() as patch:
        patch.setattr("setfit_kd.finetune.run.evaluate", Mock(side_effect=KeyboardInterrupt))
        evaluated = invoke(*command(files, folder, checkpoint_seconds=EVERY_STEP, encode_batch_size=7))
    assert evaluated.exit_code == 130
    assert "Resuming from step 8" in evaluated.stderr
    result = invoke(*command(files, folder, checkpoint_seconds=60))
    assert result.exit_code == 0, result.output
    assert "Resuming from step 14" in result.stderr
    assert equal_weights(weights(load(folder, device="cpu")), weights(by_command.model))
    assert read_json(folder / "metrics.json")["validation_history"] == by_command.metrics["validation_history"]
    assert contents(folder).keys() == contents(by_command.folder).keys()
    assert not checkpoints.exists()


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"labeled": "fewer"}, {"model": "other"}])
def test_changed_training_does_not_resume(
    change: dict[str, Any], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_student: Path
) -> None:
    with monkeypatch.context() as patch:
        raise_at_step(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(files, tmp_path / "out", steps=5, checkpoint_seconds=EVERY_STEP)
    fewer = write_rows(tmp_path / "fewer.jsonl", SPLITS["train"][:-1])
    paths = {"fewer": fewer, "other": str(tiny_student)}
    change = {name: paths.get(str(value), value) for name, value in change.items()}
    result = run_finetune(files, tmp_path / "out", **change, steps=5, checkpoint_seconds=EVERY_STEP)
    fresh = run_finetune(files, tmp_path / "fresh", **change, steps=5)
    assert equal_weights(weights(result.model), weights(fresh.model))


def test_model_can_be_finetuned_further(by_command: FinishedRun, files: Path, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", model=str(by_command.folder), learning_rate=1e-12, steps=1)
    assert weight_distance(weights(result.model), weights(by_command.model)) < 1e-6
