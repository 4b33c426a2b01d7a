"""Tests of pushing a student to the hub and loading it again, with a local stand-in for the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from checks import invoke
from click.testing import Result
from conftest import FAST, newswire
from huggingface_hub import HfApi
from standin_hub import Failure, StandInHub, use_hub

from setfit_kd import distill, load
from setfit_kd.errors import InputError
from setfit_kd.hub import client

TEXTS = [row["text"] for row in newswire("eval")[:20]]


@pytest.fixture(scope="module")
def finished_run(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with data and models in local folders, one of them named by a relative path."""
    folder = tmp_path_factory.mktemp("secret-folder")
    shutil.copytree(tiny_teacher, folder / "acme/teacher")
    for name in ("train", "eval"):
        rows = newswire(name)[:120]
        (folder / f"acme/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = str(folder / "acme/train.jsonl")
    models = {"teacher": str(tiny_teacher), "student": "layers:0,1@acme/teacher"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distill(train, train, "acme/eval.jsonl", **{**FAST, **models, "output_dir": folder / "run"})
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({}, uploads=tmp_path / "uploads") as server:
        use_hub(monkeypatch, server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def push(*arguments: str | Path) -> Result:
    result = invoke("push", *arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_not_pushed(result: Result, message: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr), result.stderr


def test_loaded_model_predicts_like_the_pushed_student(server: StandInHub, run: Path, tmp_path: Path) -> None:
    result = push(run, "me/news", "--dry-run")
    assert f"{(run / 'student/model.safetensors').stat().st_size:,}" in result.stdout
    assert f"Dry run: nothing was uploaded to {server.endpoint}/me/news." in result.stdout
    assert not server.requests
    result = push(run, "me/news", "--private", "--message", "The first one")
    assert result.stdout == f"{server.endpoint}/me/news\n"
    assert (server.private, server.commits) == ({"models/me/news": True}, ["The first one"])
    local, loaded = (load(name, device="cpu") for name in (run, "me/news"))
    np.testing.assert_array_equal(local.predict_proba(TEXTS).numpy(), loaded.predict_proba(TEXTS).numpy())
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    assert 'SetFitModel.from_pretrained("me/news")' in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "eval.jsonl"
    for path in (tmp_path / "uploads").rglob("*.*"):
        if path.suffix in (".json", ".md", ".txt"):
            assert not re.search("secret-folder|acme", path.read_text()), f"{path} contains a local path"


def test_second_push_replaces_the_first(server: StandInHub, run: Path, tmp_path: Path) -> None:
    push(run, "me/news")
    (run / "student/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(run / "student", "me/news")
    assert (tmp_path / "uploads/me/news/README.md").read_text().endswith("# Mine\n")
    assert len(server.commits) == 2
    assert_not_pushed(invoke("push", run, "me/news", "--private"), "'me/news' already exists and is public.\nMake it")
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
    others.append("vocab.txt")
    pushed = {str(path.relative_to(tmp_path / "uploads/me/news")) for path in (tmp_path / "uploads").rglob("*.*")}
    assert {"model.safetensors", "head.safetensors", "head.json", "model_head.pkl", "1_Pooling/config.json"} <= pushed
    assert not pushed & set(others)
    for name in others:
        assert f"Skipped, not part of a model: {name}\n" in result.stderr


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        ("unauthorized", "No permission to write to .* returned HTTP 401.*\n.*hf auth login", 2),
        ("refused_commit", "No permission to write to .* returned HTTP 403", 2),
        ("unavailable", "Cannot upload .* the hub at .* returned HTTP 503", 69),
        ("stalled", "Cannot upload .* timed out", 69),
    ],
)
def test_failed_upload_is_reported(
    server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch, failure: Failure, message: str, code: int
) -> None:
    monkeypatch.setattr(client, "UPLOAD_TIMEOUT_S", 0.5)
    server.failure = failure
    assert_not_pushed(invoke("push", run, "me/news"), message, code)
    assert not server.commits


def test_unreachable_hub_and_invalid_card_are_reported(
    server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "student/README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert_not_pushed(invoke("push", run, "me/news"), "rejected the upload .*README.md")
    use_hub(monkeypatch, "http://127.0.0.1:9")
    assert_not_pushed(invoke("push", run, "me/news"), "Cannot upload .*: cannot connect to the hub", 69)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_not_pushed(invoke("push", run, "me/news"), "Cannot upload .*: HF_HUB_OFFLINE is set", 69)
    assert not server.commits


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        *(("run", name, f"'{name}' is not a valid repository name") for name in ("news", "../x")),
        ("nowhere", "me/news", "No such folder: nowhere"),
        ("run/signals", "me/news", "is not a model"),
        ("tiny", "me/news", "is a sentence encoder, not a classifier"),
        ("damaged", "me/news", "Cannot load"),
    ],
)
def test_invalid_model_or_name_is_rejected(
    server: StandInHub, run: Path, tiny_student: Path, tmp_path: Path, model: str, name: str, message: str
) -> None:
    shutil.copytree(tiny_student, tmp_path / "tiny")
    weights = shutil.copytree(run / "student", tmp_path / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_not_pushed(invoke("push", model, name), message)
    assert not server.requests


def test_run_records_the_revisions_of_its_models(server: StandInHub, run: Path, tmp_path: Path) -> None:
    push(run, "me/news")
    pinned = str(HfApi(endpoint=server.endpoint).repo_info("me/news").sha)
    models = {"teacher": f"me/news@{pinned}", "student": [f"layers:0,1@me/news@{pinned}", "static:8@me/news@main"]}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    distill(**{**FAST, **models, **sources, "output_dir": tmp_path / "again", "pool_size": 60, "baseline": False})
    record = json.loads((tmp_path / "again/run.json").read_text())
    assert record["revisions"] == {f"me/news@{pinned}": pinned, "me/news@main": pinned}
    assert pinned in (tmp_path / "again/report.html").read_text()
    assert "@" not in "".join(record["students"].values())
    for revision in ("v9", "feature/x"):
        with pytest.raises(InputError, match=f"'me/news' on the hub at .* has no revision '{revision}'"):
            load(f"me/news@{revision}")
