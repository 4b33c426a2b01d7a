"""Run every example with tiny models, and with a simulated hub if it needs one."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
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


Examples = dict[str, tuple[tuple[Any, ...], dict[str, Any], str]]


@pytest.fixture
def examples(tiny_teacher: Path, tiny_student: Path) -> Examples:
    """Arguments of the examples' main function, settings and a part of the output."""
    teacher, student, small = str(tiny_teacher), str(tiny_student), {**FAST, "pool_size": 100}
    layers = {**small, "teacher": teacher, "student": "layers:0,2"}
    bert = {**small, "teacher": f"transformer:{teacher}", "student": "layers:2:distilbert"}
    two = {**small, "teacher": [teacher, f"transformer:{student}"], "student": "static:8"}
    finetune = {"device": "cpu", "precision": "fp32", "epochs": 1}
    return {
        "quickstart": ((), layers, "student   accuracy"),
        "own_csv": (("labeled.csv", "pool.txt", "test.csv"), layers, "agreement with the teacher"),
        "ag_news": ((), small, "student"),
        "stages": ((teacher, student), FAST, "texts/s"),
        "finetune": ((teacher, "model"), finetune, "macro-F1"),
        "bert_to_distilbert": ((), bert, "baseline  accuracy"),
        "two_teachers": ((), two, "teachers/transformer-student"),
        "labels_from_file": ((), {**FAST, "shots": None, "student": student}, "accuracy"),
    }


EXAMPLE_NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "deploy_fastapi")


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_example(
    name: str,
    examples: Examples,
    ag_news_like: Path,
    tiny_teacher: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, rows in (("labeled", newswire("train")[:120]), ("test", newswire("eval"))):
        lines = [f'"{row["text"]}",{row["label"]}\n' for row in rows]
        Path(f"{file}.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
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


def test_service_reports_health(service: Any) -> None:
    assert service.get("/health").json() == {"status": "ok", "labels": list(LABELS)}


@pytest.mark.parametrize(
    "texts",
    [
        ["the match was lost", "shares rose", "", "the match was lost"],
        ["Schlüssel", "مرحبا", "😀", "two\nlines", "a\u0000b"],
        [f"text number {i}" for i in range(256)],
        ["long " * 2000],
    ],
    ids=["several texts", "not ASCII", "max texts", "max characters"],
)
def test_service_predicts_like_the_classifier(texts: list[str], service: Any, bundle: Path) -> None:
    response = service.post("/predict", json={"texts": texts})
    assert response.status_code == 200
    assert_predictions(response.json(), bundle, texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"texts": []}', "at least 1 item"),
        (json.dumps({"texts": ["a"] * 257}), "at most 256 items"),
        (json.dumps({"texts": ["a", "b" * 10_001]}), "at most 10000 characters"),
        (b'{"texts": [7]}', "valid string"),
        (b'{"text": "a"}', "Field required"),
        (b"{broken", "JSON decode error"),
        (b'{"texts": ["half \\ud83d"]}', "valid string"),
        (b'{"texts": ["\xff\xfe"]}', "error parsing the body"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_service_explains_invalid_requests(content: bytes, message: str, service: Any) -> None:
    response = service.post("/predict", content=content, headers=JSON)
    assert response.status_code in (400, 422)
    assert message in response.text
    assert service.post("/predict", json={"texts": ["still there"]}).status_code == 200


def test_service_rejects_large_requests(service: Any, service_module: ModuleType) -> None:
    max_bytes = service_module.MAX_BYTES
    for chunks, length in (((), max_bytes + 1), ([b" " * (max_bytes // 2 + 1)] * 2, 0)):
        status, response = exchange(service.app, *chunks, length=length)
        assert status == 413
        assert f"{max_bytes:,}" in json.loads(response)["detail"]
    content = json.dumps({"texts": ["a"]}).ljust(max_bytes)
    assert service.post("/predict", content=content, headers=JSON).status_code == 200


def test_service_times_out_an_incomplete_request(
    service: Any, service_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_SECONDS", 0.2)
    status, response = exchange(service.app, b'{"texts": ')
    assert status == 408
    assert b"within 0.2 seconds" in response


def test_service_handles_concurrent_requests(service: Any, bundle: Path) -> None:
    requests = [[f"match {i} goal {j}" for j in range(1 + i % 5)] for i in range(80)]
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda texts: service.post("/predict", json={"texts": texts}), requests))
    for response, texts in zip(responses, requests, strict=True):
        assert_predictions(response.json(), bundle, texts)


@pytest.mark.parametrize("length", ["many", "-1"])
def test_server_rejects_an_invalid_length_and_stops(length: str, service_module: ModuleType, bundle: Path) -> None:
    import uvicorn

    app = service_module.make_app(str(bundle), threads=1)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", b"", {"content-length": length})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=30)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.slow
def test_service_memory_does_not_grow(service_module: ModuleType, bundle: Path) -> None:
    psutil = pytest.importorskip("psutil")
    with socket.create_server(("127.0.0.1", 0)) as free_socket:
        port = free_socket.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "deploy_fastapi.py"), str(bundle), "--port", str(port), "--threads", "1"]
    largest = {"texts": ["a " * (service_module.MAX_CHARACTERS // 2)] * service_module.MAX_TEXTS}
    content, url = json.dumps(largest).encode(), f"http://127.0.0.1:{port}"

    def post(_: int) -> int:
        request = urllib.request.Request(f"{url}/predict", content, JSON)
        with urllib.request.urlopen(request, timeout=200) as response:
            return int(response.status)

    memory = []
    with subprocess.Popen(command) as process:
        try:
            wait_for(f"{url}/health")
            for _ in range(3):
                with ThreadPoolExecutor(12) as threads:
                    assert set(threads.map(post, range(12))) == {200}
                memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        finally:
            process.terminate()
    assert memory[2] < 1.1 * memory[1], memory
    assert max(memory) < 400, memory


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the service did not start")
