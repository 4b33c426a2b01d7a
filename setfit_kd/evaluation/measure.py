"""Evaluation of a classifier, or of an ensemble of classifiers, on a labeled set."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.data.labeled_set import LabeledSet, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.errors import DataError
from setfit_kd.evaluation import metrics
from setfit_kd.evaluation.metrics import Calibration, ClassQuality, Interval, OperatingPoint, Quality, measure_quality
from setfit_kd.memory.backoff import OOMBackoff, shared_backoff
from setfit_kd.models.bodies import family_of
from setfit_kd.models.encode import choose_forward, predict_proba
from setfit_kd.models.forward import ForwardPass
from setfit_kd.models.heads import at_temperature
from setfit_kd.models.io import BUNDLE, save_model
from setfit_kd.runtime.classify import Classifier
from setfit_kd.utils.arrays import load_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_file, atomic_folder, raise_output_errors
from setfit_kd.utils.console import show_progress
from setfit_kd.utils.files import folder_megabytes, read_json, read_json_lines

if TYPE_CHECKING:
    from setfit import SetFitModel

_WARM_UP = 32
_MEASURED, _PROBABILITIES, _TEXTS = "measured.json", "probabilities.npy", "texts.jsonl"


@dataclass(frozen=True)
class Cost:
    """Size and speed of a classifier on a device.

    ``parameters`` are the weights in body and head; None for a bundle. ``megabytes`` is the size of the saved model, in
    10^6 bytes. ``texts_per_second`` includes tokenization, in batches sorted by length. ``method`` is how the body ran,
    see `setfit_kd.models.forward.METHODS`; empty for a bundle.
    """

    parameters: int | None
    megabytes: float
    texts_per_second: float
    device: str
    method: str = ""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Quality and cost of one classifier, with its (n, n_classes) float32 probabilities and the (n,) gold classes."""

    quality: Quality
    cost: Cost
    probabilities: npt.NDArray[np.float32]
    gold: npt.NDArray[np.int64]

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(n,) int64, the most probable class of each text."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)

    def save(self, folder: Path) -> None:
        """Write the evaluation to a new folder, as `atomic_folder` does."""
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            measured = {"quality": asdict(self.quality), "cost": asdict(self.cost), "gold": self.gold.tolist()}
            (part / _MEASURED).write_text(json.dumps(measured, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Load an evaluation that `save` wrote; raise a `DataError` if it is not complete."""
        try:
            measured = read_json(folder / _MEASURED)
            classes = {name: ClassQuality(**fields) for name, fields in measured["quality"].pop("classes").items()}
            quality, cost = Quality(**measured["quality"], classes=classes), Cost(**measured["cost"])
            probabilities = np.array(load_rows(folder / _PROBABILITIES), np.float32)
            gold = _class_indices(measured["gold"], len(classes))
            if probabilities.shape != (len(gold), len(classes)) or not np.isfinite(probabilities).all():
                raise ValueError(f"expected finite probabilities of shape {(len(gold), len(classes))}")
            return cls(quality, cost, probabilities, gold)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Cannot read the evaluation in {folder} ({error}).", hint="Evaluate again.") from None

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration of the predicted probabilities."""
        return metrics.measure_calibration(self.probabilities, self.gold)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """``accuracy``, ``macro_f1`` and, for students, ``agreement`` with their 95% intervals."""
        intervals = metrics.bootstrap_quality(self.gold, self.predicted, n_classes=self.probabilities.shape[1])
        if self.quality.agreement is not None:
            n = len(self.gold)
            intervals["agreement"] = metrics.bootstrap_proportion(round(self.quality.agreement * n), n)
        return intervals

    @cached_property
    def calibration_intervals(self) -> dict[str, Interval]:
        """``ece`` and ``brier`` with their 95% intervals; takes seconds for hundreds of thousands of texts."""
        return metrics.bootstrap_calibration(self.probabilities, self.gold)

    def difference_to(self, other: Evaluation) -> dict[str, Interval]:
        """Compute the difference in ``accuracy`` and ``macro_f1`` to another evaluation on the same texts."""
        n_classes = self.probabilities.shape[1]
        return metrics.bootstrap_quality(self.gold, self.predicted, n_classes=n_classes, other=other.predicted)

    def operating_point(self, target: float) -> OperatingPoint | None:
        """Find the lowest threshold at which the answers reach the accuracy ``target``; None if there is none.

        The threshold is chosen and measured on the same texts, so expect a lower accuracy on new ones, especially if
        there were few texts. The interval shows how much of the accuracy may be due to chance.
        """
        from scipy.stats import binomtest

        curve = metrics.coverage_curve(self.probabilities, self.gold)
        points = curve[curve[:, 2] >= target]
        if not len(points):
            return None
        threshold, coverage, accuracy = map(float, points[-1])
        n = round(coverage * len(self.gold))
        interval = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        # Round down by less than the spacing of single-precision numbers, so that the same texts are answered.
        threshold = math.floor(threshold * 1e9) / 1e9
        return OperatingPoint(threshold, coverage, accuracy, float(interval.low), float(interval.high))

    def as_dict(self, *, target_accuracy: float | None = None) -> dict[str, Any]:
        """Return all results as plain values for JSON; a target accuracy adds its operating point as ``answering``."""
        all_intervals = {**self.intervals, **self.calibration_intervals}
        intervals = {f"{name}_interval": [interval.low, interval.high] for name, interval in all_intervals.items()}
        values = {**asdict(self.quality), **intervals, **asdict(self.calibration), **asdict(self.cost)}
        if target_accuracy is not None:
            point = self.operating_point(target_accuracy)
            values["answering"] = point and asdict(point)
        return values


def evaluate(
    model: SetFitModel | Classifier,
    data: LabeledSet | Source,
    *,
    teacher: Evaluation | None = None,
    encode_batch_size: int | None = None,
    exact: bool = False,
    folder: Path | None = None,
    description: str = "Evaluating",
) -> Evaluation:
    """Evaluate a classifier on a labeled set: quality, size and speed.

    Args:
        model: The classifier, on the device to run on, or a bundle, `setfit_kd.runtime.Classifier`.
        data: A `LabeledSet`, or any source that `read` accepts with the columns ``text`` and ``label``.
        teacher: The teacher's evaluation on the same set, to compute the agreement.
        encode_batch_size: Maximum number of texts per forward pass. [default: limited by the number of tokens]
        exact: Run the model in single precision with torch, even if another way is faster.
        folder: Folder of the saved model. If None, the size is measured on a temporary copy.
        description: Name of the step on the progress bar.

    Raises:
        DataError: If the set is empty or cannot be read, or if its classes differ from the model's.
    """
    names = tuple(model.labels or ())
    if not isinstance(data, LabeledSet):
        data = encode_labels(read(data, label_column="label", role="test"), names)
    if data.label_names != names:
        classes = f"{', '.join(data.label_names)}; expected the classes of the model, {', '.join(names)}"
        hint = "Use an evaluation set with the classes of the model, in the same order."
        raise DataError(f"{data.origin} has the classes {classes}.", hint=hint)
    if not len(data):
        raise DataError(f"{data.origin} contains no texts.", hint="Pass at least one text.")
    if teacher is not None and len(teacher.gold) != len(data):
        message = f"The teacher was evaluated on {len(teacher.gold)} texts, but {data.origin} has {len(data)}."
        raise DataError(message, hint="Evaluate the teacher and the student on the same set.")
    predict: Callable[[list[str]], npt.NDArray[np.float32]]
    method = ""
    if isinstance(model, Classifier):
        predict = model.predict_proba
    else:
        forward = ForwardPass(model.model_body) if exact else choose_forward(model, data.texts)
        options: Any = {"batch_size": encode_batch_size, "description": description, "forward": forward}
        options["cache_tokens"] = False  # the speed includes tokenization
        predict, method = lambda texts: predict_proba(model, texts, **options), forward.method
    # Warm up first: the first texts also trigger allocations and lazy imports.
    with show_progress(False):
        predict(data.texts[:_WARM_UP])
    with shared_backoff() as events:
        n_events = -1
        while n_events < len(events):  # after an out-of-memory error, the time includes a failed attempt
            n_events, started = len(events), time.perf_counter()
            probabilities = predict(data.texts)
            seconds = time.perf_counter() - started
        if isinstance(model, Classifier):
            parameters, megabytes, device = None, folder_megabytes(model.folder), "cpu"
        else:
            body = model.model_body
            backoff = OOMBackoff(description, kind="encoding", device=body.device, batch_size=1, model=body)
            parameters, megabytes = count_parameters(model), _megabytes(model, folder)
            device = str(backoff.attempt.device)
    cost = Cost(parameters, round(megabytes, 1), round(len(data) / seconds, 1), device, method)
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    quality = measure_quality(predicted, data.labels, names, None if teacher is None else teacher.predicted)
    return Evaluation(quality, cost, probabilities, data.labels)


def _megabytes(model: SetFitModel, folder: Path | None) -> float:
    with TemporaryDirectory(prefix="setfit-kd-") as scratch:
        if folder is None:
            folder = Path(scratch) / "model"
            save_model(model, folder)
        return folder_megabytes(folder) - folder_megabytes(folder / BUNDLE)


def count_parameters(model: SetFitModel) -> int:
    """Count the weights of body and head."""
    body, head = model.model_body, model.model_head
    count: int = sum(parameter.numel() for parameter in body.parameters())
    if family_of(body) == "transformer":  # the body includes the head
        return count
    if model.has_differentiable_head:
        return count + sum(int(parameter.numel()) for parameter in head.parameters())
    return count + sum(int(getattr(head, name).size) for name in ("coef_", "intercept_") if hasattr(head, name))


def evaluate_ensemble(
    evaluations: Sequence[Evaluation], weights: Sequence[float], temperatures: Sequence[float], mean_temperature: float
) -> Evaluation:
    """Evaluate an ensemble from the evaluations, weights and temperatures of its members on the same texts.

    As in `TeacherSignals.average`, the probabilities are averaged before temperature scaling. Sizes and run times are
    summed, because every member classifies every text.
    """
    first, costs = evaluations[0], [evaluation.cost for evaluation in evaluations]
    unscaled = [at_temperature(e.probabilities, 1 / t) for e, t in zip(evaluations, temperatures, strict=True)]
    averaged = np.average(unscaled, axis=0, weights=np.asarray(weights))
    probabilities = np.asarray(at_temperature(averaged, mean_temperature), np.float32)
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    parameters, megabytes = sum(c.parameters or 0 for c in costs), round(sum(c.megabytes for c in costs), 1)
    speed = round(1 / sum(1 / max(c.texts_per_second, 0.1) for c in costs), 1)
    cost = Cost(parameters, megabytes, speed, first.cost.device)
    return Evaluation(measure_quality(predicted, first.gold, [*first.quality.classes]), cost, probabilities, first.gold)


def write_texts(data: LabeledSet, folder: Path) -> None:
    """Write the texts and labels to ``texts.jsonl``; its first line holds the label names and the origin."""
    with raise_output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = {"label_names": list(data.label_names), "origin": data.origin, "texts": len(data)}
    rows = ({"text": text, "label": int(label)} for text, label in zip(data.texts, data.labels, strict=True))
    with atomic_file(folder / _TEXTS) as file:
        for row in (header, *rows):
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_texts(folder: Path) -> LabeledSet:
    """Read the evaluation set that `write_texts` wrote; raise a `DataError` if it is missing or incomplete."""
    try:
        header, *rows = read_json_lines(folder / _TEXTS)
        names, texts = header["label_names"], [row["text"] for row in rows]
        if not isinstance(names, list) or not all(isinstance(text, str) for text in [*names, *texts]):
            raise ValueError("texts and label names must be strings")
        if len(texts) != header["texts"]:
            raise ValueError(f"expected {header['texts']} texts, got {len(texts)}")
        labels = _class_indices([row["label"] for row in rows], len(names))
        return LabeledSet(texts, labels, tuple(names), str(header["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Cannot read {folder / _TEXTS} ({error}).", hint="Evaluate the run again.") from None


def _class_indices(values: object, n_classes: int) -> npt.NDArray[np.int64]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < n_classes for value in values):
        raise ValueError(f"labels must be integers from 0 to {n_classes - 1}")
    return np.array(values, np.int64)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table with one row per model: quality, then cost."""
    has_teacher = any(evaluation.quality.agreement is not None for evaluation in evaluations.values())
    headings = ["", "accuracy", "95% CI", "macro-F1", *["agreement"] * has_teacher, "parameters", "MB", "texts/s"]
    rows = []
    for name, evaluation in evaluations.items():
        quality, cost, interval = evaluation.quality, evaluation.cost, evaluation.intervals["accuracy"]
        agreement = "" if quality.agreement is None else f"{quality.agreement:.1%}"
        accuracy = f"{quality.accuracy:.1%}", f"{100 * interval.low:.1f}-{100 * interval.high:.1f}"
        parameters = "" if cost.parameters is None else f"{cost.parameters / 1e6:.1f} M"
        costs = parameters, f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"
        rows.append([name, *accuracy, f"{quality.macro_f1:.1%}", *[agreement] * has_teacher, *costs])
    return headings, rows


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (divided by n - 1) and values of a metric over several seeds."""

    mean: float
    std: float
    values: list[float]


@dataclass(frozen=True)
class SeedSummary:
    """Metrics of one model over several seeds.

    ``figures`` are ``accuracy``, ``macro_f1``, ``ece``, ``brier`` and, for a student or baseline, ``agreement``.
    ``against`` are the differences of ``accuracy`` and ``macro_f1`` to each ``teacher`` or ``baseline``, within a seed.
    """

    figures: dict[str, Spread]
    against: dict[str, dict[str, Spread]]


def summarize_seeds(
    by_seed: Sequence[Mapping[str, Evaluation]], references: Mapping[str, Mapping[str, str]]
) -> dict[str, SeedSummary]:
    """Summarize the evaluations, by model name, of the same models over at least two seeds.

    ``references`` has, for each student, the names of its reference models by role (``teacher``, ``baseline``).
    """
    seeds = [{name: _figures(evaluation) for name, evaluation in evaluations.items()} for evaluations in by_seed]

    def spreads(keys: Iterable[str], name: str, reference: str | None = None) -> dict[str, Spread]:
        values = {k: [seed[name][k] - (seed[reference][k] if reference else 0.0) for seed in seeds] for k in keys}
        return {key: Spread(fmean(v), stdev(v), v) for key, v in values.items()}

    summaries = {}
    for name, figures in seeds[0].items():
        roles = references.get(name, {}).items()
        against = {role: spreads(("accuracy", "macro_f1"), name, reference) for role, reference in roles}
        summaries[name] = SeedSummary(spreads(figures, name), against)
    return summaries


def _figures(evaluation: Evaluation) -> dict[str, float]:
    quality, calibration = evaluation.quality, evaluation.calibration
    figures = {"accuracy": quality.accuracy, "macro_f1": quality.macro_f1, "agreement": quality.agreement}
    return {k: v for k, v in figures.items() if v is not None} | {"ece": calibration.ece, "brier": calibration.brier}
