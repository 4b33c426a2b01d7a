"""Every example runs: with tiny models, and with a stand-in where it needs the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from conftest import FAST, newswire
from standin_hub import StandInHub
from test_hub import STUDENT, TEACHER, ag_news_like  # noqa: F401 - a fixture

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"quickstart", "own_csv", "ag_news", "stages"}


def test_quickstart(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("quickstart").main(teacher=str(tiny_teacher), student="layers:0,2", **FAST)
    assert "student   accuracy" in capsys.readouterr().out


def test_own_csv(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("labeled", newswire("train")[:120]), ("test", newswire("eval"))):
        lines = [f'"{row["text"]}",{row["label"]}\n' for row in rows]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(lines), encoding="utf-8")
    (tmp_path / "pool.txt").write_text("".join(row["text"] + "\n" for row in newswire("train")), encoding="utf-8")
    settings = {**FAST, "teacher": str(tiny_teacher), "student": "layers:0"}
    example("own_csv").main("labeled.csv", "pool.txt", "test.csv", **settings)
    assert "agrees with the teacher" in capsys.readouterr().out
    assert (tmp_path / "runs/own/student").is_dir()


def test_ag_news(
    ag_news_like: Path,  # noqa: F811
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
