"""Whole runs of tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FAST

from setfit_kd import distill


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    distill(
        "bundled:newswire",
        "bundled:newswire",
        "bundled:newswire",
        teacher=str(tiny_teacher),
        student=str(tiny_student),
        output_dir=folder,
        **FAST,
    )
    return folder


def test_a_run_folder_holds_everything(run_folder: Path) -> None:
    assert {path.name for path in run_folder.iterdir()} == {
        "config.yaml",
        "metrics.json",
        "run.json",
        "run.log",
        "signals",
        "student",
        "teacher",
    }
