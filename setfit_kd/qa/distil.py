"""Distil question answering, in the stages of a run."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.config.task_runs import DISTILLATION_SETTINGS, QuestionRunConfig, training_settings
from setfit_kd.models.token_model import load_token_model
from setfit_kd.qa.model import QuestionAnswerer, is_answerer, load_answerer, save_answerer
from setfit_kd.qa.run import read_sets
from setfit_kd.qa.train import choose_threshold, evaluate_answers, train_questions
from setfit_kd.utils.files import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.models.token_model import TokenTask


class QuestionAnswering:
    """Questions of a run that distils question answering, and its stages, see `run.task_run.Task`."""

    name: TokenTask = "question-answering"
    save, load = staticmethod(save_answerer), staticmethod(load_answerer)

    def __init__(self, config: QuestionRunConfig) -> None:
        self.sets, leaks = read_sets(config.labeled, config.unlabeled, config.validation, config.eval)
        self.sizes = {name: len(questions) for name, questions in self.sets.items()}
        self.sizes |= {f"{name}_leaks": number for name, number in leaks.items()}
        self.config = config.part(QuestionConfig)
        settings, data = training_settings(self.config), {k: list(map(astuple, v)) for k, v in self.sets.items()}
        alone = {name: value for name, value in settings.items() if name not in DISTILLATION_SETTINGS}
        self.key = fingerprint(alone, data["labeled"], data["validation"])
        self.distillation_key = fingerprint(settings, data["pool"])
        self.evaluation_key = fingerprint(settings, data["evaluation"]) if data["evaluation"] else None

    def load_teacher(self, folder: Path) -> tuple[QuestionAnswerer, str]:
        """Load a teacher, with its settings if it answers questions, and return it with a fingerprint of these."""
        if is_answerer(folder):
            teacher = load_answerer(folder)
            return teacher, fingerprint(teacher.config.model_dump(mode="json"), teacher.null_threshold)
        body = load_token_model(folder, self.name, seed=self.config.seed)
        return QuestionAnswerer(body, self.config), ""

    def train_teacher(self, teacher: QuestionAnswerer, checkpoints: Path | None) -> QuestionAnswerer:
        """Fine-tune a teacher that does not answer questions yet."""
        if teacher.model_body[0].has_head:
            return teacher
        return self._train(teacher.model_body, "Training teacher", checkpoints)

    def train_student(
        self, body: SentenceTransformer, teacher: SentenceTransformer | None, description: str, checkpoints: Path | None
    ) -> QuestionAnswerer:
        """Train a student on the gold answers; with a teacher, also on the pool."""
        pool = [] if teacher is None else self.sets["pool"]
        return self._train(body, description, checkpoints, teacher=teacher, pool=pool)

    def _train(
        self, body: SentenceTransformer, description: str, checkpoints: Path | None, **options: Any
    ) -> QuestionAnswerer:
        """Train a model, and choose its threshold for giving no answer."""
        options |= {"config": self.config, "description": description, "checkpoints": checkpoints}
        model = train_questions(body, self.sets["labeled"], **options)
        choose_threshold(model, self.sets["labeled"], self.sets["validation"])
        return model

    def evaluate(self, model: QuestionAnswerer) -> dict[str, Any]:
        """Compute the metrics of `evaluate_answers`."""
        return evaluate_answers(model, self.sets["evaluation"])
