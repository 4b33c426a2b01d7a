"""SetFit's distillation trainer, with the teacher's cosines as targets, O(pool) memory and a head on soft labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from setfit import DistillationTrainer, SetFitModel, TrainingArguments
from torch import nn

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import StudentConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.losses.pairs import PairSimilarityLoss, draw_pairs
from setfit_kd.losses.soft_labels import NO_GOLD
from setfit_kd.models.bodies import family_of
from setfit_kd.models.encode import embed, shorten_texts
from setfit_kd.models.heads import fit_head, resolve_c
from setfit_kd.models.temperature import at_temperature, fit_temperature, head_at_temperature, held_out_logits
from setfit_kd.models.transformer_head import get_head
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.agreement import AgreementCallback, hold_out
from setfit_kd.student.loss import LossInputs, create_loss, match_gold_labels
from setfit_kd.student.steps import MAX_HEAD_TEXTS, has_trained_head
from setfit_kd.training.loop import inner_trainer_options, resolve_learning_rate, training_arguments
from setfit_kd.utils.arrays import sample_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LEARNING_RATE = 3e-4


class StudentTrainer(DistillationTrainer):
    """Trainer of a SetFit model on a teacher's signals; the teacher itself is not needed.

    Args:
        model: The student, without a fitted head.
        signals: The teacher's signals on the pool.
        labeled: Texts with gold labels, if any.
        config: The settings, with the precision resolved.
        device: Device to train on.
        output_dir: Folder for files of the inner trainer.
    """

    def __init__(
        self,
        model: SetFitModel,
        signals: TeacherSignals,
        labeled: LabeledSet | None,
        config: StudentConfig,
        device: torch.device,
        output_dir: str,
    ) -> None:
        self.signals = signals
        self.labeled = labeled
        self.config = config = config.with_family_defaults(family_of(model.model_body))
        arguments = training_arguments(
            output_dir,
            batch_size=config.batch_size,
            epochs=config.epochs,
            learning_rate=resolve_learning_rate(config.learning_rate, model.model_body, default=LEARNING_RATE),
            num_iterations=config.num_iterations,
            seed=config.seed,
            precision=config.precision,
        )
        with inner_trainer_options(device, config.precision):
            super().__init__(teacher_model=None, student_model=model, args=arguments, metric=lambda *_: {})
        self.gold = np.full(len(signals), NO_GOLD)
        if labeled is not None:
            self.gold = match_gold_labels(signals, labeled.texts, labeled.labels)
        self.rows = np.arange(len(signals))
        self.agreement_callback: AgreementCallback | None = None
        if config.patience is not None:
            self.agreement_callback = self._add_early_stopping(config.patience)

    def _add_early_stopping(self, patience: int) -> AgreementCallback:
        self.rows, held_out = hold_out(len(self.signals), seed=self.config.seed, avoid=self.gold != NO_GOLD)
        callback = AgreementCallback(
            self.model.model_body,
            patience,
            self.signals,
            training_rows=self.rows,
            held_out_rows=held_out,
            head_c=self.config.head_c,
            balance=self.config.balance,
            encode_batch_size=self.config.encode_batch_size,
            seed=self.config.seed,
        )
        self.st_trainer.add_callback(callback)
        return callback

    def dataset_to_parameters(self, dataset: Dataset | None) -> list[Any]:
        """Return the pool's texts; SetFit would map over a ``train_dataset`` for its model card."""
        return [self.signals.texts]

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[Dataset, nn.Module]:
        """Create the training dataset and the loss of the config's objective."""
        inputs = LossInputs(self.model.model_body, self.signals, self.rows, self.gold, self.config)
        x = shorten_texts(inputs.body, x)
        if self.config.objective == "pairs":
            left, right, cosines = draw_pairs(
                inputs.teacher_embeddings, pairs_per_text=args.num_iterations, seed=args.seed, rows=self.rows
            )
            columns = {"sentence_1": [x[row] for row in left], "sentence_2": [x[row] for row in right]}
            return Dataset.from_dict({**columns, "label": cosines}), PairSimilarityLoss(inputs.body, **inputs.options)
        # A last batch of one text has no pair.
        self.st_trainer.args.dataloader_drop_last = len(self.rows) % args.embedding_batch_size == 1
        columns = {"sentence": [x[row] for row in self.rows], "label": self.rows.tolist()}
        return Dataset.from_dict(columns), create_loss(inputs)

    def train_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Train the body; with early stopping, restore its best weights."""
        with _frozen_embeddings(self.model.model_body, resolved(self.config.freeze_embeddings)):
            super().train_embeddings(*args, **kwargs)
        if self.agreement_callback is not None:
            self.agreement_callback.restore_best_weights()

    def train_classifier(self, x_train: list[str], args: TrainingArguments | None = None) -> None:
        """Fit the head on the teacher's soft labels and, with a larger weight, on the gold labels.

        A transformer trained on soft labels has a head already: its last layer.
        """
        if has_trained_head(family_of(self.model.model_body), self.config):
            self.model.model_head = get_head(self.model.model_body)
            return
        texts, probabilities, weights = self._head_examples()
        embeddings = embed(
            self.model.model_body, texts, batch_size=self.config.encode_batch_size, description="Fitting head"
        )
        gold = self._gold_set
        c = resolve_c(
            self.config.head_c,
            embeddings[-len(gold) :] if gold else None,
            gold.labels if gold else None,
            seed=self.config.seed,
        )
        head = fit_head(embeddings, probabilities, weights, C=c, balance=self.config.balance)
        self.model.model_head = head_at_temperature(head, self._temperature(embeddings, probabilities, weights, c))

    def _temperature(
        self,
        embeddings: npt.NDArray[np.floating],
        probabilities: npt.NDArray[np.float32],
        weights: npt.NDArray[np.float32],
        c: float,
    ) -> float:
        """Fit the temperature at which the student's probabilities on held-out texts match the teacher's."""
        rows, logits = held_out_logits(
            embeddings, probabilities, weights, C=c, balance=self.config.balance, seed=self.config.seed
        )
        is_soft = rows < len(embeddings) - (len(self._gold_set) if self._gold_set else 0)
        targets = at_temperature(probabilities[rows[is_soft]], self.signals.temperature)
        return fit_temperature(logits[is_soft], targets)

    @property
    def _gold_set(self) -> LabeledSet | None:
        """The labeled texts, unless their weight in the head is 0."""
        return self.labeled if self.labeled and self.config.gold_weight > 0 else None

    def _head_examples(self) -> tuple[list[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return m texts with (m, n_classes) labels and (m,) weights: soft labels first, gold labels last."""
        gold = self._gold_set
        rows = np.flatnonzero(self.gold == NO_GOLD) if gold else np.arange(len(self.signals))
        rows = sample_rows(rows, MAX_HEAD_TEXTS, seed=[self.config.seed, 7])
        texts = [self.signals.texts[row] for row in rows]
        probabilities, weights = self.signals.probabilities[rows], np.ones(len(rows), np.float32)
        if gold:
            texts += gold.texts
            one_hot = np.eye(len(gold.label_names), dtype=np.float32)[gold.labels]
            probabilities = np.concatenate([probabilities, one_hot])
            weights = np.concatenate([weights, np.full(len(gold), self.config.gold_weight, np.float32)])
        return texts, probabilities, weights


@contextmanager
def _frozen_embeddings(body: SentenceTransformer, frozen: bool) -> Iterator[None]:
    """Context manager that, if ``frozen``, excludes a transformer's word embeddings from training."""
    model = getattr(body[0], "auto_model", None)
    embeddings = model.get_input_embeddings() if frozen and model is not None else None
    if embeddings is None:
        yield
        return
    requires_grad = [(parameter, parameter.requires_grad) for parameter in embeddings.parameters()]
    embeddings.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
