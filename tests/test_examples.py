"""Every example runs: with tiny models, and with a stand-in where it needs the hub."""

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

from setfit_kd.config import PRESETS
from setfit_kd.runtime import Classifier

TEACHER, STUDENT = PRESETS["ag_news"]["teacher"], PRESETS["ag_news"]["student"]
EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    families = {"finetune", "bert_to_distilbert", "two_teachers", "labels_from_file"}
    tested = {"quickstart", "own_csv", "ag_news", "stages", "deploy_fastapi"} | families
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("quickstart").main(teacher=str(tiny_teacher), student="layers:0,2", **FAST)
    assert "student   accuracy" in capsys.readouterr().out


def test_own_csv(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("labeled", newswire("train")[:120]), ("test", newswire("eval"))):
        lines = [f'"{row["text"]}",{row["label"]}\n' for row in rows]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    (tmp_path / "pool.txt").write_text("".join(row["text"] + "\n" for row in newswire("train")), encoding="utf-8")
    settings = {**FAST, "teacher": str(tiny_teacher), "student": "layers:1"}
    example("own_csv").main("labeled.csv", "pool.txt", "test.csv", **settings)
    assert "agrees with the teacher" in capsys.readouterr().out
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
        example("ag_news").main(**{**FAST, "pool_size": 100})
    assert "student" in capsys.readouterr().out


def test_stages(tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("stages").main(str(tiny_teacher), str(tiny_student), **FAST)
    assert "texts/s" in capsys.readouterr().out


def test_finetune(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    example("finetune").main(str(tiny_teacher), tmp_path / "model", device="cpu", precision="fp32", epochs=1)
    assert capsys.readouterr().out.count("macro-F1") == 2
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")


def test_bert_to_distilbert(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"teacher": f"transformer:{tiny_teacher}", "student": "layers:2:distilbert"}
    result = example("bert_to_distilbert").main(**{**FAST, **pair})
    assert result.student.model_body[0].auto_model.config.model_type == "distilbert"
    assert "baseline  accuracy" in capsys.readouterr().out


def test_two_teachers(tiny_teacher: Path, tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"teacher": [str(tiny_teacher), f"transformer:{tiny_student}"], "student": "static:8"}
    example("two_teachers").main(**{**FAST, **named})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("teachers/teacher", "teachers/transformer-student", "teacher", "baseline", "student")
    ]


def test_labels_from_file(tiny_student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {name: value for name, value in FAST.items() if name != "shots"}
    example("labels_from_file").main(**{**settings, "student": str(tiny_student)})
    assert "accuracy" in capsys.readouterr().out


# The service


@dataclass(frozen=True)
class Service:
    """The service of the example, running."""

    module: ModuleType
    port: int
    timeout: float = 30

    def ask(self, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and answer of a request; bytes are sent as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/predict"
        request = urllib.request.Request(url, content, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                is_json = error.headers.get_content_type() == "application/json"
                return error.code, json.loads(error.read()) if is_json else error.read()

    def send(self, *headers: tuple[str, str], body: bytes = b"") -> tuple[int, bytes]:
        """Status and answer of a request with these headers and no others."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest("POST", "/predict")
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path]) -> Path:
    return models["bundle"]


@contextmanager
def serving(bundle: Path) -> Iterator[Service]:
    """The service on a free port; it has stopped by the end of the block."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the extra serve is not installed")
    import uvicorn

    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set()

    module = example("deploy_fastapi")
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
    with serving(bundle) as running:
        yield running


def assert_answers(answers: list[dict[str, Any]], bundle: Path, texts: list[str]) -> None:
    expected = Classifier(bundle).predict_proba(texts)
    for answer, probabilities in zip(answers, expected.tolist(), strict=True):
        assert answer["probabilities"] == pytest.approx(dict(zip(LABELS, probabilities, strict=True)), abs=1e-6)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)


def test_the_service_is_well(service: Service) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/health", timeout=30) as answer:
        assert json.loads(answer.read()) == {"status": "ok", "labels": list(LABELS)}


@pytest.mark.parametrize(
    "texts",
    [
        ["the match was lost"],
        ["the match was lost", "shares rose", "", "the match was lost"],
        ["Schlüssel", "مرحبا", "😀", "two\nlines", "a\u0000b"],
        [f"text number {i}" for i in range(256)],
        ["long " * 2000],
    ],
    ids=["one", "several", "not in ASCII", "most", "longest"],
)
def test_the_service_answers_as_the_classifier(texts: list[str], service: Service, bundle: Path) -> None:
    status, answers = service.ask({"texts": texts})
    assert status == 200
    assert_answers(answers, bundle, texts)


@pytest.mark.parametrize(
    ("body", "says"),
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
def test_the_service_says_what_it_cannot_answer(body: Any, says: str, service: Service) -> None:
    status, answer = service.ask(body)
    assert status == 422
    assert says in json.dumps(answer)
    assert service.ask({"texts": ["still there"]})[0] == 200


@pytest.mark.parametrize("body", [b'{"texts": ["\xff\xfe"]}', b'{"texts": ["half \\ud83d"]}'])
def test_the_service_refuses_what_is_no_unicode(body: bytes, service: Service) -> None:
    status, _ = service.ask(body)
    assert status in (400, 422)


def test_the_service_refuses_a_large_request_unread(service: Service) -> None:
    most = service.module.MOST_BYTES
    declared = ("content-type", "application/json"), ("content-length", str(most + 1))
    status, answer = service.send(*declared)  # the answer comes before the body does
    assert status == 413
    assert f"{most:,}" in json.loads(answer)["detail"]
    fits = json.dumps({"texts": ["a"]}).encode()
    status, _ = service.ask(fits + b" " * (most - len(fits)))
    assert status == 200


CHUNKED = b"transfer-encoding: chunked\r\n"


def exchange(service: Service, headers: bytes, body: bytes) -> bytes:
    """All that the service answers until it closes the connection, which is left open on this side."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + headers + b"\r\n")
        client.sendall(body)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_the_service_reads_a_request_in_pieces(service: Service, bundle: Path) -> None:
    content = json.dumps({"texts": ["the match was lost"]}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    headers = ("content-type", "application/json"), ("transfer-encoding", "chunked")
    status, answer = service.send(*headers, body=chunks)
    assert status == 200
    assert_answers(json.loads(answer), bundle, ["the match was lost"])


@pytest.mark.parametrize("headers", [CHUNKED, CHUNKED + b"content-length: 20\r\n"], ids=["chunked", "both"])
def test_the_service_refuses_a_large_request_in_pieces(headers: bytes, service: Service) -> None:
    size = service.module.MOST_BYTES + 1
    answer = exchange(service, headers, b"%x\r\n%s" % (size, b" " * size))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_service_reads_no_more_than_the_declared_length(service: Service) -> None:
    answers = exchange(service, b"content-length: 20\r\n", b" " * 20 + b"x" * 100_000)
    assert answers.startswith(b"HTTP/1.1 422 ")  # nothing but spaces; the rest is no request
    assert b"HTTP/1.1 200" not in answers


@pytest.mark.parametrize(("headers", "body"), [(b"content-length: 20\r\n", b'{"texts": '), (CHUNKED, b"14\r\n{")])
def test_the_service_ends_a_request_that_is_sent_by_half(
    headers: bytes, body: bytes, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.module, "MOST_SECONDS", 0.2)
    answer = exchange(service, headers, body)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 0.2 seconds" in answer


@pytest.mark.slow
def test_the_memory_of_the_service_does_not_grow(bundle: Path) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "deploy_fastapi.py"), str(bundle), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command) as process:
        try:
            service = Service(example("deploy_fastapi"), port, timeout=200)
            wait_until_served(port)
            largest = {"texts": ["a " * (service.module.MOST_CHARACTERS // 2)] * service.module.MOST_TEXTS}
            taken = []
            for _ in range(3):
                with ThreadPoolExecutor(12) as threads:
                    assert {status for status, _ in threads.map(service.ask, [largest] * 12)} == {200}
                taken.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        finally:
            process.terminate()
    assert taken[2] < 1.1 * taken[1], taken
    assert max(taken) < 400, taken


def wait_until_served(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the service did not start")


@pytest.mark.parametrize("length", ["many", "-1", "1e3", "5, 6"])
def test_the_service_refuses_a_length_that_is_no_number(length: str, service: Service) -> None:
    status, _ = service.send(("content-type", "application/json"), ("content-length", length))
    assert status == 400


def test_the_service_answers_several_at_once(service: Service, bundle: Path) -> None:
    asked = [[f"match {i} goal {j}" for j in range(1 + i % 5)] for i in range(80)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda texts: service.ask({"texts": texts}), asked))
    for (status, answers), texts in zip(found, asked, strict=True):
        assert status == 200
        assert_answers(answers, bundle, texts)


def test_the_service_stops_when_told(bundle: Path) -> None:
    with serving(bundle) as service:
        assert service.ask({"texts": ["a"]})[0] == 200
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", service.port))
