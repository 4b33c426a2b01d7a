"""The commands on models that answer questions: finetune, evaluate, predict and export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke, read_tree, truncate_file
from synthetic import raise_at_step
from synthetic_questions import config, load_body, make_questions, write_questions
from test_windows import with_inputs

from setfit_kd.config.questions import QuestionFinetuneConfig
from setfit_kd.errors import ConfigError, ModelError, OutputError
from setfit_kd.export.answers import export_answerer
from setfit_kd.inference.answerer import answerer_folder
from setfit_kd.qa.data import Question
from setfit_kd.qa.metrics import score_answers
from setfit_kd.qa.model import QuestionAnswerer, load_answerer, save_answerer
from setfit_kd.qa.run import finetune_questions
from setfit_kd.qa.train import evaluate_answers, find_candidates, predict_answers
from setfit_kd.runtime.answer import Answerer
from setfit_kd.runtime.classify import BundleError, Classifier

SETS = {
    "labeled": make_questions(10, unanswerable=3),
    "validation": make_questions(6, first=10, unanswerable=3),
    "eval": make_questions(5, first=16, unanswerable=2),
}
SETTINGS: dict[str, Any] = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 4, "max_length": 64, "stride": 8,
                            "max_answer_tokens": 12, "device": "cpu", "precision": "fp32"}  # fmt: skip


def arguments(folder: Path, model: Path, **settings: Any) -> list[str]:
    sources = {name: write_questions(Path(f"{name}.jsonl"), questions) for name, questions in SETS.items()}
    options = {**sources, "output_dir": folder, **SETTINGS, **settings}
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return ["finetune", "--task", "qa", str(model), *(part for flag in flags for part in flag)]


@pytest.fixture(scope="module")
def plain(tiny_student: Path) -> Path:
    return tiny_student.with_name(f"{tiny_student.name}-plain")


@pytest.fixture(scope="module")
def model_folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model fine-tuned by the command, some of whose answers are no answer."""
    folder = tmp_path_factory.mktemp("qa") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        result = invoke(*arguments(folder, plain), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        name: json.loads((folder / "metrics.json").read_text())[name]
        for name in ("evaluation", "null_threshold", "leaks")
    }
    return folder


# finetune


def test_folder_is_a_transformers_model_with_settings(model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    files = {path.name for path in model_folder.iterdir()}
    expected = {"config.json", "metrics.json", "model.safetensors", "question_answering.json", "tokenizer.json"}
    assert files == {*expected, "tokenizer_config.json"}
    assert not list(model_folder.parent.glob("*checkpoints*"))
    model, info = AutoModelForQuestionAnswering.from_pretrained(model_folder, output_loading_info=True)
    assert not info["missing_keys"]
    answerer, question = load_answerer(model_folder), SETS["eval"][0]
    question = replace(question, context=question.context[:60], answers=None)  # which fits in one window
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    encoded = tokenizer(question.question, question.context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0]
    with torch.inference_mode():
        output = model.eval()(**encoded)
    second = torch.tensor([number == 1 for number in encoded.sequence_ids(0)])
    start, end = (logits[0].masked_fill(~second, -1e9) for logits in (output.start_logits, output.end_logits))
    sums = (start[:, None] + end[None]).triu().tril(11)
    sums[sums == 0] = -1e9
    first, last = divmod(int(sums.argmax()), len(offsets))
    answer = predict_answers(QuestionAnswerer(answerer.model_body, answerer.config), [question])[0]
    assert (answer.start, answer.end) == (int(offsets[first, 0]), int(offsets[last, 1]))


def test_metrics_use_the_threshold_from_the_validation_questions(model_folder: Path) -> None:
    metrics = json.loads((model_folder / "metrics.json").read_text())
    answerer = load_answerer(model_folder)
    assert answerer.null_threshold == metrics["null_threshold"]
    assert (answerer.config.max_length, answerer.config.stride, answerer.config.max_answer_tokens) == (64, 8, 12)
    scores = evaluate_answers(answerer, SETS["eval"])
    assert metrics["evaluation"] == scores
    assert {"hasans_f1", "noans_f1"} <= scores.keys()
    best = evaluate_answers(answerer, SETS["validation"])
    for answerer.null_threshold in (None, 0.0, -100.0):
        other = evaluate_answers(answerer, SETS["validation"])
        assert other["f1"] <= best["f1"]
    assert QuestionFinetuneConfig.of(**metrics["settings"]).max_length == 64


def test_without_validation_questions_no_answer_needs_the_higher_score(plain: Path, tmp_path: Path) -> None:
    assert invoke(*arguments(tmp_path / "out", plain, validation=None, eval=None, epochs=1)).exit_code == 0
    assert load_answerer(tmp_path / "out").null_threshold == 0.0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["evaluation"] is None
    answered = {"labeled": write_questions(tmp_path / "answered.jsonl", make_questions(4)), "epochs": 1}
    result = invoke(*arguments(tmp_path / "out", plain, validation=None, eval=None, **answered), "--overwrite")
    assert result.exit_code == 0, result.output
    assert load_answerer(tmp_path / "out").null_threshold is None
    assert "setfit-kd predict" in result.stdout


def test_questions_of_later_sets_are_removed(plain: Path, tmp_path: Path) -> None:
    mixed = write_questions(tmp_path / "mixed.jsonl", [*SETS["labeled"], *SETS["validation"][:2], SETS["eval"][0]])
    result = invoke(*arguments(tmp_path / "out", plain, labeled=mixed, epochs=1), "--json")
    assert json.loads(result.stdout)["leaks"] == {"validation": 0, "labeled": 3}
    assert "removed 3 labeled questions" in result.stderr
    only = write_questions(tmp_path / "only.jsonl", SETS["eval"])
    assert_refused(invoke(*arguments(tmp_path / "out2", plain, labeled=only)), "no questions are left to train on")


def test_interrupted_run_resumes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = arguments(tmp_path / "out", plain, validation=None, eval=None, checkpoint_seconds=1e-9)
    with monkeypatch.context() as patch:
        raise_at_step(patch, 4, KeyboardInterrupt)
        assert invoke(*command).exit_code == 130
    assert not (tmp_path / "out").exists()
    assert invoke(*command).exit_code == 0
    assert "Resuming from step 3" in caplog.text
    assert answerer_folder(tmp_path / "out")
    assert not (tmp_path / "out.checkpoints").exists()


def test_other_files_are_kept_and_other_folders_refused(plain: Path, model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (folder / "notes.txt").write_text("mine")
    assert_refused(invoke(*arguments(folder, plain)), "is not empty", "--overwrite")
    assert invoke(*arguments(folder, plain, validation=None, eval=None, epochs=1), "--overwrite").exit_code == 0
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert_refused(
        invoke(*arguments(tmp_path / "other", plain), "--overwrite"), "was not written by `setfit-kd finetune`"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "title"], "text_column: unknown setting"),
        (["--stride", "64"], "stride: must be less than max_length, 64"),
        (["--labeled", "missing.json"], "No such file: missing.json"),
        (["--eval", "pool.jsonl"], "Question '1' has no gold answers"),
        (["--labeled", "long.jsonl"], "Question 'long' is too long for windows of 64 tokens"),
    ],
)
def test_settings_and_sources_are_checked(options: list[str], message: str, plain: Path, tmp_path: Path) -> None:
    Path("pool.jsonl").write_text('{"question": "who?", "context": "Ann"}\n')
    write_questions(Path("long.jsonl"), [Question("long", "who " * 60, "Ann", ())])
    assert_refused(invoke(*arguments(tmp_path / "out", plain, eval=None), *options), message)
    assert not (tmp_path / "out").exists()


def test_classification_refuses_settings_of_questions(plain: Path) -> None:
    command = ["finetune", plain, "--labeled", "bundled:newswire", "--output-dir", "out", "--stride", "3"]
    assert_refused(invoke(*command), "stride: unknown setting")


# Loading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "has format 2, but this version reads formats up to 1"),
        ('{"format": 1, "stride": -1}', "stride: "),
        ('{"format": 1, "null_threshold": Infinity}', "null_threshold must be finite"),
        ('{"format": 1, "null_threshold": "no"}', "TypeError"),
        ("[1]", "Cannot load the model"),
        ("{", "Cannot load the model"),
    ],
)
def test_unusable_settings_of_a_model_are_explained(content: str, message: str, model_folder: Path) -> None:
    folder = Path(shutil.copytree(model_folder, "copy"))
    (folder / "question_answering.json").write_text(content)
    assert_refused(invoke("predict", folder, "who?", "Ann"), "copy", message)


def test_models_without_settings_or_a_head(model_folder: Path, plain: Path) -> None:
    folder = Path(shutil.copytree(model_folder, "copy"))
    (folder / "question_answering.json").unlink()
    answerer = load_answerer(folder)
    assert (answerer.null_threshold, answerer.config.max_length) == (None, 384)
    with pytest.raises(ModelError, match="its head is not trained"):
        load_answerer(plain)


def test_only_models_for_questions_are_recognised(
    model_folder: Path, plain: Path, setfit_folder: Path, bundle: Path
) -> None:
    assert answerer_folder(model_folder) == model_folder
    run = Path("run")
    shutil.copytree(model_folder, run / "student")
    (run / "config.yaml").write_text("")
    assert answerer_folder(str(run)) == run / "student"
    for other in (plain, setfit_folder, bundle, "someone/name", "missing"):
        assert answerer_folder(other) is None


# evaluate and predict


def test_evaluate_shows_the_metrics(model_folder: Path, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "test.jsonl", SETS["eval"])
    expected = json.loads((model_folder / "metrics.json").read_text())["evaluation"]
    result = invoke("evaluate", model_folder, "--eval", file, "--device", "cpu", "--json")
    assert json.loads(result.stdout) == {"eval": str(file), "eval_questions": 5, **expected}
    table = invoke("evaluate", model_folder, "--eval", file, "--device", "cpu").stdout
    assert f"{expected['hasans_f1']:.1%}" in table
    assert "5 evaluation questions" in table
    for sources in ((), ("--eval", file, "--eval", "other.jsonl")):
        assert_refused(invoke("evaluate", model_folder, *sources), "requires questions from one source", "--eval")
    assert_refused(invoke("evaluate", model_folder, "--eval", file, "--label-column", "x"), "label_column: unknown")


def read_predictions(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(
        path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False, na_values={"start": "", "end": ""}
    )  # fmt: skip
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[no-any-return]


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_predict_writes_one_row_per_question(extension: str, model_folder: Path, tmp_path: Path) -> None:
    source, target = write_questions(tmp_path / "test.jsonl", SETS["eval"]), tmp_path / f"answers.{extension}"
    result = invoke("predict", model_folder, "--input", source, "--output", target, "--device", "cpu")
    assert result.exit_code == 0, result.output
    answerer, rows = load_answerer(model_folder), read_predictions(target)
    answers = predict_answers(answerer, SETS["eval"])
    for row, question, answer in zip(rows, SETS["eval"], answers, strict=True):
        assert list(row) == ["id", "question", "answer", "score", "start", "end"]
        assert [row["id"], row["question"], row["answer"]] == [question.id, question.question, answer.text]
        assert [row["start"], row["end"]] == [answer.start, answer.end]
        assert row["score"] == pytest.approx(answer.score, abs=1e-6)


@pytest.mark.parametrize("model", ["model_folder", "exported"])
def test_questions_that_are_too_long_get_no_answer(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = request.getfixturevalue(model)
    long = [replace(question, id=f"long {i}", question="who " * 60) for i, question in enumerate(SETS["eval"][:2])]
    source = write_questions(tmp_path / "test.jsonl", [long[0], *SETS["eval"], long[1]])
    target, alone = tmp_path / "answers.parquet", write_questions(tmp_path / "alone.jsonl", SETS["eval"])
    result = invoke("predict", folder, "--input", source, "--output", target)
    assert result.exit_code == 0, result.output
    assert caplog.text.count("too long for a window, which get no answer: 2 of 7.") == 1
    first, *rows, last = read_predictions(target)
    assert [first["answer"], last["answer"], last["score"], last["end"]] == ["", "", None, None]
    invoke("predict", folder, "--input", alone, "--output", target)
    assert rows == read_predictions(target)
    scores = json.loads(invoke("evaluate", folder, "--eval", source, "--json").stdout)
    expected = json.loads(invoke("evaluate", folder, "--eval", alone, "--json").stdout)
    assert scores["hasans_f1"] < expected["hasans_f1"] or expected["hasans_f1"] == 0


def test_predict_uses_the_threshold_of_the_model(model_folder: Path) -> None:
    settings = json.loads((model_folder / "question_answering.json").read_text())
    for threshold, has_answer in ((-100.0, False), (100.0, True), (None, True)):
        folder = Path(shutil.copytree(model_folder, f"copy {threshold}"))
        (folder / "question_answering.json").write_text(json.dumps({**settings, "null_threshold": threshold}))
        assert bool(json.loads(invoke("predict", folder, "who won ?", "Ann won .").stdout)["answer"]) == has_answer


def test_predict_answers_a_question_in_the_arguments(model_folder: Path) -> None:
    question = SETS["labeled"][0]
    result = invoke("predict", model_folder, question.question, question.context, "--device", "cpu")
    row = json.loads(result.stdout)
    assert row["answer"] == ("" if row["start"] is None else question.context[row["start"] : row["end"]])
    assert row["id"] == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["who?"], "got 1 texts and 0 files"),
        ([], "got 0 texts and 0 files"),
        (["who?", "Ann", "--input", "test.jsonl"], "got 2 texts and 1 files"),
        (["who?", " "], "context: the text is empty"),
        (["--input", "test.jsonl", "--output", "answers.txt"], "Unknown file extension"),
        (["--input", "test.jsonl", "--output", "test.jsonl"], "is both --input and --output"),
        (["who?", "Ann", "--threshold", "0.5"], "threshold: unknown setting"),
        (["who?", "Ann", "--at-least-one"], "at_least_one: unknown setting"),
    ],
)
def test_predict_refuses(options: list[str], message: str, model_folder: Path) -> None:
    write_questions(Path("test.jsonl"), SETS["eval"])
    assert_refused(invoke("predict", model_folder, *options), message)
    assert not list(Path().glob("answers*"))


# Bundles


@pytest.fixture(scope="module")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    source = write_questions(folder.with_name("pool.jsonl"), SETS["labeled"])
    result = invoke("export", model_folder, "--format", "onnx", "--output-dir", folder, "--unlabeled", source)
    assert result.exit_code == 0, result.output
    assert "Wrote onnx bundle" in result.stdout
    assert f'python {folder}/answer.py "..." "..."' in result.stdout
    return folder


@pytest.mark.parametrize(("architecture", "has_types"), [("bert", True), ("roberta", False), ("mpnet", False),
                                                         ("distilbert", False)])  # fmt: skip
def test_bundle_answers_like_the_model(
    architecture: str, has_types: bool, make_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    import onnx

    names = ["input_ids", "token_type_ids", "attention_mask"] if has_types else ["input_ids", "attention_mask"]
    body = load_body(with_inputs(make_encoder(architecture), tmp_path / "model", names))
    settings = config(max_length=48)
    questions = make_questions(8, characters=300)  # in several windows each
    candidates = find_candidates(QuestionAnswerer(body, settings), questions)
    threshold = float(np.median([candidate.difference for candidate in candidates]))
    expected = [candidate.decide(threshold) for candidate in candidates]
    assert {answer.text == "" for answer in expected} == {True, False}
    export_answerer(
        QuestionAnswerer(body, settings, threshold), tmp_path / "bundle", questions=questions, format="onnx"
    )
    graph = onnx.load(str(tmp_path / "bundle" / "model.onnx")).graph
    assert ("token_type_ids" in {node.name for node in graph.input}) == has_types
    answers = Answerer(tmp_path / "bundle", batch_size=3).answer([(q.question, q.context) for q in questions])
    for answer, other in zip(answers, expected, strict=True):
        assert answer[::2] == other[::2]
        assert answer.score == pytest.approx(other.score, abs=1e-5)


def test_bundle_runs_without_torch_and_the_package(exported: Path, model_folder: Path) -> None:
    question = SETS["eval"][0]
    command = [sys.executable, str(exported / "answer.py"), question.question, question.context]
    check = "import sys; from answer import Answerer; print('setfit_kd' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    answerer = load_answerer(model_folder)
    (answer,) = predict_answers(answerer, [question])
    printed = json.loads(result.stdout)
    assert [printed["text"], printed["start"], printed["end"]] == [answer.text, answer.start, answer.end]
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=exported)
    assert loaded.stdout.split() == ["False", "False"]
    long = subprocess.run([*command[:2], "who " * 99, "Ann"], capture_output=True, text=True, check=True)
    assert json.loads(long.stdout) == {"text": "", "score": None, "start": None, "end": None}
    assert long.stderr.startswith("Questions too long for a window, which get no answer: 1 of 1.")


def test_commands_use_bundles(exported: Path, tmp_path: Path) -> None:
    source = write_questions(tmp_path / "test.jsonl", SETS["eval"])
    answers = Answerer(exported).answer([(q.question, q.context) for q in SETS["eval"]])
    result = invoke("evaluate", exported, "--eval", source, "--json")
    scores = score_answers([answer.text for answer in answers], SETS["eval"])
    assert {name: json.loads(result.stdout)[name] for name in scores} == scores
    rows = [json.loads(line) for line in invoke("predict", exported, "--input", source).stdout.splitlines()]
    assert [row["answer"] for row in rows] == [answer.text for answer in answers]


def test_bundle_in_8_bits_is_smaller(model_folder: Path, exported: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr("setfit_kd.export.answers._AnswerDraft.measure_seconds", lambda _: next(seconds))
    options: Any = {"questions": SETS["labeled"], "min_agreement": 0.0}
    bundle = export_answerer(load_answerer(model_folder), tmp_path / "small", **options)
    assert (bundle.format, bundle.int8_rejection_reason) == ("onnx-int8", None)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (bundle.path, exported)]
    assert sizes[0] < 0.7 * sizes[1]
    assert (Answerer(bundle.path)("who won ?", "Ann won .").score or 0) > 0


def test_export_refuses(model_folder: Path, exported: Path) -> None:
    answerer = load_answerer(model_folder)
    with pytest.raises(ConfigError, match="cannot be exported as static"):
        export_answerer(answerer, "out", questions=SETS["eval"], format="static")
    before = read_tree(exported)
    with pytest.raises(OutputError, match="already exists"):
        export_answerer(answerer, exported, questions=SETS["eval"])
    assert read_tree(exported) == before


def test_damaged_bundles_are_refused(exported: Path) -> None:
    folder = Path(shutil.copytree(exported, "copy"))
    with pytest.raises(BundleError, match="has kind 'question-answering', expected static or onnx"):
        Classifier(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"stride": "8"}, "missing or invalid fields: stride"),
        ({"null_threshold": "0"}, "missing or invalid fields: null_threshold"),
        ({"format": 2}, "has format 2, but this version reads formats up to 1"),
        ({"kind": "onnx"}, "has kind 'onnx', expected question-answering"),
        ({"max_answer_tokens": -3}, "cannot be used"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BundleError, match=message):
            Answerer(folder)("who?", "Ann")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    truncate_file(folder / "model.onnx")
    assert_refused(invoke("predict", folder, "who?", "Ann"), "has changed since the bundle was exported")


def test_a_model_is_saved_once(model_folder: Path) -> None:
    with pytest.raises(OutputError, match="already exists"):
        save_answerer(load_answerer(model_folder), model_folder)
    config = QuestionFinetuneConfig.of(model="m", labeled="x.json", output_dir=model_folder)
    with pytest.raises(OutputError, match="is not empty"):
        finetune_questions(config)
