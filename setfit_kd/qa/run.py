"""Run of `setfit-kd finetune --task qa`: read the questions, fine-tune, evaluate and write the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

from setfit_kd.config.questions import QuestionConfig, QuestionFinetuneConfig
from setfit_kd.data.splits import normalize
from setfit_kd.errors import DataError
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import content_hash, locate_model
from setfit_kd.qa.data import Question, read_questions
from setfit_kd.qa.metrics import gold_texts
from setfit_kd.qa.model import save_answerer
from setfit_kd.utils.files import fingerprint
from setfit_kd.utils.output_folder import Trained, open_output_folder

logger = logging.getLogger(__name__)
_THRESHOLD = "null_threshold"  # key by which ``metrics.json`` is recognized


def finetune_questions(config: QuestionFinetuneConfig) -> Trained:
    """Fine-tune a transformer to answer questions, evaluate it, and write it to a folder in the format of transformers.

    If training questions have no answer, a question gets no answer if its score is higher than that of the best answer.
    On validation questions, some of them without an answer, the threshold of the difference is chosen for the best F1.
    An interrupted run that is started again resumes from its last checkpoint, in a folder next to the output folder.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.
    """
    options: Any = {"overwrite": config.overwrite, "command": "finetune", "keys": {_THRESHOLD}}
    with open_output_folder(config.output_dir, **options) as output, shared_backoff(cpu_fallback=config.cpu_fallback):
        sets, leaks = read_sets(config.labeled, None, config.validation, config.eval)

        # Imported after the data has been checked, because loading torch takes time.
        from setfit_kd.models.token_model import load_token_model
        from setfit_kd.qa.train import choose_threshold, evaluate_answers, train_questions

        device = resolve_device(config.device)
        body = load_token_model(locate_model(config.model), "question-answering", seed=config.seed)
        settings = config.part(QuestionConfig)
        inputs = QuestionConfig.fingerprint_inputs(settings), content_hash(body), list(map(astuple, sets["labeled"]))
        checkpoints = output.checkpoints / fingerprint(*inputs)
        model = train_questions(body, sets["labeled"], config=settings, checkpoints=checkpoints)
        move_model(body, device, phase="Evaluating")
        choose_threshold(model, sets["labeled"], sets["validation"])
        evaluation = evaluate_answers(model, sets["evaluation"]) if sets["evaluation"] else None
        metrics = {"evaluation": evaluation, _THRESHOLD: model.null_threshold, "leaks": leaks}
        output.write(partial(save_answerer, model), {**metrics, "settings": config.model_dump(mode="json")})
        return Trained(model, metrics)


def read_sets(
    labeled: str, pool: str | None, validation: str | None, evaluation: str | None
) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """Read the questions of each set, and remove those of later sets; return them with the numbers of removed ones.

    Raises:
        DataError: If answers are missing, or no labeled questions are left.
    """
    sources = {"labeled": (labeled, "train"), "pool": (pool, "train")}
    sources |= {"validation": (validation, "validation"), "evaluation": (evaluation, "test")}
    sets = {name: read_questions(source, role) if source else [] for name, (source, role) in sources.items()}
    for name in ("labeled", "validation", "evaluation"):
        list(map(gold_texts, sets[name]))  # raises if answers are missing
    leaks = {}
    held_out = ["validation", "evaluation"]
    for name, later in (("validation", held_out[1:]), ("labeled", held_out), *[("pool", held_out)] * bool(pool)):
        kept = _without(sets[name], [question for other in later for question in sets[other]])
        sets[name], leaks[name] = kept, len(sets[name]) - len(kept)
        if leaks[name]:
            message = "Leak guard: removed %d %s questions that are also in the %s set."
            logger.warning(message, leaks[name], name, " or ".join(later))
    if not sets["labeled"]:
        raise DataError(f"{labeled}: no questions are left to train on.", hint="Pass other questions with --labeled.")
    sets["pool"] = _without(sets["pool"], sets["labeled"])
    return sets, leaks


def _without(questions: Sequence[Question], others: Sequence[Question]) -> list[Question]:
    """Return the questions that are not asked about the same context in another set, after `normalize`."""
    keys = {(normalize(question.question), normalize(question.context)) for question in others}
    return [q for q in questions if (normalize(q.question), normalize(q.context)) not in keys]
