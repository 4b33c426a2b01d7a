"""Benchmark comparison: its calculations, and a complete comparison with tiny models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
from click.testing import CliRunner

from setfit_kd import RunConfig
from setfit_kd.student.distil import n_held_out

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare  # noqa: E402

CASE = {"labeled": "train.csv", "eval": "test.csv", "seed": 0, "shots": 16, "tests": None, "threads": 1}
CASE |= {"device": "cpu", "teacher": "t", "student": "s", "pool_size": 1000, "pair_steps": 500}


def test_methods_match_rows_of_the_table() -> None:
    import methods

    assert list(methods.METHODS) == list(compare.ROWS)
    order = list(compare.ROWS)
    for row, about in compare.ROWS.items():
        assert all(order.index(name) < order.index(row) for name in about.requires)


def test_tables_have_means_and_costs_including_the_teacher() -> None:
    cell = {"row": "teacher", "data": "a", "shots": 8, "macro_f1": 0.5, "ece": 0.25, "cpu_seconds": 10.0}
    cells = [{**cell, "seed": seed, "accuracy": accuracy} for seed, accuracy in enumerate((0.5, 0.7))]
    cells += [
        {**cell, "seed": 0, "accuracy": 0.9, "row": row, "pool_size": 100} for row in ("refined_teacher", "student")
    ]
    cells.append({"row": "unique_teacher", "data": "a", "shots": 8, "seed": 0})  # was left out
    table = compare.format_tables(cells, {"teacher": "t", "student": "s", "device": "cpu", "threads": 1})
    assert "| teacher: calibrated, not refined | 60.0 ± 14.1 (25.0) |" in table
    assert "| **student**, pool of 100 | 90.0 (25.0) |" in table
    assert "| **student**, pool of 100 | 30 |" in table
    assert "unique" not in table


@pytest.mark.parametrize(
    ("row", "changed", "is_measured_again"),
    [
        ("stock_teacher", {"pool_size": 300}, False),
        ("stock_teacher", {"student": "other"}, False),
        ("stock_teacher", {"shots": 8}, True),
        ("student", {"pool_size": 300}, True),
        ("student", {"pair_steps": 9}, False),
        ("labels_alone", {"student": "other"}, True),
    ],
)
def test_results_are_reused_if_their_inputs_are_unchanged(
    row: str, changed: dict[str, Any], is_measured_again: bool
) -> None:
    changes = compare.fingerprint_inputs(row, {**CASE, **changed}) != compare.fingerprint_inputs(row, CASE)
    assert changes == is_measured_again


def test_changed_source_code_affects_only_our_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = Path(shutil.copytree(compare.PACKAGE, tmp_path / "package"))
    monkeypatch.setattr(compare, "PACKAGE", package)
    before = {row: compare.fingerprint_inputs(row, CASE) for row in compare.ROWS}
    (package / "losses" / "contrastive.py").write_text("")
    changed = {row for row in compare.ROWS if compare.fingerprint_inputs(row, CASE) != before[row]}
    assert {"teacher", "student", "static_student"} <= changed
    assert not changed & {"frozen", "stock_teacher", "unique_teacher", "model2vec"}


def test_rows_are_measured_once_and_results_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    cell = {"accuracy": 0.5, "macro_f1": 0.5, "ece": 0.1, "cpu_seconds": 1.0}
    run_row = Mock(return_value=cell)
    monkeypatch.setattr(compare, "run_row", run_row)
    options = ["--seeds", "2", "--pool-size", "50", "--pool-size", "99", "--output", str(tmp_path / "results")]
    options += ["--work", str(tmp_path / "work")]
    outputs = [CliRunner().invoke(compare.main, options) for _ in range(2)]
    assert [output.exit_code for output in outputs] == [0, 0], outputs[0].output
    n_pool_rows = sum(row.uses_pool for row in compare.ROWS.values())
    once = 2 * (len(compare.ROWS) - 1 - n_pool_rows) + 4 * n_pool_rows  # without model2vec
    # The artifacts are missing here, so that rows are trained again for others, but not a second time.
    names = [call.args[0] for call in run_row.call_args_list]
    assert set(names) == set(compare.ROWS) - {"model2vec"}
    assert len(json.loads((tmp_path / "results/compare.json").read_text())["results"]) == once
    n_calls = run_row.call_count
    CliRunner().invoke(compare.main, options)
    assert run_row.call_count == n_calls
    other = CliRunner().invoke(compare.main, [*options, "--student", "static"])
    assert "other settings" in other.output


def test_data_sets_need_distinct_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = compare.data_sets(("a", "b=8"), 16)
    assert sources["b"]["eval"] == str(tmp_path.resolve() / "b" / "test.csv")
    assert [source["shots"] for source in sources.values()] == [16, 8]
    with pytest.raises(click.ClickException, match="are named a"):
        compare.data_sets(("x/a", "y/a"), 16)


@pytest.mark.slow
def test_comparison_writes_results_and_is_not_repeated(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    pytest.importorskip("matplotlib")
    command: list[Any] = [sys.executable, BENCHMARKS / "compare.py", "--quick", "--shots", 4]
    command += ["--teacher", tiny_teacher, "--student", tiny_student]
    command += ["--output", tmp_path / "results", "--work", tmp_path / "work"]
    subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    results = tmp_path / "results" / "quick"
    assert {path.name for path in results.iterdir()} == {"compare.json", "compare.md", "compare.png"}
    rows = {cell["row"]: cell for cell in json.loads((results / "compare.json").read_text())["results"]}
    assert set(rows) == set(compare.ROWS) - {"model2vec"}
    full_batches = 125 * 16 * 2  # the last batch of an epoch may be smaller
    assert full_batches - 2 * 16 < rows["stock_student"]["training_passes"] <= full_batches
    (file,) = (tmp_path / "work").rglob("signals/texts.jsonl")
    n = len(file.read_text(encoding="utf-8").splitlines())
    trained = n - n_held_out(n, RunConfig.of(teacher="t", student="s"))
    assert n > 250 + 16  # with augmented texts
    assert rows["student"]["training_passes"] == 3 * trained
    assert rows["pairs_student"]["training_passes"] == 2 * -(-125 * 16 // n) * trained
    assert all(0 < cell["accuracy"] < 1 and cell["peak_mb"] > 0 for cell in rows.values())
    again = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert "newswire, 4, 0" not in again.stdout
