"""How fast a classifier is, measured in a fresh process that holds nothing else."""

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
_WARM_UP = 16
_SINGLE_SECONDS, _LEAST_SINGLES, _LEAST_SECONDS = 10.0, 30, 1.0
_CODE = """
import sys
sys.path[:] = [folder for folder in sys.path if folder] + sys.argv[1:]  # nothing from the working folder
from setfit_kd.inference.benchmark import main
main()
"""


@dataclass(frozen=True)
class Speed:
    """What a classifier takes.

    Attributes:
        p50_ms: Milliseconds that a text alone takes: half of the texts take no longer.
        p95_ms: 95 % of them take no longer.
        p99_ms: 99 % of them take no longer.
        texts_per_second: The best throughput, tokenizing included.
        batch_size: The batch size that it was had at.
        load_seconds: From the start of Python to a classifier that is ready.
        memory_mb: Most memory that the process took while texts came one by one, in 10^6 bytes.
        disk_mb: Size of the folder, in 10^6 bytes; None for a model on the hub.
        threads: That it could take.
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
    """Measure a run, a SetFit model or a bundle in a process of its own.

    Args:
        path: As `open_classifier`.
        texts: n texts of the kind that it is for; all of them are classified at every batch size, and as many of them
            one by one as ten seconds allow.
        threads: Most threads of the CPU to take; None takes as many as there are cores.
        device: As in `RunConfig`.
        batch_sizes: Texts a forward pass to try.
        trust_pickle: Also load a head that is stored as a pickle only.

    Raises:
        DataError: There are no texts.
        SetFitKDError: The classifier cannot be opened or run.
    """
    if not len(texts):
        raise DataError("There are no texts to measure with.", hint="Give some of the kind that the classifier is for.")
    threads = threads or os.cpu_count() or 1
    task = {
        "path": str(path),
        "threads": threads,
        "device": device,
        "batch_sizes": list(batch_sizes),
        "trust_pickle": trust_pickle,
        "texts": list(texts),
    }
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    parallel = {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(_PACKAGE_ROOT)],
        input=json.dumps({**task, "started": time.time()}).encode(),
        env={**os.environ, **counts, **parallel},
        capture_output=True,
    )
    if done.returncode or not done.stdout:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise SetFitKDError(
            f"{path} could not be measured: its process ended with {done.returncode} {' '.join(last)}.",
            hint="See whether `setfit-kd predict` can use it.",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise getattr(errors, found["kind"])(found["error"], hint=found["hint"])
    return Speed(**found)


def main() -> None:
    """What the fresh process does: read the task from stdin, measure, print the answer as the last line of stdout."""
    try:
        with redirect_stdout(sys.stderr):  # whatever the libraries print
            found: dict[str, Any] = asdict(_measure(**json.load(sys.stdin)))
    except SetFitKDError as error:
        found = {"kind": type(error).__name__, "error": error.message, "hint": error.hint}
    print(json.dumps(found))


def _measure(
    path: str, texts: list[str], threads: int, device: str, batch_sizes: list[int], trust_pickle: bool, started: float
) -> Speed:
    # This module imports no more than a bundle needs, so that the time and memory are the classifier's own.
    classifier = open_classifier(path, device=device, threads=threads, trust_pickle=trust_pickle)
    load_seconds = time.time() - started
    for text in texts[:_WARM_UP]:
        classifier.predict_proba([text])
    singles = _singles(classifier, texts)
    memory = _peak_memory()
    rates = {size: _rate(classifier, texts, size) for size in batch_sizes}
    best = max(rates, key=lambda size: rates[size])
    p50, p95, p99 = (float(value) for value in np.percentile(singles, (50, 95, 99)))
    folder = classifier_path(path)
    size = None if folder is None else folder_megabytes(folder)
    return Speed(
        p50_ms=round(1000 * p50, 3),
        p95_ms=round(1000 * p95, 3),
        p99_ms=round(1000 * p99, 3),
        texts_per_second=round(rates[best], 1),
        batch_size=best,
        load_seconds=round(load_seconds, 3),
        memory_mb=round(memory / 1e6, 1),
        disk_mb=None if size is None else round(size, 1),
        threads=threads,
        torch="torch" in sys.modules,
    )


def _singles(classifier: TextClassifier, texts: Sequence[str]) -> list[float]:
    """Seconds that texts take one by one."""
    found: list[float] = []
    began = time.perf_counter()
    for text in texts:
        if len(found) >= _LEAST_SINGLES and time.perf_counter() - began > _SINGLE_SECONDS:
            break
        found.append(_seconds(lambda text=text: classifier.predict_proba([text])))  # type: ignore[misc]
    return found


def _rate(classifier: TextClassifier, texts: Sequence[str], batch_size: int) -> float:
    """Texts a second, all of them handed over at once, in batches of this size; for a second at least."""
    classifier.batch_size = batch_size
    seconds, passes = 0.0, 0
    while seconds < _LEAST_SECONDS:
        seconds += _seconds(lambda: classifier.predict_proba(texts))
        passes += 1
    return passes * len(texts) / seconds


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _peak_memory() -> int:
    """Most bytes of memory that this process has taken."""
    import psutil

    try:
        import resource
    except ImportError:  # Windows keeps the figure elsewhere
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands ru_maxrss on from parent to child
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
