"""SetFit's trainer with whole-batch contrast beside its pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from torch import nn

from setfit_kd.config import TeacherConfig, resolved
from setfit_kd.data import LabeledSet
from setfit_kd.losses import ContrastiveLoss, LossOptions, PairSimilarityLoss
from setfit_kd.models import embed, fit_head, resolve_c, shorten_texts
from setfit_kd.teacher.steps import PAIRS_BATCH, teacher_batches
from setfit_kd.training.loop import FixedBatchSampler, inner_trainer_options, resolve_learning_rate, training_arguments

LEARNING_RATE = 6e-5


class TeacherTrainer(Trainer):
    """Fine-tunes a SetFit model on labeled texts.

    Args:
        model: The model to train, head unfitted.
        labeled: The few labels.
        config: How, with its precision settled.
        device: Where.
        output_dir: A folder for what the inner trainer may write.
    """

    def __init__(
        self, model: SetFitModel, labeled: LabeledSet, config: TeacherConfig, device: torch.device, output_dir: str
    ) -> None:
        self.labeled = labeled
        self.config = config = config.with_family_defaults("setfit")
        arguments = training_arguments(
            output_dir,
            batch_size=resolved(config.teacher_batch_size) if config.teacher_objective == "in-batch" else PAIRS_BATCH,
            epochs=1,
            learning_rate=resolve_learning_rate(config.teacher_learning_rate, model.model_body, usual=LEARNING_RATE),
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
        """The texts with their classes and the contrastive objective, or SetFit's own pairs."""
        body = self.model.model_body
        x = shorten_texts(body, x)
        options: LossOptions = {
            "dropout": resolved(self.config.teacher_dropout),
            "micro_batch_size": self.config.micro_batch_size,
        }
        if self.config.teacher_objective == "pairs":
            # SetFit draws its pairs by a constant seed: the order of the texts is where ours comes in.
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
        strength = resolve_c(self.config.head_c, embeddings, labels, seed=self.config.seed)
        one_hot = np.eye(len(self.labeled.label_names), dtype=np.float32)[labels]
        self.model.model_head = fit_head(embeddings, one_hot, C=strength, balance=self.config.balance)


def _no_metric(*_: Any) -> dict[str, float]:
    """SetFit's default metric would be fetched over the network; evaluation has a room of its own."""
    return {}
