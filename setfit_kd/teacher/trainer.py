"""SetFit's trainer with a contrastive loss over whole batches, or with SetFit's own pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from setfit import SetFitModel, Trainer, TrainingArguments
from torch import nn

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.losses.contrastive import ContrastiveLoss, balanced_batches
from setfit_kd.losses.pairs import PairSimilarityLoss
from setfit_kd.models.encode import embed
from setfit_kd.models.heads import balanced_weights, fit_head
from setfit_kd.teacher.train import PAIRS_PER_BATCH, steps_and_batch_size
from setfit_kd.training.loop import resolve_learning_rate
from setfit_kd.training.loss_trainer import LossTrainer, TokenDataset

LEARNING_RATE = 6e-5


class TeacherTrainer(Trainer):
    """Trainer of a SetFit model on labeled texts; the precision in the config is resolved."""

    def __init__(
        self, model: SetFitModel, labeled: LabeledSet, config: TeacherConfig, device: torch.device, output_dir: str
    ) -> None:
        self.labeled = labeled
        self.config = config = config.with_family_defaults("setfit")
        # SetFit's own constructor would move the body to the first accelerator and create another inner trainer.
        self.args, self._model = TrainingArguments(num_iterations=config.num_iterations, report_to="none"), model
        self.inner = self.st_trainer = LossTrainer(
            model.model_body,
            config,
            device,
            output_dir,
            batch_size=PAIRS_PER_BATCH if config.teacher_objective == "pairs" else resolved(config.teacher_batch_size),
            learning_rate=resolve_learning_rate(config.teacher_learning_rate, model.model_body, default=LEARNING_RATE),
        )

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[TokenDataset, nn.Module]:
        """Create the dataset and the loss: texts with classes and a contrastive loss, or SetFit's pairs."""
        body, config = self.model.model_body, self.config
        options: dict[str, Any] = {"dropout": config.teacher_dropout, "micro_batch_size": config.micro_batch_size}
        if config.teacher_objective == "pairs":
            # SetFit draws pairs with a constant seed; shuffling the texts makes them depend on our seed.
            order = np.random.default_rng([config.seed, 4]).permutation(len(x))
            pairs, _ = super().get_dataset([str(i) for i in order], [y[i] for i in order], args, max_pairs)
            columns = [np.array(pairs[name], np.int64) for name in ("sentence_1", "sentence_2")]
            return TokenDataset(body, x, pairs["label"], columns), PairSimilarityLoss(body, **options)
        steps, _ = steps_and_batch_size(config, self.labeled, family="setfit", device=body.device)
        size = resolved(config.teacher_batch_size)
        self.inner.batches = balanced_batches(self.labeled.labels, batch_size=size, steps=steps, seed=config.seed)
        return TokenDataset(body, x, y), ContrastiveLoss(body, **options)

    def train_body(self) -> None:
        """Train the body on the labels."""
        self.train_embeddings(self.labeled.texts, self.labeled.labels.tolist())

    def fit_head(self) -> None:
        """Fit the head on the gold labels."""
        config = self.config
        texts, size = self.labeled.texts, config.encode_batch_size
        embeddings = embed(self.model.model_body, texts, batch_size=size, description="Fitting head")
        labeled = self.labeled
        options: dict[str, Any] = {"task": labeled.task, "C": config.head_c}
        options["class_weights"] = balanced_weights(labeled.counts, config.balance, labeled.task)
        self.model.model_head = fit_head(embeddings, labeled.targets, **options)
