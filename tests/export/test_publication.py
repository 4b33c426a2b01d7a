"""Tests of pushing a student to the hub and loading it again, with a local stand-in for the hub."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import FAST, newswire
from standin_hub import Failure, StandInHub

from setfit_kd import distill, load
from setfit_kd.cli import main
from setfit_kd.errors import InputError

TEXTS = [row["text"] for row in newswire("eval")[:20]]
MAX_SECONDS = 10.0


@pytest.fixture(scope="module")
def finished_run(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with data in local files."""
    folder = tmp_path_factory.mktemp("secret-folder")
    for name in ("train", "eval"):
        rows = newswire(name)[:120]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = (str(folder / f"{name}.jsonl") for name in ("train", "eval"))
    models = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    distill(train, train, test, **{**FAST, **models, "output_dir": folder / "run"})
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({}, uploads=tmp_path / "uploads") as server:
        server.token = "hf_right"
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server


def push(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["push", *map(str, arguments)])


def test_loaded_model_predicts_like_the_pushed_student(server: StandInHub, run: Path, tmp_path: Path) -> None:
    result = push(run, "me/news", "--private", "--message", "The first one")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{server.endpoint}/me/news\n"
    assert (server.private, server.commits) == ({"models/me/news": True}, ["The first one"])
    local, loaded = (load(name, device="cpu") for name in (run, "me/news"))
    np.testing.assert_array_equal(local.predict_proba(TEXTS).numpy(), loaded.predict_proba(TEXTS).numpy())
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    assert 'SetFitModel.from_pretrained("me/news")' in card
    assert "path/to/this/folder" in (run / "student/README.md").read_text()


def test_second_push_replaces_the_first(server: StandInHub, run: Path, tmp_path: Path) -> None:
    assert push(run, "me/news").exit_code == 0
    (run / "student/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(run / "student", "me/news").exit_code == 0
    assert (tmp_path / "uploads/me/news/README.md").read_text().endswith("# Mine\n")
    assert len(server.commits) == 2


def test_only_files_of_the_model_are_pushed(server: StandInHub, run: Path, tmp_path: Path) -> None:
    student = run / "student"
    others = [".env", "notes.docx", "other.pkl", ".cache/x.json", "credentials.json", "customers.txt", "x/config.json"]
    for name in others:
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text("secret")
    (tmp_path / "elsewhere.txt").write_text("secret")
    (student / "vocab.txt").symlink_to(tmp_path / "elsewhere.txt")
    result = push(run, "me/news")
    assert result.exit_code == 0, result.output
    others.append("vocab.txt")
    pushed = {str(path.relative_to(tmp_path / "uploads/me/news")) for path in (tmp_path / "uploads").rglob("*.*")}
    assert {"model.safetensors", "head.safetensors", "head.json", "model_head.pkl", "1_Pooling/config.json"} <= pushed
    assert not pushed & set(others)
    for name in others:
        assert f"Skipped, not part of a model: {name}\n" in result.stderr


def test_pushed_files_do_not_contain_local_paths(
    server: StandInHub, run: Path, finished_run: Path, tmp_path: Path
) -> None:
    assert push(run, "me/news").exit_code == 0
    for path in (tmp_path / "uploads").rglob("*.*"):
        if path.suffix in (".json", ".md", ".txt"):
            assert finished_run.parent.name not in path.read_text(), path
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "eval.jsonl"


def test_dry_run_lists_files_without_contacting_the_hub(server: StandInHub, run: Path) -> None:
    result = push(run, "me/news", "--dry-run")
    assert result.exit_code == 0, result.output
    size = (run / "student/model.safetensors").stat().st_size
    assert f"{size:,}" in result.stdout
    assert f"Dry run: nothing was uploaded to {server.endpoint}/me/news." in result.stdout
    assert not server.requests


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        ("unauthorized", "No permission to write to .* returned HTTP 401", 2),
        ("not_found", "No permission to write to .* returned HTTP 404", 2),
        ("refused_commit", "No permission to write to .* returned HTTP 403", 2),
        ("unavailable", "Cannot upload .* the hub at .* returned HTTP 503", 69),
    ],
)
def test_rejected_upload_is_reported(server: StandInHub, run: Path, failure: Failure, message: str, code: int) -> None:
    server.failure = failure
    result = push(run, "me/news")
    assert_refused(result, message, code)
    assert not server.commits


def assert_refused(result: Result, message: str, code: int | None = None) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert re.search(message, result.stderr), result.stderr
    assert result.exit_code == code if code is not None else result.exit_code != 0
    assert len(result.stderr.strip().splitlines()) <= 3


def test_invalid_and_missing_tokens_are_reported(
    server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        result = push(run, "me/news")
        assert_refused(result, "HTTP 401")
        assert "hf auth login" in result.stderr


def test_unreachable_hub_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = push(run, "me/news")
    assert_refused(result, "Cannot upload .*: cannot connect to the hub", 69)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(push(run, "me/news"), "Cannot upload .*: HF_HUB_OFFLINE is set", 69)


def test_hub_without_response_times_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from setfit_kd.hub import client as hub

    monkeypatch.setattr(hub, "UPLOAD_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert_refused(push(run, "me/news"), "timed out", 69)
        assert time.monotonic() - start < MAX_SECONDS


def test_invalid_model_card_is_reported(server: StandInHub, run: Path) -> None:
    (run / "student/README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert_refused(push(run, "me/news"), "README.md")
    assert not server.commits


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("run", "news", "'news' is not a valid repository name"),
        ("run", "a/b/c", "'a/b/c' is not a valid repository name"),
        ("run", "../x", "'../x' is not a valid repository name"),
        ("run", "me/news--", "is not a valid repository name"),
        ("nowhere", "me/news", "No such folder: nowhere"),
        ("run/signals", "me/news", "is not a model"),
        ("tiny", "me/news", "Found no classifier"),
    ],
)
def test_invalid_model_or_name_is_rejected(
    run: Path, tiny_student: Path, tmp_path: Path, model: str, name: str, message: str
) -> None:
    shutil.copytree(tiny_student, tmp_path / "tiny")
    assert_refused(push(model, name), message)


def test_private_push_to_a_public_repository_is_rejected(server: StandInHub, run: Path) -> None:
    assert push(run, "me/news").exit_code == 0
    assert_refused(
        push(run, "me/news", "--private"),
        "Error: 'me/news' already exists and is public.\nMake it private",
    )
    assert len(server.commits) == 1


def test_model_card_does_not_contain_relative_paths(
    server: StandInHub, run: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_teacher, "acme/teacher")
    Path("acme/eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in newswire("eval")[:40]))
    sources = {"labeled": "bundled:newswire", "unlabeled": "bundled:newswire", "eval": "acme/eval.jsonl"}
    models = {"teacher": "acme/teacher", "student": "layers:0,1@acme/teacher"}
    distill(**{**FAST, **sources, **models, "output_dir": tmp_path / "again", "pool_size": 60})
    assert push(tmp_path / "again", "me/news").exit_code == 0
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    assert "acme" not in card
    assert "eval.jsonl" in card


def test_damaged_model_is_not_pushed(server: StandInHub, run: Path) -> None:
    weights = run / "student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(push(run, "me/news"), "Cannot load")
    assert not server.requests


# Pinned revisions


@pytest.fixture
def pinned(server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit hash of a pushed model."""
    from huggingface_hub import HfApi

    assert push(run, "me/news").exit_code == 0
    commit = HfApi(endpoint=server.endpoint).repo_info("me/news").sha
    assert commit is not None
    return commit


def test_run_records_the_revisions_of_its_models(
    server: StandInHub, pinned: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    models = {"teacher": f"me/news@{pinned}", "student": [f"layers:0,1@me/news@{pinned}", "static:8@me/news@main"]}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    distill(**{**FAST, **models, **sources, "output_dir": tmp_path / "again", "pool_size": 60})
    record = json.loads((tmp_path / "again/run.json").read_text())
    assert record["revisions"] == {f"me/news@{pinned}": pinned, "me/news@main": pinned}
    assert pinned in (tmp_path / "again/report.md").read_text()
    assert "@" not in "".join(record["students"].values())


def test_unknown_revision_is_reported(server: StandInHub, pinned: str) -> None:
    for revision in ("v9", "feature/x"):
        with pytest.raises(InputError, match=rf"'me/news' on the hub at .* has no revision '{revision}'"):
            load(f"me/news@{revision}")
    with pytest.raises(InputError, match="Expected a revision"):
        load("me/news@")


def test_cached_revision_is_loaded_without_the_hub(
    server: StandInHub, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(f"me/news@{pinned}", device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = load(f"me/news@{pinned}", device="cpu")
    np.testing.assert_array_equal(first.predict_proba(TEXTS).numpy(), again.predict_proba(TEXTS).numpy())
