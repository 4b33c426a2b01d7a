"""Run ``setfit-kd predict`` and read its output."""

from __future__ import annotations

import csv
import hashlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from setfit_kd.cli import main

LABELS = ('Sci/Tech, "new"', "Sports", "Geld\tund Zinsen", "سياسة 🗳")
DELIMITERS = {"csv": ",", "tsv": "\t"}


def run_predict(model: str | Path, *arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    command = ["predict", str(model), "--device", "cpu", *map(str, arguments)]
    return CliRunner().invoke(main, command, input=stdin)


def predict_ok(model: str | Path, *arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    result = run_predict(model, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


@dataclass(frozen=True)
class Row:
    """One row of an output."""

    text: str | None
    label: str | None
    probabilities: dict[str, float] | None


OUTPUT_COLUMNS = ["text", "label", "probability", *(f"probability_{label}" for label in LABELS)]


def read_records(kind: str, result: Result) -> list[dict[str, Any]]:
    """Read the rows of an output with standard libraries; an empty cell is null."""
    if kind in ("stdout", "jsonl"):
        content = result.stdout_bytes if kind == "stdout" else Path("out.jsonl").read_bytes()
        return [json.loads(line, parse_constant=pytest.fail) for line in content.decode("utf-8").split("\n")[:-1]]
    assert result.stdout == ""
    if kind == "parquet":
        records: list[dict[str, Any]] = pq.read_table("out.parquet").to_pylist()
        return records
    with Path(f"out.{kind}").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter=DELIMITERS[kind], strict=True)
    return [{name: cell or None for name, cell in zip(header, line, strict=True)} for line in lines]


def read_output(kind: str, result: Result) -> list[Row]:
    """Read the rows of an output without the other columns of the input."""
    rows = []
    for record in read_records(kind, result):
        if kind in ("stdout", "jsonl"):
            assert list(record)[-3:] == ["text", "label", "probabilities"]
            rows.append(Row(record["text"], record["label"], record["probabilities"]))
            continue
        assert list(record)[-len(OUTPUT_COLUMNS) :] == OUTPUT_COLUMNS
        cells = {label: record[f"probability_{label}"] for label in LABELS}
        if record["probability"] is None:
            assert set(cells.values()) == {None}
            rows.append(Row(record["text"], record["label"], None))
            continue
        probabilities = {label: float(value) for label, value in cells.items()}
        assert float(record["probability"]) == max(probabilities.values())
        rows.append(Row(record["text"], record["label"], probabilities))
    return rows


@contextmanager
def live_process(command: Sequence[str]) -> Iterator[Any]:
    """Context manager that runs a command with pipes, and kills it at the end or after a minute."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # If the tests run in the background, they ignore interrupts, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        stop = threading.Timer(60, process.kill)
        stop.start()
        try:
            yield process
        finally:
            stop.cancel()
            process.kill()


def read_manifest(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Write a file of a bundle and update its hash in the manifest."""
    (bundle / name).write_bytes(content)
    manifest = read_manifest(bundle)
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def claim_onnx(bundle: Path) -> None:
    """Change the manifest of a static bundle so that loading it imports onnxruntime."""
    replace_file(bundle, "model.onnx", b"")
    (bundle / "manifest.json").write_text(json.dumps({**read_manifest(bundle), "kind": "onnx"}), encoding="utf-8")
