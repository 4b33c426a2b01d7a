"""Tests of the speed measurement and of ``setfit-kd benchmark``."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checks import assert_refused, invoke, truncate_file

from setfit_kd.data.sources import read
from setfit_kd.errors import DataError, InputError, SetFitKDError
from setfit_kd.inference import benchmark as benchmark_module
from setfit_kd.inference.benchmark import Speed, measure_speed

TEXTS = ["the match was lost", "shares rose", "the vote is tomorrow", "a new phone"]
quick: Any = partial(measure_speed, batch_sizes=(4,))


def assert_plausible(speed: Speed, folder: Path) -> None:
    assert 0 < speed.p50_ms <= speed.p95_ms <= speed.p99_ms
    assert speed.texts_per_second > 0
    assert speed.load_seconds > 0
    assert speed.memory_mb > 10  # memory of Python alone
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert speed.disk_mb == round(size / 1e6, 1)


def test_bundle_is_measured_without_torch_and_without_code_of_the_working_directory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random.py", "hashlib.py", "tokenizers.py"):
        Path(name).write_text("raise SystemExit('imported')\n", encoding="utf-8")
    Path("few.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    monkeypatch.setattr(benchmark_module, "measure_speed", partial(measure_speed, batch_sizes=(2, 4)))
    result = invoke(*f"benchmark {bundle} --json -q --unlabeled few.txt --texts 1000 --threads 1".split())
    assert (result.exit_code, result.stderr) == (0, "")
    output = json.loads(result.stdout)
    assert (output["texts"], list(output["models"])) == (len(TEXTS), [str(bundle)])
    speed = Speed(**output["models"][str(bundle)])
    assert_plausible(speed, bundle)
    assert (speed.torch, speed.threads) == (False, 1)
    assert speed.batch_size in (2, 4)


def test_student_of_a_run_with_a_pickled_head_is_measured_with_torch(setfit_folder: Path) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(setfit_folder, f"run/{name}")
    Path("run/config.yaml").write_text("seed: 0\n")
    for name in ("head.safetensors", "head.json"):
        Path("run/student", name).unlink()
    with pytest.raises(InputError, match="is a pickle") as raised:
        quick("run", TEXTS)
    assert "--trust-pickle" in str(raised.value.hint)
    speed = quick("run", TEXTS, threads=2, trust_pickle=True)
    assert_plausible(speed, Path("run/student"))
    assert (speed.torch, speed.threads, speed.batch_size) == (True, 2, 4)


def test_error_of_the_process_is_raised(bundle: Path) -> None:
    with pytest.raises(DataError, match="without texts"):
        measure_speed(bundle, [])
    shutil.copytree(bundle, "broken")
    truncate_file(Path("broken/embeddings.safetensors"))
    with pytest.raises(InputError, match="safetensors has changed since") as raised:
        quick("broken", TEXTS)
    assert raised.value.hint == "Export or copy the bundle again."


def test_failed_process_is_reported(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path("failing").absolute()
    script.write_text("#!/bin/sh\necho first >&2; echo out of memory >&2\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(SetFitKDError, match=rf"{bundle}: .* exit code 3: out of memory\."):
        measure_speed(bundle, TEXTS)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Paths and texts that the commands of a test measure; the results are constants."""
    calls: list[tuple[str, list[str]]] = []

    def measure(path: str, texts: list[str], **_: Any) -> Speed:
        calls.append((path, texts))
        return Speed(0.12, 0.34, 0.56, 123456.7 / len(calls), 8, 1.23, 1234.5, 345.6, 1, torch=False)

    monkeypatch.setattr(benchmark_module, "measure_speed", measure)
    return calls


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["one/student", "two/bundle", "one/student"], ["student", "bundle"]),
        (["one/student", "two/student"], ["one/student", "two/student"]),
    ],
)
def test_each_model_has_a_row_and_a_ratio_to_the_first(
    models: list[str], names: list[str], measured: list[tuple[str, list[str]]]
) -> None:
    result = invoke("benchmark", *models, "--texts", 20)
    assert [path for path, _ in measured] == models[:2]
    first, second = [line.split() for line in result.stdout.splitlines()[1:3]]
    assert first == [names[0], "0.12", "0.34", "0.56", "123,457", "1.0x", "1.23", "1234", "345.6"]
    assert [second[0], *second[4:6]] == [names[1], "61,728", "0.5x"]
    assert "20 texts, 1 threads" in result.stdout


@pytest.mark.parametrize("n_texts", [1, 7, 5000])
def test_texts_are_spread_over_the_corpus(n_texts: int, measured: list[tuple[str, list[str]]]) -> None:
    assert invoke("benchmark", "anything", "--texts", n_texts).exit_code == 0
    corpus = read("bundled:newswire").texts
    ((_, texts),) = measured
    assert len(texts) == min(n_texts, len(corpus))
    rows = [corpus.index(text) for text in texts]
    assert rows == sorted(set(rows))
    assert n_texts == 1 or rows[-1] > len(corpus) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "No such file or folder: nowhere"),
        (["x", "--texts", "0"], "--texts"),
        (["x", "--unlabeled", "nowhere.txt"], "No such file: nowhere.txt"),
    ],
)
def test_invalid_arguments_are_reported(arguments: list[str], message: str) -> None:
    assert_refused(invoke("benchmark", *arguments), message)
