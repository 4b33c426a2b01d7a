"""SetFit's distillation trainer made right: true targets, in memory O(pool), and a head on soft labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from setfit import DistillationTrainer, SetFitModel, TrainingArguments
from torch import nn

from setfit_kd.config import StudentConfig
from setfit_kd.data import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.memory import inner_trainer_on
from setfit_kd.models import embed, fit_head
from setfit_kd.objectives import PairsObjective, SimilarityObjective, draw_pairs
from setfit_kd.signals import TeacherSignals
from setfit_kd.training import training_arguments


class StudentTrainer(DistillationTrainer):
    """Trains a SetFit model from a teacher's signals; the teacher itself is never needed.

    Args:
        model: The student, head unfitted.
        signals: The teacher's signals over the pool, with embeddings.
        labeled: Texts with gold labels for the head, where there are any.
        config: How.
        device: Where.
        output_dir: A folder for what the inner trainer may write.
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
        self.config = config
        arguments = training_arguments(
            output_dir,
            batch_size=config.batch_size,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            num_iterations=config.num_iterations,
            seed=config.seed,
        )
        with inner_trainer_on(device):
            super().__init__(teacher_model=None, student_model=model, args=arguments, metric=lambda *_: {})
        # Only now: SetFit would map over every text of the pool to fill the tables of its model card.
        self.train_dataset = Dataset.from_dict({"text": signals.texts})

    def get_dataset(
        self, x: list[str], y: Any, args: TrainingArguments, max_pairs: int = -1
    ) -> tuple[Dataset, nn.Module]:
        """The pool with the objective that the config names; targets are the teacher's cosines."""
        teacher = self.signals.embeddings
        if teacher is None:
            raise DataError(
                f"The signals of {self.signals.origin} hold no embeddings, which both objectives need.",
                hint="Score the pool by a SetFit teacher.",
            )
        body = self.model.model_body
        if self.config.objective == "similarity":
            # A last batch of one text would have no pair.
            self.st_trainer.args.dataloader_drop_last = len(x) % args.embedding_batch_size == 1
            dataset = Dataset.from_dict({"sentence": x, "label": np.arange(len(x))})
            return dataset, SimilarityObjective(body, teacher)
        left, right, cosines = draw_pairs(teacher, pairs_per_text=args.num_iterations, seed=args.seed)
        columns = {"sentence_1": [x[i] for i in left], "sentence_2": [x[i] for i in right], "label": cosines}
        return Dataset.from_dict(columns), PairsObjective(body)

    def train_classifier(self, x_train: list[str], args: TrainingArguments | None = None) -> None:
        """Fit the head on the teacher's soft labels and, weighing more, the gold labels."""
        texts, probabilities = list(x_train), self.signals.probabilities
        weights = np.ones(len(texts), np.float32)
        if self.labeled is not None and self.config.gold_weight > 0:
            texts += self.labeled.texts
            one_hot = np.eye(len(self.signals.label_names), dtype=np.float32)[self.labeled.labels]
            probabilities = np.concatenate([probabilities, one_hot])
            weights = np.concatenate([weights, np.full(len(self.labeled), self.config.gold_weight, np.float32)])
        embeddings = embed(
            self.model.model_body, texts, batch_size=self.config.encode_batch_size, description="Fitting head"
        )
        self.model.model_head = fit_head(embeddings, probabilities, weights)
