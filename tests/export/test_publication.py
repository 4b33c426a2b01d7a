"""A student on its way to the hub and back, against a stand-in on loopback."""

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
SECONDS = 10.0


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on files of its own, as most are."""
    folder = tmp_path_factory.mktemp("secret-place")
    for name in ("train", "eval"):
        rows = newswire(name)[:120]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = (str(folder / f"{name}.jsonl") for name in ("train", "eval"))
    models = {"teacher": str(tiny_teacher), "student": str(tiny_student)}
    distill(train, train, test, **{**FAST, **models, "output_dir": folder / "run"})
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub({}, uploads=tmp_path / "uploads") as server:
        server.token = "hf_right"
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server


def push(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["push", *map(str, arguments)])


def test_what_comes_back_predicts_as_what_was_pushed(server: StandInHub, run: Path, tmp_path: Path) -> None:
    result = push(run, "me/news", "--private", "--message", "The first one")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{server.endpoint}/me/news\n"
    assert (server.private, server.commits) == ({"models/me/news": True}, ["The first one"])
    ours, theirs = (load(name, device="cpu") for name in (run, "me/news"))
    np.testing.assert_array_equal(ours.predict_proba(TEXTS).numpy(), theirs.predict_proba(TEXTS).numpy())
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    assert 'SetFitModel.from_pretrained("me/news")' in card
    assert "path/to/this/folder" in (run / "student/README.md").read_text()


def test_a_second_push_takes_the_place_of_the_first(server: StandInHub, run: Path, tmp_path: Path) -> None:
    assert push(run, "me/news").exit_code == 0
    (run / "student/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(run / "student", "me/news").exit_code == 0
    assert (tmp_path / "uploads/me/news/README.md").read_text().endswith("# Mine\n")
    assert len(server.commits) == 2


def test_only_what_belongs_to_the_model_goes(server: StandInHub, run: Path, tmp_path: Path) -> None:
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
    gone = {str(path.relative_to(tmp_path / "uploads/me/news")) for path in (tmp_path / "uploads").rglob("*.*")}
    assert {"model.safetensors", "head.safetensors", "head.json", "model_head.pkl", "1_Pooling/config.json"} <= gone
    assert not gone & set(others)
    for name in others:
        assert f"Left out, since it is no part of a model: {name}\n" in result.stderr


def test_nothing_tells_where_the_run_was_made(server: StandInHub, run: Path, made: Path, tmp_path: Path) -> None:
    assert push(run, "me/news").exit_code == 0
    for path in (tmp_path / "uploads").rglob("*.*"):
        if path.suffix in (".json", ".md", ".txt"):
            assert made.parent.name not in path.read_text(), path
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "eval.jsonl"


def test_a_dry_run_lists_it_and_asks_nobody(server: StandInHub, run: Path) -> None:
    result = push(run, "me/news", "--dry-run")
    assert result.exit_code == 0, result.output
    size = (run / "student/model.safetensors").stat().st_size
    assert f"{size:,}" in result.stdout
    assert f"Would go to {server.endpoint}/me/news." in result.stdout
    assert not server.requests


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        ("unauthorized", "may not be written to: the hub at .* answers HTTP 401", 2),
        ("not_found", "may not be written to: the hub at .* answers HTTP 404", 2),
        ("refused_commit", "may not be written to: the hub at .* answers HTTP 403", 2),
        ("unavailable", "was not uploaded: the hub at .* answers HTTP 503", 69),
    ],
)
def test_a_hub_that_does_not_take_it(server: StandInHub, run: Path, failure: Failure, message: str, code: int) -> None:
    server.failure = failure
    result = push(run, "me/news")
    assert_refused(result, message, code)
    assert not server.commits


def assert_refused(result: Result, message: str, code: int | None = None) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert re.search(message, result.stderr), result.stderr
    assert result.exit_code == code if code is not None else result.exit_code != 0
    assert len(result.stderr.strip().splitlines()) <= 3


def test_a_wrong_token_and_none(server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        result = push(run, "me/news")
        assert_refused(result, "HTTP 401")
        assert "hf auth login" in result.stderr


def test_nobody_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = push(run, "me/news")
    assert_refused(result, "was not uploaded: no hub answers", 69)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_refused(push(run, "me/news"), "was not uploaded: HF_HUB_OFFLINE keeps off the hub", 69)


def test_a_hub_that_never_answers_is_given_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from setfit_kd.hub import client as hub

    monkeypatch.setattr(hub, "UPLOAD_STALL_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert_refused(push(run, "me/news"), "does not answer in time", 69)
        assert time.monotonic() - started < SECONDS


def test_a_card_that_the_hub_cannot_read(server: StandInHub, run: Path) -> None:
    (run / "student/README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    assert_refused(push(run, "me/news"), "README.md")
    assert not server.commits


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("run", "news", "'news' is no name on the hub"),
        ("run", "a/b/c", "'a/b/c' is no name on the hub"),
        ("run", "../x", "'../x' is no name on the hub"),
        ("run", "me/news--", "is no name on the hub"),
        ("nowhere", "me/news", "There is no folder nowhere"),
        ("run/signals", "me/news", "is not a model"),
        ("tiny", "me/news", "holds no classifier"),
    ],
)
def test_what_cannot_be_pushed(
    run: Path, tiny_student: Path, tmp_path: Path, model: str, name: str, message: str
) -> None:
    shutil.copytree(tiny_student, tmp_path / "tiny")
    assert_refused(push(model, name), message)


def test_what_shall_be_private_goes_to_no_public_repository(server: StandInHub, run: Path) -> None:
    assert push(run, "me/news").exit_code == 0
    assert_refused(
        push(run, "me/news", "--private"),
        "Error: 'me/news' is there already, and everybody may see it.\nMake it private",
    )
    assert len(server.commits) == 1


def test_relative_paths_stay_here_too(server: StandInHub, run: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher, "acme/teacher")
    Path("acme/eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in newswire("eval")[:40]))
    sources = {"labeled": "bundled:newswire", "unlabeled": "bundled:newswire", "eval": "acme/eval.jsonl"}
    models = {"teacher": "acme/teacher", "student": "layers:0,1@acme/teacher"}
    distill(**{**FAST, **sources, **models, "output_dir": tmp_path / "again", "pool_size": 60})
    assert push(tmp_path / "again", "me/news").exit_code == 0
    card = (tmp_path / "uploads/me/news/README.md").read_text()
    assert "acme" not in card
    assert "eval.jsonl" in card


def test_a_damaged_model_stays_here(server: StandInHub, run: Path) -> None:
    weights = run / "student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(push(run, "me/news"), "does not load")
    assert not server.requests


# Pinned revisions


@pytest.fixture
def pinned(server: StandInHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commit of a model that has since changed."""
    assert push(run, "me/news").exit_code == 0
    return load_commit(server)


def load_commit(server: StandInHub) -> str:
    from huggingface_hub import HfApi

    found = HfApi(endpoint=server.endpoint).repo_info("me/news").sha
    assert found is not None
    return found


def test_a_run_tells_which_revisions_it_was_made_of(
    server: StandInHub, pinned: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    models = {"teacher": f"me/news@{pinned}", "student": [f"layers:0,1@me/news@{pinned}", "static:8@me/news@main"]}
    sources = dict.fromkeys(("labeled", "unlabeled", "eval"), "bundled:newswire")
    distill(**{**FAST, **models, **sources, "output_dir": tmp_path / "again", "pool_size": 60})
    told = json.loads((tmp_path / "again/run.json").read_text())
    assert told["revisions"] == {f"me/news@{pinned}": pinned, "me/news@main": pinned}
    assert pinned in (tmp_path / "again/report.md").read_text()
    assert "@" not in "".join(told["students"].values())


def test_there_is_no_such_revision(server: StandInHub, pinned: str) -> None:
    for revision in ("v9", "feature/x"):
        with pytest.raises(InputError, match=rf"'me/news' on the hub at .* has no revision '{revision}'"):
            load(f"me/news@{revision}")
    with pytest.raises(InputError, match="names no revision"):
        load("me/news@")


def test_a_pinned_copy_needs_no_hub(server: StandInHub, pinned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"me/news@{pinned}", device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = load(f"me/news@{pinned}", device="cpu")
    np.testing.assert_array_equal(first.predict_proba(TEXTS).numpy(), again.predict_proba(TEXTS).numpy())
