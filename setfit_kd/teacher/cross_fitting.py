"""Predict labeled texts by teachers that were not trained on them, to calibrate a teacher and estimate its quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.base import Family
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import family_of
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import at_temperature, fit_temperature
from setfit_kd.models.thresholds import fit_thresholds
from setfit_kd.tasks.classification import SINGLE_LABEL, Labels, Task, is_equal, task_of
from setfit_kd.teacher.train import steps_and_batch_size, train_teacher
from setfit_kd.utils.arrays import Floats, load_rows, save_rows
from setfit_kd.utils.atomic_io import atomic_folder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

FOLDS = 3
MIN_LABELS_PER_CLASS = 3
"""Texts of classes with fewer labels are always trained on, since a class needs two."""
_PROBABILITIES = "probabilities.npy"
_PRIOR = 0.2  # heads are nearly calibrated without it, and a temperature from 32 texts is uncertain by a factor of two


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Predictions for the labeled texts, each by a teacher that was trained on other folds.

    Attributes:
        probabilities: (n, n_classes) float32; NaN in rows of texts that are in no fold.
        labels: Gold labels, see `Labels`.
    """

    probabilities: npt.NDArray[np.float32]
    labels: Labels

    @property
    def task(self) -> Task:
        """The task of the labels."""
        return task_of(self.labels)

    @property
    def targets(self) -> npt.NDArray[np.float32]:
        """(n, n_classes) gold labels, 0 or 1."""
        return self.task.targets(self.labels, self.probabilities.shape[1])

    @property
    def is_correct(self) -> npt.NDArray[np.bool_]:
        """(n,) whether all labels of a text are predicted correctly."""
        return is_equal(self.task.decide(self.probabilities, self.thresholds), self.labels)

    @cached_property
    def thresholds(self) -> Floats | None:
        """The (n_classes,) thresholds of a multi-label task with the best F1 expected from the probabilities."""
        if self.task is SINGLE_LABEL or not len(self.labels):
            return None
        return fit_thresholds(self.probabilities, "f1")

    def predicted(self) -> CrossFit:
        """Return only the texts that were predicted."""
        rows = ~np.isnan(self.probabilities[:, 0])
        return CrossFit(self.probabilities[rows], self.labels[rows])

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions; None if there are no predictions."""
        is_correct = self.predicted().is_correct
        return float(is_correct.mean()) if len(is_correct) else None

    @cached_property
    def temperature(self) -> float:
        """Temperature that calibrates the predictions; 1 if there are none."""
        held_out, task = self.predicted(), self.task
        return fit_temperature(task.to_logits(held_out.probabilities), held_out.targets, task=task, prior=_PRIOR)

    @property
    def unrecognized(self) -> npt.NDArray[np.int64]:
        """Classes with texts but without any correct prediction, sorted."""
        held_out, n_classes = self.predicted(), self.probabilities.shape[1]
        predicted = self.task.targets(self.task.decide(held_out.probabilities, held_out.thresholds), n_classes)
        n_correct = (predicted * held_out.targets).sum(axis=0)
        return np.flatnonzero((n_correct == 0) & self.targets.any(axis=0))

    @property
    def log_loss(self) -> float:
        """Mean cross-entropy of the calibrated probabilities."""
        held_out = self.calibrated.predicted()
        return float(self.task.cross_entropy(self.task.to_logits(held_out.probabilities), held_out.targets).mean())

    @property
    def calibrated(self) -> CrossFit:
        """The predictions at that temperature."""
        calibrated = at_temperature(self.probabilities, self.temperature, self.task)
        return CrossFit(calibrated.astype(np.float32), self.labels)

    def save(self, folder: Path) -> None:
        """Write the predictions to a new folder, as `atomic_folder` does."""
        with atomic_folder(folder) as part:
            save_rows(self.probabilities, part / _PROBABILITIES, half_if_large=False)

    @classmethod
    def load(cls, folder: Path, labeled: LabeledSet) -> CrossFit:
        """Read the predictions that `save` wrote for the same labeled texts; raise a `DataError` if that fails."""
        try:
            probabilities = np.asarray(load_rows(folder / _PROBABILITIES), np.float32)
            if probabilities.shape != (len(labeled), len(labeled.label_names)):
                raise ValueError(f"the shape is {probabilities.shape}")
            return cls(probabilities, labeled.labels)
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the predictions in {folder}: {error}.", hint="Run it again.") from None


def cross_fit(labeled: LabeledSet, load_body: Callable[[], SentenceTransformer], *, config: TeacherConfig) -> CrossFit:
    """Predict each of `FOLDS` parts of the labeled texts by a teacher that was trained on the others.

    Unlike predictions on the texts that a teacher was trained on, these tell how good the teacher is.

    Args:
        labeled: n labeled texts.
        load_body: Function that returns a new copy of the body.
        config: The teacher's settings.
    """
    probabilities = np.full((len(labeled), len(labeled.label_names)), np.nan, np.float32)
    for number, (training, held_out) in enumerate(_folds(labeled, config.seed), 1):
        phase = f"Cross-fitting teacher {number} of {FOLDS}"
        with shared_backoff(cpu_fallback=config.cpu_fallback):
            body, device = load_body(), resolve_device(config.device)
            fold_config = _fold_config(config, labeled, training, family=family_of(body), device=device)
            model = train_teacher(labeled.take(training), body, config=fold_config, description=phase)
            move_model(model.model_body, device, phase=phase)
            texts, size = [labeled.texts[row] for row in held_out], config.encode_batch_size
            probabilities[held_out] = predict_proba(model, texts, batch_size=size, description=phase)
            del model  # free its memory before the next one is trained
    return CrossFit(probabilities, labeled.labels)


def _folds(labeled: LabeledSet, seed: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return the training rows and the held-out rows of each fold; no folds if all classes have too few labels."""
    from sklearn.model_selection import StratifiedKFold

    # The rarest label of each text; an additional class holds the texts without labels.
    counts = np.append(labeled.counts, len(labeled))
    targets = np.column_stack([labeled.targets, np.ones(len(labeled))])
    rarest = np.where(targets, counts, len(labeled) + 1).argmin(axis=1)
    rows = np.flatnonzero(counts[rarest] >= MIN_LABELS_PER_CLASS)
    if len(rows) < FOLDS:
        return []
    groups, sizes = rarest[rows], np.bincount(rarest[rows])
    groups = np.where(sizes[groups] < FOLDS, sizes.argmax(), groups)  # groups that cannot be split join the largest
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out_rows = [rows[held_out] for _, held_out in splitter.split(rows, groups)]
    folds = []
    for held_out in held_out_rows:
        training = np.setdiff1d(np.arange(len(labeled)), held_out)
        too_few = labeled.targets[training].sum(axis=0) < 2  # of several labels of a text, only the rarest is spread
        held_out = held_out[~labeled.targets[held_out][:, too_few].any(axis=1)]
        folds.append((np.setdiff1d(np.arange(len(labeled)), held_out), held_out))
    return [fold for fold in folds if len(fold[1])]


def _fold_config(
    config: TeacherConfig,
    labeled: LabeledSet,
    training: npt.NDArray[np.int64],
    *,
    family: Family,
    device: torch.device,
) -> TeacherConfig:
    """Return the config of the teacher of a fold: as many passes over its texts as the teacher makes over all."""
    if family != "setfit":  # as few steps as possible already
        return config
    steps, _ = steps_and_batch_size(config, labeled, family=family, device=device)
    return config.model_copy(update={"teacher_steps": math.ceil(steps * len(training) / len(labeled))})


def cross_fit_steps(config: TeacherConfig, labeled: LabeledSet, *, family: Family, device: torch.device) -> int:
    """Count the training steps of `cross_fit`."""
    options: Any = {"family": family, "device": device}
    training_sets = [training for training, _ in _folds(labeled, config.seed)]
    configs = [_fold_config(config, labeled, training, **options) for training in training_sets]
    pairs = zip(configs, training_sets, strict=True)
    return sum(steps_and_batch_size(fold, labeled.take(training), **options)[0] for fold, training in pairs)
