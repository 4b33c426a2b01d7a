"""Evaluation on validation texts during fine-tuning."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.models.encode import embed
from setfit_kd.models.transformer_head import get_head
from setfit_kd.training.callbacks import EvaluationCallback
from setfit_kd.utils.console import show_progress

logger = logging.getLogger(__name__)

_RESULTS_FILE = "validation.json"


@dataclass
class ValidationCallback(EvaluationCallback):
    """Callback that measures accuracy and F1 on the validation texts, and keeps the best weights.

    Attributes:
        validation: Validation texts, labeled with the model's classes.
        metric: Metric that selects the best weights, as in `FinetuneConfig`.
        eval_steps: Steps between evaluations; the last step is evaluated, too.
        halve_learning_rate: Whether to halve the learning rate after each evaluation without improvement.
        encode_batch_size: Texts per forward pass.
        results: Step and all scores of each evaluation; the inherited ``history`` has the score of ``metric`` only.
    """

    validation: LabeledSet
    metric: str
    eval_steps: int
    halve_learning_rate: bool
    encode_batch_size: int
    results: list[dict[str, float]] = field(default_factory=list)

    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Return whether to evaluate: every ``eval_steps`` steps and after the last step."""
        return step % self.eval_steps == 0 or step == state.max_steps

    def measure(self, step: int) -> float:
        """Evaluate on the validation texts; return the metric."""
        with show_progress(None):  # None hides the bar, since the training has one
            embeddings = embed(
                self.body, self.validation.texts, batch_size=self.encode_batch_size, description="Validating"
            )
        head = get_head(self.body)  # the classification layer is part of the transformer
        predicted = head.predict_proba(np.asarray(embeddings, np.float64)).argmax(axis=1)
        scores = measure_quality(predicted, self.validation.labels, self.validation.label_names).scores
        self.results.append({"step": step, **scores})
        message = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
        logger.info("Step %d: %s on %s.", step, message, self.validation.origin)
        return scores[self.metric]

    def on_no_improvement(self, **kwargs: Any) -> None:
        """Halve the learning rate, if ``halve_learning_rate`` is set."""
        scheduler = kwargs["lr_scheduler"]
        if self.halve_learning_rate:
            scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
            for group in kwargs["optimizer"].param_groups:  # the scheduler has already set the rate of the next step
                group["lr"] /= 2
            logger.info("Halved the learning rate to %g.", scheduler.base_lrs[0])

    def save_state(self, folder: Path) -> None:
        """Write the results and the best weights to a checkpoint folder."""
        super().save_state(folder)
        (folder / _RESULTS_FILE).write_text(json.dumps(self.results), encoding="utf-8")

    def load_state(self, folder: Path) -> None:
        """Load the state that `save_state` wrote."""
        super().load_state(folder)
        self.results = json.loads((folder / _RESULTS_FILE).read_text(encoding="utf-8"))

    def restore_best_weights(self) -> None:
        """Load the best weights into the body."""
        super().restore_best_weights()
        if self.best_weights:
            logger.info("Best weights: step %d (%s %.1f%%).", self.best_step, self.metric, 100 * self.best_score)
