"""Looks at the validation texts while a transformer is fine-tuned."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.data import LabeledSet
from setfit_kd.evaluation import measure_quality
from setfit_kd.models import embed, get_head
from setfit_kd.training.callbacks import EvaluationCallback
from setfit_kd.utils.console import show_progress

logger = logging.getLogger(__name__)

_SCORES = "validation.json"


@dataclass
class ValidationCallback(EvaluationCallback):
    """Measures accuracy and F1 on the validation texts, and keeps the best weights.

    Attributes:
        validation: The texts, with the model's classes.
        metric: By which looks are compared, as in `FinetuneConfig`.
        every: Steps between two looks; one comes at the end, too.
        halves_rate: Halve the learning rate after each look that was no better.
        encode_batch_size: Texts a forward pass.
        scores: Step, accuracy and F1 of each look.
    """

    validation: LabeledSet
    metric: str
    every: int
    halves_rate: bool
    encode_batch_size: int
    scores: list[dict[str, float]] = field(default_factory=list)

    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Every so many steps, and after the last."""
        return step % self.every == 0 or step == state.max_steps

    def measure(self, step: int) -> float:
        """The metric on the validation texts."""
        with show_progress(None):
            features = embed(
                self.body, self.validation.texts, batch_size=self.encode_batch_size, description="Validating"
            )
        predicted = get_head(self.body).predict_proba(np.asarray(features, np.float64)).argmax(axis=1)
        found = measure_quality(predicted, self.validation.labels, self.validation.label_names).scores
        told = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
        self.scores.append({"step": step, **found})
        logger.info("Step %d: %s on %s.", step, told, self.validation.origin)
        return found[self.metric]

    def on_no_improvement(self, **given: Any) -> None:
        """Halve the rate, where that is asked for."""
        scheduler = given["lr_scheduler"]
        if self.halves_rate:
            scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
            for group in given["optimizer"].param_groups:  # the next step's rate is settled already
                group["lr"] /= 2
            logger.info("The learning rate is halved, to %g.", scheduler.base_lrs[0])

    def save_state(self, folder: Path) -> None:
        """Write what has been seen, and the best weights, into a checkpoint's folder."""
        super().save_state(folder)
        (folder / _SCORES).write_text(json.dumps(self.scores), encoding="utf-8")

    def load_state(self, folder: Path) -> None:
        """Take up what `save_state` wrote."""
        super().load_state(folder)
        self.scores = json.loads((folder / _SCORES).read_text(encoding="utf-8"))

    def restore(self) -> None:
        """Put the best weights back."""
        super().restore()
        if self.best_weights:
            logger.info("The weights after step %d are the best (%s %.1f %%).", self.best_step, self.metric,
                        100 * self.best)  # fmt: skip
