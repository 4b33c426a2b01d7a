"""Question answering models: find, save and load them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import model_errors
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ANSWERER_SUFFIX = "ForQuestionAnswering"  # of the architecture names of transformers that answer questions
SETTINGS_FILE, _FORMAT = "question_answering.json", 1
_SETTINGS = ("max_length", "stride", "max_answer_tokens")


@dataclass(eq=False)
class QuestionAnswerer:
    """A transformer that answers questions.

    Attributes:
        model_body: The transformer, see `TokenModel`.
        config: Settings of the windows and the answers.
        null_threshold: A question gets no answer if the score of no answer minus that of the best answer is above it;
            None for always an answer.
        loss_curve_: The loss of each training step.
    """

    model_body: SentenceTransformer
    config: QuestionConfig
    null_threshold: float | None = None
    loss_curve_: list[float] = field(default_factory=list)


def is_answerer(folder: Path) -> bool:
    """Return whether a folder holds a transformer that answers questions."""
    try:
        return any(str(name).endswith(ANSWERER_SUFFIX) for name in read_json(folder / "config.json")["architectures"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def save_answerer(model: QuestionAnswerer, folder: str | Path) -> None:
    """Save a model atomically, as a folder of transformers' ``AutoModelForQuestionAnswering`` with the settings.

    Raises:
        OutputError: If the folder already exists or cannot be written.
    """
    settings = {"format": _FORMAT, "null_threshold": model.null_threshold}
    settings |= {name: getattr(model.config, name) for name in _SETTINGS}
    with atomic_folder(folder) as part, quiet_libraries(with_setfit=False):
        model.model_body[0].save(str(part))  # type: ignore[operator]
        (part / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_answerer(folder: str | Path) -> QuestionAnswerer:
    """Load a model on the CPU; a `ModelError` if the folder holds no such model, or a newer format."""
    from setfit_kd.models.token_model import load_token_model

    path = Path(folder, SETTINGS_FILE)
    with model_errors(Path(folder)):
        saved = read_json(path) if path.is_file() else {}
        if saved.get("format", _FORMAT) > _FORMAT:
            message = f"{path} has format {saved['format']}, but this version reads formats up to {_FORMAT}."
            raise ModelError(message, hint="Upgrade setfit-kd.")
        threshold = saved.get("null_threshold")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"null_threshold must be finite, got {threshold}")
        config = QuestionConfig.of(**{name: saved[name] for name in _SETTINGS if name in saved})
        body = load_token_model(Path(folder), "question-answering")
        if not body[0].has_head:
            message = f"The model in {folder} cannot answer questions: its head is not trained."
            raise ModelError(message, hint="Fine-tune it with setfit-kd finetune --task qa.")
        return QuestionAnswerer(body, config, threshold)
