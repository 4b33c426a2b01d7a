"""Benchmark comparison: its calculations, and a complete comparison with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare  # noqa: E402


def test_methods_match_rows_of_the_table() -> None:
    import methods

    assert list(methods.METHODS) == list(compare.ROWS)
    assert set(compare.REQUIRED_ROWS) <= set(compare.ROWS)
    order = list(compare.ROWS)
    for row, required in compare.REQUIRED_ROWS.items():
        assert all(order.index(name) < order.index(row) for name in required)


def test_table_cells() -> None:
    cells = [compare.mean_and_deviation(values) for values in ([50.0], [50.0, 70.0], [50.0] * 3)]
    assert cells == ["50.0", "60.0 ± 14.1", "50.0 ± 0.0"]
    # The cost is the CPU time, if it was measured.
    assert [compare.cost({"seconds": 9.0, "cpu_seconds": 3.0}), compare.cost({"seconds": 9.0})] == [3.0, 9.0]


def test_results_with_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "case.json"
    for _ in range(2):
        compare.save_case(file, {"shots": 16, "threads": 1})
    with pytest.raises(click.ClickException, match="other settings"):
        compare.save_case(file, {"shots": 16, "threads": 2})


def test_data_sets_need_distinct_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.data_sets((Path("a"), Path("b")))["b"]["eval"] == str(tmp_path.resolve() / "b" / "test.csv")
    with pytest.raises(click.ClickException, match="are named a"):
        compare.data_sets((Path("x/a"), Path("y/a")))


@pytest.mark.slow
def test_comparison_writes_results_and_is_not_repeated(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    pytest.importorskip("matplotlib")
    command: list[Any] = [sys.executable, BENCHMARKS / "compare.py", "--quick", "--shots", 4, "--threads", 1]
    command += ["--teacher", tiny_teacher, "--student", tiny_student]
    command += ["--output", tmp_path / "results", "--work", tmp_path / "work"]
    first = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert first.stdout.count("seed 0") == len(compare.ROWS) - 1  # without model2vec
    results = tmp_path / "results" / "quick"
    names = {"newswire-4-shots.json", "newswire-4-shots.md", "accuracy-4-shots.png"}
    assert {path.name for path in results.iterdir()} == names
    rows = json.loads((results / "newswire-4-shots.json").read_text())["rows"]
    full_batches = 125 * 16 * 2  # the last batch of an epoch may be smaller
    assert full_batches - 2 * 16 < rows["stock_student"][0]["training_passes"] <= full_batches
    assert rows["pairs_student"][0]["training_passes"] == 2 * 8 * (250 + 16)
    assert rows["student"][0]["training_passes"] == 3 * (250 + 16)
    assert all(0 < rows[row][0]["accuracy"] < 1 and rows[row][0]["peak_mb"] > 0 for row in rows)
    again = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert "seed 0" not in again.stdout
