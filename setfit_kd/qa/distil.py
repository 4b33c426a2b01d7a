"""Distil question answering, in the stages of a run."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.config.task_runs import QuestionRunConfig
from setfit_kd.errors import DataError
from setfit_kd.qa.data import read_questions
from setfit_kd.qa.metrics import gold_texts
from setfit_kd.qa.model import QuestionAnswerer, load_answerer, save_answerer
from setfit_kd.qa.run import without_leaks
from setfit_kd.qa.train import evaluate_answers, train_questions
from setfit_kd.utils.files import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.models.token_model import TokenTask


class QuestionAnswering:
    """Questions of a run that distils question answering, and its stages, see `run.task_run.Task`."""

    name: TokenTask = "question-answering"

    def __init__(self, config: QuestionRunConfig) -> None:
        labeled, self.held_out = read_questions(config.labeled, "train"), []
        pool = [] if config.unlabeled is None else read_questions(config.unlabeled, "train")
        if config.eval is not None:
            self.held_out = read_questions(config.eval, "test")
        for question in (*labeled, *self.held_out):
            gold_texts(question)  # raises if answers are missing
        self.labeled = without_leaks(labeled, self.held_out)
        self.pool = without_leaks(pool, [*self.held_out, *self.labeled])
        if not self.labeled:
            message = f"{config.labeled}: no questions are left to train on."
            raise DataError(message, hint="Pass other questions with --labeled.")
        self.sizes = {"labeled": len(self.labeled), "pool": len(self.pool), "evaluation": len(self.held_out)}
        self.sizes |= {"labeled_leaks": len(labeled) - len(self.labeled)}
        self.config = QuestionConfig.of(**{name: getattr(config, name) for name in QuestionConfig.model_fields})
        settings = QuestionConfig.fingerprint_inputs(self.config)
        self.key = fingerprint(settings, *(list(map(astuple, some)) for some in (self.labeled, self.pool)))
        held_out = list(map(astuple, self.held_out))
        self.evaluation_key = fingerprint(settings, held_out) if held_out else None

    def train_teacher(self, body: SentenceTransformer, checkpoints: Path | None) -> QuestionAnswerer:
        """Fine-tune a teacher that has no head for answers yet."""
        if body[0].has_head:
            return self._decide(QuestionAnswerer(body, self.config))
        options: Any = {"description": "Training teacher", "checkpoints": checkpoints}
        return self._decide(train_questions(body, self.labeled, config=self.config, **options))

    def train_student(
        self, body: SentenceTransformer, teacher: SentenceTransformer | None, description: str, checkpoints: Path | None
    ) -> QuestionAnswerer:
        """Train a student on the gold answers; with a teacher, also on the pool."""
        options: Any = {"teacher": teacher, "description": description, "checkpoints": checkpoints}
        pool = [] if teacher is None else self.pool
        return self._decide(train_questions(body, self.labeled, config=self.config, pool=pool, **options))

    def _decide(self, model: QuestionAnswerer) -> QuestionAnswerer:
        """Let a model give no answer if training questions have none."""
        if not all(question.answers for question in self.labeled):
            model.null_threshold = 0.0
        return model

    def evaluate(self, model: QuestionAnswerer) -> dict[str, float]:
        """Compute the metrics of `evaluate_answers`."""
        options: Any = {"config": self.config, "null_threshold": model.null_threshold}
        return evaluate_answers(model.model_body, self.held_out, **options)

    def save(self, model: QuestionAnswerer, folder: Path) -> None:
        """Save a model in the format of transformers."""
        save_answerer(model, folder)

    def load(self, folder: Path) -> QuestionAnswerer:
        """Load a model."""
        return load_answerer(folder)
