"""Measuring a classifier, or several that answer as one, on a labeled set."""

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

from setfit_kd.data import LabeledSet, Source, encode_labels, read
from setfit_kd.errors import DataError
from setfit_kd.evaluation.calibration import Calibration, OperatingPoint, measure_calibration, threshold_for
from setfit_kd.evaluation.cost import Cost, count_parameters, model_megabytes
from setfit_kd.evaluation.intervals import Interval, bootstrap, bootstrap_calibration, bootstrap_share
from setfit_kd.evaluation.metrics import ClassQuality, Quality, measure_quality
from setfit_kd.evaluation.texts import class_indices
from setfit_kd.memory import OOMBackoff, shared_backoff
from setfit_kd.models import at_temperature, predict_proba
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
        quality: How right it is.
        cost: What it takes.
        probabilities: (n, n_classes) float32, what it predicted.
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
        """Write the evaluation to a folder, whole or not at all.

        Raises:
            OutputError: The folder exists already or cannot be written.
        """
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)
            about = {"quality": asdict(self.quality), "cost": asdict(self.cost), "gold": self.gold.tolist()}
            (part / _MEASURED).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            DataError: The folder holds no whole evaluation.
        """
        try:
            about = read_json(folder / _MEASURED)
            classes = {name: ClassQuality(**of) for name, of in about["quality"].pop("classes").items()}
            quality, cost = Quality(**about["quality"], classes=classes), Cost(**about["cost"])
            probabilities = np.array(load_rows(folder / _PROBABILITIES), np.float32)
            gold = class_indices(about["gold"], len(classes))
            if probabilities.shape != (len(gold), len(classes)):
                raise ValueError("its parts do not belong together")
            if not np.isfinite(probabilities).all():
                raise ValueError("its probabilities are not all finite")
            return cls(quality, cost, probabilities, gold)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder} holds no whole evaluation ({error}).", hint="Evaluate again.") from None

    @cached_property
    def calibration(self) -> Calibration:
        """How far its probabilities can be believed."""
        return measure_calibration(self.probabilities, self.gold)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """``accuracy``, ``macro_f1`` and, of students, ``agreement`` with their 95 % intervals."""
        found = bootstrap(self.gold, self.predicted, n_classes=self.probabilities.shape[1])
        if self.quality.agreement is not None:
            n = len(self.gold)
            found["agreement"] = bootstrap_share(round(self.quality.agreement * n), n)
        return found

    @cached_property
    def calibration_intervals(self) -> dict[str, Interval]:
        """``ece`` and ``brier`` with their 95 % intervals; takes seconds with hundreds of thousands of texts."""
        return bootstrap_calibration(self.probabilities, self.gold)

    def against(self, other: Evaluation) -> dict[str, Interval]:
        """``accuracy`` and ``macro_f1`` less another classifier's on the same texts, with their 95 % intervals."""
        return bootstrap(self.gold, self.predicted, n_classes=self.probabilities.shape[1], other=other.predicted)

    def operating_point(self, target: float) -> OperatingPoint | None:
        """The lowest threshold at which its answers are as accurate as the target; see `threshold_for`."""
        return threshold_for(target, self.probabilities, self.gold)

    def as_dict(self, *, target_accuracy: float | None = None) -> dict[str, Any]:
        """Everything measured as plain values for JSON; with a target, ``answering`` at that accuracy, too."""
        every = {**self.intervals, **self.calibration_intervals}
        intervals = {f"{name}_interval": [found.low, found.high] for name, found in every.items()}
        measured = {**asdict(self.quality), **intervals, **asdict(self.calibration), **asdict(self.cost)}
        if target_accuracy is not None:
            found = self.operating_point(target_accuracy)
            measured["answering"] = found and asdict(found)
        return measured


def evaluate(
    model: SetFitModel,
    data: LabeledSet | Source,
    *,
    teacher: Evaluation | None = None,
    encode_batch_size: int = 32,
    folder: Path | None = None,
    description: str = "Evaluating",
) -> Evaluation:
    """Classify a labeled set and measure quality, size and speed.

    Args:
        model: The classifier, on the device it shall run on.
        data: A `LabeledSet`, or anything that `read` takes, with the columns ``text`` and ``label``.
        teacher: The teacher's evaluation on the same set, for the agreement.
        encode_batch_size: Texts a forward pass.
        folder: Where the model is saved; without it, its size is taken from a temporary copy.
        description: What to call the step on the progress bar.

    Raises:
        DataError: The set is empty, cannot be read, or has labels that the model lacks.
    """
    names = tuple(model.labels or ())
    if not isinstance(data, LabeledSet):
        data = encode_labels(read(data, label_column="label", role="test"), names)
    if data.label_names != names:
        raise DataError(
            f"{data.origin} is over the classes {', '.join(data.label_names)}, the model over {', '.join(names)}.",
            hint="Give a set with the model's classes, in its order.",
        )
    if not len(data):
        raise DataError(f"There are no texts in {data.origin}.", hint="Give at least one.")
    if teacher is not None and len(teacher.probabilities) != len(data):
        raise DataError(
            f"The teacher was evaluated on {len(teacher.probabilities)} texts, {data.origin} has {len(data)}.",
            hint="Evaluate both on the same set.",
        )
    # The first texts pay for allocations and lazy imports that no later one does.
    with show_progress(None):
        predict_proba(model, data.texts[:_WARM_UP], batch_size=encode_batch_size)
    with shared_backoff() as events:
        while True:
            before, started = len(events), time.perf_counter()
            probabilities = predict_proba(model, data.texts, batch_size=encode_batch_size, description=description)
            seconds = time.perf_counter() - started
            if len(events) == before:  # no failed try is in the time
                break
        body = model.model_body
        ran_on = OOMBackoff(description, kind="encoding", device=body.device, size=1, model=body).attempt.device
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    quality = measure_quality(predicted, data.labels, names, None if teacher is None else teacher.predicted)
    cost = Cost(
        parameters=count_parameters(model),
        megabytes=round(folder_megabytes(folder) if folder else model_megabytes(model), 1),
        texts_per_second=round(len(data) / seconds, 1),
        device=str(ran_on),
    )
    return Evaluation(quality, cost, probabilities, data.labels)


def evaluate_ensemble(
    evaluations: Sequence[Evaluation],
    shares: Sequence[float],
    temperatures: Sequence[float],
    average_temperature: float,
) -> Evaluation:
    """What classifiers come to whose probabilities are averaged, from their evaluations on the same texts.

    As in `TeacherSignals.average`, what is averaged are the probabilities before each one's temperature. Sizes add up,
    and so do the times: each text passes through every one.

    Args:
        evaluations: One a classifier, at least one, each at its temperature.
        shares: Their weights.
        temperatures: The temperature of each.
        average_temperature: That of the average.
    """
    first = evaluations[0]
    sharp = [at_temperature(e.probabilities, 1 / t) for e, t in zip(evaluations, temperatures, strict=True)]
    averaged = np.average(sharp, axis=0, weights=np.asarray(shares))
    probabilities = np.asarray(at_temperature(averaged, average_temperature), np.float32)
    predicted = np.asarray(probabilities.argmax(axis=1), np.int64)
    cost = Cost(
        parameters=sum(of.cost.parameters for of in evaluations),
        megabytes=round(sum(of.cost.megabytes for of in evaluations), 1),
        texts_per_second=round(1 / sum(1 / max(of.cost.texts_per_second, 0.1) for of in evaluations), 1),
        device=first.cost.device,
    )
    return Evaluation(
        measure_quality(predicted, first.gold, list(first.quality.classes)), cost, probabilities, first.gold
    )
