"""SetFit's trainer with cross-entropy on a transformer's own last layer in the place of its contrast."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from torch import nn

from setfit_kd.config import FinetuneConfig, resolved
from setfit_kd.data import LabeledSet
from setfit_kd.finetune.steps import resolve_batch_size, steps_per_epoch
from setfit_kd.finetune.validation import ValidationCallback
from setfit_kd.losses import CrossEntropyLoss
from setfit_kd.models import get_head, last_layer, shorten_texts
from setfit_kd.training.loop import inner_trainer_options, training_arguments


class FinetuneTrainer(Trainer):
    """Fine-tunes a transformer on labeled texts.

    Args:
        model: The model to train.
        labeled: The labels.
        validation: Texts to look at from time to time, where there are any.
        config: How, with its precision settled.
        device: Where.
        output_dir: A folder for what the inner trainer may write.
    """

    def __init__(
        self,
        model: SetFitModel,
        labeled: LabeledSet,
        validation: LabeledSet | None,
        config: FinetuneConfig,
        device: torch.device,
        output_dir: str,
    ) -> None:
        self.labeled = labeled
        self.config = config
        arguments = training_arguments(
            output_dir,
            batch_size=resolve_batch_size(device, config),
            epochs=config.epochs,
            learning_rate=resolved(config.learning_rate),
            num_iterations=1,
            seed=config.seed,
            precision=config.precision,
            steps=config.steps,
        )
        dataset = Dataset.from_dict({"text": labeled.texts, "label": labeled.labels.tolist()})
        with inner_trainer_options(device, config.precision):
            super().__init__(model=model, args=arguments, train_dataset=dataset, metric=lambda *_: {})
        self.looks: ValidationCallback | None = None
        if validation is not None:
            self.looks = ValidationCallback(
                model.model_body,
                config.patience,
                validation,
                metric=config.metric,
                every=config.eval_steps or steps_per_epoch(config, len(labeled), device),
                halves_rate=config.schedule == "plateau",
                encode_batch_size=config.encode_batch_size,
            )
            self.st_trainer.add_callback(self.looks)

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[Dataset, nn.Module]:
        """The texts with their classes, and cross-entropy."""
        body = self.model.model_body
        objective = CrossEntropyLoss(
            body,
            last_layer(body),
            dropout=resolved(self.config.dropout),
            micro_batch_size=self.config.micro_batch_size,
        )
        return Dataset.from_dict({"sentence": shorten_texts(body, x), "label": y}), objective

    def train_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Train; with validation texts, the best weights are kept."""
        super().train_embeddings(*args, **kwargs)
        if self.looks is not None:
            self.looks.restore()

    def train_classifier(self, x_train: list[str], y_train: Any, args: TrainingArguments | None = None) -> None:
        """The head is the last layer, which was trained along."""
        self.model.model_head = get_head(self.model.model_body)
