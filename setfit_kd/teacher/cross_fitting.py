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
from setfit_kd.models.heads import at_temperature, fit_temperature, log_probabilities
from setfit_kd.teacher.train import steps_and_batch_size, train_teacher
from setfit_kd.utils.arrays import load_rows, save_rows
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
        labels: (n,) gold classes.
    """

    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def predicted(self) -> CrossFit:
        """Return only the texts that were predicted."""
        rows = ~np.isnan(self.probabilities[:, 0])
        return CrossFit(self.probabilities[rows], self.labels[rows])

    @property
    def accuracy(self) -> float | None:
        """Share of correct predictions; None if there are no predictions."""
        held_out = self.predicted()
        is_correct = held_out.probabilities.argmax(axis=1) == held_out.labels
        return float(is_correct.mean()) if len(is_correct) else None

    @cached_property
    def temperature(self) -> float:
        """Temperature that calibrates the predictions; 1 if there are none."""
        held_out = self.predicted()
        one_hot = np.eye(held_out.probabilities.shape[1])[held_out.labels]
        return fit_temperature(log_probabilities(held_out.probabilities), one_hot, prior=_PRIOR)

    @property
    def unrecognized(self) -> npt.NDArray[np.int64]:
        """Classes without any correct prediction, sorted."""
        held_out = self.predicted()
        is_correct = held_out.probabilities.argmax(axis=1) == held_out.labels
        return np.setdiff1d(self.labels, held_out.labels[is_correct])

    @property
    def log_loss(self) -> float:
        """Mean negative logarithm of the calibrated probability of the gold class."""
        held_out = self.calibrated.predicted()
        gold = held_out.probabilities[np.arange(len(held_out.labels)), held_out.labels]
        return float(-log_probabilities(gold).mean())

    @property
    def calibrated(self) -> CrossFit:
        """The predictions at that temperature."""
        return CrossFit(at_temperature(self.probabilities, self.temperature).astype(np.float32), self.labels)

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

    rows = np.flatnonzero(labeled.counts[labeled.labels] >= MIN_LABELS_PER_CLASS)
    if not len(rows):
        return []
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    held_out_rows = [rows[held_out] for _, held_out in splitter.split(rows, labeled.labels[rows])]
    return [(np.setdiff1d(np.arange(len(labeled)), held_out), held_out) for held_out in held_out_rows]


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
