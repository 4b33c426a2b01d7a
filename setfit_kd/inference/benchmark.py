"""Measure speed, memory and size of a classifier in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd import errors
from setfit_kd.errors import DataError, SetFitKDError
from setfit_kd.inference.classifier import check_pairs, is_bundle, open_classifier
from setfit_kd.utils.files import folder_megabytes

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
    """Speed, memory and size of a classifier; sizes are in 10^6 bytes."""

    p50_ms: float  # percentiles of the latency of a single text
    p95_ms: float
    p99_ms: float
    texts_per_second: float  # highest throughput over all batch sizes, including tokenization
    batch_size: int  # of the highest throughput
    load_seconds: float  # from the start of Python until the classifier is ready
    memory_mb: float  # peak memory of the process while texts are classified one by one
    disk_mb: float | None  # size of the folder; None for a model on the hub
    threads: int  # maximum number of CPU threads
    torch: bool  # whether torch was imported


def measure_speed(
    path: str | Path,
    texts: Sequence[str],
    *,
    threads: int | None = None,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (8, 32, 128, 512),
    trust_pickle: bool = False,
) -> Speed:
    """Measure the student of a run, a SetFit model or a bundle in a separate process.

    Typical texts are classified one by one for ten seconds at most, and all of them at every batch size. The other
    arguments are those of `open_classifier`, but ``threads`` is one per core by default.

    Raises:
        DataError: If ``texts`` is empty.
        ConfigError: If the classifier takes pairs and ``texts`` are single texts, or the other way round.
        SetFitKDError: If the classifier cannot be opened or run.
    """
    if not len(texts):
        raise DataError("Cannot measure a classifier without texts.", hint="Pass texts like those to be classified.")
    threads = threads or os.cpu_count() or 1
    options = {"device": device, "threads": threads, "trust_pickle": trust_pickle}
    task = {"path": str(path), "texts": list(texts), "batch_sizes": list(batch_sizes), "options": options}
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    variables = {**os.environ, **variables, "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[2])]
    content = json.dumps({**task, "started": time.time()}).encode()
    process = subprocess.run(command, input=content, env=variables, capture_output=True)
    if process.returncode or not process.stdout:
        stderr = process.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = ": ".join([str(process.returncode), *stderr[-1:]])
        message = f"Cannot measure {path}: the process ended with exit code {reason}."
        raise SetFitKDError(message, hint="Check that `setfit-kd predict` works with this model.")
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


def _measure(path: str, texts: list[str], batch_sizes: list[int], options: dict[str, Any], started: float) -> Speed:
    # This module imports only the packages that a bundle needs, so that time and memory are those of the classifier.
    classifier = open_classifier(path, **options)
    check_pairs(path, texts, takes_pairs=classifier.takes_pairs)
    load_seconds = round(time.time() - started, 3)

    def seconds(texts: list[str]) -> float:
        start = time.perf_counter()
        classifier.predict_proba(texts)
        return time.perf_counter() - start

    for text in texts[:_N_WARMUP_TEXTS]:
        classifier.predict_proba([text])
    latencies: list[float] = []
    for text in texts:
        if len(latencies) >= _MIN_LATENCY_TEXTS and sum(latencies) > _MAX_LATENCY_SECONDS:
            break
        latencies.append(seconds([text]))
    memory_mb = round(_peak_memory() / 1e6, 1)
    classifier.predict_proba(texts)  # may choose a faster forward pass
    throughputs: list[tuple[float, int]] = []
    for size in batch_sizes:
        classifier.batch_size = size
        times: list[float] = []
        while sum(times) < _MIN_THROUGHPUT_SECONDS:
            times.append(seconds(texts))
        throughputs.append((len(times) * len(texts) / sum(times), size))
    texts_per_second, best_size = max(throughputs)
    folder, kept_mb = Path(path), 0.0
    if folder.is_dir() and not is_bundle(folder):
        from setfit_kd.models.io import BUNDLE, classifier_folder

        folder = classifier_folder(folder)
        kept_mb = folder_megabytes(folder / BUNDLE)
    disk_mb = round(folder_megabytes(folder) - kept_mb, 1) if folder.is_dir() else None
    p50, p95, p99 = (round(1000 * float(value), 3) for value in np.percentile(latencies, (50, 95, 99)))
    throughput, has_torch = round(texts_per_second, 1), "torch" in sys.modules
    return Speed(p50, p95, p99, throughput, best_size, load_seconds, memory_mb, disk_mb, options["threads"], has_torch)


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
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
