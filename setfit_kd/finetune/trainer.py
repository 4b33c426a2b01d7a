"""SetFit's trainer with cross-entropy on a transformer's classification layer instead of the contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from torch import nn

from setfit_kd.config.base import resolved
from setfit_kd.config.stages import FinetuneConfig
from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.finetune.steps import resolve_batch_size, steps_per_epoch
from setfit_kd.finetune.validation import ValidationCallback
from setfit_kd.losses.cross_entropy import CrossEntropyLoss
from setfit_kd.models.encode import shorten_texts
from setfit_kd.models.transformer_head import get_head, last_layer
from setfit_kd.training.loop import inner_trainer_options, training_arguments


class FinetuneTrainer(Trainer):
    """Trainer that fine-tunes a transformer on labeled texts.

    Args:
        model: The model to train.
        labeled: Labeled texts to train on.
        validation: Labeled texts to evaluate on during training; None for no evaluation.
        config: The settings, with precision resolved.
        device: The device to train on.
        output_dir: Folder for files of the inner trainer.
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
        self.validation_callback: ValidationCallback | None = None
        if validation is not None:
            self.validation_callback = ValidationCallback(
                model.model_body,
                config.patience,
                validation,
                metric=config.metric,
                eval_steps=config.eval_steps or steps_per_epoch(config, len(labeled), device),
                halve_learning_rate=config.schedule == "plateau",
                encode_batch_size=config.encode_batch_size,
            )
            self.st_trainer.add_callback(self.validation_callback)

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[Dataset, nn.Module]:
        """Return the labeled texts and the cross-entropy loss."""
        body = self.model.model_body
        loss = CrossEntropyLoss(
            body,
            last_layer(body),
            dropout=resolved(self.config.dropout),
            micro_batch_size=self.config.micro_batch_size,
        )
        return Dataset.from_dict({"sentence": shorten_texts(body, x), "label": y}), loss

    def train_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Train the model; with validation texts, restore the best weights."""
        super().train_embeddings(*args, **kwargs)
        if self.validation_callback is not None:
            self.validation_callback.restore_best_weights()

    def train_classifier(self, x_train: list[str], y_train: Any, args: TrainingArguments | None = None) -> None:
        """Set the head to the classification layer, which was trained with the body."""
        self.model.model_head = get_head(self.model.model_body)
