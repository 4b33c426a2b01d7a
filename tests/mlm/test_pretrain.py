"""The pretrain command: its folder, what it can be used for, resuming and errors."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checks import assert_refused, invoke, read_tree
from conftest import newswire
from synthetic import raise_at_step
from transformers import AutoModelForMaskedLM, AutoTokenizer

from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.config.mlm import PretrainConfig
from setfit_kd.errors import ConfigError, DataError, ModelError, OutputError, SetFitKDError
from setfit_kd.mlm.run import pretrain
from setfit_kd.mlm.train import evaluate_mlm
from setfit_kd.models.token_model import load_token_model
from setfit_kd.student.kinds import locate_student
from setfit_kd.utils.output_folder import Trained

QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 4,
    "max_length": 32,
    "steps": 4,
    "learning_rate": 1e-2,
}
HELD_OUT = [row["text"] for row in newswire("eval")[:8]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts to train and evaluate on, one of them in both, and words."""
    folder = tmp_path_factory.mktemp("texts")
    texts = [row["text"] for row in newswire("train")[:40]]
    rows = [{"headline": text} for text in [*texts, f" {HELD_OUT[0].upper()}"]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = [{"headline": text} for text in HELD_OUT]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "words.txt").write_text("qatarx\nzebrafish\n", encoding="utf-8")
    return {path.stem: str(path) for path in folder.iterdir()}


def settings(files: dict[str, str], model: Path | str, folder: Path, **changes: Any) -> dict[str, Any]:
    texts = {"texts": files["train"], "eval": files["eval"], "text_column": "headline"}
    return {"model": str(model), **texts, "output_dir": str(folder), **QUICK, **changes}


def run(*arguments: Any, **changes: Any) -> Trained:
    return pretrain(PretrainConfig.of(**settings(*arguments, **changes)))


def command(*arguments: Any, **changes: Any) -> list[str]:
    options = settings(*arguments, **changes)
    words = ["pretrain", options.pop("model")]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


class Finished(NamedTuple):
    """Folder and output of a finished command."""

    folder: Path
    stdout: str
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def pretrained(files: dict[str, str], masked_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    result = invoke(*command(files, masked_lm, folder, add_vocab=3))
    assert result.exit_code == 0, result.output
    return Finished(folder, result.output, json.loads((folder / "metrics.json").read_text()))


def test_folder_contains_model_and_metrics(pretrained: Finished, files: dict[str, str], masked_lm: Path) -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.json"}
    assert {path.name for path in pretrained.folder.iterdir()} == names
    assert {path.name for path in pretrained.folder.parent.iterdir()} == {"pretrained"}
    metrics = pretrained.metrics
    assert list(metrics) == ["before", "after", "teacher", "added_words", "leaks", "settings", "files"]
    assert (metrics["teacher"], metrics["added_words"], metrics["leaks"]) == (None, 3, 1)
    assert metrics["after"]["bits_per_character"] < metrics["before"]["bits_per_character"]
    config = PretrainConfig.of(**metrics["settings"])
    assert config == PretrainConfig.of(**settings(files, masked_lm, pretrained.folder, add_vocab=3))
    for folder, name in ((masked_lm, "before"), (pretrained.folder, "after")):
        measured = evaluate_mlm(load_token_model(folder, "fill-mask"), HELD_OUT, config=config)
        assert measured == pytest.approx(metrics[name], rel=1e-5)
    assert f"{metrics['after']['bits_per_character']:.3f}" in pretrained.stdout
    assert "Added 3 words to the vocabulary" in pretrained.stdout


def test_folder_loads_with_transformers(pretrained: Finished, masked_lm: Path) -> None:
    model: Any = AutoModelForMaskedLM.from_pretrained(pretrained.folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(pretrained.folder)
    original: Any = AutoTokenizer.from_pretrained(masked_lm)
    assert len(tokenizer) == model.config.vocab_size == len(original) + 3
    assert tokenizer.model_max_length == original.model_max_length
    loaded = load_token_model(pretrained.folder, "fill-mask")
    module: Any = loaded[0]
    inputs = tokenizer(HELD_OUT, padding=True, truncation=True, max_length=64, return_tensors="pt")
    expected = model.eval()(**inputs).logits
    torch.testing.assert_close(module.apply_head(loaded(dict(inputs))["token_embeddings"]).logits, expected)


def test_folder_is_a_teacher_a_student_and_a_mask_filler(pretrained: Finished) -> None:
    for name in (f"transformer:{pretrained.folder}", f"layers:1@{pretrained.folder}", str(pretrained.folder)):
        body = locate_student(name).prepare(None, ("a", "b")).source_body
        assert body is not None
        assert body.encode(HELD_OUT[:2]).shape == (2, 16)
    fill = FillMask(pretrained.folder, device=torch.device("cpu"))
    assert fill(HELD_OUT, 0) != HELD_OUT


def test_words_of_a_file_are_added(files: dict[str, str], masked_lm: Path, tmp_path: Path) -> None:
    result = run(files, masked_lm, tmp_path / "out", vocab_file=files["words"], steps=1)
    assert result.metrics["added_words"] == 2
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("zebrafish qatarx") == ["zebrafish", "qatarx"]


@pytest.mark.parametrize("kind", ["layers", "blank", "model"])
def test_students_are_distilled_from_a_teacher(
    kind: str, files: dict[str, str], masked_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(*arguments: Any, **options: Any) -> None:
        seen.append(options["teacher"])

    monkeypatch.setattr("setfit_kd.mlm.train.pretrain_body", record)
    (tmp_path / "config").mkdir()
    shutil.copy(masked_lm / "config.json", tmp_path / "config")
    name = {"layers": "layers:1", "blank": f"blank:{tmp_path / 'config'}", "model": str(masked_lm)}[kind]
    result = run(files, name, tmp_path / "out", teacher=str(masked_lm))
    assert seen[0] is not None
    assert result.metrics["teacher"] == evaluate_mlm(
        load_token_model(masked_lm, "fill-mask"), HELD_OUT, config=PretrainConfig.of(**settings(files, name, tmp_path))
    )
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == (
        1 if kind == "layers" else 2
    )


def test_interrupted_run_resumes(
    files: dict[str, str],
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The interrupted one is of the whole model, after that of the missing head."""
    options: dict[str, Any] = {"head_steps": 2, "add_vocab": 2, "checkpoint_seconds": 1e-9}
    run(files, tiny_student, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        raise_at_step(patch, 2 + 3, KeyboardInterrupt)
        assert invoke(*command(files, tiny_student, tmp_path / "out", **options)).exit_code == 130
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.INFO):
        run(files, tiny_student, tmp_path / "out", **options)
    assert "Resuming from step 2" in caplog.text
    left, right = (read_tree(tmp_path / name) for name in ("whole", "out"))
    assert left["model.safetensors"] == right["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} <= {"whole", "out", "hub-cache"}


def test_model_is_replaced_only_with_overwrite(
    files: dict[str, str], masked_lm: Path, pretrained: Finished, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pretrained.folder, tmp_path / "out"))
    with pytest.raises(OutputError, match="is not empty"):
        run(files, masked_lm, folder)
    assert read_tree(folder) == read_tree(pretrained.folder)
    run(files, masked_lm, folder, overwrite=True, steps=1)
    assert json.loads((folder / "metrics.json").read_text())["added_words"] == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"add_vocab": 2, "vocab_file": "words"},
            ConfigError,
            "add_vocab: cannot be combined with vocab_file; choose one",
        ),
        ({"add_vocab": 2, "teacher": "lm"}, ConfigError, "add_vocab: cannot be combined with teacher; the student has"),
        ({"texts": "eval"}, DataError, "All training texts are evaluation texts"),
        ({"model": "layers:1"}, ConfigError, "Cannot build layers:1 without a teacher"),
        ({"model": "static"}, ConfigError, "no output for each token"),
        ({"model": "layers:9", "teacher": "lm"}, ModelError, "layers"),
        ({"teacher": "body"}, ModelError, "The teacher has no head"),
        ({"text_column": "text"}, DataError, "has no column 'text'"),
        ({"vocab_file": "train"}, DataError, "No such text file"),
    ],
)
def test_unusable_settings_are_refused(
    changes: dict[str, Any],
    error: type[SetFitKDError],
    message: str,
    files: dict[str, str],
    masked_lm: Path,
    tiny_student: Path,
    tmp_path: Path,
) -> None:
    paths = {**files, "lm": str(masked_lm), "body": str(tiny_student)}
    changes = {name: paths.get(str(value), value) for name, value in changes.items()}
    with pytest.raises(error, match=message):
        run(files, changes.pop("model", masked_lm), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_error_is_shown_without_a_traceback(files: dict[str, str], masked_lm: Path, tmp_path: Path) -> None:
    result = invoke(*command(files, masked_lm, tmp_path / "out", teacher=masked_lm, add_vocab=1))
    assert_refused(result, "add_vocab: cannot be combined with teacher")
