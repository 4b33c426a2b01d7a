"""SetFit's distillation trainer, with the teacher's cosines as targets, O(pool) memory and a head on soft labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from setfit import DistillationTrainer, SetFitModel, TrainingArguments
from torch import nn

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.losses.pairs import PairSimilarityLoss, draw_pairs
from setfit_kd.losses.soft_labels import NO_GOLD
from setfit_kd.models.bodies import family_of
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import (
    at_temperature,
    balanced_weights,
    fit_head,
    fit_temperature,
    get_head,
    head_at_temperature,
    head_logits,
    held_out_logits,
    set_head,
)
from setfit_kd.models.thresholds import with_thresholds
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.agreement import AgreementCallback
from setfit_kd.student.distil import hold_out
from setfit_kd.student.loss import LossInputs, create_loss, match_labeled_texts
from setfit_kd.tasks.classification import MULTI_LABEL
from setfit_kd.training.loop import resolve_learning_rate
from setfit_kd.training.loss_trainer import LossTrainer, TokenDataset
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LEARNING_RATE = 3e-4
MAX_HEAD_TEXTS = 20_000
"""Maximum number of pool texts to fit a head on. More do not improve a linear head, and each must be embedded."""


class StudentTrainer(DistillationTrainer):
    """Trainer of a student on a teacher's signals, without the teacher; the precision in the config is resolved."""

    def __init__(
        self,
        model: SetFitModel,
        signals: TeacherSignals,
        labeled: LabeledSet | None,
        config: StudentConfig,
        device: torch.device,
        output_dir: str,
    ) -> None:
        self.signals, self.labeled = signals, labeled
        body = model.model_body
        self.config = config = config.with_family_defaults(family_of(body))
        objectives = parse_objectives(resolved(config.objective))
        self._trains_last_layer = family_of(body) == "transformer" and "soft-labels" in objectives
        self.gold = np.full(len(signals), NO_GOLD)
        if labeled is not None:
            self.gold = match_labeled_texts(signals, labeled)
        # SetFit's own constructor would move the body to the first accelerator and create another inner trainer.
        self.args, self._model = TrainingArguments(report_to="none"), model
        self.inner = self.st_trainer = LossTrainer(
            body,
            config,
            device,
            output_dir,
            batch_size=config.batch_size,
            learning_rate=resolve_learning_rate(config.learning_rate, body, default=LEARNING_RATE),
            epochs=config.epochs,
        )
        self.rows, self.held_out = hold_out(len(signals), config, avoid=self.gold != NO_GOLD)
        if config.patience is not None:
            rows = None if self._trains_last_layer else self.rows
            self.inner.add_callback(AgreementCallback(body, config.patience, signals, rows, self.held_out, config))

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[TokenDataset, nn.Module]:
        """Create the training dataset and the loss of the config's objective."""
        config = self.config
        inputs = LossInputs(self.model.model_body, self.signals, self.rows, self.gold, self.labeled, config)
        if config.objective == "pairs":
            left, right, cosines = draw_pairs(
                inputs.teacher_embeddings, pairs_per_text=config.num_iterations, seed=config.seed, rows=self.rows
            )
            loss = PairSimilarityLoss(inputs.body, **inputs.options)
            return TokenDataset(inputs.body, x, cosines, columns=(left, right)), loss
        # A last batch of one text has no pair.
        self.inner.args.dataloader_drop_last = len(self.rows) % config.batch_size == 1
        return TokenDataset(inputs.body, x, self.rows, columns=[self.rows]), create_loss(inputs)

    def train_body(self) -> None:
        """Train the body on the pool."""
        with _frozen_embeddings(self.model.model_body, resolved(self.config.freeze_embeddings)):
            self.train_embeddings(self.signals.texts)

    def fit_head(self) -> None:
        """Fit the head on the teacher's soft labels and, with a larger weight, on the gold labels, and calibrate it.

        A transformer trained on soft labels has a head already: its last layer.
        """
        config, body, signals = self.config, self.model.model_body, self.signals
        texts, targets, weights = self._head_examples()
        n, n_gold, size, task = len(texts), len(self._gold_set or ()), config.encode_batch_size, signals.task
        texts += [signals.texts[row] for row in self.held_out]
        embeddings = embed(body, texts, batch_size=size, description="Fitting head")
        last_layer = get_head(body) if self._trains_last_layer else None
        options: dict[str, Any] = {"task": task, "C": config.soft_labels_c}
        if self.labeled:
            options["class_weights"] = balanced_weights(self.labeled.counts, config.balance, task)
        head = last_layer or fit_head(embeddings[:n], targets, weights, **options)
        # The temperature at which the student's probabilities match the teacher's, on texts it was not trained on.
        if len(self.held_out):
            logits, soft_labels = head_logits(head, embeddings[n:]), signals.probabilities[self.held_out]
        elif last_layer:
            logits, soft_labels = head_logits(head, embeddings), targets
        else:
            rows, logits = held_out_logits(embeddings, targets, weights, seed=config.seed, **options)
            is_soft = rows < n - n_gold
            logits, soft_labels = logits[is_soft], targets[rows[is_soft]]
        calibrated = at_temperature(soft_labels, signals.temperature, task)
        head = head_at_temperature(head, fit_temperature(logits, calibrated, task=task))
        if task is MULTI_LABEL:
            pool = np.delete(embeddings, np.arange(n - n_gold, n), axis=0)
            probabilities = task.to_probabilities(head_logits(head, pool))
            head = with_thresholds(head, probabilities, config.thresholds, label_names=signals.label_names)
        if self._trains_last_layer:
            set_head(head, body)
        self.model.model_head = head

    @property
    def _gold_set(self) -> LabeledSet | None:
        """The labeled texts, unless their weight in the head is 0 or the head is the last layer."""
        if self.labeled and self.config.gold_weight > 0 and not self._trains_last_layer:
            return self.labeled
        return None

    def _head_examples(self) -> tuple[list[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return m texts with (m, n_classes) labels and (m,) weights: soft labels first, gold labels last."""
        gold = self._gold_set
        rows = np.flatnonzero(self.gold == NO_GOLD) if gold else np.arange(len(self.signals))
        rows = sample_rows(np.setdiff1d(rows, self.held_out), MAX_HEAD_TEXTS, seed=[self.config.seed, 7])
        texts = [self.signals.texts[row] for row in rows]
        probabilities, weights = self.signals.probabilities[rows], np.ones(len(rows), np.float32)
        if gold:
            texts += gold.texts
            probabilities = np.concatenate([probabilities, gold.targets])
            weights = np.concatenate([weights, np.full(len(gold), self.config.gold_weight, np.float32)])
        return texts, probabilities, weights


@contextmanager
def _frozen_embeddings(body: SentenceTransformer, frozen: bool) -> Iterator[None]:
    """Context manager that, if ``frozen``, excludes a transformer's word embeddings from training."""
    model = getattr(body[0], "auto_model", None)
    embeddings = model.get_input_embeddings() if frozen and model is not None else None
    trained = [] if embeddings is None else [weight for weight in embeddings.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
