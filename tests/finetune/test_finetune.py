"""The command that fine-tunes a transformer: its sources, its folder, and what it measures."""

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
from synthetic import distance, same, stop_at, weights
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from setfit_kd import evaluate, load
from setfit_kd.cli import main
from setfit_kd.config import FinetuneRunConfig
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.finetune import FinetuneResult, finetune_run
from setfit_kd.models import predict_proba

NAMES = ["Business", "Sci/Tech", "Sports", "World"]
SPLITS = {"train": newswire("train")[:40], "validation": newswire("train")[40:60], "test": newswire("eval")[:20]}
STEPS = 15
"""Three passes over 40 texts in batches of 8."""
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
class Given:
    """A transformer, and the same texts in files and as one folder of splits."""

    model: Path
    train: Path
    validation: Path
    test: Path
    splits: Path

    @property
    def files(self) -> dict[str, str]:
        return {"labeled": str(self.train), "validation": str(self.validation), "eval": str(self.test)}


def splits_of(columns_of: Callable[[list[Row]], dict[str, list[Any]]]) -> Any:
    """The splits as `datasets` has them, labels as numbers."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    kinds = {"text": Value("string"), "label": ClassLabel(names=NAMES)}
    found = {}
    for split, rows in SPLITS.items():
        columns = {**columns_of(rows), "label": [NAMES.index(row["label"]) for row in rows]}
        features = Features({name: kinds.get(name, List(Value("int32"))) for name in columns})
        found[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(found)


def texts_of(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


def spread_out(folder: Path) -> None:
    """Make texts differ more to a random model."""
    weights = load_file(folder / "model.safetensors")
    wider = {name: 15 * value if value.ndim > 1 else value for name, value in weights.items()}
    save_file(wider, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Given:
    folder = tmp_path_factory.mktemp("given")
    for split, rows in SPLITS.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows({name: row[name] for name in ("text", "label")} for row in rows)
    splits_of(lambda rows: {"text": texts_of(rows)}).save_to_disk(folder / "splits")
    model = shutil.copytree(tiny_student.with_name(f"{tiny_student.name}-plain"), folder / "model")
    spread_out(model)
    train, validation, test = (folder / f"{split}.csv" for split in SPLITS)
    return Given(model, train, validation, test, folder / "splits")


def finetuned(given: Given, folder: Path, **settings: Any) -> FinetuneResult:
    every = {"model": str(given.model), **given.files, "output_dir": folder, **QUICK}
    return finetune_run(FinetuneRunConfig.of(**{**every, **settings}))


def command(given: Given, folder: Path | None, **settings: Any) -> list[object]:
    every = {**given.files, "output_dir": folder, **QUICK, **settings}
    return [
        *("finetune", given.model),
        *(
            part
            for name, value in every.items()
            if value is not None
            for part in (f"--{name.replace('_', '-')}", value)
        ),
    ]


@dataclass(frozen=True)
class Finished:
    folder: Path
    stdout: str


@pytest.fixture(scope="module")
def by_command(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("models") / "by-command"
    done = invoke(*command(given, folder), "--json")
    assert done.exit_code == 0, done.output
    return Finished(folder, done.stdout)


# What is in the folder


def test_the_folder_holds_a_model_and_what_was_measured(by_command: Finished) -> None:
    assert {path.name for path in by_command.folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "metrics.json")
    }
    assert {path.name for path in by_command.folder.parent.iterdir()} == {"by-command"}


def test_transformers_reads_it(by_command: Finished) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(by_command.folder)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: place for place, name in enumerate(NAMES)}
    make_pipeline: Any = pipeline
    classify = make_pipeline("text-classification", model=str(by_command.folder), device="cpu", top_k=None)
    texts = texts_of(SPLITS["test"])
    said = [{one["label"]: one["score"] for one in row} for row in classify(texts, truncation=True)]
    expected = predict_proba(load(by_command.folder, device="cpu"), texts)
    np.testing.assert_allclose([[row[name] for name in NAMES] for row in said], expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # not all alike


def test_the_json_is_what_the_folder_tells(by_command: Finished) -> None:
    told = read_json(by_command.folder / "metrics.json")
    assert list(told) == ["evaluation", "validation", "leaks", "looks", "settings", "files"]
    assert set(told["files"]) == {path.name for path in by_command.folder.iterdir()}
    assert told["validation"] is None
    assert json.loads(by_command.stdout) == {
        name: value for name, value in told.items() if name not in ("settings", "files")
    }


def test_the_evaluation_is_of_the_evaluation_texts(by_command: Finished, given: Given) -> None:
    told = read_json(by_command.folder / "metrics.json")["evaluation"]
    again = evaluate(load(by_command.folder, device="cpu"), str(given.test))
    assert told["confusion"] == again.quality.confusion
    assert sum(map(sum, told["confusion"])) == len(SPLITS["test"])
    assert {name: told[name] for name in again.quality.scores} == pytest.approx(again.quality.scores)
    assert {"accuracy", "f1-macro", "f1-weighted"} <= told.keys()
    assert told["megabytes"] > 0


def test_the_looks_are_of_the_validation_texts(by_command: Finished) -> None:
    looks = read_json(by_command.folder / "metrics.json")["looks"]
    assert [look["step"] for look in looks] == [5, 10, 15]  # one a pass
    for look in looks:
        assert set(look) == {"step", "accuracy", "f1-macro", "f1-weighted"}
        assert look["accuracy"] * len(SPLITS["validation"]) == pytest.approx(
            round(look["accuracy"] * len(SPLITS["validation"]))
        )


def test_the_settings_tell_the_whole_training(by_command: Finished, given: Given) -> None:
    told = read_json(by_command.folder / "metrics.json")["settings"]
    expected = FinetuneRunConfig.of(model=str(given.model), **given.files, output_dir=by_command.folder, **QUICK)
    assert FinetuneRunConfig.of(**told) == expected


def test_the_best_weights_are_kept(given: Given, tmp_path: Path) -> None:
    result = finetuned(given, tmp_path / "out", eval=None, eval_steps=2, metric="f1-macro")
    scores = [look["f1-macro"] for look in result.looks]
    assert [look["step"] for look in result.looks] == [*range(2, STEPS, 2), STEPS]
    assert scores[-1] < max(scores), "nothing is to be seen"
    assert result.evaluation is None
    assert result.validation is not None
    assert result.validation.quality.scores["f1-macro"] == pytest.approx(max(scores))
    told = read_json(tmp_path / "out" / "metrics.json")
    assert (told["evaluation"], told["validation"]["f1-macro"]) == (None, pytest.approx(max(scores)))
    kept = evaluate(load(tmp_path / "out", device="cpu"), str(given.validation))
    assert kept.quality.scores["f1-macro"] == pytest.approx(max(scores))


def test_without_validation_the_last_weights_are_kept(by_command: Finished, given: Given, tmp_path: Path) -> None:
    result = finetuned(given, tmp_path / "out", validation=None)
    assert result.looks == []
    assert result.evaluation is not None
    assert len(result.evaluation.gold) == len(SPLITS["test"])
    looks = read_json(by_command.folder / "metrics.json")["looks"]
    best = max(looks, key=lambda look: look["accuracy"])
    is_last = best["accuracy"] == looks[-1]["accuracy"] and best is looks[-1]
    assert same(weights(result.model), weights(load(by_command.folder, device="cpu"))) == is_last


def test_without_validation_and_evaluation_nothing_is_measured(given: Given, tmp_path: Path) -> None:
    done = invoke(*command(given, tmp_path / "out", validation=None, eval=None))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f'Use it: setfit-kd predict {tmp_path / "out"} "..."']
    told = read_json(tmp_path / "out" / "metrics.json")
    assert (told["evaluation"], told["validation"], told["looks"]) == (None, None, [])


def test_scores_on_validation_texts_are_printed_as_such(given: Given, tmp_path: Path) -> None:
    done = invoke(*command(given, tmp_path / "out", eval=None, steps=1))
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'out'} (validation)" in done.stdout


def test_training_ends_when_it_gets_no_better(given: Given, tmp_path: Path) -> None:
    result = finetuned(given, tmp_path / "out", learning_rate=1e-12, eval_steps=2, patience=2)
    assert [look["step"] for look in result.looks] == [2, 4, 6]


def test_steps_take_the_place_of_passes(given: Given, tmp_path: Path) -> None:
    result = finetuned(given, tmp_path / "out", steps=4, eval_steps=3)
    assert [look["step"] for look in result.looks] == [3, 4]


# Sources


def test_a_folder_of_splits_is_taken_by_role(given: Given, by_command: Finished, tmp_path: Path) -> None:
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(given.splits))
    done = invoke(*command(given, tmp_path / "out", **sources))
    assert done.exit_code == 0, done.output
    assert same(*(weights(load(folder, device="cpu")) for folder in (tmp_path / "out", by_command.folder)))
    told, expected = (read_json(folder / "metrics.json") for folder in (tmp_path / "out", by_command.folder))
    assert told["looks"] == expected["looks"]
    assert told["evaluation"]["confusion"] == expected["evaluation"]["confusion"]
    for name in ("accuracy", "f1-macro", "f1-weighted"):
        assert f"{expected['evaluation'][name]:.1%}" in done.stdout
        assert name in done.stdout


def tokenised(given: Given, folder: Path, *, special: bool = True, padded: bool = False, text: bool = False) -> Path:
    read: Any = AutoTokenizer.from_pretrained(given.model)

    def columns(rows: list[Row]) -> dict[str, list[Any]]:
        made = read(
            texts_of(rows), add_special_tokens=special, padding="max_length" if padded else False, truncation=True
        )
        found = {name: made[name] for name in ("input_ids", "attention_mask")}
        return {**found, "text": [row["text"] for row in rows]} if text else found

    splits_of(columns).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("how", [{}, {"special": False}, {"padded": True}], ids=["whole", "bare", "padded"])
def test_what_is_tokenised_already_is_read_back(
    how: dict[str, bool], given: Given, by_command: Finished, tmp_path: Path
) -> None:
    folder = tokenised(given, tmp_path / "tokens", **how)
    sources = dict.fromkeys(("labeled", "validation", "eval"), str(folder))
    result = finetuned(given, tmp_path / "out", **sources)
    assert same(weights(result.model), weights(load(by_command.folder, device="cpu")))
    assert result.evaluation is not None
    assert (
        result.evaluation.quality.confusion == read_json(by_command.folder / "metrics.json")["evaluation"]["confusion"]
    )


def test_where_there_are_texts_the_tokens_are_left(given: Given, by_command: Finished, tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = tokenised(given, tmp_path / "both", text=True)
    turned = load_from_disk(str(folder)).map(lambda row: {"input_ids": row["input_ids"][::-1]})
    turned.save_to_disk(tmp_path / "turned")
    result = finetuned(given, tmp_path / "out", labeled=str(tmp_path / "turned"))
    assert same(weights(result.model), weights(load(by_command.folder, device="cpu")))


def test_tokens_of_another_tokenizer_are_refused(given: Given, tmp_path: Path) -> None:
    vocabulary: dict[str, int] = json.loads((given.model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    # What are whole words to one tokenizer are ends of words to another.
    ends = [token for piece, token in vocabulary.items() if piece.startswith("##")]
    rng = np.random.default_rng(0)
    splits_of(lambda rows: {"input_ids": [rng.choice(ends, 20).tolist() for _ in rows]}).save_to_disk(
        tmp_path / "tokens"
    )
    done = invoke(*command(given, tmp_path / "out", labeled=tmp_path / "tokens"))
    assert done.exit_code == DataError.exit_code
    assert f"are not what the tokenizer in {given.model} makes of their texts" in done.stderr
    assert "Give the texts themselves, or the model whose tokenizer was used." in done.stderr.splitlines()
    assert not (tmp_path / "out").exists()


def test_columns_may_have_other_names(given: Given, by_command: Finished, tmp_path: Path) -> None:
    for split in SPLITS:
        text = getattr(given, split).read_text(encoding="utf-8")
        (tmp_path / f"{split}.csv").write_text(text.replace("text,label", "headline,topic", 1), encoding="utf-8")
    sources = {name: str(tmp_path / Path(path).name) for name, path in given.files.items()}
    wrong = invoke(*command(given, tmp_path / "out", **sources))
    assert wrong.exit_code == DataError.exit_code
    assert "has no column 'text'" in wrong.stderr
    result = finetuned(given, tmp_path / "out", **sources, text_column="headline", label_column="topic")
    assert same(weights(result.model), weights(load(by_command.folder, device="cpu")))


@pytest.mark.parametrize("which", ["validation", "eval"])
def test_a_label_that_is_not_trained_on_is_refused(which: str, given: Given, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na text,Weather\n", encoding="utf-8")
    with pytest.raises(DataError, match="has labels that the training set lacks: 'Weather'"):
        finetuned(given, tmp_path / "out", **{which: str(tmp_path / "x.csv")})
    assert not (tmp_path / "out").exists()


def test_texts_to_be_measured_on_are_taken_out_of_what_comes_before(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def added(name: str, *others: list[Row]) -> str:
        rows = [row for rows in others for row in rows]
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                [("text", "label"), *((row["text"].upper() + "\u200b", row["label"]) for row in rows)]
            )
        return str(tmp_path / name)

    train, validation, test = SPLITS.values()
    sources = {
        "labeled": added("train.csv", train, validation[:2], test[:3]),
        "validation": added("validation.csv", validation, test[2:4]),
    }
    result = finetuned(given, tmp_path / "out", steps=1, **sources)
    assert result.leaks == read_json(tmp_path / "out" / "metrics.json")["leaks"] == {"labeled": 5, "validation": 2}
    assert result.evaluation is not None
    assert len(result.evaluation.gold) == len(test)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "Leak guard: 5 labeled texts are in the validation or evaluation set and were taken out.",
        "Leak guard: 2 validation texts are in the evaluation set and were taken out.",
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"validation": "test"}, r"test\.csv without the texts of the evaluation set: no text is left that accuracy"),
        (
            {"eval": "train"},
            r"train\.csv without the texts of the validation or evaluation set: label '.*' occurs in no",
        ),
        (
            {"validation": None, "eval": "train"},
            r"texts of the validation or evaluation set: label '.*' occurs in no text",
        ),
    ],
)
def test_a_leak_guard_that_leaves_too_little_is_an_error(
    sources: dict[str, str | None], message: str, given: Given, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        finetuned(given, tmp_path / "out", **{name: of and str(getattr(given, of)) for name, of in sources.items()})
    assert not (tmp_path / "out").exists()


def test_binary_f1_needs_validation_texts_of_the_second_class(tmp_path: Path, given: Given) -> None:
    rows = [("a", "no"), ("b", "no"), ("c", "yes"), ("d", "yes"), ("e", "no"), ("f", "yes")]
    for name, taken in (("labeled", rows[:4]), ("validation", rows[4:]), ("eval", rows[5:])):
        lines = "".join(f"text {text},{label}\n" for text, label in taken)
        (tmp_path / f"{name}.csv").write_text("text,label\n" + lines, encoding="utf-8")
    sources = {name: str(tmp_path / f"{name}.csv") for name in ("labeled", "validation", "eval")}
    with pytest.raises(DataError, match="no text is left that f1-binary can be measured on"):
        finetuned(given, tmp_path / "out", **sources, metric="f1-binary")


def test_of_four_classes_there_is_no_binary_f1(given: Given, tmp_path: Path) -> None:
    done = invoke(*command(given, tmp_path / "out", metric="f1-binary"))
    assert done.exit_code == ConfigError.exit_code
    assert "There are 4 classes, binary F1 is of two." in done.stderr


# Settings


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("labeled", "Error: Invalid settings: labeled: must be given."),
        ("output_dir", "Error: Invalid settings: output_dir: must be given."),
    ],
)
def test_what_must_be_given_is_told(left_out: str, told: str, given: Given, tmp_path: Path) -> None:
    done = invoke(*command(given, **{"folder": tmp_path / "out", left_out: None}))
    assert done.exit_code == ConfigError.exit_code
    assert done.stderr.splitlines()[0] == told
    assert "Traceback" not in done.output
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
        ({"objective": "pairs"}, "objective: is not a setting"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneRunConfig.of(**{"model": "m", "labeled": "l", "output_dir": "o", **settings})


# Folders


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_model_is_replaced_on_request_alone(given: Given, by_command: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    (folder / "notes.txt").write_text("mine")
    (folder / "data").mkdir()
    (folder / "data" / "more.txt").write_text("mine too")
    (folder / "spare.bin").write_text("of the earlier model")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "files": [*metrics["files"], "spare.bin"]}))
    beside = tmp_path / "out.checkpoints"
    beside.mkdir()
    (beside / "kept.txt").write_text("mine")
    before = contents(folder)
    refused = invoke(*command(given, folder))
    assert refused.exit_code == OutputError.exit_code
    assert f"The folder {folder} is not empty." in refused.stderr
    assert "add --overwrite" in refused.stderr
    assert contents(folder) == before
    replaced = invoke(*command(given, folder, steps=1), "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    own = {"notes.txt": b"mine", "data/more.txt": b"mine too"}
    assert contents(folder).keys() == contents(by_command.folder).keys() | own.keys()
    assert own.items() <= contents(folder).items()
    assert contents(beside) == {"kept.txt": b"mine"}
    assert distance(weights(load(folder, device="cpu")), weights(load(by_command.folder, device="cpu"))) > 0


def test_an_earlier_model_stays_until_there_is_another(
    given: Given, by_command: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    before = contents(folder)
    stop_at(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        finetuned(given, folder, overwrite=True)
    assert contents(folder) == before


@pytest.mark.parametrize("fails", ["save_model", "write_text"])
def test_an_earlier_model_stays_where_the_other_cannot_be_written(
    fails: str, given: Given, by_command: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(by_command.folder, tmp_path / "out"))
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"setfit_kd.finetune.run.{fails}", full)
    with pytest.raises((OSError, OutputError)):
        finetuned(given, folder, steps=1, overwrite=True)
    kept = {name: content for name, content in contents(tmp_path).items() if "checkpoints" not in name}
    assert kept == before


def test_a_model_is_written_to_where_one_is(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    finetuned(given, Path(), steps=1)
    assert load(tmp_path / "here", device="cpu").labels
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("files", [["notes.txt"], ["config.json"], ["model.safetensors", "other/config.json"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_replaced(
    files: list[str], overwrite: bool, given: Given, tmp_path: Path
) -> None:
    for name in files:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(OutputError, match="holds something else than a model"):
        finetuned(given, tmp_path / "out", overwrite=overwrite)
    assert set(contents(tmp_path / "out").values()) == {b"mine"}
    assert len(contents(tmp_path / "out")) == len(files)


def test_a_file_is_no_folder(given: Given, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        finetuned(given, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_taken_and_folders_are_made(given: Given, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "deep" / "in" / "it"):
        finetuned(given, folder, steps=1, validation=None, eval=None)
        assert load(folder, device="cpu").labels == NAMES


# Kills


@pytest.mark.parametrize("step", [6, 15])
def test_what_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    step: int, given: Given, by_command: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    started = command(given, folder, checkpoint_seconds=EVERY_STEP)
    with monkeypatch.context() as patch:
        stop_at(patch, step, KeyboardInterrupt)
        stopped = invoke(*started)
    assert stopped.exit_code == 130
    assert not folder.exists()
    assert any((tmp_path / "out.checkpoints").rglob("whole.json"))
    done = invoke(*started)
    assert done.exit_code == 0, done.output
    assert f"Going on from step {step - 1}" in done.stderr
    assert same(*(weights(load(path, device="cpu")) for path in (folder, by_command.folder)))
    told, expected = (read_json(path / "metrics.json") for path in (folder, by_command.folder))
    assert told["looks"] == expected["looks"]
    assert told["evaluation"]["confusion"] == expected["evaluation"]["confusion"]
    assert not (tmp_path / "out.checkpoints").exists()


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"labeled": "fewer"}, {"model": "other"}])
def test_a_training_of_another_kind_does_not_go_on_from_there(
    change: dict[str, Any], given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_student: Path
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            finetuned(given, tmp_path / "out", steps=5, checkpoint_seconds=EVERY_STEP)
    lines = given.train.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "fewer.csv").write_text("".join(lines[:-1]), encoding="utf-8")
    named = {"fewer": str(tmp_path / "fewer.csv"), "other": str(tiny_student)}
    change = {name: named.get(str(value), value) for name, value in change.items()}
    done = finetuned(given, tmp_path / "out", **change, steps=5, checkpoint_seconds=EVERY_STEP)
    fresh = finetuned(given, tmp_path / "fresh", **change, steps=5)
    assert same(weights(done.model), weights(fresh.model))


def test_what_decides_nothing_may_change_on_the_way(
    given: Given,
    by_command: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 9, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            finetuned(given, tmp_path / "out", checkpoint_seconds=EVERY_STEP)
    with caplog.at_level(logging.INFO, "setfit_kd"):
        done = finetuned(given, tmp_path / "out", encode_batch_size=7, eval=None, checkpoint_seconds=60)
    assert "Going on from step 8" in caplog.text
    assert same(weights(done.model), weights(load(by_command.folder, device="cpu")))


def test_what_was_stopped_while_it_was_measured_goes_on(
    given: Given, by_command: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    started = command(given, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("setfit_kd.finetune.run.evaluate", stop)
        assert invoke(*started).exit_code == 130
    done = invoke(*started)
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "out").keys() == contents(by_command.folder).keys()


# Used by the other commands


def test_it_predicts(by_command: Finished) -> None:
    text = SPLITS["test"][0]["text"]
    done = invoke("predict", by_command.folder, text, "--device", "cpu")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    expected = predict_proba(load(by_command.folder, device="cpu"), [text])[0]
    assert said["probabilities"] == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5)


def test_it_is_evaluated(by_command: Finished, given: Given) -> None:
    done = invoke("evaluate", by_command.folder, "--eval", given.test, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    told = read_json(by_command.folder / "metrics.json")["evaluation"]
    assert json.loads(done.stdout)["confusion"] == told["confusion"]


def test_it_is_exported(by_command: Finished, given: Given, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    bundle = tmp_path / "bundle"
    done = invoke("export", by_command.folder, "--output-dir", bundle, "--format", "onnx", "--unlabeled", given.test)
    assert done.exit_code == 0, done.output
    texts = texts_of(SPLITS["test"])
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    predicted = invoke("predict", bundle, "--input", tmp_path / "texts.txt")
    said = [json.loads(line)["probabilities"] for line in predicted.stdout.splitlines()]
    expected = predict_proba(load(by_command.folder, device="cpu"), texts)
    np.testing.assert_allclose([[row[name] for name in NAMES] for row in said], expected, atol=1e-4)


def test_it_is_fine_tuned_further(by_command: Finished, given: Given, tmp_path: Path) -> None:
    again = finetuned(given, tmp_path / "out", model=str(by_command.folder), learning_rate=1e-12, steps=1)
    assert distance(weights(again.model), weights(load(by_command.folder, device="cpu"))) < 1e-6
    head = load(by_command.folder, device="cpu").model_head
    np.testing.assert_allclose(again.model.model_head.coef_, head.coef_, atol=1e-6)
