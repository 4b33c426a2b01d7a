"""Classify with Ray Data: parts of files on a cluster, or the batches of a data set of the user's own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from setfit_kd.data.sources import check_texts
from setfit_kd.errors import UnavailableError
from setfit_kd.inference.classifier import is_bundle, open_classifier
from setfit_kd.inference.predict import classify
from setfit_kd.runtime.classify import SINGLE_LABEL
from setfit_kd.scale.parts import Job, Part, Result, run_part
from setfit_kd.utils.console import show_progress

_RETRIES = 5  # of a part whose worker process died; a text that makes every process die must not block the others


class BatchClassifier:
    """Callable class for `ray.data.Dataset.map_batches`: adds predictions to batches of columns.

    The added columns are those of `setfit-kd predict` for Parquet files: ``label`` and ``probability``, or ``labels``
    for a multi-label model, and one ``probability_NAME`` (n,) per label. A row without visible text has the label None
    and probabilities NaN.

    Args:
        model: A bundle, run folder or model, as in `setfit-kd predict`. Each machine must find it at this path.
        text_column: Column of the texts.
        pair_column: Column of the second texts, for a model of pairs.
        threshold: Minimum probability of a label. [default: 0; the thresholds of a multi-label model]
        **options: ``device``, ``batch_size``, ``threads``, ``trust_pickle`` and ``exact``, see `setfit_kd.load`.

    Raises:
        SetFitKDError: If the model cannot be loaded.

    Example:
        >>> import ray  # doctest: +SKIP
        >>> rows = ray.data.read_parquet("s3://bucket/texts")  # doctest: +SKIP
        >>> options = {"fn_constructor_args": ["runs/mine/student/bundle"], "batch_size": 1024, "concurrency": 8}
        >>> rows.map_batches(BatchClassifier, **options).write_parquet("s3://bucket/labels")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        *,
        text_column: str = "text",
        pair_column: str | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> None:
        self.columns = [text_column] if pair_column is None else [text_column, pair_column]
        self.threshold = threshold
        self.classifier = open_classifier(model, **options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a batch of n rows and those of the predictions."""
        first, *second = (np.asarray(batch[column]).tolist() for column in self.columns)
        items: Any = list(zip(first, *second, strict=True)) if second else first
        rows = check_texts(items, origin="the batch", unit="row", pairs=bool(second))
        predictions = [p for chunk in classify(self.classifier, rows, threshold=self.threshold) for p in chunk]
        is_single_label = self.classifier.task == SINGLE_LABEL
        labels = np.empty(len(predictions), object)
        labels[:] = [prediction.label for prediction in predictions]
        names = self.classifier.labels
        probabilities = np.array([p.probabilities for p in predictions], np.float32).reshape(-1, len(names))
        result = {**batch, "label" if is_single_label else "labels": labels}
        if is_single_label:
            result["probability"] = probabilities.max(axis=1)
        return result | {f"probability_{name}": column for name, column in zip(names, probabilities.T, strict=True)}


class _PartWorker:
    """Callable class for `map_batches` that loads the classifier once and classifies parts."""

    def __init__(self, job: Job) -> None:
        self.job, self.classifier = job, job.open_classifier()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        with show_progress(False):
            results = [run_part(Part(**json.loads(part)), self.job, self.classifier) for part in batch["part"]]
        return {"part": batch["part"], "rows": [r.rows for r in results], "error": [r.error or "" for r in results]}


def run_with_ray(parts: Sequence[Part], job: Job, workers: int | None = None) -> Iterator[Result]:
    """Classify parts by Ray Data, on the cluster that ``ray.init()`` finds, or else on this machine; see `run_part`.

    A part whose worker process dies is classified again by another; if that happens several times, it has no result.

    Args:
        parts: The parts. All machines of the cluster must see the inputs, the outputs and the model at the same paths.
        job: The model and the settings.
        workers: Number of worker processes. [default: one per GPU, or per CPU if there are none or for a bundle]

    Raises:
        UnavailableError: If Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UnavailableError(
            f"--engine ray needs Ray ({error}).", hint="Install it: pip install 'ray[data]'"
        ) from None
    job.open_classifier(device="cpu")  # its errors are better shown before any process starts
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    threads = job.options.get("threads") or 1
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) and job.options.get("device") != "cpu" and not is_bundle(job.model)
    available = resources["GPU"] if use_gpu else resources.get("CPU", 1) // threads
    size = min(workers or max(1, int(available)), len(parts))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    with ray.data.DataContext.current(context):
        items = [{"part": json.dumps(asdict(part))} for part in parts]
        results = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
            _PartWorker,
            fn_constructor_args=[job],
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            num_cpus=0 if use_gpu else threads,
            num_gpus=1 if use_gpu else 0,
            ray_remote_args_fn=lambda: {"max_task_retries": _RETRIES},
        )
        for row in results.iter_rows():
            yield Result(Part(**json.loads(row["part"])), row["rows"], row["error"] or None)
