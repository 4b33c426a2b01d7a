"""Tests of the speed measurement and of ``setfit-kd benchmark``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checks import assert_refused, truncate_file
from click.testing import CliRunner, Result

from setfit_kd.cli import main
from setfit_kd.data.sources import read
from setfit_kd.errors import DataError, InputError, SetFitKDError, UnavailableError
from setfit_kd.inference import benchmark as benchmark_module
from setfit_kd.inference.benchmark import Speed, measure_speed

TEXTS = ["the match was lost", "shares rose", "the vote is tomorrow", "a new phone"]
BATCH_SIZES = (4,)


def copy_with_pickled_head(setfit_folder: Path) -> Path:
    """Copy a model and keep its head only as a pickle."""
    shutil.copytree(setfit_folder, "pickled")
    for name in ("head.safetensors", "head.json"):
        (Path("pickled") / name).unlink()
    return Path("pickled")


def assert_plausible(speed: Speed, folder: Path) -> None:
    assert 0 < speed.p50_ms <= speed.p95_ms <= speed.p99_ms
    assert speed.texts_per_second > 0
    assert speed.load_seconds > 0
    assert speed.memory_mb > 10  # memory of Python alone
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert speed.disk_mb == round(size / 1e6, 1)


def test_bundle_is_measured_without_torch(bundle: Path) -> None:
    speed = measure_speed(bundle, TEXTS, threads=1, batch_sizes=(2, 4))
    assert_plausible(speed, bundle)
    assert not speed.torch
    assert speed.threads == 1
    assert speed.batch_size in (2, 4)


def test_setfit_model_is_measured_with_torch(setfit_folder: Path) -> None:
    folder = copy_with_pickled_head(setfit_folder)
    speed = measure_speed(folder, TEXTS, threads=2, batch_sizes=BATCH_SIZES, trust_pickle=True)
    assert_plausible(speed, folder)
    assert speed.torch
    assert speed.threads == 2
    assert speed.batch_size == 4


def test_measuring_without_texts_is_rejected(bundle: Path) -> None:
    with pytest.raises(DataError, match="without texts") as raised:
        measure_speed(bundle, [])
    assert raised.value.hint


# Errors in the separate process


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate_file(path / "embeddings.safetensors"), "embeddings.safetensors has changed since"),
        (lambda path: (path / "manifest.json").write_text("{}"), "is not the manifest of a bundle"),
    ],
)
def test_damaged_bundle_is_reported(damage: Callable[[Path], object], message: str, bundle: Path) -> None:
    shutil.copytree(bundle, "broken")
    damage(Path("broken"))
    with pytest.raises(InputError, match=message) as raised:
        measure_speed("broken", TEXTS, batch_sizes=BATCH_SIZES)
    assert raised.value.hint
    assert "Traceback" not in str(raised.value)


def test_pickled_head_is_not_loaded_by_default(setfit_folder: Path) -> None:
    with pytest.raises(InputError, match="is a pickle") as raised:
        measure_speed(copy_with_pickled_head(setfit_folder), TEXTS, batch_sizes=BATCH_SIZES)
    assert "--trust-pickle" in str(raised.value.hint)


def test_missing_onnxruntime_is_unavailable(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundle, "onnx")
    manifest = json.loads(Path("onnx/manifest.json").read_text(encoding="utf-8"))
    Path("onnx/model.onnx").write_bytes(b"")
    empty_hash = hashlib.sha256(b"").hexdigest()
    manifest = {**manifest, "kind": "onnx", "files": {**manifest["files"], "model.onnx": empty_hash}}
    Path("onnx/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    Path("sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(SetFitKDError, match="needs onnxruntime") as raised:
        measure_speed("onnx", TEXTS, batch_sizes=BATCH_SIZES)
    assert raised.value.exit_code == UnavailableError.exit_code
    assert raised.value.hint == "Install it: pip install onnxruntime"


@pytest.mark.parametrize(
    ("commands", "message"),
    [("", r"exit code 3\."), ("echo first >&2; echo out of memory >&2", r"exit code 3: out of memory\.")],
)
def test_failed_process_is_reported(commands: str, message: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("failing").absolute()
    script.write_text(f"#!/bin/sh\n{commands}\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(SetFitKDError, match=message) as raised:
        measure_speed(bundle, TEXTS)
    assert str(bundle) in raised.value.message
    assert raised.value.hint


def test_modules_in_the_working_directory_are_not_imported(bundle: Path) -> None:
    for name in ("random.py", "hashlib.py", "tokenizers.py"):
        Path(name).write_text("raise SystemExit('imported')\n", encoding="utf-8")
    assert_plausible(measure_speed(bundle, TEXTS, batch_sizes=BATCH_SIZES), bundle)


# Command line


@pytest.fixture
def measured_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that the commands of a test measure, each with one batch size."""
    paths: list[str] = []
    quick: Any = partial(measure_speed, batch_sizes=BATCH_SIZES)

    def measure(path: str, *args: Any, **kwargs: Any) -> Speed:
        paths.append(path)
        speed: Speed = quick(path, *args, **kwargs)
        return speed

    monkeypatch.setattr(benchmark_module, "measure_speed", measure)
    return paths


def benchmark(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["benchmark", *map(str, arguments)])


def test_each_model_has_a_row_and_a_ratio_to_the_first(bundle: Path, measured_paths: list[str]) -> None:
    shutil.copytree(bundle, "copy")
    result = benchmark(bundle, "copy", bundle, "--texts", 20, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert measured_paths == [str(bundle), "copy"]
    header, first, second = [line.split() for line in result.stdout.splitlines()[:3]]
    for heading in ("p50", "p95", "p99", "texts/s", "ratio", "load", "memory", "disk"):
        assert heading in header
    assert (first[0], second[0]) == ("bundle", "copy")
    assert first[5] == "1.0x"
    rates = [float(row[4].replace(",", "")) for row in (first, second)]
    assert float(second[5].removesuffix("x")) == pytest.approx(rates[1] / rates[0], abs=0.06)
    assert "20 texts, 1 threads" in result.stdout
    assert "Measuring" in result.stderr


def test_json_output_is_complete(bundle: Path, measured_paths: list[str]) -> None:
    corpus = read("bundled:newswire").texts
    Path("few.txt").write_text("".join(f"{text}\n" for text in corpus[:5]), encoding="utf-8")
    result = benchmark(bundle, "--json", "-q", "--unlabeled", "few.txt", "--texts", 1000)
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    assert output["texts"] == 5  # all texts of the file
    assert list(output["models"]) == measured_paths == [str(bundle)]
    assert_plausible(Speed(**output["models"][str(bundle)]), bundle)
    assert result.stderr == ""


@pytest.mark.parametrize(("n_texts", "expected"), [(1, 1), (7, 7), (400, 400), (599, 599), (5000, None)])
def test_texts_are_spread_over_the_corpus(n_texts: int, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_texts: list[list[str]] = []

    def measure(_: str, texts: list[str], **__: Any) -> Speed:
        passed_texts.append(texts)
        return Speed(1, 1, 1, 1, 8, 1, 1, None, 1, False)

    monkeypatch.setattr(benchmark_module, "measure_speed", measure)
    result = benchmark("anything", "--texts", n_texts)
    assert result.exit_code == 0, result.stderr
    corpus = read("bundled:newswire").texts
    (texts,) = passed_texts
    assert len(texts) == (expected or len(corpus))
    rows = [corpus.index(text) for text in texts]
    assert rows == sorted(set(rows))
    if 1 < n_texts < len(corpus) / 2:
        assert rows[-1] > len(corpus) / 2


def test_models_with_the_same_folder_name_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark_module, "measure_speed", lambda *_, **__: Speed(1, 1, 1, 1, 8, 1, 1, None, 1, torch=False)
    )
    result = benchmark("one/student", "two/student")
    rows = [line.split()[0] for line in result.stdout.splitlines()[1:3]]
    assert rows == ["one/student", "two/student"]
    result = benchmark("one/student", "two/bundle")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["student", "bundle"]


def test_numbers_are_not_truncated_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Speed(0.12, 0.34, 0.56, 123456.7, 8, 1.23, 1234.5, 345.6, 1, torch=False)
    monkeypatch.setattr(benchmark_module, "measure_speed", lambda *_, **__: fast)
    result = benchmark("runs/newswire/students/paraphrase-MiniLM-L3-v2", "bundle")
    for row in result.stdout.splitlines()[1:3]:
        assert row.split()[1:] == ["0.12", "0.34", "0.56", "123,457", "1.0x", "1.23", "1234", "345.6"]


def test_disk_size_of_a_run_is_that_of_its_student(setfit_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(setfit_folder, run / "student")
    shutil.copytree(setfit_folder, run / "teacher")
    (run / "config.yaml").write_text("seed: 0\n")
    size = sum(file.stat().st_size for file in (run / "student").rglob("*") if file.is_file()) / 1e6
    assert measure_speed(run, TEXTS[:4], threads=1, batch_sizes=[4]).disk_mb == round(size, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "No such model folder: ./nowhere"),
        (["BUNDLE", "--texts", "0"], "--texts"),
        (["BUNDLE", "--threads", "0"], "--threads"),
        (["BUNDLE", "--unlabeled", "nowhere.txt"], "No such file: nowhere.txt"),
        ([], "MODEL"),
    ],
)
def test_invalid_arguments_are_reported(
    arguments: list[str], message: str, bundle: Path, measured_paths: list[str]
) -> None:
    command = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    assert_refused(benchmark(*command), message)
    assert measured_paths == [argument for argument in command if argument == "./nowhere"]
