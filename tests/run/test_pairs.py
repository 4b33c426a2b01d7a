"""Classification of pairs of texts, from the data to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_refused, invoke
from conftest import FAST
from synthetic import WORDS, raise_at_step
from torch import OutOfMemoryError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from setfit_kd import RunResult, distill, load
from setfit_kd.models.encode import predict_proba
from setfit_kd.runtime.classify import Classifier, join_pair, shorten, split_pair

NAMES = ["contradiction", "entailment", "neutral"]
COLUMNS = ("--text-column", "premise", "--pair-column", "hypothesis")
Row = dict[str, str]


def rows(n: int, seed: int) -> list[Row]:
    """Pairs of texts: on the same topic, on opposite topics, or on others."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    topics = [(0, (2, 0, 1)[label]) for label in labels]
    texts = [[" ".join(rng.choice(WORDS[topic].split(), 3)) for topic in pair] for pair in topics]
    return [
        {"premise": f"{first} {seed}{i}", "hypothesis": second, "label": NAMES[label]}
        for i, ((first, second), label) in enumerate(zip(texts, labels, strict=True))
    ]


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    return [(row["premise"], row["hypothesis"]) for row in rows(n, seed)]


def write(path: Path, content: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    content = {"labeled": rows(60, 1), "unlabeled": rows(40, 2), "eval": rows(45, 3)}
    return {name: write(folder / f"{name}.jsonl", some) for name, some in content.items()}


@pytest.fixture(scope="module")
def settings(files: dict[str, str], tiny_teacher: Path) -> dict[str, Any]:
    return {
        **FAST,
        **files,
        "text_column": "premise",
        "pair_column": "hypothesis",
        "teacher": f"transformer:{tiny_teacher}",
        "student": "layers:1",
        "teacher_steps": 30,
        "teacher_learning_rate": 3e-3,
        "learning_rate": 3e-3,
        "epochs": 6,
    }


@pytest.fixture(scope="module")
def result(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return distill(**settings, output_dir=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def student(result: RunResult) -> Path:
    assert result.output_dir is not None
    return result.output_dir / "student"


def test_models_learn_from_both_texts(result: RunResult) -> None:
    assert set(result.evaluations) == {"teacher", "baseline", "student"}
    for name in ("teacher", "student"):
        assert result.evaluations[name].quality.accuracy > 0.6, name
    assert [split_pair(text) for text in result.signals.texts[:40]] == pairs(40, 2)


def test_resumed_run_loads_all_stages(result: RunResult, trained_steps: list[int]) -> None:
    distill(resume=result.output_dir)
    assert trained_steps == []


def test_step_without_memory_is_repeated_in_smaller_batches(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_at_step(monkeypatch, 2, OutOfMemoryError)
    result = distill(**{**settings, "eval": None, "baseline": False})
    assert result.out_of_memory


def test_predictions_are_alike_everywhere(result: RunResult, student: Path, tmp_path: Path) -> None:
    expected, some = result.evaluations["student"].probabilities, pairs(45, 3)
    joined = [join_pair(*pair) for pair in some]
    model = load(student, device="cpu")
    np.testing.assert_allclose(predict_proba(model, joined), expected, atol=1e-5)
    assert model.predict(some) == [NAMES[row.argmax()] for row in expected]
    with_transformers = AutoModelForSequenceClassification.from_pretrained(student)
    tokens = AutoTokenizer.from_pretrained(student)([list(pair) for pair in some], padding=True, return_tensors="pt")
    logits = with_transformers.eval()(**tokens).logits
    np.testing.assert_allclose(logits.softmax(-1).detach().numpy(), expected, atol=1e-5)
    exported = invoke("export", student, "--format", "onnx", "--output-dir", tmp_path / "bundle")
    assert exported.exit_code == 0, exported.output
    assert f'python {tmp_path}/bundle/classify.py "..." "..."' in exported.stdout
    assert result.output_dir is not None
    assert f'setfit-kd predict {result.output_dir} "..." "..."\n' in (result.output_dir / "report.html").read_text()
    classifier = Classifier(tmp_path / "bundle")
    assert classifier.takes_pairs
    np.testing.assert_allclose(classifier.predict_proba(some), expected, atol=1e-5)
    swapped = classifier.predict_proba([(second, first) for first, second in some])
    assert np.abs(swapped - expected).max() > 1e-3
    with pytest.raises(TypeError, match="pairs of texts"):
        classifier.predict(["a single text"])
    assert classifier.predict([("visible", " ")]) == [None]


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_predictions_are_signals_of_pairs(
    files: dict[str, str], student: Path, result: RunResult, extension: str, tmp_path: Path
) -> None:
    from setfit_kd.signals.files import read_signals

    output = tmp_path / f"predictions.{extension}"
    predicted = invoke("predict", student, "-i", files["eval"], *COLUMNS, "-o", output, "--device", "cpu")
    assert predicted.exit_code == 0, predicted.output
    signals = read_signals(output)
    assert [split_pair(text) for text in signals.texts] == pairs(45, 3)
    np.testing.assert_allclose(signals.probabilities, result.evaluations["student"].probabilities, atol=1e-5)


def test_pairs_in_arguments_and_lines(student: Path) -> None:
    (first, second), *_ = pairs(1, 3)
    from_arguments = invoke("predict", student, first, second, "--device", "cpu")
    from_lines = invoke("predict", student, "--device", "cpu", stdin=f"{first}\t{second}\nonly one text\n")
    record, without = map(json.loads, from_lines.stdout.splitlines())
    assert json.loads(from_arguments.stdout) == record
    assert (record["text"], record["text_pair"]) == (first, second)
    assert without["label"] is None
    assert_refused(invoke("predict", student, "one text"), "two texts for each pair")


def test_numbered_labels_need_names(files: dict[str, str], student: Path, result: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "numbered"
    model = AutoModelForSequenceClassification.from_pretrained(student)
    model.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    model.config.label2id = {f"LABEL_{i}": i for i in range(3)}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    command = ("evaluate", folder, "--eval", files["eval"], *COLUMNS, "--device", "cpu", "--json")
    assert_refused(invoke(*command), "LABEL_0", "--label-names")
    assert_refused(invoke(*command, "--label-names", "a,b"), "LABEL_0", "3 labels")
    named = invoke(*command, "--label-names", ",".join(NAMES))
    assert json.loads(named.stdout)["accuracy"] == result.evaluations["student"].quality.accuracy
    assert_refused(invoke("evaluate", student, *command[2:], "--label-names", ",".join(NAMES)), "already has label")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"teacher": "sentence"}, ("transformer:",)),
        ({"student": "static:16"}, ("transformer:",)),
        ({"pair_column": "conclusion"}, ("no column 'conclusion'", "--pair-column")),
        ({"augment": 10}, ("augment", "pair_column")),
        ({"labeled": "empty.jsonl"}, ("line 2: second text: the text is empty",)),
    ],
)
def test_unusable_input(
    settings: dict[str, Any], change: dict[str, Any], fragments: tuple[str, ...], tiny_teacher: Path
) -> None:
    first, second, *others = rows(12, 4)
    write(Path("empty.jsonl"), [first, {**second, "hypothesis": " "}, *others])
    change = {name: str(tiny_teacher) if value == "sentence" else value for name, value in change.items()}
    chosen = {name: (settings | change)[name] for name in ("labeled", "teacher", "student", "pair_column")}
    chosen |= {"text_column": "premise", "output_dir": "run", **change}
    flags = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert_refused(invoke("run", *flags), *fragments)
    assert not Path("run").exists()


def test_models_of_pairs_and_single_texts_are_told_apart(
    files: dict[str, str], student: Path, models: dict[str, Path]
) -> None:
    assert_refused(
        invoke("evaluate", student, "--eval", files["eval"], *COLUMNS[:2]), "pairs of texts", "--pair-column"
    )
    assert_refused(invoke("predict", student, "-i", files["eval"], *COLUMNS[:2]), "pairs of texts", "--pair-column")
    assert_refused(invoke("predict", models["bundle"], "-i", files["eval"], *COLUMNS), "single texts", "--pair-column")
    assert_refused(invoke("benchmark", student), "pairs of texts, got single texts", "with --text-column and --pair-")
    pairs_of_texts = ("--unlabeled", files["eval"], *COLUMNS)
    assert_refused(
        invoke("benchmark", models["bundle"], *pairs_of_texts), "got pairs of texts", "without --pair-column"
    )


def test_finetuned_transformer_classifies_pairs(files: dict[str, str], tiny_student: Path) -> None:
    flags = ("--labeled", files["labeled"], "--eval", files["eval"], *COLUMNS, "--steps", 60, "--learning-rate", 1e-2)
    result = invoke("finetune", tiny_student, *flags, "--output-dir", "tuned", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith('setfit-kd predict tuned "..." "..."\n')
    assert json.loads(Path("tuned/metrics.json").read_text())["evaluation"]["accuracy"] > 0.5
    assert json.loads(Path("tuned/config.json").read_text())["text_pairs"] is True
    assert_refused(invoke("export", "tuned", "--output-dir", "bundle"), "pairs of texts", "--pair-column")


def test_both_texts_of_a_pair_are_shortened() -> None:
    class Words:
        truncation = {"max_length": 8, "stride": 0, "direction": "right"}  # noqa: RUF012

        def encode(self, text: str, **_: Any) -> Any:
            count = len(text.split())
            return type("Encoding", (), {"attention_mask": [1] * count, "overflowing": []})

    texts = split_pair(shorten(join_pair("a " * 5_000, "b " * 5_000), Words()))
    assert [text[0] for text in texts] == ["a", "b"]
    assert all(40 <= len(text.split()) < 500 for text in texts)
