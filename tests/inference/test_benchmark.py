"""How fast classifiers are: what is measured, and what is said where nothing can be."""

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
from checks import assert_refused, halve
from click.testing import CliRunner, Result

from setfit_kd.cli import main
from setfit_kd.data import read
from setfit_kd.errors import DataError, InputError, SetFitKDError, UnavailableError
from setfit_kd.inference import benchmark as speed_module
from setfit_kd.inference.benchmark import Speed, measure_speed

TEXTS = ["the match was lost", "shares rose", "the vote is tomorrow", "a new phone"]
SIZES = (4,)


def only_pickled(setfit_folder: Path) -> Path:
    """A copy whose head only a pickle holds."""
    shutil.copytree(setfit_folder, "pickled")
    for name in ("head.safetensors", "head.json"):
        (Path("pickled") / name).unlink()
    return Path("pickled")


def assert_plausible(speed: Speed, folder: Path) -> None:
    assert 0 < speed.p50_ms <= speed.p95_ms <= speed.p99_ms
    assert speed.texts_per_second > 0
    assert speed.load_seconds > 0
    assert speed.memory_mb > 10  # Python alone takes that
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert speed.disk_mb == round(size / 1e6, 1)


def test_a_bundle_is_measured_without_torch(bundle: Path) -> None:
    speed = measure_speed(bundle, TEXTS, threads=1, batch_sizes=(2, 4))
    assert_plausible(speed, bundle)
    assert not speed.torch
    assert speed.threads == 1
    assert speed.batch_size in (2, 4)


def test_a_setfit_model_is_measured_with_torch(setfit_folder: Path) -> None:
    speed = measure_speed(only_pickled(setfit_folder), TEXTS, threads=2, batch_sizes=SIZES, trust_pickle=True)
    assert_plausible(speed, Path("pickled"))
    assert speed.torch
    assert speed.threads == 2
    assert speed.batch_size == 4


def test_without_texts_nothing_is_measured(bundle: Path) -> None:
    with pytest.raises(DataError, match="no texts") as raised:
        measure_speed(bundle, [])
    assert raised.value.hint


# What the other process cannot do


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: halve(path / "embeddings.safetensors"), "embeddings.safetensors is not what it was"),
        (lambda path: (path / "manifest.json").write_text("{}"), "is not the manifest of a bundle"),
    ],
)
def test_a_broken_bundle_is_told(break_it: Callable[[Path], object], says: str, bundle: Path) -> None:
    shutil.copytree(bundle, "broken")
    break_it(Path("broken"))
    with pytest.raises(InputError, match=says) as raised:
        measure_speed("broken", TEXTS, batch_sizes=SIZES)
    assert raised.value.hint
    assert "Traceback" not in str(raised.value)


def test_a_head_that_is_a_pickle_is_not_loaded_unasked(setfit_folder: Path) -> None:
    with pytest.raises(InputError, match="is a pickle") as raised:
        measure_speed(only_pickled(setfit_folder), TEXTS, batch_sizes=SIZES)
    assert "--trust-pickle" in str(raised.value.hint)


def test_what_is_not_installed_there_is_not_the_models_fault(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, "onnx")
    manifest = json.loads(Path("onnx/manifest.json").read_text(encoding="utf-8"))
    Path("onnx/model.onnx").write_bytes(b"")
    nothing = hashlib.sha256(b"").hexdigest()
    manifest = {**manifest, "kind": "onnx", "files": {**manifest["files"], "model.onnx": nothing}}
    Path("onnx/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    Path("sitecustomize.py").write_text("import sys\nsys.modules['onnxruntime'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(SetFitKDError, match="needs onnxruntime") as raised:
        measure_speed("onnx", TEXTS, batch_sizes=SIZES)
    assert raised.value.exit_code == UnavailableError.exit_code
    assert raised.value.hint == "pip install onnxruntime"


@pytest.mark.parametrize(
    ("last_words", "says"),
    [("", "ended with 3"), ("echo first >&2; echo killed by the heat >&2", "ended with 3 killed by the heat")],
)
def test_a_process_that_dies_says_so(last_words: str, says: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("dying").absolute()
    script.write_text(f"#!/bin/sh\n{last_words}\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(SetFitKDError, match=says) as raised:
        measure_speed(bundle, TEXTS)
    assert str(bundle) in raised.value.message
    assert raised.value.hint


def test_files_that_lie_about_are_not_run(bundle: Path) -> None:
    for name in ("random.py", "hashlib.py", "tokenizers.py"):
        Path(name).write_text("raise SystemExit('this is a note of mine')\n", encoding="utf-8")
    assert_plausible(measure_speed(bundle, TEXTS, batch_sizes=SIZES), bundle)


# On the command line


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that are measured by the commands of a test, each at one batch size."""
    paths: list[str] = []
    quick: Any = partial(measure_speed, batch_sizes=SIZES)

    def measure(path: str, *args: Any, **kwargs: Any) -> Speed:
        paths.append(path)
        found: Speed = quick(path, *args, **kwargs)
        return found

    monkeypatch.setattr(speed_module, "measure_speed", measure)
    return paths


def benchmark(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["benchmark", *map(str, arguments)])


def test_each_model_has_a_row_and_a_ratio_to_the_first(bundle: Path, measured: list[str]) -> None:
    shutil.copytree(bundle, "copy")
    result = benchmark(bundle, "copy", bundle, "--texts", 20, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert measured == [str(bundle), "copy"]
    header, first, second = [line.split() for line in result.stdout.splitlines()[:3]]
    for heading in ("p50", "p95", "p99", "texts/s", "ratio", "load", "memory", "disk"):
        assert heading in header
    assert (first[0], second[0]) == ("bundle", "copy")
    assert first[5] == "1.0x"
    rates = [float(row[4].replace(",", "")) for row in (first, second)]
    assert float(second[5].removesuffix("x")) == pytest.approx(rates[1] / rates[0], abs=0.06)
    assert "20 texts, 1 threads" in result.stdout
    assert "Measuring" in result.stderr


def test_json_tells_everything(bundle: Path, measured: list[str]) -> None:
    corpus = read("bundled:newswire").texts
    Path("few.txt").write_text("".join(f"{text}\n" for text in corpus[:5]), encoding="utf-8")
    result = benchmark(bundle, "--json", "-q", "--unlabeled", "few.txt", "--texts", 1000)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["texts"] == 5  # as many as there are
    assert list(told["models"]) == measured == [str(bundle)]
    assert_plausible(Speed(**told["models"][str(bundle)]), bundle)
    assert result.stderr == ""


@pytest.mark.parametrize(("n_texts", "expected"), [(1, 1), (7, 7), (400, 400), (599, 599), (5000, None)])
def test_texts_are_taken_from_all_over_the_corpus(
    n_texts: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def measure(_: str, texts: list[str], **__: Any) -> Speed:
        given.append(texts)
        return Speed(1, 1, 1, 1, 8, 1, 1, None, 1, False)

    monkeypatch.setattr(speed_module, "measure_speed", measure)
    result = benchmark("anything", "--texts", n_texts)
    assert result.exit_code == 0, result.stderr
    corpus = read("bundled:newswire").texts
    assert len(given[0]) == (expected or len(corpus))
    places = [corpus.index(text) for text in given[0]]
    assert places == sorted(set(places))
    if 1 < n_texts < len(corpus) / 2:
        assert places[-1] > len(corpus) / 2


def test_two_models_whose_names_end_alike_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speed_module, "measure_speed", lambda *_, **__: Speed(1, 1, 1, 1, 8, 1, 1, None, 1, torch=False)
    )
    result = benchmark("one/student", "two/student")
    rows = [line.split()[0] for line in result.stdout.splitlines()[1:3]]
    assert rows == ["one/student", "two/student"]
    result = benchmark("one/student", "two/bundle")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["student", "bundle"]


def test_no_figure_is_cut_off_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Speed(0.12, 0.34, 0.56, 123456.7, 8, 1.23, 1234.5, 345.6, 1, torch=False)
    monkeypatch.setattr(speed_module, "measure_speed", lambda *_, **__: fast)
    result = benchmark("runs/newswire/students/paraphrase-MiniLM-L3-v2", "bundle")
    for row in result.stdout.splitlines()[1:3]:
        assert row.split()[1:] == ["0.12", "0.34", "0.56", "123,457", "1.0x", "1.23", "1234", "345.6"]


def test_the_size_of_a_run_is_that_of_its_student(setfit_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(setfit_folder, run / "student")
    shutil.copytree(setfit_folder, run / "teacher")
    (run / "config.yaml").write_text("seed: 0\n")
    size = sum(file.stat().st_size for file in (run / "student").rglob("*") if file.is_file()) / 1e6
    assert measure_speed(run, TEXTS[:4], threads=1, batch_sizes=[4]).disk_mb == round(size, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./nowhere"], "There is no model folder ./nowhere"),
        (["BUNDLE", "--texts", "0"], "--texts"),
        (["BUNDLE", "--threads", "0"], "--threads"),
        (["BUNDLE", "--unlabeled", "nowhere.txt"], "There is no file nowhere.txt"),
        ([], "MODEL"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments: list[str], says: str, bundle: Path, measured: list[str]) -> None:
    given = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    assert_refused(benchmark(*given), says)
    assert measured == [argument for argument in given if argument == "./nowhere"]
