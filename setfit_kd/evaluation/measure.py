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
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.evaluation import metrics
from setfit_kd.evaluation.metrics import Calibration, ClassQuality, Interval, OperatingPoint, Quality, measure_quality
from setfit_kd.memory.backoff import OOMBackoff, shared_backoff
from setfit_kd.models.bodies import family_of, takes_pairs
from setfit_kd.models.encode import choose_forward, predict_proba
from setfit_kd.models.forward import ForwardPass
from setfit_kd.models.heads import at_temperature, head_task, head_thresholds
from setfit_kd.models.io import BUNDLE, save_model
from setfit_kd.runtime.classify import PAIR_SEPARATOR, Classifier
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, TASKS, Labels, Task, task_of
from setfit_kd.utils.arrays import Floats, load_rows, save_rows
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
    """Quality and cost of one classifier, with its (n, n_classes) float32 probabilities and the gold labels.

    ``thresholds`` are the (n_classes,) decision thresholds of a multi-label classifier; None means 0.5 for all labels.
    """

    quality: Quality
    cost: Cost
    probabilities: npt.NDArray[np.float32]
    gold: Labels
    thresholds: Floats | None = None

    @property
    def task(self) -> Task:
        """The task of the classifier."""
        return task_of(self.gold)

    @property
    def predicted(self) -> Labels:
        """(n,) int64, the most probable class of each text; multi-label: (n, n_classes) bool."""
        return self.task.decide(self.probabilities, self.thresholds)

    @property
    def confidence(self) -> Floats:
        """(n,) probability that the predicted labels of each text are all correct."""
        return self.task.joint_probability(self.probabilities, self.predicted)

    def save(self, folder: Path) -> None:
        """Write the evaluation to a new folder, as `atomic_folder` does."""
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            measured: dict[str, Any] = {"quality": self.quality.as_dict(), "cost": asdict(self.cost)}
            measured |= {"gold": _to_indices(self.gold), "task": self.task.name}
            measured["thresholds"] = None if self.thresholds is None else self.thresholds.tolist()
            (part / _MEASURED).write_text(json.dumps(measured, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Load an evaluation that `save` wrote; raise a `DataError` if it is not complete."""
        try:
            measured = read_json(folder / _MEASURED)
            classes = {name: ClassQuality(**fields) for name, fields in measured["quality"].pop("classes").items()}
            quality, cost = Quality(**measured["quality"], classes=classes), Cost(**measured["cost"])
            probabilities = np.array(load_rows(folder / _PROBABILITIES), np.float32)
            gold = _from_indices(measured["gold"], len(classes), measured["task"])
            if probabilities.shape != (len(gold), len(classes)) or not np.isfinite(probabilities).all():
                raise ValueError(f"expected finite probabilities of shape {(len(gold), len(classes))}")
            if (thresholds := measured["thresholds"]) is not None:
                thresholds = np.array(thresholds, np.float64).reshape(len(classes))
            return cls(quality, cost, probabilities, gold, thresholds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Cannot read the evaluation in {folder} ({error}).", hint="Evaluate again.") from None

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration of the predicted probabilities."""
        return metrics.measure_calibration(self.probabilities, self.gold)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Metrics of `bootstrap_quality` and, for students, ``agreement`` with their 95% intervals."""
        intervals = metrics.bootstrap_quality(self.gold, self.predicted, n_classes=self.probabilities.shape[1])
        if self.quality.agreement is not None:
            n = len(self.gold)
            agrees = np.arange(n) < round(self.quality.agreement * n)  # their order does not matter
            intervals["agreement"] = metrics.bootstrap_mean(agrees)
        return intervals

    @cached_property
    def calibration_intervals(self) -> dict[str, Interval]:
        """``ece`` and ``brier`` with their 95% intervals; takes seconds for hundreds of thousands of texts."""
        return metrics.bootstrap_calibration(self.probabilities, self.gold)

    def difference_to(self, other: Evaluation) -> dict[str, Interval]:
        """Compute the difference in the metrics of `bootstrap_quality` to another evaluation on the same texts."""
        n_classes = self.probabilities.shape[1]
        return metrics.bootstrap_quality(self.gold, self.predicted, n_classes=n_classes, other=other.predicted)

    def operating_point(self, target: float) -> OperatingPoint | None:
        """Find the lowest threshold at which the answers reach the accuracy ``target``; None if there is none.

        The threshold is chosen and measured on the same texts, so expect a lower accuracy on new ones, especially if
        there were few texts. The interval shows how much of the accuracy may be due to chance.

        Raises:
            ConfigError: If the task is multi-label.
        """
        from scipy.stats import binomtest

        if self.task is MULTI_LABEL:
            message = "A target accuracy needs a classifier with one label per text, but this one is multi-label."
            raise ConfigError(message, hint="Remove the target accuracy (target_accuracy, --target-accuracy).")
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
        values = {**self.quality.as_dict(), **intervals, **asdict(self.calibration), **asdict(self.cost)}
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
        DataError: If the set is empty or cannot be read, or if its classes or its task differ from the model's.
    """
    names = tuple(model.labels or ())
    if isinstance(model, Classifier):
        task, thresholds = TASKS[model.task], model.thresholds
    else:
        task, thresholds = head_task(model.model_head), head_thresholds(model.model_head)
    if not isinstance(data, LabeledSet):
        data = encode_labels(read(data, label_column="label", role="test"), names, task)
    if data.label_names != names:
        classes = f"{', '.join(data.label_names)}; expected the classes of the model, {', '.join(names)}"
        hint = "Use an evaluation set with the classes of the model, in the same order."
        raise DataError(f"{data.origin} has the classes {classes}.", hint=hint)
    if data.task is not task:
        message = f"{data.origin} is {data.task.name}, but the model is {task.name}."
        raise DataError(message, hint=f"Use a {task.name} set, or a {data.task.name} model.")
    if not len(data):
        raise DataError(f"{data.origin} contains no texts.", hint="Pass at least one text.")
    has_pairs = PAIR_SEPARATOR in data.texts[0]
    if has_pairs != (model.takes_pairs if isinstance(model, Classifier) else takes_pairs(model.model_body)):
        message = f"The model classifies {'single texts' if has_pairs else 'pairs of texts'}, unlike {data.origin}."
        raise DataError(message, hint=f"{'Remove' if has_pairs else 'Add'} --pair-column.")
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
        options |= {"cache_tokens": False, "share": False}  # the speed is that of one process, with tokenization
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
    predicted, reference = task.decide(probabilities, thresholds), None if teacher is None else teacher.predicted
    quality = measure_quality(predicted, data.labels, names, reference, probabilities=probabilities)
    return Evaluation(quality, cost, probabilities, data.labels, thresholds)


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
    rows = getattr(head, "estimators_", [head])
    return count + sum(np.size(getattr(row, name, ())) for row in rows for name in ("coef_", "intercept_"))


def evaluate_ensemble(
    evaluations: Sequence[Evaluation],
    weights: Sequence[float],
    temperatures: Sequence[float],
    mean_temperature: float,
    *,
    thresholds: Floats | None = None,
) -> Evaluation:
    """Evaluate an ensemble from the evaluations, weights and temperatures of its members on the same texts.

    As in `TeacherSignals.average`, the probabilities are averaged before temperature scaling. Sizes and run times are
    summed, because every member classifies every text.
    """
    first, costs = evaluations[0], [evaluation.cost for evaluation in evaluations]
    task, pairs = first.task, zip(evaluations, temperatures, strict=True)
    unscaled = [at_temperature(e.probabilities, 1 / temperature, task) for e, temperature in pairs]
    averaged = np.average(unscaled, axis=0, weights=np.asarray(weights))
    probabilities = np.asarray(at_temperature(averaged, mean_temperature, task), np.float32)
    parameters, megabytes = sum(c.parameters or 0 for c in costs), round(sum(c.megabytes for c in costs), 1)
    speed = round(1 / sum(1 / max(c.texts_per_second, 0.1) for c in costs), 1)
    cost = Cost(parameters, megabytes, speed, first.cost.device)
    predicted, names = task.decide(probabilities, thresholds), [*first.quality.classes]
    quality = measure_quality(predicted, first.gold, names, probabilities=probabilities)
    return Evaluation(quality, cost, probabilities, first.gold, thresholds)


def write_texts(data: LabeledSet, folder: Path) -> None:
    """Write the texts and labels to ``texts.jsonl``; its first line holds the label names and the origin."""
    with raise_output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    header = {"label_names": list(data.label_names), "origin": data.origin, "texts": len(data), "task": data.task.name}
    rows = ({"text": text, "label": label} for text, label in zip(data.texts, _to_indices(data.labels), strict=True))
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
        labels = _from_indices([row["label"] for row in rows], len(names), header["task"])
        return LabeledSet(texts, labels, tuple(names), str(header["origin"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"Cannot read {folder / _TEXTS} ({error}).", hint="Evaluate the run again.") from None


def _to_indices(labels: Labels) -> list[Any]:
    """Convert labels to one class index per text or, for multi-label, a list of them."""
    return [np.flatnonzero(row).tolist() for row in labels] if task_of(labels) is MULTI_LABEL else labels.tolist()


def _from_indices(values: list[Any], n_classes: int, task: str) -> Labels:
    """Convert the result of `_to_indices` to labels of a task."""
    is_multi = TASKS[task] is MULTI_LABEL
    rows = values if is_multi else [[value] for value in values]
    if not all(type(value) is int and 0 <= value < n_classes for row in rows for value in row):
        raise ValueError(f"labels must be integers from 0 to {n_classes - 1}")
    if is_multi:
        return np.array([[i in row for i in range(n_classes)] for row in rows], bool).reshape(len(rows), n_classes)
    return np.array(values, np.int64)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table with one row per model: quality, then cost."""
    has_teacher = any(evaluation.quality.agreement is not None for evaluation in evaluations.values())
    names = metrics.METRICS[next(iter(evaluations.values())).task]
    main, *others = names
    quality_headings = [names[main], "95% CI", *(names[key] for key in others), *["agreement"] * has_teacher]
    headings, rows = ["", *quality_headings, "parameters", "MB", "texts/s"], []
    for name, evaluation in evaluations.items():
        quality, cost = evaluation.quality, evaluation.cost
        first, *rest = (f"{getattr(quality, key):.1%}" for key in names)
        agreement = "" if quality.agreement is None else f"{quality.agreement:.1%}"
        parameters = "" if cost.parameters is None else f"{cost.parameters / 1e6:.1f} M"
        costs = parameters, f"{cost.megabytes:.1f}", f"{cost.texts_per_second:,.0f}"
        rows.append([name, first, str(evaluation.intervals[main]), *rest, *[agreement] * has_teacher, *costs])
    return headings, rows


def class_table(evaluation: Evaluation, n_worst: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table with one row per class, or of those with the lowest F1."""
    is_multi, classes = evaluation.task is MULTI_LABEL, evaluation.quality.classes
    thresholds = np.full(len(classes), 0.5) if evaluation.thresholds is None else evaluation.thresholds
    fields = {"precision": "precision", "recall": "recall", "f1": "F1"}
    fields |= {"average_precision": "average precision", "ece": "calibration error"} if is_multi else {}
    headings = [*(["label", "threshold"] if is_multi else ["class"]), *fields.values(), "texts"]
    items = list(zip(classes, classes.values(), thresholds, strict=True))
    if n_worst is not None:
        items = sorted((item for item in items if item[1].support), key=lambda item: item[1].f1)[:n_worst]
    rows = []
    for name, quality, threshold in items:
        values = [f"{getattr(quality, field):.1%}" for field in fields]
        rows.append([name, *[f"{threshold:.2f}"] * is_multi, *values, f"{quality.support:,}"])
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

    ``figures`` are the metrics in `METRICS`, ``ece``, ``brier`` and, for a student or baseline, ``agreement``.
    ``against`` are the differences of the former to each ``teacher`` or ``baseline``, within a seed.
    """

    figures: dict[str, Spread]
    against: dict[str, dict[str, Spread]]

    @property
    def task(self) -> Task:
        """The task of the model."""
        return MULTI_LABEL if "micro_f1" in self.figures else SINGLE_LABEL


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
        shown = [key for key in figures if key in metrics.METRICS[by_seed[0][name].task]]
        against = {role: spreads(shown, name, reference) for role, reference in roles}
        summaries[name] = SeedSummary(spreads(figures, name), against)
    return summaries


def _figures(evaluation: Evaluation) -> dict[str, float]:
    quality, calibration = evaluation.quality, evaluation.calibration
    figures = {key: getattr(quality, key) for key in ("accuracy", "macro_f1", "micro_f1", "agreement")}
    return {k: v for k, v in figures.items() if v is not None} | {"ece": calibration.ece, "brier": calibration.brier}
