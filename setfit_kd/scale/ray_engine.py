"""Classify with Ray Data: parts of files on a cluster, or the batches of any data set."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from setfit_kd.data.sources import check_texts
from setfit_kd.errors import UnavailableError, first_line
from setfit_kd.inference.classifier import check_pair_column, is_bundle, open_classifier
from setfit_kd.inference.predict import classify
from setfit_kd.runtime.classify import SINGLE_LABEL
from setfit_kd.scale.parts import Job, Part, Result, run_part
from setfit_kd.utils.console import show_progress, suppress_warnings


class BatchClassifier:
    """Callable class for `ray.data.Dataset.map_batches` that adds the columns of predictions to batches.

    These are ``label`` and ``probability``, or ``labels`` for a multi-label model, and one ``probability_NAME`` (n,)
    per label, as in files of `setfit-kd predict`. A row without visible text has label None and probabilities NaN.

    Args:
        model: A bundle, run folder or model, which all machines find at this path.
        text_column: Column of the texts.
        pair_column: Column of the second texts, for a model of pairs.
        threshold: Minimum probability of a label. [default: 0; the thresholds of a multi-label model]
        **options: ``device``, ``batch_size``, ``threads``, ``trust_pickle`` and ``exact`` of `open_classifier`.

    Raises:
        SetFitKDError: If the model cannot be loaded, or takes pairs and there is no ``pair_column``, or vice versa.

    Example:
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
        self.columns, self.threshold = [text_column, *([pair_column] if pair_column else [])], threshold
        self.classifier = open_classifier(model, **options)
        check_pair_column(model, self.classifier, self.columns[1:] or None)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a batch of n rows, and those of the predictions."""
        first, *second = (np.asarray(batch[column]).tolist() for column in self.columns)
        items: Any = list(zip(first, *second, strict=True)) if second else first
        rows = check_texts(items, origin="the batch", unit="row", pairs=bool(second))
        predictions = [p for chunk in classify(self.classifier, rows, threshold=self.threshold) for p in chunk]
        labels, names = np.empty(len(predictions), object), self.classifier.labels
        labels[:] = [prediction.label for prediction in predictions]
        probabilities = np.array([p.probabilities for p in predictions], np.float32).reshape(-1, len(names))
        added: dict[str, Any] = {"labels": labels}
        if self.classifier.task == SINGLE_LABEL:
            added = {"label": labels, "probability": probabilities.max(axis=1)}
        added |= {f"probability_{name}": column for name, column in zip(names, probabilities.T, strict=True)}
        return {**batch, **added}


class _PartWorker:
    """Callable class for `ray.data.Dataset.map` that loads the classifier once and classifies parts."""

    def __init__(self, job: Job, **options: Any) -> None:
        self.job, self.classifier = job, job.open_classifier(**options)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        with show_progress(False):
            return {"result": pickle.dumps(run_part(pickle.loads(row["item"]), self.job, self.classifier))}


def run_with_ray(parts: Sequence[Part], job: Job, workers: int | None = None) -> Iterator[Result]:
    """Classify parts by Ray Data, on the cluster that ``ray.init()`` finds, or else on this machine; see `run_part`.

    All machines must see the model and the files at the same paths. A part whose worker process dies is classified
    again by another. ``workers`` is their number. [default: one per GPU; one per CPU without GPUs or for a bundle]

    Raises:
        UnavailableError: If Ray is not installed or fails.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data
    except ImportError as error:
        hint = "Install the extra: pip install 'setfit-kd[ray]'"
        raise UnavailableError(f"Ray is not available ({error}).", hint=hint) from None
    job.open_classifier(device="cpu")  # its errors are better shown before any process starts
    try:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level="error")
        resources = ray.cluster_resources()
        use_gpu = "GPU" in resources and job.options["device"] != "cpu" and not is_bundle(job.model)
        cpus = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes())  # a worker is on one machine
        threads = min(job.options["threads"] or 1, cpus)
        available = int(resources["GPU"] if use_gpu else resources.get("CPU", 1) // threads)
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # by default 30 minutes, too short for a large file
        with suppress_warnings("ray.data"), ray.data.DataContext.current(context):
            items = [pickle.dumps(part) for part in parts]
            results = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map(
                _PartWorker,
                fn_constructor_args=[job],
                fn_constructor_kwargs={} if use_gpu else {"threads": threads},
                compute=ray.data.ActorPoolStrategy(size=min(workers or max(available, 1), len(parts))),
                num_cpus=0 if use_gpu else threads,
                num_gpus=1 if use_gpu else 0,
            )
            for row in results.iter_rows():
                yield pickle.loads(row["result"])
    except Exception as error:  # Ray has errors of many types, such as that of a worker that cannot load the model
        message = f"Ray stopped ({type(error).__name__}: {first_line(str(error))})."
        raise UnavailableError(message, hint="Repeat the command: finished files are kept.") from error
