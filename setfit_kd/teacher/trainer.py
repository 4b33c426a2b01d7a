"""SetFit's trainer with a contrastive loss over whole batches, or with SetFit's own pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from torch import nn

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import TeacherConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.losses.base import LossOptions
from setfit_kd.losses.contrastive import ContrastiveLoss
from setfit_kd.losses.pairs import PairSimilarityLoss
from setfit_kd.models.encode import embed, shorten_texts
from setfit_kd.models.heads import fit_head, resolve_c
from setfit_kd.teacher.steps import PAIRS_PER_BATCH, teacher_batches
from setfit_kd.training.loop import FixedBatchSampler, inner_trainer_options, resolve_learning_rate, training_arguments

LEARNING_RATE = 6e-5


class TeacherTrainer(Trainer):
    """Trainer of a SetFit model on labeled texts.

    Args:
        model: The model to train, without a fitted head.
        labeled: The labels.
        config: The settings, with the precision resolved.
        device: Device to train on.
        output_dir: Folder for files of the inner trainer.
    """

    def __init__(
        self, model: SetFitModel, labeled: LabeledSet, config: TeacherConfig, device: torch.device, output_dir: str
    ) -> None:
        self.labeled = labeled
        self.config = config = config.with_family_defaults("setfit")
        is_in_batch = config.teacher_objective == "in-batch"
        arguments = training_arguments(
            output_dir,
            batch_size=resolved(config.teacher_batch_size) if is_in_batch else PAIRS_PER_BATCH,
            epochs=1,
            learning_rate=resolve_learning_rate(config.teacher_learning_rate, model.model_body, default=LEARNING_RATE),
            num_iterations=config.num_iterations,
            seed=config.seed,
            precision=config.precision,
        )
        dataset = Dataset.from_dict({"text": labeled.texts, "label": labeled.labels.tolist()})
        with inner_trainer_options(device, config.precision):
            super().__init__(model=model, args=arguments, train_dataset=dataset, metric=_no_metric)

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[Dataset, nn.Module]:
        """Create the dataset and the loss: texts with classes and a contrastive loss, or SetFit's pairs."""
        body = self.model.model_body
        x = shorten_texts(body, x)
        options: LossOptions = {
            "dropout": resolved(self.config.teacher_dropout),
            "micro_batch_size": self.config.micro_batch_size,
        }
        if self.config.teacher_objective == "pairs":
            # SetFit draws pairs with a constant seed; shuffling the texts makes them depend on our seed.
            order = np.random.default_rng([self.config.seed, 4]).permutation(len(x))
            shuffled = [x[i] for i in order], [y[i] for i in order]
            dataset, _ = super().get_dataset(*shuffled, args=args, max_pairs=max_pairs)
            return dataset, PairSimilarityLoss(body, **options)
        batches = teacher_batches(self.config, self.labeled)
        self.st_trainer.args.batch_sampler = lambda *_, **__: FixedBatchSampler(batches)
        return Dataset.from_dict({"sentence": x, "label": y}), ContrastiveLoss(body, **options)

    def train_classifier(self, x_train: list[str], y_train: Any, args: TrainingArguments | None = None) -> None:
        """Fit the head on the gold labels."""
        embeddings = embed(
            self.model.model_body, x_train, batch_size=self.config.encode_batch_size, description="Fitting head"
        )
        labels = np.asarray(y_train)
        c = resolve_c(self.config.head_c, embeddings, labels, seed=self.config.seed)
        one_hot = np.eye(len(self.labeled.label_names), dtype=np.float32)[labels]
        self.model.model_head = fit_head(embeddings, one_hot, C=c, balance=self.config.balance)


def _no_metric(*_: Any) -> dict[str, float]:
    """Replace SetFit's default metric, which would be downloaded."""
    return {}
