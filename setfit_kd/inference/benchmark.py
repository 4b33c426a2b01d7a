"""Measure speed, memory and size of a classifier in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd import errors
from setfit_kd.errors import DataError, SetFitKDError
from setfit_kd.inference.classifier import TextClassifier, classifier_path, open_classifier
from setfit_kd.utils.files import folder_megabytes

BATCH_SIZES = (8, 32, 128, 512)
_PACKAGE_ROOT = Path(__file__).parents[2]
_N_WARMUP_TEXTS = 16
_MAX_LATENCY_SECONDS, _MIN_LATENCY_TEXTS, _MIN_THROUGHPUT_SECONDS = 10.0, 30, 1.0
_PROGRAM = """
import sys
sys.path[:] = [folder for folder in sys.path if folder] + sys.argv[1:]  # import nothing from the working directory
from setfit_kd.inference.benchmark import main
main()
"""


@dataclass(frozen=True)
class Speed:
    """Speed, memory and size of a classifier.

    Attributes:
        p50_ms: Median latency of a single text, in milliseconds.
        p95_ms: 95th percentile of the latency.
        p99_ms: 99th percentile of the latency.
        texts_per_second: Highest throughput over all batch sizes, including tokenization.
        batch_size: Batch size of the highest throughput.
        load_seconds: Time from the start of Python until the classifier is ready.
        memory_mb: Peak memory of the process while texts are classified one by one, in 10^6 bytes.
        disk_mb: Size of the folder, in 10^6 bytes; None for a model on the hub.
        threads: Maximum number of CPU threads.
        torch: Whether torch was imported.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    texts_per_second: float
    batch_size: int
    load_seconds: float
    memory_mb: float
    disk_mb: float | None
    threads: int
    torch: bool


def measure_speed(
    path: str | Path,
    texts: Sequence[str],
    *,
    threads: int | None = None,
    device: str = "cpu",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    trust_pickle: bool = False,
) -> Speed:
    """Measure the student of a run, a SetFit model or a bundle in a separate process.

    Args:
        path: As in `open_classifier`.
        texts: n typical texts; all of them are classified at every batch size, and one by one for ten seconds at most.
        threads: Maximum number of CPU threads; None uses one per core.
        device: As in `RunConfig`.
        batch_sizes: Numbers of texts per forward pass to try.
        trust_pickle: Also load a head that is stored only as a pickle.

    Raises:
        DataError: If ``texts`` is empty.
        SetFitKDError: If the classifier cannot be opened or run.
    """
    if not len(texts):
        raise DataError("Cannot measure a classifier without texts.", hint="Pass texts like those to be classified.")
    threads = threads or os.cpu_count() or 1
    task = {
        "path": str(path),
        "threads": threads,
        "device": device,
        "batch_sizes": list(batch_sizes),
        "trust_pickle": trust_pickle,
        "texts": list(texts),
    }
    thread_limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    tokenizer_threads = {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(_PACKAGE_ROOT)],
        input=json.dumps({**task, "started": time.time()}).encode(),
        env={**os.environ, **thread_limits, **tokenizer_threads},
        capture_output=True,
    )
    if process.returncode or not process.stdout:
        stderr = process.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = ": ".join([str(process.returncode), *stderr[-1:]])
        raise SetFitKDError(
            f"Cannot measure {path}: the process ended with exit code {reason}.",
            hint="Check that `setfit-kd predict` works with this model.",
        )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in result:
        raise getattr(errors, result["kind"])(result["error"], hint=result["hint"])
    return Speed(**result)


def main() -> None:
    """Entry point of the separate process: read the task from stdin, print the result as the last line of stdout."""
    try:
        with redirect_stdout(sys.stderr):  # keep output of libraries out of stdout
            result: dict[str, Any] = asdict(_measure(**json.load(sys.stdin)))
    except SetFitKDError as error:
        result = {"kind": type(error).__name__, "error": error.message, "hint": error.hint}
    print(json.dumps(result))


def _measure(
    path: str, texts: list[str], threads: int, device: str, batch_sizes: list[int], trust_pickle: bool, started: float
) -> Speed:
    # This module imports only the packages that a bundle needs, so that time and memory are those of the classifier.
    classifier = open_classifier(path, device=device, threads=threads, trust_pickle=trust_pickle)
    load_seconds = time.time() - started
    for text in texts[:_N_WARMUP_TEXTS]:
        classifier.predict_proba([text])
    latencies = _measure_latencies(classifier, texts)
    peak_memory = _peak_memory()
    throughputs = {size: _measure_throughput(classifier, texts, size) for size in batch_sizes}
    best_size = max(throughputs, key=lambda size: throughputs[size])
    p50, p95, p99 = (float(value) for value in np.percentile(latencies, (50, 95, 99)))
    folder = classifier_path(path)
    disk_mb = None if folder is None else folder_megabytes(folder)
    return Speed(
        p50_ms=round(1000 * p50, 3),
        p95_ms=round(1000 * p95, 3),
        p99_ms=round(1000 * p99, 3),
        texts_per_second=round(throughputs[best_size], 1),
        batch_size=best_size,
        load_seconds=round(load_seconds, 3),
        memory_mb=round(peak_memory / 1e6, 1),
        disk_mb=None if disk_mb is None else round(disk_mb, 1),
        threads=threads,
        torch="torch" in sys.modules,
    )


def _measure_latencies(classifier: TextClassifier, texts: Sequence[str]) -> list[float]:
    """Classify texts one by one and return the seconds of each."""
    latencies: list[float] = []
    start = time.perf_counter()
    for text in texts:
        if len(latencies) >= _MIN_LATENCY_TEXTS and time.perf_counter() - start > _MAX_LATENCY_SECONDS:
            break
        latencies.append(_time(lambda text=text: classifier.predict_proba([text])))  # type: ignore[misc]
    return latencies


def _measure_throughput(classifier: TextClassifier, texts: Sequence[str], batch_size: int) -> float:
    """Classify all texts in batches of this size, for at least a second, and return texts per second."""
    classifier.batch_size = batch_size
    seconds, passes = 0.0, 0
    while seconds < _MIN_THROUGHPUT_SECONDS:
        seconds += _time(lambda: classifier.predict_proba(texts))
        passes += 1
    return passes * len(texts) / seconds


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _peak_memory() -> int:
    """Peak memory of this process in bytes."""
    import psutil

    try:
        import resource
    except ImportError:  # Windows has no resource module
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, a child process inherits ru_maxrss of its parent
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
