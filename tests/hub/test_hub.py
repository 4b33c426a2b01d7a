"""Hub downloads and uploads against a local stand-in, and all kinds of failures."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from conftest import FAST, newswire
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from standin_hub import StandInHub

from setfit_kd.config.presets import PRESETS
from setfit_kd.data.sources import read
from setfit_kd.errors import InputError, SetFitKDError, UnavailableError
from setfit_kd.hub import client as hub

TEACHER, STUDENT = PRESETS["ag_news"]["teacher"], PRESETS["ag_news"]["student"]
MAX_SECONDS = 10.0
"""Maximum time until a failure is reported."""


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
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def run_cli(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process with an empty cache."""
    env = {**os.environ, "HF_HOME": str(home), "PYTHONWARNINGS": "ignore", **environment}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-m", "setfit_kd", *arguments], env=env, capture_output=True, text=True, timeout=240
    )


def test_run_without_arguments_downloads_and_succeeds(standin: StandInHub, tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    result = run_cli("run", *flags, home=tmp_path / "home", HF_ENDPOINT=standin.endpoint)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "runs/ag_news").iterdir()}
    assert {"config.yaml", "metrics.json", "run.json", "student"} <= names
    assert all(name in result.stdout for name in ("teacher", "baseline", "student"))
    assert any("fancyzhx/ag_news" in request for request in standin.requests)


def test_run_without_hub_fails_fast(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = run_cli("run", home=tmp_path / "home", HF_ENDPOINT=endpoint)
    assert result.returncode == 69
    assert TEACHER in result.stderr
    assert endpoint in result.stderr
    assert "setfit-kd run --preset newswire" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


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
@pytest.mark.parametrize(("kind", "name"), [("model", TEACHER), ("dataset", "ag_news")])
def test_failure_is_reported_within_seconds(
    standin: StandInHub, failure: Any, error: type[SetFitKDError], fragments: list[str], kind: hub.Kind, name: str
) -> None:
    standin.failure = failure
    started = time.monotonic()
    with pytest.raises(error) as caught:
        hub.snapshot(name, kind)
    assert time.monotonic() - started < MAX_SECONDS
    message = str(caught.value)
    assert name in message
    assert all(fragment in message for fragment in fragments), message


def test_refused_connection_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"cannot connect to the hub at http://127\.0\.0\.1:9"):
        hub.snapshot(TEACHER, "model")


def test_interrupted_download_is_completed_by_next_call(standin: StandInHub, tiny_teacher: Path) -> None:
    standin.failure = "cut_off"
    with pytest.raises(UnavailableError):
        hub.snapshot(TEACHER, "model")
    standin.failure = "unavailable"
    with pytest.raises(UnavailableError, match=r"HTTP 503"):
        hub.snapshot(TEACHER, "model")
    standin.failure = "none"
    folder = hub.snapshot(TEACHER, "model")
    for file in tiny_teacher.rglob("*.safetensors"):
        assert (folder / file.relative_to(tiny_teacher)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("failure", ["unavailable", "not_found", "stalled"])
def test_complete_copy_in_cache_is_used_if_hub_fails(
    standin: StandInHub, failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = hub.snapshot(TEACHER, "model")
    standin.failure = failure
    assert hub.snapshot(TEACHER, "model") == first
    assert "from the local cache" in caplog.text


@pytest.mark.parametrize(
    ("kind", "name", "kept_pattern"), [("model", TEACHER, "*.json"), ("dataset", "ag_news", "*.md")]
)
def test_incomplete_copy_in_cache_is_not_used(
    standin: StandInHub, kind: hub.Kind, name: str, kept_pattern: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = hub.snapshot(name, kind)
    shutil.rmtree(folder.parent.parent / "trees", ignore_errors=True)  # older clients do not write it
    for path in folder.rglob("*"):
        if path.is_file() and not path.match(kept_pattern):
            path.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.cached_snapshot(name, kind) is None
    with pytest.raises(UnavailableError, match="nor in the local cache"):
        hub.snapshot(name, kind)


def test_offline_mode_uses_cache_without_requests(standin: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnavailableError, match="HF_HUB_OFFLINE"):
        hub.snapshot(TEACHER, "model")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = hub.snapshot(TEACHER, "model")
    n_requests = len(standin.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.snapshot(TEACHER, "model") == folder
    assert len(standin.requests) == n_requests


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


def test_unknown_split_or_configuration_is_reported(standin: StandInHub) -> None:
    with pytest.raises(InputError, match=r"no split 'validation'; it has 'train', 'test'"):
        read("ag_news[validation]", label_column="label")
    with pytest.raises(InputError, match="NAME:CONFIG"):
        read("ag_news:other", label_column="label")


def test_missing_weights_are_an_error(
    standin: StandInHub, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setfit_kd.errors import ModelError
    from setfit_kd.models.bodies import load_body, locate_model

    without_weights = tmp_path / "hollow"
    shutil.copytree(tiny_teacher, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    with StandInHub({"models/org/hollow": without_weights}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        with pytest.raises(ModelError, match="Cannot load"):
            load_body(locate_model("org/hollow"))


def test_password_in_hub_url_is_never_printed(tmp_path: Path) -> None:
    endpoint = "http://me:hidden@127.0.0.1:9"
    for arguments in (["run"], ["doctor"], ["predict", "org/model", "x"], ["run", "--labeled", "org/data"]):
        result = run_cli(*arguments, home=tmp_path / "home", HF_ENDPOINT=endpoint)
        assert "http://127.0.0.1:9" in result.stdout + result.stderr, arguments
        assert "hidden" not in result.stdout + result.stderr, arguments


CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture
def upload_hub(tmp_path: Path) -> Iterator[StandInHub]:
    """Empty hub that accepts uploads with a token."""
    with StandInHub({}, uploads=tmp_path / "uploads") as server:
        server.token = "hf_right"
        yield server


def make_client(server: StandInHub, token: str | bool = "hf_right") -> HfApi:
    return HfApi(endpoint=server.endpoint, token=token)


def read_files(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix(): content for path, content in files.items() if path.parts[0] != ".cache"}


@pytest.mark.parametrize(("requested", "name"), [("tiny", "me/tiny"), ("org/tiny", "org/tiny")])
def test_stand_in_returns_uploaded_files(
    upload_hub: StandInHub, tmp_path: Path, tiny_student: Path, requested: str, name: str
) -> None:
    weights = tiny_student / "model.safetensors"
    api = make_client(upload_hub)
    assert api.create_repo(requested, repo_type="model", private=True).repo_id == name
    operations = [
        CommitOperationAdd("README.md", CARD),
        CommitOperationAdd("deep/er/model.safetensors", weights),
        CommitOperationAdd("empty.txt", b""),
    ]
    commit = api.create_commit(name, operations=operations, commit_message="Upload it", commit_description="All of it")
    assert [request.replace(name, "NAME") for request in upload_hub.requests] == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/models/NAME/preupload/main",
        "POST /api/models/NAME/commit/main",
    ]
    assert (upload_hub.private, upload_hub.commits) == ({f"models/{name}": True}, ["Upload it"])
    assert commit.oid == api.repo_info(name).sha
    assert commit.repo_url.repo_id == name
    expected = {"README.md": CARD, "deep/er/model.safetensors": weights.read_bytes(), "empty.txt": b""}
    assert read_files(tmp_path / "uploads" / name) == expected
    api.snapshot_download(name, local_dir=tmp_path / "back")
    assert read_files(tmp_path / "back") == expected


def test_stand_in_accepts_folder_and_its_next_version(
    upload_hub: StandInHub, tmp_path: Path, tiny_student: Path
) -> None:
    api, folder = make_client(upload_hub), tmp_path / "mine"
    shutil.copytree(tiny_student, folder)
    api.create_repo("tiny", private=False)
    first = api.upload_folder(repo_id="me/tiny", folder_path=folder, commit_message="First")
    repeated = api.upload_folder(repo_id="me/tiny", folder_path=folder, commit_message="The same again")
    assert first.oid == repeated.oid
    (folder / "config.json").rename(folder / "renamed.json")
    api.upload_folder(repo_id="me/tiny", folder_path=folder, commit_message="Second", delete_patterns="*.json")
    assert read_files(tmp_path / "uploads/me/tiny") == read_files(folder)
    delete, add = CommitOperationDelete("renamed.json"), CommitOperationAdd("other.txt", b"other")
    api.create_commit(
        "me/tiny", operations=[delete, add], commit_message="Third", parent_commit=api.repo_info("me/tiny").sha
    )
    assert "renamed.json" not in read_files(tmp_path / "uploads/me/tiny")
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit("me/tiny", operations=[delete, CommitOperationAdd("more.txt", b"")], commit_message="Fourth")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(
            "me/tiny",
            operations=[CommitOperationAdd("more.txt", b"")],
            commit_message="Fifth",
            parent_commit=first.oid,
        )
    assert upload_hub.commits == ["First", "Second", "Third"]
    assert "more.txt" not in read_files(tmp_path / "uploads/me/tiny")


def test_stand_in_creates_repository_once(upload_hub: StandInHub) -> None:
    api = make_client(upload_hub)
    created = api.create_repo("tiny", private=True)
    assert api.create_repo("tiny", private=False, exist_ok=True) == created
    with pytest.raises(HfHubHTTPError, match="already created this model repo") as caught:
        api.create_repo("me/tiny")
    assert caught.value.response.status_code == 409
    assert upload_hub.private == {"models/me/tiny": True}


@pytest.mark.parametrize(
    ("token", "message"), [("hf_wrong", "Invalid credentials in Authorization header"), (False, "Invalid username")]
)
def test_stand_in_requires_its_token(upload_hub: StandInHub, token: str | bool, message: str) -> None:
    make_client(upload_hub).create_repo("tiny")
    api = make_client(upload_hub, token)
    operations = [CommitOperationAdd("README.md", CARD)]
    with pytest.raises(HfHubHTTPError, match=message) as caught:
        api.create_repo("other", exist_ok=True)
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match=message) as caught:
        api.create_commit("me/tiny", operations=operations, commit_message="Upload it")
    assert caught.value.response.status_code == 401
    assert (list(upload_hub.repos), upload_hub.commits) == (["models/me/tiny"], [])


def test_stand_in_can_refuse_a_commit(upload_hub: StandInHub, tmp_path: Path) -> None:
    upload_hub.failure = "refused_commit"
    api = make_client(upload_hub)
    api.create_repo("tiny")
    with pytest.raises(HfHubHTTPError, match="create_pr=1") as caught:
        api.create_commit("me/tiny", operations=[CommitOperationAdd("README.md", CARD)], commit_message="Upload it")
    assert caught.value.response.status_code == 403
    assert (upload_hub.commits, read_files(tmp_path / "uploads")) == ([], {})


@pytest.mark.parametrize(("failure", "status"), [("unauthorized", 401), ("not_found", 404), ("unavailable", 503)])
def test_stand_in_fails_uploads_like_downloads(upload_hub: StandInHub, failure: Any, status: int) -> None:
    upload_hub.failure = failure
    with pytest.raises(HfHubHTTPError) as caught:
        make_client(upload_hub).create_repo("tiny")
    assert caught.value.response.status_code == status
    assert not upload_hub.repos


def test_stand_in_stalls_uploads(upload_hub: StandInHub) -> None:
    upload_hub.failure = "stalled"
    with pytest.raises(TimeoutError):
        urlopen(Request(f"{upload_hub.endpoint}/api/repos/create", data=b"{}"), timeout=0.2)
    assert not upload_hub.repos


def test_stand_in_does_not_change_existing_folders(standin: StandInHub, tiny_teacher: Path) -> None:
    before = read_files(tiny_teacher)
    with pytest.raises(HfHubHTTPError, match="don't have the rights to create a model"):
        make_client(standin).create_repo("tiny")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        make_client(standin).create_commit(
            TEACHER, operations=[CommitOperationAdd("config.json", b"{}")], commit_message="Upload it"
        )
    assert read_files(tiny_teacher) == before


def test_stand_in_validates_cards(upload_hub: StandInHub) -> None:
    api = make_client(upload_hub)
    api.create_repo("tiny")
    invalid, missing = (
        CommitOperationAdd("README.md", b"---\na: [\n---\n"),
        CommitOperationAdd("README.md", b"# Tiny\n"),
    )
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        api.create_commit("me/tiny", operations=[invalid], commit_message="Upload it")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_commit("me/tiny", operations=[missing], commit_message="Upload it")
    assert api.whoami()["name"] == "me"
