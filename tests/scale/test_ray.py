"""Tests of ``setfit-kd predict --engine ray`` and of the classifier for a data set of Ray."""

from __future__ import annotations

import json
import os
import runpy
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from predictions import LABELS, predict_ok, run_predict
from synthetic import texts_and_labels

from setfit_kd.errors import ConfigError
from setfit_kd.inference.classifier import open_classifier
from setfit_kd.scale import BatchClassifier

TEXTS = texts_and_labels(8)[0]
N_FILES, N_ROWS = 30, 1000


def test_batch_classifier_adds_the_columns_of_predict(models: dict[str, Path]) -> None:
    texts = np.array([*TEXTS, "", None], object)
    for model in models.values():
        batch = BatchClassifier(str(model), text_column="title", device="cpu")({"title": texts, "id": np.arange(10)})
        assert list(batch) == ["title", "id", "label", "probability", *(f"probability_{label}" for label in LABELS)]
        expected = open_classifier(model, device="cpu").predict_proba(TEXTS)
        probabilities = np.stack([batch[f"probability_{label}"] for label in LABELS], axis=1)
        np.testing.assert_allclose(probabilities[:8], expected, atol=1e-6)
        assert np.isnan(probabilities[8:]).all()
        assert batch["label"].tolist() == [*(LABELS[row.argmax()] for row in expected), None, None]


def test_batch_classifier_refuses_pairs_for_a_model_of_single_texts(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="classifies single texts"):
        BatchClassifier(str(bundle), pair_column="text_pair")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    patch = pytest.MonkeyPatch()
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    patch.setenv("PYTHONPATH", path)
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()
    patch.undo()


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kill a process of Ray that classifies, once there are outputs."""
    while not list(folder.glob("*.manifest.json")):
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "_PartWorker" in " ".join(process.cmdline()) and not killed:
                process.kill()
                killed.append(process.pid)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of settings that Ray copies
def test_killed_worker_loses_no_row(bundle: Path, cluster: Any, tmp_path: Path) -> None:
    Path("in").mkdir()
    for file in range(N_FILES):
        rows = [{"id": file * N_ROWS + i, "text": f"{TEXTS[i % 8]} {i}"} for i in range(N_ROWS)]
        Path(f"in/{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("in/x.jsonl").write_text("{", encoding="utf-8")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "out", killed), daemon=True)
    killer.start()
    result = run_predict(bundle, "-i", "in/*.jsonl", "-o", "out/", "--engine", "ray", "--workers", "2")
    killer.join(10)
    assert killed, (result.output, result.exception)
    assert f"Failed: {tmp_path}/in/x.jsonl." in result.stderr
    assert f"\n{N_FILES} files done, 0 skipped, 1 failed; {N_FILES * N_ROWS:,} rows in" in f"\n{result.stdout}"
    lines = [line for path in Path("out").glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(json.loads(line)["id"] for line in lines) == list(range(N_FILES * N_ROWS))
    Path("in/x.jsonl").write_text(json.dumps({"id": -1, "text": "x"}), encoding="utf-8")
    predict_ok(bundle, "-i", "in/x.jsonl", "-o", "out/", "--engine", "ray", "--threads", "99")  # more than there are
    Path("in/x.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    again = predict_ok(bundle, "-i", "in/*.jsonl", "-o", "out/", "--engine", "ray")
    assert again.stdout.startswith(f"0 files done, {N_FILES} skipped")
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    predict_ok(bundle, "-i", "in/*.jsonl", "-o", "here/")
    assert [Path(f"out/{i}.jsonl").read_bytes() for i in range(N_FILES)] == [
        Path(f"here/{i}.jsonl").read_bytes() for i in range(N_FILES)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of settings that Ray copies
def test_example(bundle: Path, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ray_data.py"))
    example["main"](str(bundle), workers=1)
    assert sum(line.startswith(LABELS) for line in capsys.readouterr().out.splitlines()) == 3
