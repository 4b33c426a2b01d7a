"""Run every example with tiny models, and with a simulated hub if it needs one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import FAST, newswire
from predictions import LABELS
from standin_hub import StandInHub, use_hub

from setfit_kd.config.presets import PRESETS
from setfit_kd.runtime.classify import Classifier

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def examples(tiny_teacher: Path, tiny_student: Path) -> dict[str, Any]:
    """Arguments of the examples' main function, settings and a part of the output."""
    teacher, student, small = str(tiny_teacher), str(tiny_student), {**FAST, "pool_size": 100}
    layers = {**small, "teacher": teacher, "student": "layers:0,2"}
    bert = {**small, "teacher": f"transformer:{teacher}", "student": "layers:2:distilbert"}
    question_settings = {"teacher": teacher, "student": "layers:2", "epochs": 1, "device": "cpu", "precision": "fp32"}
    two = {**small, "teacher": [teacher, f"transformer:{student}"], "student": "static:8"}
    return {
        "quickstart": ((), layers, "student   accuracy"),
        "own_csv": (("labeled.csv", "pool.txt", "test.csv"), layers, "agreement with the teacher"),
        "ag_news": ((), small, "student"),
        "stages": ((teacher, student), FAST, "texts/s"),
        "finetune": ((teacher, "model"), {"device": "cpu", "precision": "fp32", "epochs": 1}, "macro-F1"),
        "sentence_pairs": ((), {**bert, "student": "layers:2", "shots": 32, "pool_size": None}, "same"),
        "question_answering": (("questions.json", "held-out.json"), question_settings, "exact match"),
        "masked_language_model": (
            (student, "lm", "layers:1"),
            {"device": "cpu", "precision": "fp32", "steps": 2, "head_steps": 2},
            "bits per character",
        ),
        "sentence_encoder": ((teacher, "layers:2"), {"device": "cpu", "precision": "fp32", "epochs": 1}, "same event"),
        "bert_to_distilbert": ((), bert, "baseline  accuracy"),
        "two_teachers": ((), two, "teachers/transformer-student"),
        "labels_from_file": ((), {**FAST, "shots": None, "student": student}, "accuracy"),
    }


OTHERS = {"deploy_fastapi", "ray_data"}  # which have tests of their own, here and in tests/scale
EXAMPLE_NAMES = sorted({path.stem for path in EXAMPLES.glob("*.py")} - OTHERS)


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_example(
    name: str,
    examples: dict[str, Any],
    ag_news_like: Path,
    tiny_teacher: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, rows in (("labeled", newswire("train")[:120]), ("test", newswire("eval"))):
        lines = [f'"{row["text"]}",{row["label"]}\n' for row in rows]
        Path(f"{file}.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    asked = {"id": "1", "question": "Who won?", "answers": [{"text": "The islanders", "answer_start": 0}]}
    held_out = {**asked, "id": "2", "question": "Which team won?"}
    for file, questions in (("questions", [asked]), ("held-out", [held_out])):
        paragraphs = [{"context": "The islanders won the final by 2 to 1.", "qas": questions}]
        Path(f"{file}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    Path("pool.txt").write_text("".join(row["text"] + "\n" for row in newswire("train")), encoding="utf-8")
    teacher, student = (f"models/{PRESETS['ag_news'][role]}" for role in ("teacher", "student"))
    arguments, settings, output = examples[name]
    with StandInHub({teacher: tiny_teacher, student: tiny_student, "datasets/ag_news": ag_news_like}) as server:
        use_hub(monkeypatch, server.endpoint)
        load_example(name).main(*arguments, **settings)
    assert output in capsys.readouterr().out


# The service

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service_module() -> ModuleType:
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    return load_example("deploy_fastapi")


@pytest.fixture(scope="module")
def service(service_module: ModuleType, bundle: Path) -> Iterator[Any]:
    """Client of the service."""
    from fastapi.testclient import TestClient

    with TestClient(service_module.make_app(str(bundle), threads=1)) as client:
        yield client


def exchange(app: Any, *chunks: bytes, length: int = 0) -> tuple[int, bytes]:
    """Send parts of a request, which are never followed by its end; return status and body of the response."""
    import anyio

    parts, sent = iter(chunks), []

    async def receive() -> dict[str, Any]:
        body = next(parts, None)
        if body is None:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
    anyio.run(app, scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def assert_predictions(predictions: list[dict[str, Any]], bundle: Path, texts: list[str]) -> None:
    expected = Classifier(bundle).predict_proba(texts)
    for text, prediction, row in zip(texts, predictions, expected.tolist(), strict=True):
        probabilities = prediction["probabilities"]
        if not text:
            assert prediction == {"label": None, "probabilities": None}
            continue
        assert probabilities == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-6)
        assert prediction["label"] == max(probabilities, key=probabilities.get)


def test_service_predicts_like_the_classifier(service: Any, bundle: Path) -> None:
    assert service.get("/health").json() == {"status": "ok", "labels": list(LABELS)}
    various = ["the match was lost", "", "Schlüssel", "مرحبا", "😀", "two\nlines", "a\u0000b", "the match was lost"]
    for texts in (various, [f"text number {i}" for i in range(256)], ["long " * 2000]):  # the most texts and characters
        response = service.post("/predict", json={"texts": texts})
        assert response.status_code == 200
        assert_predictions(response.json(), bundle, texts)
    requests = [[f"match {i} goal {j}" for j in range(1 + i % 5)] for i in range(80)]
    with ThreadPoolExecutor(8) as threads:  # concurrent requests
        responses = list(threads.map(lambda texts: service.post("/predict", json={"texts": texts}), requests))
    for response, texts in zip(responses, requests, strict=True):
        assert_predictions(response.json(), bundle, texts)


def test_service_explains_invalid_requests(service: Any) -> None:
    for content, message in (
        (b'{"texts": []}', "at least 1 item"),
        (json.dumps({"texts": ["a"] * 257}), "at most 256 items"),
        (json.dumps({"texts": ["a", "b" * 10_001]}), "at most 10000 characters"),
        (b'{"text": "a"}', "Field required"),
        (b"{broken", "JSON decode error"),
        (b'{"texts": ["half \\ud83d"]}', "valid string"),
        (b'{"texts": ["\xff\xfe"]}', "error parsing the body"),
    ):
        response = service.post("/predict", content=content, headers=JSON)
        assert response.status_code in (400, 422)
        assert message in response.text
    assert service.post("/predict", json={"texts": ["still there"]}).status_code == 200


def test_service_rejects_large_and_incomplete_requests(
    service: Any, service_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    max_bytes = service_module.MAX_BYTES
    for chunks, length in (((), max_bytes + 1), ([b" " * (max_bytes // 2 + 1)] * 2, 0)):
        status, response = exchange(service.app, *chunks, length=length)
        assert status == 413
        assert f"{max_bytes:,}" in json.loads(response)["detail"]
    content = json.dumps({"texts": ["a"]}).ljust(max_bytes)
    assert service.post("/predict", content=content, headers=JSON).status_code == 200
    monkeypatch.setattr(service_module, "MAX_SECONDS", 0.2)
    status, response = exchange(service.app, b'{"texts": ')
    assert status == 408
    assert b"within 0.2 seconds" in response
