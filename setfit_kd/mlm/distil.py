"""Distil a masked language model, in the stages of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.mlm import MlmConfig
from setfit_kd.config.task_runs import DISTILLATION_SETTINGS, MlmRunConfig, training_settings
from setfit_kd.mlm.run import read_texts
from setfit_kd.mlm.train import MaskedLanguageModel, evaluate_mlm, fit_mlm_head, pretrain_body
from setfit_kd.models.token_model import load_token_model, save_token_model
from setfit_kd.utils.files import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from setfit_kd.models.token_model import TokenTask


class MaskedLanguageModeling:
    """Texts of a run that distils a masked language model, and its stages, see `run.task_run.Task`."""

    name: TokenTask = "fill-mask"

    def __init__(self, config: MlmRunConfig) -> None:
        self.texts, self.held_out, leaks = read_texts(config.unlabeled, config.eval, config.text_column)
        self.sizes = {"pool": len(self.texts), "evaluation": len(self.held_out), "pool_leaks": leaks}
        self.config = config.part(MlmConfig)
        settings = training_settings(self.config)
        self.key = fingerprint({k: v for k, v in settings.items() if k not in DISTILLATION_SETTINGS}, self.texts)
        self.distillation_key = fingerprint({name: settings[name] for name in DISTILLATION_SETTINGS})
        self.evaluation_key = fingerprint(settings, self.held_out) if self.held_out else None

    def load_teacher(self, folder: Path) -> tuple[MaskedLanguageModel, str]:
        """Load a teacher; it has nothing beside its body, so that the fingerprint is empty."""
        return MaskedLanguageModel(load_token_model(folder, self.name, seed=self.config.seed)), ""

    def train_teacher(self, teacher: MaskedLanguageModel, checkpoints: Path | None) -> MaskedLanguageModel:
        """Train only the head of a teacher that has none."""
        if not teacher.model_body[0].has_head:
            fit_mlm_head(teacher.model_body, self.texts, config=self.config, checkpoints=checkpoints)
        return teacher

    def train_student(
        self, body: SentenceTransformer, teacher: SentenceTransformer | None, description: str, checkpoints: Path | None
    ) -> MaskedLanguageModel:
        """Train a student."""
        options: Any = {"teacher": teacher, "description": description, "checkpoints": checkpoints}
        return pretrain_body(body, self.texts, config=self.config, **options)

    def evaluate(self, model: MaskedLanguageModel) -> dict[str, float]:
        """Compute the metrics of `evaluate_mlm`."""
        return evaluate_mlm(model.model_body, self.held_out, config=self.config)

    def save(self, model: MaskedLanguageModel, folder: Path) -> None:
        """Save a model in the format of transformers."""
        save_token_model(model.model_body, folder)

    def load(self, folder: Path) -> MaskedLanguageModel:
        """Load a model."""
        return MaskedLanguageModel(load_token_model(folder, self.name))
