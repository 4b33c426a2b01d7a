"""The encoder command: training rows, both trainings, models, interruptions and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checks import assert_refused, invoke
from conftest import FAST, encoder_config
from sentence_transformers import SentenceTransformer
from synthetic import equal_weights, raise_at_step, texts_and_labels

from setfit_kd import distill
from setfit_kd.config.encoder import EncoderConfig, EncoderRunConfig
from setfit_kd.data.sources import SentencePairs, read_pairs
from setfit_kd.encoder.run import encoder_run, spearman
from setfit_kd.encoder.train import TrainingRows, read_rows, train_encoder
from setfit_kd.errors import ConfigError
from setfit_kd.losses.base import BatchLoss
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.models.bodies import content_hash, is_static, load_body
from setfit_kd.training.loss_trainer import TokenDataset

if TYPE_CHECKING:
    from torch import Tensor

QUICK: dict[str, Any] = {"device": "cpu", "precision": "fp32", "epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
EVERY_STEP = 1e-9
LABELS = {True: "entailment", False: "Contradiction"}


def make_pairs(n: int, seed: int) -> SentencePairs:
    """Return pairs of sentences, each in four pairs, that are entailed if they are about the same topic."""
    texts, topics = texts_and_labels(n // 4)
    left, right = np.random.default_rng(seed).permuted(np.tile(np.arange(n // 4), (2, 4)), axis=1)
    labels = [LABELS[bool(same)] for same in topics[left] == topics[right]]
    return SentencePairs([texts[i] for i in left], [f"the {texts[i]}" for i in right], labels, "pairs")


NLI, STS = make_pairs(96, 0), make_pairs(40, 1)
SCORED = SentencePairs(STS.first, STS.second, [float(label == "entailment") for label in STS.values], "scores")
TEXTS = sorted({*NLI.first, *NLI.second})


def pairs_of(*rows: tuple[str, str, Any]) -> SentencePairs:
    first, second, values = (list(column) for column in zip(*rows, strict=True))
    return SentencePairs(first, second, values, "pairs")


def write_pairs(path: Path, pairs: SentencePairs, value: str) -> str:
    rows = zip(pairs.first, pairs.second, pairs.values, strict=True)
    lines = [json.dumps({"premise": a, "hypothesis": b, value: v}) + "\n" for a, b, v in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def evaluate(body: SentenceTransformer) -> float:
    return spearman(body, SCORED, torch.device("cpu"), EncoderConfig.of())


def weights(body: SentenceTransformer) -> list[Tensor]:
    return [value.clone() for value in body.state_dict().values()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts.txt").write_text("".join(text + "\n" for text in TEXTS), encoding="utf-8")
    nli, sts = write_pairs(folder / "nli.jsonl", NLI, "label"), write_pairs(folder / "sts.jsonl", SCORED, "score")
    return {"nli": nli, "sts": sts, "texts": str(folder / "texts.txt")}


@pytest.fixture(scope="module")
def trained(tiny_teacher: Path) -> SentenceTransformer:
    """Encoder that is trained on the pairs."""
    return train_encoder(tiny_teacher, nli=NLI, **QUICK)


def command(model: object, **settings: Any) -> list[str]:
    options = {"output_dir": "out", **QUICK, **settings}
    return ["encoder", str(model), *(f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None)]


# Training rows


def ranking_rows(*pairs: tuple[str, str, str], **settings: Any) -> TrainingRows:
    return read_rows(EncoderConfig.of(**settings), nli=pairs_of(*pairs), texts=None)


def triples(rows: TrainingRows) -> list[list[str | None]]:
    return [[rows.texts[i] if i >= 0 else None for i in row] for row in zip(*rows.columns, strict=True)]


def test_ranking_rows_have_hard_negatives_only_where_the_pairs_have_them(student_body: SentenceTransformer) -> None:
    rows = ranking_rows(
        ("a goal", "a match", "Entailment"),
        ("a goal", "A  MATCH", "entailment"),  # a duplicate
        ("a goal", "the team", "ENTAILMENT"),
        ("a bank", "profit", "entailment"),
        ("a goal", "no match", "contradiction"),
        ("no match", "a goal", "neutral"),
        ("a match", "a bank", "contradiction"),  # a premise that entails nothing
        ("a bank", "profit", "contradiction"),  # both labels
    )
    expected = [["a goal", "a match", "no match"], ["a goal", "the team", "no match"], ["a bank", "profit", None]]
    assert triples(rows) == expected
    dataset = TokenDataset(student_body, rows.texts, rows.labels, rows.columns)
    for batch, counts in (([0, 1, 2], [3, 3, 2]), ([2, 0], [2, 2, 1]), ([2], [1, 1])):
        features = dataset.__getitems__(batch)["features"]
        assert [len(column["input_ids"]) for column in features] == counts


def test_labels_can_have_other_names_and_several_negatives_take_turns() -> None:
    pairs = [("a", "b", "yes"), ("a", "c", "yes"), ("a", "d", "yes"), ("a", "x", "no"), ("a", "y", "no")]
    rows = ranking_rows(*pairs, entailment="YES", contradiction="No")
    assert triples(rows) == [["a", "b", "x"], ["a", "c", "y"], ["a", "d", "x"]]
    assert triples(ranking_rows(*pairs, entailment="yes")) == [["a", b, None] for b in "bcd"]


# Training


def test_both_trainings_learn_similarity(trained: SentenceTransformer, tiny_teacher: Path, tiny_student: Path) -> None:
    before = evaluate(load_body(tiny_teacher))
    assert evaluate(trained) > max(0.7, before + 0.2)
    student_before = evaluate(load_body(tiny_student))
    trainings: list[dict[str, Any]] = [
        {"nli": NLI, "objective": "softmax", "epochs": 6},
        *({"teacher": trained, "texts": TEXTS, "objective": name} for name in ("similarity", "embedding", None)),
    ]
    for training in trainings:
        body: Any = train_encoder(tiny_student, **{**QUICK, "epochs": 4, **training})
        losses = body.loss_curve_
        assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), training
        assert evaluate(body) > student_before + 0.2, training


def test_micro_batches_and_a_lack_of_memory_do_not_change_the_result(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "nli": NLI, "epochs": 1, "learning_rate": 1e-4}
    expected, small = (
        train_encoder(tiny_student, **settings),
        train_encoder(tiny_student, **settings, micro_batch_size=3),
    )
    encode = BatchLoss._encode

    def limited(self: BatchLoss, features: dict[str, Tensor]) -> Tensor:
        if len(features["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, features)

    monkeypatch.setattr(BatchLoss, "_encode", limited)
    with shared_backoff() as events:
        split = train_encoder(tiny_student, **settings)
    assert (events[-1]["phase"], events[-1]["to"]["texts"]) == ("Training encoder", 1)
    for body in (small, split):
        for value, target in zip(weights(body), weights(expected), strict=True):
            torch.testing.assert_close(value, target, atol=1e-5, rtol=1e-3)


# Models


@pytest.fixture
def places(tiny_teacher: Path, tiny_student: Path, masked_lm: Path, tokenizer: Any, tmp_path: Path) -> dict[str, str]:
    """Models by a name in capitals."""
    encoder_config("bert", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "blank")
    tokenizer.save_pretrained(tmp_path / "blank")
    plain = tiny_student.with_name("student-plain")
    folders = {"TEACHER": tiny_teacher, "PLAIN": plain, "LM": masked_lm, "BLANK": tmp_path / "blank"}
    return {name: str(folder) for name, folder in folders.items()}


@pytest.mark.parametrize(
    "name", ["layers:0,2@TEACHER", "static:8@TEACHER", "blank:BLANK", "PLAIN", "LM", "layers:2", "static:8"]
)
def test_any_model_becomes_an_encoder_that_sentence_transformers_loads(
    name: str, places: dict[str, str], files: dict[str, str], tmp_path: Path
) -> None:
    model = name
    for placeholder, place in places.items():
        model = model.replace(placeholder, place)
    sources = (
        {"nli": files["nli"]}
        if "@" in name or "blank" in name
        else {"teacher": places["TEACHER"], "texts": files["texts"]}
    )
    settings = {**QUICK, "epochs": 1, "sts": files["sts"], **sources}
    bodies: list[Any] = []
    for folder in (tmp_path / "out", tmp_path / "again")[: 2 if name in ("LM", "blank:BLANK") else 1]:
        torch.rand(3)  # the missing weights of these models are random, but do not depend on this generator
        result = encoder_run(EncoderRunConfig.of(model=model, output_dir=folder, **settings))
        bodies.append(SentenceTransformer(str(folder), device="cpu"))
    np.testing.assert_allclose(bodies[0].encode(TEXTS[:9]), result.model.encode(TEXTS[:9]), atol=1e-6)
    assert content_hash(bodies[0]) == content_hash(bodies[-1])
    assert is_static(bodies[0]) is name.startswith("static")
    assert [type(module).__name__ for module in bodies[0]][1:] == ["Normalize" if is_static(bodies[0]) else "Pooling"]
    if name.startswith("layers"):
        assert bodies[0][0].auto_model.config.num_hidden_layers == 2


# The command


def test_command_writes_encoder_and_metrics_and_it_can_be_a_student(
    files: dict[str, str], tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    sources = {"nli": files["nli"], "sts": files["sts"]}
    result = invoke(*command(tiny_student, **sources), "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads(result.stdout) == {"spearman": metrics["spearman"]}
    assert metrics["spearman"]["before"] == pytest.approx(evaluate(load_body(tiny_student)))
    assert metrics["spearman"]["after"] == pytest.approx(evaluate(load_body(tmp_path / "out")), abs=1e-4)
    assert EncoderRunConfig.of(**metrics["settings"]).nli == files["nli"]
    assert set(metrics["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    assert_refused(invoke(*command(tiny_student, **sources)), "is not empty", "--overwrite")
    again = invoke(*command(tiny_student, **sources, epochs=1), "--overwrite")
    assert again.exit_code == 0, again.output
    assert f"{metrics['spearman']['before']:.4f}" in again.stdout
    assert "--student out" in again.stdout

    news = {"labeled": "bundled:newswire", "unlabeled": "bundled:newswire", "evaluation": "bundled:newswire"}
    settings = {**FAST, "shots": 4, "pool_size": 32, "batch_size": 16}
    run = distill(*news.values(), teacher=str(tiny_teacher), student="out", **settings)
    assert run.student.model_body.get_embedding_dimension() == 16


def test_leak_guard_removes_pairs_to_evaluate_on(tiny_student: Path, tmp_path: Path) -> None:
    kept = [("a goal", "a match", "entailment"), ("a goal", "profit", "entailment"), ("a vote", "a poll", "neutral")]
    leaks = [("A  goal", "the Team", "entailment"), ("a loss", "a gain\u200b", "entailment")]
    scored = pairs_of(("a goal", "the team", 1), ("A gain", "a loss", 0), ("a goal", "a poll", 0))
    texts = {}
    for name, rows in (("all", [*kept, *leaks]), ("leaks", leaks)):
        texts[name] = write_pairs(tmp_path / f"{name}.jsonl", pairs_of(*rows), "label")
    sts = write_pairs(tmp_path / "sts.jsonl", scored, "score")
    result = invoke(*command(tiny_student, nli=texts["all"], sts=sts, epochs=1))
    assert result.exit_code == 0, result.output
    assert "Leak guard: removed 2 labeled pairs that are also in the evaluation set." in result.stderr
    assert ": 2 entailed pairs" in result.stderr
    refused = invoke(*command(tiny_student, nli=texts["leaks"], sts=sts, output_dir="none"))
    assert_refused(refused, "leaks.jsonl: no pairs are left")


def test_pairs_are_read_as_usable_texts() -> None:
    columns = {"first": ["a\x1fgoal"], "second": ["x\x1f"], "label": ["neutral"]}
    pairs = read_pairs(columns, *columns)
    assert (pairs.first, pairs.second) == (["a goal"], ["x "])


def test_loading_a_masked_language_model_prints_nothing(masked_lm: Path, files: dict[str, str], caplog: Any) -> None:
    assert invoke(*command(masked_lm, nli=files["nli"], epochs=1)).exit_code == 0
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []


@pytest.mark.parametrize("training", ["nli", "teacher"])
def test_killed_command_resumes(
    training: str, files: dict[str, str], tiny_student: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    sources = {"nli": files["nli"]} if training == "nli" else {"teacher": tiny_teacher, "texts": files["texts"]}
    settings: dict[str, Any] = {**sources, "checkpoint_seconds": EVERY_STEP}
    with monkeypatch.context() as patch:
        raise_at_step(patch, 5, KeyboardInterrupt)
        assert invoke(*command(tiny_student, **settings)).exit_code == 130
    assert not (tmp_path / "out").exists()
    assert any((tmp_path / "out.checkpoints").rglob("whole.json"))
    resumed = invoke(*command(tiny_student, **settings))
    assert resumed.exit_code == 0, resumed.output
    assert "Resuming from step 4" in resumed.stderr
    assert not (tmp_path / "out.checkpoints").exists()
    whole = invoke(*command(tiny_student, **sources, output_dir="whole"))
    assert whole.exit_code == 0, whole.output
    assert equal_weights(*(weights(load_body(tmp_path / name)) for name in ("out", "whole")))


# Bad input

ROW = {"premise": "a goal", "hypothesis": "a match", "label": "entailment", "score": 1.5}
BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("nli", {"premise": ...}, "bad.jsonl has no column 'premise'; it has 'hypothesis', 'label', 'score'"),
    ("nli", {"label": ...}, "has no column 'label'"),
    ("sts", {"score": ...}, "--score-column"),
    ("nli", {"label": "neutral"}, "bad.jsonl has no pairs with the label 'entailment'; it has 'neutral'"),
    ("nli", {"label": None}, "bad.jsonl, line 1: no label"),
    ("nli", {"hypothesis": " "}, "bad.jsonl, line 1: second text: the text is empty; line 2: second"),
    ("sts", {"hypothesis": None}, "bad.jsonl, line 1: second text: no text"),
    ("sts", {"score": "high"}, "bad.jsonl, line 1: expected a number as score, got 'high'"),
    ("sts", {"score": "nan"}, "expected a number as score, got 'nan'"),
    ("sts", {}, "bad.jsonl: all scores are 1.5"),
]


@pytest.mark.parametrize(("role", "change", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_pairs_are_refused(role: str, change: dict[str, Any], message: str, files: dict[str, str]) -> None:
    row = {name: value for name, value in {**ROW, **change}.items() if value is not ...}
    Path("bad.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    assert_refused(invoke(*command("nowhere", **{"nli": files["nli"], role: "bad.jsonl"})), message)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Expected either sentence pairs (--nli) or a teacher (--teacher), got neither."),
        ({"nli": "NLI", "teacher": "TEACHER", "texts": "TEXTS"}, "got both"),
        ({"teacher": "TEACHER"}, "Expected --teacher and --texts together, got only --teacher."),
        ({"nli": "NLI", "texts": "TEXTS"}, "got only --texts"),
        ({"nli": "NLI", "objective": "similarity"}, "The objective similarity cannot be combined with --nli."),
        ({"teacher": "TEACHER", "texts": "TEXTS", "objective": "ranking"}, "cannot be combined with --teacher"),
        ({"nli": "NLI", "objective": "ranking,embedding"}, "ranking cannot be combined with other objectives"),
        ({"nli": "NLI", "objective": "soft-labels"}, "expected ranking, softmax, similarity or embedding"),
        ({"nli": "NLI", "contradiction": "no"}, "has no pairs with the label 'no'; it has 'Contradiction', 'ent"),
        ({"nli": "NLI", "model": "transformer:TEACHER"}, "Expected a sentence encoder, got the classifier transf"),
        ({"nli": "NLI", "model": "layers:2"}, "There is no teacher to build the model from"),
        ({"teacher": "TEACHER", "texts": "BLANK_LINES"}, "blank.txt, line 2: the text is empty"),
        ({"teacher": "TEACHER", "texts": "ONE"}, "Expected at least two different texts, got one."),
        ({"nli": "ONE"}, "one.txt has no column 'hypothesis'; it has 'text'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(
    settings: dict[str, str], message: str, files: dict[str, str], tiny_student: Path, tiny_teacher: Path
) -> None:
    Path("blank.txt").write_text("one\n\n")
    Path("one.txt").write_text("one\nOne\n")
    names = {"NLI": files["nli"], "TEXTS": files["texts"], "TEACHER": str(tiny_teacher)}
    names |= {"BLANK_LINES": "blank.txt", "ONE": "one.txt"}
    for name, value in settings.items():
        settings = {**settings, name: next((value.replace(k, v) for k, v in names.items() if k in value), value)}
    assert_refused(invoke(*command(settings.pop("model", tiny_student), **settings)), message)
    assert not Path("out").exists()


def test_python_function_takes_any_source_and_checks_settings(tiny_student: Path) -> None:
    columns = {"premise": NLI.first, "hypothesis": NLI.second, "label": NLI.values}
    by_columns = train_encoder(tiny_student, nli=columns, **{**QUICK, "epochs": 1})
    by_pairs = train_encoder(tiny_student, nli=read_pairs(columns, *columns), **{**QUICK, "epochs": 1})
    assert equal_weights(weights(by_columns), weights(by_pairs))
    with pytest.raises(ConfigError, match="got neither"):
        train_encoder(tiny_student)
