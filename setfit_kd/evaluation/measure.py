"""Evaluation of a classifier, or of an ensemble of classifiers, on a labeled set."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.data.labeled_set import LabeledSet, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.errors import DataError
from setfit_kd.evaluation.calibration import Calibration, OperatingPoint, measure_calibration, threshold_for
from setfit_kd.evaluation.cost import Cost, count_parameters, model_megabytes
from setfit_kd.evaluation.intervals import Interval, bootstrap_calibration, bootstrap_proportion, bootstrap_quality
from setfit_kd.evaluation.metrics import ClassQuality, Quality, measure_quality
from setfit_kd.evaluation.texts import class_indices
from setfit_kd.memory.backoff import OOMBackoff, shared_backoff
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.temperature import at_temperature
from setfit_kd.utils.arrays import load_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.console import show_progress
from setfit_kd.utils.files import folder_megabytes, read_json

if TYPE_CHECKING:
    from setfit import SetFitModel

_WARM_UP = 32
_MEASURED, _PROBABILITIES = "measured.json", "probabilities.npy"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Quality and cost of one classifier.

    Attributes:
        quality: Accuracy, F1, confusion matrix and agreement with the teacher.
        cost: Size and speed.
        probabilities: (n, n_classes) float32, the predicted probabilities.
        gold: (n,) int64, the gold classes.
    """

    quality: Quality
    cost: Cost
    probabilities: npt.NDArray[np.float32]
    gold: npt.NDArray[np.int64]

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(n,) int64, the most probable class of each text."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)

    def save(self, folder: Path) -> None:
        """Write the evaluation to a new folder atomically.

        Raises:
            OutputError: If the folder already exists or cannot be written.
        """
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            measured = {"quality": asdict(self.quality), "cost": asdict(self.cost), "gold": self.gold.tolist()}
            (part / _MEASURED).write_text(json.dumps(measured, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Load an evaluation that `save` wrote.

        Raises:
            DataError: If the folder does not contain a complete evaluation.
        """
        try:
            measured = read_json(folder / _MEASURED)
            classes = {name: ClassQuality(**fields) for name, fields in measured["quality"].pop("classes").items()}
            quality, cost = Quality(**measured["quality"], classes=classes), Cost(**measured["cost"])
            probabilities = np.array(load_rows(folder / _PROBABILITIES), np.float32)
            gold = class_indices(measured["gold"], len(classes))
            shape = (len(gold), len(classes))
            if probabilities.shape != shape:
                raise ValueError(f"expected probabilities of shape {shape}, got {probabilities.shape}")
            if not np.isfinite(probabilities).all():
                raise ValueError("probabilities must be finite")
            return cls(quality, cost, probabilities, gold)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"Cannot read the evaluation in {folder} ({error}).", hint="Evaluate again.") from None

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration of the predicted probabilities."""
        return measure_calibration(self.probabilities, self.gold)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """``accuracy``, ``macro_f1`` and, for students, ``agreement`` with their 95% intervals."""
        intervals = bootstrap_quality(self.gold, self.predicted, n_classes=self.probabilities.shape[1])
        if self.quality.agreement is not None:
            n = len(self.gold)
            intervals["agreement"] = bootstrap_proportion(round(self.quality.agreement * n), n)
        return intervals

    @cached_property
    def calibration_intervals(self) -> dict[str, Interval]:
        """``ece`` and ``brier`` with their 95% intervals; takes seconds for hundreds of thousands of texts."""
        return bootstrap_calibration(self.probabilities, self.gold)

    def difference_to(self, other: Evaluation) -> dict[str, Interval]:
        """Compute the difference in ``accuracy`` and ``macro_f1`` to another evaluation on the same texts."""
        n_classes = self.probabilities.shape[1]
        return bootstrap_quality(self.gold, self.predicted, n_classes=n_classes, other=other.predicted)

    def operating_point(self, target: float) -> OperatingPoint | None:
        """Find the lowest threshold at which the answers reach the target accuracy; see `threshold_for`."""
        return threshold_for(target, self.probabilities, self.gold)

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
    model: SetFitModel,
    data: LabeledSet | Source,
    *,
    teacher: Evaluation | None = None,
    encode_batch_size: int = 32,
    folder: Path | None = None,
    description: str = "Evaluating",
) -> Evaluation:
    """Evaluate a classifier on a labeled set: quality, size and speed.

    Args:
        model: The classifier, on the device to run on.
        data: A `LabeledSet`, or any source that `read` accepts with the columns ``text`` and ``label``.
        teacher: The teacher's evaluation on the same set, to compute the agreement.
        encode_batch_size: Texts per forward pass.
        folder: Folder of the saved model. If None, the size is measured on a temporary copy.
        description: Name of the step on the progress bar.

    Raises:
        DataError: If the set is empty or cannot be read, or if its classes differ from the model's.
    """
    names = tuple(model.labels or ())
    if not isinstance(data, LabeledSet):
        data = encode_labels(read(data, label_column="label", role="test"), names)
    if data.label_names != names:
        raise DataError(
            f"{data.origin} has the classes {', '.join(data.label_names)}; expected the classes of the model, "
            f"{', '.join(names)}.",
            hint="Use an evaluation set with the classes of the model, in the same order.",
        )
    if not len(data):
        raise DataError(f"{data.origin} contains no texts.", hint="Pass at least one text.")
    if teacher is not None and len(teacher.probabilities) != len(data):
        raise DataError(
            f"The teacher was evaluated on {len(teacher.probabilities)} texts, but {data.origin} has {len(data)}.",
            hint="Evaluate the teacher and the student on the same set.",
        )
    # Warm up first: the first texts also trigger allocations and lazy imports.
    with show_progress(None):
        predict_proba(model, data.texts[:_WARM_UP], batch_size=encode_batch_size)
    with shared_backoff() as events:
        while True:
            before, started = len(events), time.perf_counter()
            probabilities = predict_proba(model, data.texts, batch_size=encode_batch_size, description=description)
            seconds = time.perf_counter() - started
            if len(events) == before:  # otherwise the time includes a failed attempt
                break
        body = model.model_body
        device = OOMBackoff(description, kind="encoding", device=body.device, batch_size=1, model=body).attempt.device
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    quality = measure_quality(predicted, data.labels, names, None if teacher is None else teacher.predicted)
    cost = Cost(
        parameters=count_parameters(model),
        megabytes=round(folder_megabytes(folder) if folder else model_megabytes(model), 1),
        texts_per_second=round(len(data) / seconds, 1),
        device=str(device),
    )
    return Evaluation(quality, cost, probabilities, data.labels)


def evaluate_ensemble(
    evaluations: Sequence[Evaluation],
    weights: Sequence[float],
    temperatures: Sequence[float],
    average_temperature: float,
) -> Evaluation:
    """Evaluate an ensemble that averages probabilities, from the evaluations of its members on the same texts.

    As in `TeacherSignals.average`, the probabilities are averaged before temperature scaling. Sizes and run times are
    summed, because every member classifies every text.

    Args:
        evaluations: Evaluations of the members (at least one), with temperature scaling applied.
        weights: Weights of the members.
        temperatures: Temperatures of the members.
        average_temperature: Temperature of the average.
    """
    first = evaluations[0]
    unscaled = [at_temperature(e.probabilities, 1 / t) for e, t in zip(evaluations, temperatures, strict=True)]
    averaged = np.average(unscaled, axis=0, weights=np.asarray(weights))
    probabilities = np.asarray(at_temperature(averaged, average_temperature), np.float32)
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    cost = Cost(
        parameters=sum(e.cost.parameters for e in evaluations),
        megabytes=round(sum(e.cost.megabytes for e in evaluations), 1),
        texts_per_second=round(1 / sum(1 / max(e.cost.texts_per_second, 0.1) for e in evaluations), 1),
        device=first.cost.device,
    )
    return Evaluation(
        measure_quality(predicted, first.gold, list(first.quality.classes)), cost, probabilities, first.gold
    )
