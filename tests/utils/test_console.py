"""Progress on stderr."""

from __future__ import annotations

import pytest
from rich.console import Console

from setfit_kd.utils.console import disable_progress_bars, enable_progress_bars, show_progress, track


def report_progress(description: str, total: int | None, unit: str = "texts") -> None:
    with track(description, total, unit) as advance:
        advance(1)
        advance(2)


def test_a_line_per_step_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(True):
        report_progress("Scoring pool", 12_345)
        report_progress("Classifying", None)
        report_progress("Classifying", 1)
        with show_progress(False):
            report_progress("Validating", 100)
    enable_progress_bars()
    report_progress("Shown", 100, "steps")
    disable_progress_bars()  # as in all tests
    report_progress("Hidden", 100)
    assert capsys.readouterr().err.splitlines() == ["Scoring pool: 12,345 texts", "Classifying", "Shown: 100 steps"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(stderr=True, force_terminal=True, width=120)
    monkeypatch.setattr("setfit_kd.utils.console.stderr_console", lambda: console)
    with show_progress(True):
        report_progress("Training teacher", 3, "steps")
    line = capsys.readouterr().err
    assert all(part in line for part in ("Training teacher", "3/3", "elapsed,", "left"))
