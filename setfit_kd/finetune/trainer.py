"""Trainer of transformer classifiers, and evaluation on validation texts during training."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from setfit import SetFitModel

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import FinetuneConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.evaluation.metrics import measure_quality
from setfit_kd.finetune.train import resolve_batch_size, resolve_metric, steps_per_epoch
from setfit_kd.losses.cross_entropy import CrossEntropyLoss
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import get_head, head_thresholds, last_layer
from setfit_kd.models.thresholds import with_thresholds
from setfit_kd.tasks.classification import MULTI_LABEL
from setfit_kd.training.loss_trainer import EvaluationCallback, LossTrainer, TokenDataset
from setfit_kd.utils.arrays import Floats
from setfit_kd.utils.console import show_progress, suppress_warnings

logger = logging.getLogger(__name__)

_RESULTS_FILE = "validation.json"


@dataclass
class ValidationCallback(EvaluationCallback):
    """Callback that measures accuracy and F1 on validation texts every ``eval_steps`` steps and after the last step.

    With several labels per text, this is at the thresholds that `fit_head` chooses, as in the saved model. ``results``
    holds the step and all scores of each evaluation; ``history`` has the selected metric only.
    """

    validation: LabeledSet
    config: FinetuneConfig
    eval_steps: int
    results: list[dict[str, float]] = field(default_factory=list)

    def is_due(self, step: int, args: Any, state: Any) -> bool:
        """Return whether to evaluate after this step."""
        return step % self.eval_steps == 0 or step == state.max_steps

    def fit_head(self) -> tuple[Any, Floats]:
        """Return the last layer as a head, with thresholds for the validation texts, and their probabilities."""
        data, batch_size = self.validation, self.config.encode_batch_size
        with show_progress(False):  # the training has a bar
            embeddings = embed(self.body, data.texts, batch_size=batch_size, description="Validating")
        head = get_head(self.body)  # the classification layer is part of the transformer
        probabilities = head.predict_proba(np.asarray(embeddings, np.float64))
        options: Any = {"targets": data.targets, "label_names": data.label_names}
        return with_thresholds(head, probabilities, self.config.thresholds, **options), probabilities

    def measure(self, step: int) -> float:
        """Evaluate on the validation texts; return the metric."""
        data = self.validation
        with suppress_warnings("setfit_kd.models.thresholds"):  # shown once, for the saved model
            head, probabilities = self.fit_head()
        predicted = data.task.decide(probabilities, head_thresholds(head))
        scores = measure_quality(predicted, data.labels, data.label_names).scores
        self.results.append({"step": step, **scores})
        message = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
        logger.info("Step %d: %s on %s.", step, message, data.origin)
        return scores[resolve_metric(self.config, data.task)]

    def on_no_improvement(self, **kwargs: Any) -> None:
        """Halve the learning rate, if the schedule is ``plateau``."""
        scheduler = kwargs["lr_scheduler"]
        if self.config.schedule == "plateau":
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


class FinetuneTrainer:
    """Trainer of a transformer on labeled texts; the results on the validation texts are appended to ``history``."""

    def __init__(
        self,
        model: SetFitModel,
        labeled: LabeledSet,
        validation: LabeledSet | None,
        history: list[dict[str, float]],
        config: FinetuneConfig,
        device: torch.device,
        output_dir: str,
    ) -> None:
        self.model, self.history, self.config = model, history, config
        body = model.model_body
        size, rate, epochs = resolve_batch_size(device, config), resolved(config.learning_rate), config.epochs
        self.inner = LossTrainer(
            body, config, device, output_dir, batch_size=size, learning_rate=rate, epochs=epochs, steps=config.steps
        )
        self.inner.train_dataset = TokenDataset(body, labeled.texts, labeled.labels)
        options = {"dropout": resolved(config.dropout), "micro_batch_size": config.micro_batch_size}
        self.inner.loss = CrossEntropyLoss(body, last_layer(body), **options)
        self.validation_callback: ValidationCallback | None = None
        if validation is not None:
            eval_steps = config.eval_steps or steps_per_epoch(config, len(labeled), device)
            self.validation_callback = ValidationCallback(body, config.patience, validation, config, eval_steps)
            self.inner.add_callback(self.validation_callback)

    def train_body(self) -> None:
        """Train the transformer with its classification layer."""
        self.inner.train()

    def fit_head(self) -> None:
        """Set the head to the classification layer, with thresholds for the validation texts."""
        self.model.model_head = get_head(self.model.model_body)
        if (callback := self.validation_callback) is not None:
            self.history.extend(callback.results)
            if callback.validation.task is MULTI_LABEL:
                self.model.model_head, _ = callback.fit_head()
        elif self.config.thresholds != "f1":  # a number, which needs no texts
            no_texts = np.empty((0, len(self.model.labels or ())))
            self.model.model_head = with_thresholds(self.model.model_head, no_texts, self.config.thresholds)
