"""Open a question answering model or its bundle, which runs without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from setfit_kd.config.questions import QuestionConfig
from setfit_kd.inference.classifier import convert_bundle_errors, is_bundle
from setfit_kd.models.io import classifier_folder
from setfit_kd.qa.data import Question
from setfit_kd.qa.model import is_answerer
from setfit_kd.runtime.answer import QUESTION_ANSWERING, Answer, Answerer
from setfit_kd.runtime.classify import MANIFEST
from setfit_kd.utils.files import read_json


def answerer_folder(path: str | Path) -> Path | None:
    """Return the folder of a question answering model or bundle, or of such a student of a run; None for others."""
    folder = Path(path)
    with suppress(OSError, ValueError, AttributeError):  # the caller raises the errors of other models
        if is_bundle(folder):
            return folder if read_json(folder / MANIFEST).get("kind") == QUESTION_ANSWERING else None
        if folder.is_dir() and is_answerer(model := classifier_folder(folder)):
            return model
    return None


def open_answerer(
    folder: Path, settings: dict[str, Any], *, threads: int | None = None
) -> Callable[[Sequence[Question]], list[Answer]]:
    """Open a folder from `answerer_folder`; return a function that finds the answers to questions.

    ``settings`` override those of the model; of a bundle, only the batch size can be changed, and it runs on the CPU.

    Raises:
        SetFitKDError: If the model or bundle cannot be used, or a setting is unknown.
    """
    config = QuestionConfig.of(**settings)
    if is_bundle(folder):
        with convert_bundle_errors():
            answerer = Answerer(folder, threads=threads, batch_size=config.encode_batch_size or 8)

        @convert_bundle_errors()
        def answer(questions: Sequence[Question]) -> list[Answer]:
            return answerer.answer([(question.question, question.context) for question in questions])

        return answer
    import torch

    from setfit_kd.memory.backoff import move_model
    from setfit_kd.memory.devices import resolve_device
    from setfit_kd.qa.model import load_answerer
    from setfit_kd.qa.train import predict_answers

    if threads is not None:
        torch.set_num_threads(threads)
    model = load_answerer(folder)
    model.config = QuestionConfig.merged(model.config, settings)
    move_model(model.model_body, resolve_device(model.config.device), phase="Loading model")
    return partial(predict_answers, model)
