"""The finetune command: sources, output folder and metrics."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import newswire
from safetensors.torch import load_file, save_file
from synthetic import equal_weights, raise_at_step, weight_distance, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from setfit_kd import evaluate, load
from setfit_kd.cli import main
from setfit_kd.config.run import FinetuneRunConfig
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.finetune.run import FinetuneResult, finetune_run
from setfit_kd.models.encode import predict_proba

NAMES = ["Business", "Sci/Tech", "Sports", "World"]
SPLITS = {"train": newswire("train")[:40], "validation": newswire("train")[40:60], "test": newswire("eval")[:20]}
STEPS = 15
"""Three epochs over 40 texts in batches of 8."""
QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-3,
}
EVERY_STEP = 1e-9

Row = dict[str, str]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Files:
    """A transformer, and the same texts as files and as a data set folder with splits."""

    model: Path
    train: Path
    validation: Path
    test: Path
    splits: Path

    @property
    def sources(self) -> dict[str, str]:
        return {"labeled": str(self.train), "validation": str(self.validation), "eval": str(self.test)}


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


def scale_weights(folder: Path) -> None:
    """Scale the weights so that the predictions of the random model differ more between texts."""
    weights = load_file(folder / "model.safetensors")
    scaled = {name: 15 * value if value.ndim > 1 else value for name, value in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Files:
    folder = tmp_path_factory.mktemp("files")
    for split, rows in SPLITS.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows({name: row[name] for name in ("text", "label")} for row in rows)
    make_splits(lambda rows: {"text": get_texts(rows)}).save_to_disk(folder / "splits")
    model = shutil.copytree(tiny_student.with_name(f"{tiny_student.name}-plain"), folder / "model")
    scale_weights(model)
    train, validation, test = (folder / f"{split}.csv" for split in SPLITS)
    return Files(model, train, validation, test, folder / "splits")


def run_finetune(files: Files, folder: Path, **settings: Any) -> FinetuneResult:
    defaults = {"model": str(files.model), **files.sources, "output_dir": folder, **QUICK}
    return finetune_run(FinetuneRunConfig.of(**{**defaults, **settings}))


def command(files: Files, folder: Path | None, **settings: Any) -> list[object]:
    options = {**files.sources, "output_dir": folder, **QUICK, **settings}
    return [
        *("finetune", files.model),
        *(
            part
            for name, value in options.items()
            if value is not None
            for part in (f"--{name.replace('_', '-')}", value)
        ),
    ]


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    stdout: str


@pytest.fixture(scope="module")
def by_command(files: Files, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("models") / "by-command"
    result = invoke(*command(files, folder), "--json")
    assert result.exit_code == 0, result.output
    return FinishedRun(folder, result.stdout)


# Output folder


def test_folder_contains_model_and_metrics(by_command: FinishedRun) -> None:
    assert {path.name for path in by_command.folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json")
    }
    assert {path.name for path in by_command.folder.parent.iterdir()} == {"by-command"}


def test_transformers_loads_the_model(by_command: FinishedRun) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(by_command.folder)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    make_pipeline: Any = pipeline
    classify = make_pipeline("text-classification", model=str(by_command.folder), device="cpu", top_k=None)
    texts = get_texts(SPLITS["test"])
    scores = [{item["label"]: item["score"] for item in row} for row in classify(texts, truncation=True)]
    expected = predict_proba(load(by_command.folder, device="cpu"), texts)
    np.testing.assert_allclose([[row[name] for name in NAMES] for row in scores], expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the texts have different predictions


def test_json_output_equals_the_metrics_in_the_folder(by_command: FinishedRun) -> None:
    metrics = read_json(by_command.folder / "metrics.json")
    assert list(metrics) == ["evaluation", "validation", "leaks", "validation_history", "settings", "files"]
    assert set(metrics["files"]) == {path.name for path in by_command.folder.iterdir()}
    assert metrics["validation"] is None
    assert json.loads(by_command.stdout) == {
        name: value for name, value in metrics.items() if name not in ("settings", "files")
    }


def test_evaluation_uses_the_evaluation_texts(by_command: FinishedRun, files: Files) -> None:
    metrics = read_json(by_command.folder / "metrics.json")["evaluation"]
    expected = evaluate(load(by_command.folder, device="cpu"), str(files.test)).quality
    assert metrics["confusion"] == expected.confusion
    assert sum(map(sum, metrics["confusion"])) == len(SPLITS["test"])
    assert {name: metrics[name] for name in expected.scores} == pytest.approx(expected.scores)
    assert {"accuracy", "f1-macro", "f1-weighted"} <= metrics.keys()
    assert metrics["megabytes"] > 0


def test_history_is_measured_on_the_validation_texts(by_command: FinishedRun) -> None:
    history = read_json(by_command.folder / "metrics.json")["validation_history"]
    assert [entry["step"] for entry in history] == [5, 10, 15]  # one per epoch
    for entry in history:
        assert set(entry) == {"step", "accuracy", "f1-macro", "f1-weighted"}
        n_correct = entry["accuracy"] * len(SPLITS["validation"])
        assert n_correct == pytest.approx(round(n_correct))


def test_written_settings_are_complete(by_command: FinishedRun, files: Files) -> None:
    settings = read_json(by_command.folder / "metrics.json")["settings"]
    expected = FinetuneRunConfig.of(model=str(files.model), **files.sources, output_dir=by_command.folder, **QUICK)
    assert FinetuneRunConfig.of(**settings) == expected


def test_best_weights_are_restored(files: Files, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", eval=None, eval_steps=2, metric="f1-macro")
    scores = [entry["f1-macro"] for entry in result.history]
    assert [entry["step"] for entry in result.history] == [*range(2, STEPS, 2), STEPS]
    assert scores[-1] < max(scores), "the last weights must not be the best"
    assert result.evaluation is None
    assert result.validation is not None
    assert result.validation.quality.scores["f1-macro"] == pytest.approx(max(scores))
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["evaluation"], metrics["validation"]["f1-macro"]) == (None, pytest.approx(max(scores)))
    evaluation = evaluate(load(tmp_path / "out", device="cpu"), str(files.validation))
    assert evaluation.quality.scores["f1-macro"] == pytest.approx(max(scores))


def test_last_weights_are_kept_without_validation_texts(by_command: FinishedRun, files: Files, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", validation=None)
    assert result.history == []
    assert result.evaluation is not None
    assert len(result.evaluation.gold) == len(SPLITS["test"])
    history = read_json(by_command.folder / "metrics.json")["validation_history"]
    best = max(history, key=lambda entry: entry["accuracy"])
    is_last = best["accuracy"] == history[-1]["accuracy"] and best is history[-1]
    assert equal_weights(weights(result.model), weights(load(by_command.folder, device="cpu"))) == is_last


def test_no_metrics_without_validation_and_evaluation_texts(files: Files, tmp_path: Path) -> None:
    result = invoke(*command(files, tmp_path / "out", validation=None, eval=None))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f'To use it: setfit-kd predict {tmp_path / "out"} "..."']
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["evaluation"], metrics["validation"], metrics["validation_history"]) == (None, None, [])


def test_output_marks_validation_metrics(files: Files, tmp_path: Path) -> None:
    result = invoke(*command(files, tmp_path / "out", eval=None, steps=1))
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'} (validation)" in result.stdout


def test_training_stops_after_patience(files: Files, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", learning_rate=1e-12, eval_steps=2, patience=2)
    assert [entry["step"] for entry in result.history] == [2, 4, 6]


def test_steps_override_epochs(files: Files, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", steps=4, eval_steps=3)
    assert [entry["step"] for entry in result.history] == [3, 4]


# Sources


def test_splits_of_a_folder_are_read_by_role(files: Files, by_command: FinishedRun, tmp_path: Path) -> None:
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(files.splits))
    result = invoke(*command(files, tmp_path / "out", **sources))
    assert result.exit_code == 0, result.output
    assert equal_weights(*(weights(load(folder, device="cpu")) for folder in (tmp_path / "out", by_command.folder)))
    metrics, expected = (read_json(folder / "metrics.json") for folder in (tmp_path / "out", by_command.folder))
    assert metrics["validation_history"] == expected["validation_history"]
    assert metrics["evaluation"]["confusion"] == expected["evaluation"]["confusion"]
    for name in ("accuracy", "f1-macro", "f1-weighted"):
        assert f"{expected['evaluation'][name]:.1%}" in result.stdout
        assert name in result.stdout


def write_tokens(files: Files, folder: Path, *, special: bool = True, padded: bool = False, text: bool = False) -> Path:
    tokenizer: Any = AutoTokenizer.from_pretrained(files.model)

    def columns(rows: list[Row]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            get_texts(rows), add_special_tokens=special, padding="max_length" if padded else False, truncation=True
        )
        tokens = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return {**tokens, "text": [row["text"] for row in rows]} if text else tokens

    make_splits(columns).save_to_disk(folder)
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"special": False}, {"padded": True}], ids=["default", "no special tokens", "padded"]
)
def test_tokenized_texts_are_decoded(
    options: dict[str, bool], files: Files, by_command: FinishedRun, tmp_path: Path
) -> None:
    folder = write_tokens(files, tmp_path / "tokens", **options)
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(folder))
    result = run_finetune(files, tmp_path / "out", **sources)
    assert equal_weights(weights(result.model), weights(load(by_command.folder, device="cpu")))
    assert result.evaluation is not None
    assert (
        result.evaluation.quality.confusion == read_json(by_command.folder / "metrics.json")["evaluation"]["confusion"]
    )


def test_texts_take_precedence_over_tokens(files: Files, by_command: FinishedRun, tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = write_tokens(files, tmp_path / "both", text=True)
    reversed_tokens = load_from_disk(str(folder)).map(lambda row: {"input_ids": row["input_ids"][::-1]})
    reversed_tokens.save_to_disk(tmp_path / "reversed")
    result = run_finetune(files, tmp_path / "out", labeled=str(tmp_path / "reversed"))
    assert equal_weights(weights(result.model), weights(load(by_command.folder, device="cpu")))


def test_tokens_of_another_tokenizer_are_refused(files: Files, tmp_path: Path) -> None:
    vocabulary: dict[str, int] = json.loads((files.model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    # Sequences of word endings that this tokenizer does not produce.
    endings = [token for piece, token in vocabulary.items() if piece.startswith("##")]
    rng = np.random.default_rng(0)
    splits = make_splits(lambda rows: {"input_ids": [rng.choice(endings, 20).tolist() for _ in rows]})
    splits.save_to_disk(tmp_path / "tokens")
    result = invoke(*command(files, tmp_path / "out", labeled=tmp_path / "tokens"))
    assert result.exit_code == DataError.exit_code
    assert f"do not match the tokenizer in {files.model}" in result.stderr
    assert "Pass the texts themselves, or the model whose tokenizer was used." in result.stderr.splitlines()
    assert not (tmp_path / "out").exists()


def test_column_names_can_be_set(files: Files, by_command: FinishedRun, tmp_path: Path) -> None:
    for split in SPLITS:
        text = getattr(files, split).read_text(encoding="utf-8")
        (tmp_path / f"{split}.csv").write_text(text.replace("text,label", "headline,topic", 1), encoding="utf-8")
    sources = {name: str(tmp_path / Path(path).name) for name, path in files.sources.items()}
    refused = invoke(*command(files, tmp_path / "out", **sources))
    assert refused.exit_code == DataError.exit_code
    assert "has no column 'text'" in refused.stderr
    result = run_finetune(files, tmp_path / "out", **sources, text_column="headline", label_column="topic")
    assert equal_weights(weights(result.model), weights(load(by_command.folder, device="cpu")))


@pytest.mark.parametrize("source", ["validation", "eval"])
def test_label_missing_in_the_training_set_is_refused(source: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na text,Weather\n", encoding="utf-8")
    with pytest.raises(DataError, match="labels that are not in the training set: 'Weather'"):
        run_finetune(files, tmp_path / "out", **{source: str(tmp_path / "x.csv")})
    assert not (tmp_path / "out").exists()


def test_leak_guard_removes_held_out_texts(files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write_rows(name: str, *parts: list[Row]) -> str:
        rows = [row for part in parts for row in part]
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                [("text", "label"), *((row["text"].upper() + "\u200b", row["label"]) for row in rows)]
            )
        return str(tmp_path / name)

    train, validation, test = SPLITS.values()
    sources = {
        "labeled": write_rows("train.csv", train, validation[:2], test[:3]),
        "validation": write_rows("validation.csv", validation, test[2:4]),
    }
    result = run_finetune(files, tmp_path / "out", steps=1, **sources)
    assert result.leaks == read_json(tmp_path / "out" / "metrics.json")["leaks"] == {"labeled": 5, "validation": 2}
    assert result.evaluation is not None
    assert len(result.evaluation.gold) == len(test)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "Leak guard: removed 5 labeled texts that are also in the validation or evaluation set.",
        "Leak guard: removed 2 validation texts that are also in the evaluation set.",
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"validation": "test"},
            r"test\.csv without .* of the evaluation set: no texts are left to compute accuracy",
        ),
        (
            {"eval": "train"},
            r"train\.csv without the texts of the validation or evaluation set: .* the label '.*', got 0",
        ),
        (
            {"validation": None, "eval": "train"},
            r"texts of the validation or evaluation set: .* the label '.*', got 0",
        ),
    ],
)
def test_too_few_texts_after_the_leak_guard_are_an_error(
    sources: dict[str, str | None], message: str, files: Files, tmp_path: Path
) -> None:
    paths = {name: file and str(getattr(files, file)) for name, file in sources.items()}
    with pytest.raises(DataError, match=message):
        run_finetune(files, tmp_path / "out", **paths)
    assert not (tmp_path / "out").exists()


def test_binary_f1_requires_validation_texts_of_the_second_class(tmp_path: Path, files: Files) -> None:
    rows = [("a", "no"), ("b", "no"), ("c", "yes"), ("d", "yes"), ("e", "no"), ("f", "yes")]
    for name, part in (("labeled", rows[:4]), ("validation", rows[4:]), ("eval", rows[5:])):
        lines = "".join(f"text {text},{label}\n" for text, label in part)
        (tmp_path / f"{name}.csv").write_text("text,label\n" + lines, encoding="utf-8")
    sources = {name: str(tmp_path / f"{name}.csv") for name in ("labeled", "validation", "eval")}
    with pytest.raises(DataError, match="no texts are left to compute f1-binary"):
        run_finetune(files, tmp_path / "out", **sources, metric="f1-binary")


def test_binary_f1_requires_two_classes(files: Files, tmp_path: Path) -> None:
    result = invoke(*command(files, tmp_path / "out", metric="f1-binary"))
    assert result.exit_code == ConfigError.exit_code
    assert "The metric f1-binary requires 2 classes, got 4." in result.stderr


# Settings


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("labeled", "Error: Invalid settings: labeled: is required."),
        ("output_dir", "Error: Invalid settings: output_dir: is required."),
    ],
)
def test_missing_setting_is_reported(missing: str, message: str, files: Files, tmp_path: Path) -> None:
    result = invoke(*command(files, **{"folder": tmp_path / "out", missing: None}))
    assert result.exit_code == ConfigError.exit_code
    assert result.stderr.splitlines()[0] == message
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: "),
        ({"batch_size": 0}, "batch_size: "),
        ({"learning_rate": 0}, "learning_rate: "),
        ({"eval_steps": 0}, "eval_steps: "),
        ({"patience": 0}, "patience: "),
        ({"metric": "f2"}, "metric: "),
        ({"schedule": "steep"}, "schedule: "),
        ({"model": " "}, "model: must not be empty"),
        ({"labeled": ""}, "labeled: must not be empty"),
        ({"objective": "pairs"}, "objective: unknown setting"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneRunConfig.of(**{"model": "m", "labeled": "l", "output_dir": "o", **settings})


# Folders


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_model_is_replaced_only_with_overwrite(files: Files, by_command: FinishedRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    (folder / "notes.txt").write_text("mine")
    (folder / "data").mkdir()
    (folder / "data" / "more.txt").write_text("also mine")
    (folder / "spare.bin").write_text("part of the earlier model")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "files": [*metrics["files"], "spare.bin"]}))
    checkpoints = tmp_path / "out.checkpoints"
    checkpoints.mkdir()
    (checkpoints / "kept.txt").write_text("mine")
    before = contents(folder)
    refused = invoke(*command(files, folder))
    assert refused.exit_code == OutputError.exit_code
    assert f"The folder {folder} is not empty." in refused.stderr
    assert "pass --overwrite" in refused.stderr
    assert contents(folder) == before
    replaced = invoke(*command(files, folder, steps=1), "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    other_files = {"notes.txt": b"mine", "data/more.txt": b"also mine"}
    assert contents(folder).keys() == contents(by_command.folder).keys() | other_files.keys()
    assert other_files.items() <= contents(folder).items()
    assert contents(checkpoints) == {"kept.txt": b"mine"}
    assert weight_distance(weights(load(folder, device="cpu")), weights(load(by_command.folder, device="cpu"))) > 0


def test_model_of_an_earlier_version_can_be_replaced(files: Files, by_command: FinishedRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    metrics = read_json(folder / "metrics.json")
    metrics["looks"] = metrics.pop("validation_history")  # the key in earlier versions
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(OutputError, match="not empty"):
        run_finetune(files, folder, steps=1)
    run_finetune(files, folder, steps=1, overwrite=True)
    assert "looks" not in read_json(folder / "metrics.json")


def test_interrupted_training_keeps_the_earlier_model(
    files: Files, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    before = contents(folder)
    raise_at_step(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(files, folder, overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("function", ["save_model", "write_text"])
def test_failed_write_keeps_the_earlier_model(
    function: str, files: Files, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    before = contents(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"setfit_kd.finetune.run.{function}", fail)
    with pytest.raises((OSError, OutputError)):
        run_finetune(files, folder, steps=1, overwrite=True)
    after = {name: content for name, content in contents(tmp_path).items() if "checkpoints" not in name}
    assert after == before


def test_model_is_written_to_the_current_folder(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_finetune(files, Path(), steps=1)
    assert load(tmp_path / "here", device="cpu").labels
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("names", [["notes.txt"], ["config.json"], ["model.safetensors", "other/config.json"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_with_other_files_is_never_replaced(
    names: list[str], overwrite: bool, files: Files, tmp_path: Path
) -> None:
    for name in names:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(OutputError, match="was not written by `setfit-kd finetune`"):
        run_finetune(files, tmp_path / "out", overwrite=overwrite)
    assert set(contents(tmp_path / "out").values()) == {b"mine"}
    assert len(contents(tmp_path / "out")) == len(names)


def test_file_as_output_folder_is_refused(files: Files, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        run_finetune(files, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_empty_and_missing_folders_are_accepted(files: Files, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        run_finetune(files, folder, steps=1, validation=None, eval=None)
        assert load(folder, device="cpu").labels == NAMES


# Interruptions


@pytest.mark.parametrize("step", [6, 15])
def test_resumed_training_equals_an_uninterrupted_one(
    step: int, files: Files, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    arguments = command(files, folder, checkpoint_seconds=EVERY_STEP)
    with monkeypatch.context() as patch:
        raise_at_step(patch, step, KeyboardInterrupt)
        interrupted = invoke(*arguments)
    assert interrupted.exit_code == 130
    assert not folder.exists()
    assert any((tmp_path / "out.checkpoints").rglob("whole.json"))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert f"Resuming from step {step - 1}" in result.stderr
    assert equal_weights(*(weights(load(path, device="cpu")) for path in (folder, by_command.folder)))
    metrics, expected = (read_json(path / "metrics.json") for path in (folder, by_command.folder))
    assert metrics["validation_history"] == expected["validation_history"]
    assert metrics["evaluation"]["confusion"] == expected["evaluation"]["confusion"]
    assert not (tmp_path / "out.checkpoints").exists()


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"labeled": "fewer"}, {"model": "other"}])
def test_changed_training_does_not_resume(
    change: dict[str, Any], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_student: Path
) -> None:
    with monkeypatch.context() as patch:
        raise_at_step(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(files, tmp_path / "out", steps=5, checkpoint_seconds=EVERY_STEP)
    lines = files.train.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    paths = {"fewer": str(tmp_path / "fewer.csv"), "other": str(tiny_student)}
    change = {name: paths.get(str(value), value) for name, value in change.items()}
    result = run_finetune(files, tmp_path / "out", **change, steps=5, checkpoint_seconds=EVERY_STEP)
    fresh = run_finetune(files, tmp_path / "fresh", **change, steps=5)
    assert equal_weights(weights(result.model), weights(fresh.model))


def test_settings_that_do_not_affect_the_model_can_change_on_resume(
    files: Files,
    by_command: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        raise_at_step(patch, 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(files, tmp_path / "out", checkpoint_seconds=EVERY_STEP)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        result = run_finetune(files, tmp_path / "out", encode_batch_size=7, eval=None, checkpoint_seconds=60)
    assert "Resuming from step 8" in caplog.text
    assert equal_weights(weights(result.model), weights(load(by_command.folder, device="cpu")))


def test_run_interrupted_during_evaluation_can_be_repeated(
    files: Files, by_command: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = command(files, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("setfit_kd.finetune.run.evaluate", stop)
        assert invoke(*arguments).exit_code == 130
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out").keys() == contents(by_command.folder).keys()


# Other commands


def test_predict_uses_the_model(by_command: FinishedRun) -> None:
    text = SPLITS["test"][0]["text"]
    result = invoke("predict", by_command.folder, text, "--device", "cpu")
    assert result.exit_code == 0, result.output
    prediction = json.loads(result.stdout)
    expected = predict_proba(load(by_command.folder, device="cpu"), [text])[0]
    assert prediction["probabilities"] == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5)


def test_evaluate_uses_the_model(by_command: FinishedRun, files: Files) -> None:
    result = invoke("evaluate", by_command.folder, "--eval", files.test, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    metrics = read_json(by_command.folder / "metrics.json")["evaluation"]
    assert json.loads(result.stdout)["confusion"] == metrics["confusion"]


def test_model_can_be_exported(by_command: FinishedRun, files: Files, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    bundle = tmp_path / "bundle"
    result = invoke("export", by_command.folder, "--output-dir", bundle, "--format", "onnx", "--unlabeled", files.test)
    assert result.exit_code == 0, result.output
    texts = get_texts(SPLITS["test"])
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    predicted = invoke("predict", bundle, "--input", tmp_path / "texts.txt")
    predictions = [json.loads(line)["probabilities"] for line in predicted.stdout.splitlines()]
    expected = predict_proba(load(by_command.folder, device="cpu"), texts)
    np.testing.assert_allclose([[row[name] for name in NAMES] for row in predictions], expected, atol=1e-4)


def test_model_can_be_finetuned_further(by_command: FinishedRun, files: Files, tmp_path: Path) -> None:
    result = run_finetune(files, tmp_path / "out", model=str(by_command.folder), learning_rate=1e-12, steps=1)
    assert weight_distance(weights(result.model), weights(load(by_command.folder, device="cpu"))) < 1e-6
    head = load(by_command.folder, device="cpu").model_head
    np.testing.assert_allclose(result.model.model_head.coef_, head.coef_, atol=1e-6)
