"""Downloads from a local stand-in for the hub, and all kinds of failures."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import invoke
from conftest import FAST, newswire
from standin_hub import Failure, StandInHub, use_hub

from setfit_kd.config.presets import PRESETS
from setfit_kd.data.sources import read
from setfit_kd.errors import InputError, ModelError, OutputError, SetFitKDError, UnavailableError
from setfit_kd.hub import client as hub
from setfit_kd.models.bodies import load_body, locate_model

TEACHER, STUDENT = PRESETS["ag_news"]["teacher"], PRESETS["ag_news"]["student"]
SOURCES: list[tuple[hub.Kind, str]] = [("model", TEACHER), ("dataset", "ag_news")]


@pytest.fixture
def standin(
    ag_news_like: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    repos = {
        f"models/{TEACHER}": tiny_teacher,
        f"models/{STUDENT}": tiny_student,
        "datasets/fancyzhx/ag_news": ag_news_like,
    }
    with StandInHub(repos, {"datasets/ag_news": "datasets/fancyzhx/ag_news"}) as server:
        use_hub(monkeypatch, server.endpoint)
        yield server


def set_offline(monkeypatch: pytest.MonkeyPatch, value: bool = True) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", value)


def test_run_without_arguments_downloads_and_succeeds(standin: StandInHub, tmp_path: Path) -> None:
    result = invoke("run", *(f"--{name.replace('_', '-')}={value}" for name, value in FAST.items() if value))
    assert result.exit_code == 0, result.stderr
    names = {path.name for path in (tmp_path / "runs/ag_news").iterdir()}
    assert {"config.yaml", "metrics.json", "run.json", "student"} <= names


@pytest.mark.parametrize(
    ("failure", "error", "fragments"),
    [
        ("unauthorized", InputError, ["HTTP 401", "HF_TOKEN"]),
        ("not_found", InputError, ["HTTP 404", "Check the name"]),
        ("unavailable", UnavailableError, ["HTTP 503", "--preset newswire"]),
        ("stalled", UnavailableError, ["timed out", "--preset newswire"]),
        ("cut_off", UnavailableError, ["was interrupted", "Run the same command again"]),
    ],
)
@pytest.mark.parametrize(("kind", "name"), SOURCES)
def test_failure_is_reported_within_seconds(
    standin: StandInHub,
    monkeypatch: pytest.MonkeyPatch,
    failure: Failure,
    error: type[SetFitKDError],
    fragments: list[str],
    kind: hub.Kind,
    name: str,
) -> None:
    monkeypatch.setattr(hub, "CONNECT_TIMEOUT_S", 0.5)
    standin.failure = failure
    started = time.monotonic()
    with pytest.raises(error) as error_info:
        hub.snapshot(name, kind)
    assert time.monotonic() - started < 10
    message = str(error_info.value)
    assert name in message
    assert all(fragment in message for fragment in fragments), message


def test_interrupted_download_is_completed_by_next_call(standin: StandInHub, tiny_teacher: Path) -> None:
    failures: tuple[Failure, ...] = ("cut_off", "unavailable")
    for failure in failures:
        standin.failure = failure
        with pytest.raises(UnavailableError):
            hub.snapshot(TEACHER, "model")
    standin.failure = "none"
    folder = hub.snapshot(TEACHER, "model")
    for file in tiny_teacher.rglob("*.safetensors"):
        assert (folder / file.relative_to(tiny_teacher)).read_bytes() == file.read_bytes()


def test_complete_copy_in_cache_is_used_if_hub_fails(standin: StandInHub, caplog: pytest.LogCaptureFixture) -> None:
    first = hub.snapshot(TEACHER, "model")
    standin.failure = "unavailable"
    assert hub.snapshot(TEACHER, "model") == first
    assert "from the local cache" in caplog.text


@pytest.mark.parametrize(("kind", "name"), SOURCES)
@pytest.mark.parametrize("remaining", ["*.json", "*.md"])
def test_incomplete_copy_in_cache_is_not_used(
    standin: StandInHub, kind: hub.Kind, name: str, remaining: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.snapshot(name, kind)
    shutil.rmtree(folder.parent.parent / "trees", ignore_errors=True)  # older clients do not write it
    for path in folder.rglob("*"):
        if path.is_file() and not path.match(remaining):
            path.unlink()
    set_offline(monkeypatch)
    assert hub.cached_snapshot(name, kind) is None
    with pytest.raises(UnavailableError, match="nor in the local cache"):
        hub.snapshot(name, kind)


def test_offline_mode_uses_cache_without_requests(standin: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_offline(monkeypatch)
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        hub.snapshot(TEACHER, "model")
    set_offline(monkeypatch, False)
    assert re.search(r"127\.0\.0\.1:\d+ +reachable", invoke("doctor").stdout)
    folder = hub.snapshot(TEACHER, "model")
    n_requests = len(standin.requests)
    set_offline(monkeypatch)
    assert hub.snapshot(TEACHER, "model") == folder
    assert len(standin.requests) == n_requests


def test_pytorch_weights_are_downloaded_only_without_safetensors(
    standin: StandInHub, tiny_teacher: Path, tmp_path: Path
) -> None:
    for name, ignored in (("old", "*.safetensors"), ("both", "")):
        standin.repos[f"models/org/{name}"] = tmp_path / name
        shutil.copytree(tiny_teacher, tmp_path / name, ignore=shutil.ignore_patterns(ignored))
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"weights")
        is_downloaded = (hub.snapshot(f"org/{name}", "model") / "pytorch_model.bin").is_file()
        assert is_downloaded == (name == "old")
        (tmp_path / name / "pytorch_model.bin").unlink()
    standin.repos["models/org/hollow"] = tmp_path / "old"
    with pytest.raises(ModelError, match="Cannot load"):
        load_body(locate_model("org/hollow"))


def test_cache_that_cannot_be_written_is_reported(
    standin: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="HF_HOME"):
        hub.snapshot(TEACHER, "model")


def test_hub_data_set_leaves_only_the_download(
    standin: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = read("ag_news", label_column="label", role="test")
    assert rows.texts == [row["text"] for row in newswire("eval")]
    assert rows.labels == [row["label"] for row in newswire("eval")]
    assert rows.label_names == ("World", "Sports", "Business", "Sci/Tech")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"scratch", "hub-cache"}
    with pytest.raises(InputError, match=r"no split 'validation'; it has 'train', 'test'"):
        read("ag_news[validation]", label_column="label")
    with pytest.raises(InputError, match="NAME:CONFIG"):
        read("ag_news:other", label_column="label")


def test_invalid_name_is_reported() -> None:
    for name, message in (("a/b/c", "not a local path or a valid hub name"), ("org/data@", "a revision after the @")):
        with pytest.raises(InputError, match=message):
            hub.snapshot(name, "model")


@pytest.mark.parametrize("arguments", [["doctor"], ["predict", "org/model", "x"], ["run", "--labeled", "org/data"]])
def test_password_in_hub_url_is_never_printed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, "http://me:hidden@127.0.0.1:9")
    result = invoke(*arguments)
    assert "http://127.0.0.1:9" in result.output
    assert "hidden" not in result.output
    if arguments[0] != "doctor":
        assert result.exit_code == 69
        assert re.search(r"Error: The \w+( set)? '.*' is neither .*: cannot connect to the hub", result.stderr)
        assert not (tmp_path / "runs").exists()


def test_commits_are_listed_by_name(standin: StandInHub, tmp_path: Path) -> None:
    model, data = hub.snapshot(TEACHER, "model").name, hub.snapshot("ag_news", "dataset").name
    (tmp_path / "static").mkdir()
    sources = ["ag_news[train]", "bundled:newswire", "./a.csv", None, [("text", "label")]]
    pinned = f"{TEACHER}@{model}"
    for models, expected in (
        ([TEACHER, None, "layers:0,1", "static"], {TEACHER: model}),
        ([f"layers:3@transformer:{TEACHER}", "demo:all-MiniLM-L6-v2"], {TEACHER: model}),
        ([f"static:8@{pinned}", STUDENT], {pinned: model}),
        ([f"blank:{pinned}", f"transformer:{TEACHER}"], {pinned: model, TEACHER: model}),
    ):
        assert hub.cached_revisions(models, sources) == {**expected, "datasets/ag_news": data}
