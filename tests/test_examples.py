"""Run every example with tiny models, and with a simulated hub if it needs one."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import FAST, newswire
from predictions import LABELS
from standin_hub import StandInHub

from setfit_kd.config.presets import PRESETS
from setfit_kd.runtime.classify import Classifier

TEACHER, STUDENT = PRESETS["ag_news"]["teacher"], PRESETS["ag_news"]["student"]
EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    tested = {"quickstart", "own_csv", "ag_news", "stages", "deploy_fastapi"}
    tested |= {"finetune", "bert_to_distilbert", "two_teachers", "labels_from_file"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("quickstart").main(teacher=str(tiny_teacher), student="layers:0,2", **FAST)
    assert "student   accuracy" in capsys.readouterr().out


def test_own_csv(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("labeled", newswire("train")[:120]), ("test", newswire("eval"))):
        lines = [f'"{row["text"]}",{row["label"]}\n' for row in rows]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    (tmp_path / "pool.txt").write_text("".join(row["text"] + "\n" for row in newswire("train")), encoding="utf-8")
    settings = {**FAST, "teacher": str(tiny_teacher), "student": "layers:1"}
    load_example("own_csv").main("labeled.csv", "pool.txt", "test.csv", **settings)
    assert "agreement with the teacher" in capsys.readouterr().out
    assert (tmp_path / "runs/own/student").is_dir()


def test_ag_news(
    ag_news_like: Path,
    tiny_teacher: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repos = {
        f"models/{TEACHER}": tiny_teacher,
        f"models/{STUDENT}": tiny_student,
        "datasets/ag_news": ag_news_like,
    }
    with StandInHub(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        load_example("ag_news").main(**{**FAST, "pool_size": 100})
    assert "student" in capsys.readouterr().out


def test_stages(tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("stages").main(str(tiny_teacher), str(tiny_student), **FAST)
    assert "texts/s" in capsys.readouterr().out


def test_finetune(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    load_example("finetune").main(str(tiny_teacher), tmp_path / "model", device="cpu", precision="fp32", epochs=1)
    assert capsys.readouterr().out.count("macro-F1") == 2
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")


def test_bert_to_distilbert(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"teacher": f"transformer:{tiny_teacher}", "student": "layers:2:distilbert"}
    result = load_example("bert_to_distilbert").main(**{**FAST, **models})
    assert result.student.model_body[0].auto_model.config.model_type == "distilbert"
    assert "baseline  accuracy" in capsys.readouterr().out


def test_two_teachers(tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"teacher": [str(tiny_teacher), f"transformer:{tiny_student}"], "student": "static:8"}
    load_example("two_teachers").main(**{**FAST, **models})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("teachers/teacher", "teachers/transformer-student", "teacher", "baseline", "student")
    ]


def test_labels_from_file(tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {name: value for name, value in FAST.items() if name != "shots"}
    load_example("labels_from_file").main(**{**settings, "student": str(tiny_student)})
    assert "accuracy" in capsys.readouterr().out


# The service


@dataclass(frozen=True)
class Service:
    """Running service of the example."""

    module: ModuleType
    port: int
    timeout: float = 30

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Send a request and return status and response; bytes are sent unchanged, other bodies as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/predict"
        request = urllib.request.Request(url, content, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                is_json = error.headers.get_content_type() == "application/json"
                return error.code, json.loads(error.read()) if is_json else error.read()

    def send(self, *headers: tuple[str, str], body: bytes = b"") -> tuple[int, bytes]:
        """Send a request with exactly these headers and return status and response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest("POST", "/predict")
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path]) -> Path:
    return models["bundle"]


@contextmanager
def run_service(bundle: Path) -> Iterator[Service]:
    """Context manager that runs the service on a free port and stops it at the end."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    import uvicorn

    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set()

    module = load_example("deploy_fastapi")
    app = module.make_app(str(bundle), threads=1)
    server = Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(60)
        yield Service(module, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    with run_service(bundle) as service:
        yield service


def assert_predictions(predictions: list[dict[str, Any]], bundle: Path, texts: list[str]) -> None:
    expected = Classifier(bundle).predict_proba(texts)
    for prediction, row in zip(predictions, expected.tolist(), strict=True):
        probabilities = prediction["probabilities"]
        assert probabilities == pytest.approx(dict(zip(LABELS, row, strict=True)), abs=1e-6)
        assert prediction["label"] == max(probabilities, key=probabilities.get)


def test_service_reports_health(service: Service) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/health", timeout=30) as response:
        assert json.loads(response.read()) == {"status": "ok", "labels": list(LABELS)}


@pytest.mark.parametrize(
    "texts",
    [
        ["the match was lost"],
        ["the match was lost", "shares rose", "", "the match was lost"],
        ["Schlüssel", "مرحبا", "😀", "two\nlines", "a\u0000b"],
        [f"text number {i}" for i in range(256)],
        ["long " * 2000],
    ],
    ids=["one text", "several texts", "not ASCII", "max texts", "max characters"],
)
def test_service_predicts_like_the_classifier(texts: list[str], service: Service, bundle: Path) -> None:
    status, predictions = service.post({"texts": texts})
    assert status == 200
    assert_predictions(predictions, bundle, texts)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"texts": []}, "at least 1 item"),
        ({"texts": ["a"] * 257}, "at most 256 items"),
        ({"texts": ["a", "b" * 10_001]}, "at most 10000 characters"),
        ({"texts": "a"}, "valid list"),
        ({"texts": [None]}, "valid string"),
        ({"texts": [7]}, "valid string"),
        ({"text": "a"}, "Field required"),
        ([], "valid dictionary"),
        (b"{broken", "JSON decode error"),
        (b"", "Field required"),
        (b"texts=a", "JSON decode error"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_service_explains_invalid_requests(body: Any, message: str, service: Service) -> None:
    status, response = service.post(body)
    assert status == 422
    assert message in json.dumps(response)
    assert service.post({"texts": ["still there"]})[0] == 200


@pytest.mark.parametrize("body", [b'{"texts": ["\xff\xfe"]}', b'{"texts": ["half \\ud83d"]}'])
def test_service_rejects_invalid_unicode(body: bytes, service: Service) -> None:
    status, _ = service.post(body)
    assert status in (400, 422)


def test_service_rejects_a_large_request_unread(service: Service) -> None:
    max_bytes = service.module.MAX_BYTES
    declared = ("content-type", "application/json"), ("content-length", str(max_bytes + 1))
    status, response = service.send(*declared)  # the response comes before the body is sent
    assert status == 413
    assert f"{max_bytes:,}" in json.loads(response)["detail"]
    body = json.dumps({"texts": ["a"]}).encode()
    status, _ = service.post(body + b" " * (max_bytes - len(body)))
    assert status == 200


CHUNKED = b"transfer-encoding: chunked\r\n"


def exchange(service: Service, headers: bytes, body: bytes) -> bytes:
    """Send a request and return all data until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + headers + b"\r\n")
        client.sendall(body)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_service_accepts_a_chunked_request(service: Service, bundle: Path) -> None:
    content = json.dumps({"texts": ["the match was lost"]}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    headers = ("content-type", "application/json"), ("transfer-encoding", "chunked")
    status, response = service.send(*headers, body=chunks)
    assert status == 200
    assert_predictions(json.loads(response), bundle, ["the match was lost"])


@pytest.mark.parametrize("headers", [CHUNKED, CHUNKED + b"content-length: 20\r\n"], ids=["chunked", "both"])
def test_service_rejects_a_large_chunked_request(headers: bytes, service: Service) -> None:
    size = service.module.MAX_BYTES + 1
    response = exchange(service, headers, b"%x\r\n%s" % (size, b" " * size))
    assert response.startswith(b"HTTP/1.1 413 ")


def test_service_reads_only_the_declared_length(service: Service) -> None:
    responses = exchange(service, b"content-length: 20\r\n", b" " * 20 + b"x" * 100_000)
    assert responses.startswith(b"HTTP/1.1 422 ")  # the declared part is only spaces
    assert b"HTTP/1.1 200" not in responses


@pytest.mark.parametrize(("headers", "body"), [(b"content-length: 20\r\n", b'{"texts": '), (CHUNKED, b"14\r\n{")])
def test_service_times_out_an_incomplete_request(
    headers: bytes, body: bytes, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.module, "MAX_SECONDS", 0.2)
    response = exchange(service, headers, body)
    assert response.startswith(b"HTTP/1.1 408 ")
    assert b"within 0.2 seconds" in response


@pytest.mark.slow
def test_service_memory_does_not_grow(bundle: Path) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "deploy_fastapi.py"), str(bundle), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command) as process:
        try:
            service = Service(load_example("deploy_fastapi"), port, timeout=200)
            wait_for_service(port)
            largest = {"texts": ["a " * (service.module.MAX_CHARACTERS // 2)] * service.module.MAX_TEXTS}
            memory = []
            for _ in range(3):
                with ThreadPoolExecutor(12) as threads:
                    assert {status for status, _ in threads.map(service.post, [largest] * 12)} == {200}
                memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        finally:
            process.terminate()
    assert memory[2] < 1.1 * memory[1], memory
    assert max(memory) < 400, memory


def wait_for_service(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the service did not start")


@pytest.mark.parametrize("length", ["many", "-1", "1e3", "5, 6"])
def test_service_rejects_an_invalid_content_length(length: str, service: Service) -> None:
    status, _ = service.send(("content-type", "application/json"), ("content-length", length))
    assert status == 400


def test_service_handles_concurrent_requests(service: Service, bundle: Path) -> None:
    requests = [[f"match {i} goal {j}" for j in range(1 + i % 5)] for i in range(80)]
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda texts: service.post({"texts": texts}), requests))
    for (status, predictions), texts in zip(responses, requests, strict=True):
        assert status == 200
        assert_predictions(predictions, bundle, texts)


def test_service_stops_on_request(bundle: Path) -> None:
    with run_service(bundle) as service:
        assert service.post({"texts": ["a"]})[0] == 200
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", service.port))
