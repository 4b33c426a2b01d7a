"""A whole fine-tuning: from named texts to a measured model in a folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config import FinetuneConfig, FinetuneRunConfig
from setfit_kd.data import LabeledSet, check_classes, encode_labels, normalise, read, remove_leaks
from setfit_kd.errors import DataError, OutputError
from setfit_kd.evaluation import Evaluation, evaluate
from setfit_kd.finetune.steps import resolve_batch_size
from setfit_kd.finetune.train import finetune
from setfit_kd.memory import move_model, resolve_device
from setfit_kd.models import BodySource, content_hash, load_local, locate, model_errors, save_model
from setfit_kd.utils.atomic_io import LOCK, lock_folder, refuse_links, replace_folder, write_errors, write_text
from setfit_kd.utils.files import read_json
from setfit_kd.utils.hashing import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

METRICS, _FILES = "metrics.json", "files"
_LEAST_ROWS = 8
"""So many rows of tokens tell whether they are of another tokenizer."""
_TRAINING = re.compile(r"[0-9a-f]{32}")
"""How the folder of one training's checkpoints is called."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning made.

    Attributes:
        model: The classifier, on the device of the run.
        evaluation: How good it is on the evaluation texts; None without any.
        validation: How good it is on the validation texts, where there are no evaluation texts. The best weights were
            chosen on them, so that it is optimistic.
        looks: Step and figures of each look at the validation texts.
        leaks: How many ``labeled`` and ``validation`` texts were left out since a later set holds them, too.
        output_dir: Where the model is.
    """

    model: SetFitModel
    evaluation: Evaluation | None
    validation: Evaluation | None = None
    looks: list[dict[str, float]] = field(default_factory=list)
    leaks: dict[str, int] = field(default_factory=dict)
    output_dir: Path | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """Everything measured, as in ``metrics.json``."""
        measured = {
            name: found and {**found.as_dict(), **found.quality.scores}
            for name, found in (("evaluation", self.evaluation), ("validation", self.validation))
        }
        return {**measured, "leaks": self.leaks, "looks": self.looks}


def finetune_run(config: FinetuneRunConfig) -> FinetuneResult:
    """Fine-tune a transformer on named labels, measure it, and write it to a folder as transformers has it.

    A run that was stopped goes on from its last checkpoint, beside the folder, when it is started again.

    Raises:
        SetFitKDError: Something given cannot be used; nothing is left half-written.
    """
    _check_output(config.output_dir, overwrite=config.overwrite)  # what is refused is left without a lock
    with lock_folder(config.output_dir):
        return _finetune_run(config)


def _finetune_run(config: FinetuneRunConfig) -> FinetuneResult:
    output_dir = config.output_dir
    written = _check_output(output_dir, overwrite=config.overwrite)
    source = BodySource(locate(config.model), "transformer")
    decode = _Decoder(source.folder)
    columns: dict[str, Any] = {
        "text_column": config.text_column,
        "label_column": config.label_column,
        "decode": decode,
    }
    labeled = encode_labels(read(config.labeled, **columns))
    check_classes(labeled)
    names = labeled.label_names
    validation, held_out = (
        None if name is None else encode_labels(read(name, **columns, role=role), names)
        for name, role in ((config.validation, "validation"), (config.eval, "test"))
    )
    before = len(labeled), len(validation or ())
    labeled, validation = _apart(labeled, validation, held_out, config.metric)
    leaks = {"labeled": before[0] - len(labeled), "validation": before[1] - len(validation or ())}
    body = source.load(names, seed=config.seed)
    looks: list[dict[str, float]] = []
    checkpoints = _checkpoints(output_dir)
    refuse_links(checkpoints.parent, [checkpoints.name])
    model = finetune(
        labeled,
        body,
        validation=validation,
        config=config,
        checkpoints=checkpoints / _fingerprint(config, labeled, validation, body),
        looks=looks,
    )
    move_model(model.model_body, resolve_device(config.device), phase="Evaluating")
    evaluation, validated = (
        None if data is None else evaluate(model, data, encode_batch_size=config.encode_batch_size)
        for data in (held_out, None if held_out else validation)
    )
    result = FinetuneResult(model, evaluation, validated, looks, leaks, output_dir)
    told = {**result.metrics, "settings": config.model_dump(mode="json")}
    with replace_folder(output_dir, is_ours=written.__contains__) as folder:
        save_model(model, folder, title="Text classifier")
        told[_FILES] = sorted({METRICS, *(path.name for path in folder.iterdir())})
        written.update(told[_FILES])
        write_text(folder / METRICS, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    for training in checkpoints.glob("*"):
        if _TRAINING.fullmatch(training.name):
            shutil.rmtree(training, ignore_errors=True)
    with suppress(OSError):  # it holds something else, or never was there
        checkpoints.rmdir()
    return result


class _Decoder:
    """From token ids to the text that they came from, by the tokenizer in a folder, loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer: Any = None
        self._seen = self._strange = 0

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of one row.

        Raises:
            DataError: Most rows so far are not what this tokenizer makes of their text.
        """
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            with model_errors(self._folder):
                self._tokenizer = load_local(AutoTokenizer.from_pretrained, self._folder)
        tokenizer = self._tokenizer
        added = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        own = [token for token in ids if token not in added]
        text: str = tokenizer.decode(own)
        self._seen += 1
        self._strange += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != own
        if self._seen >= _LEAST_ROWS and self._strange > self._seen / 2:
            raise DataError(
                f"The tokens of most rows are not what the tokenizer in {self._folder} makes of their texts, such as "
                f"{text[:40]!r}.",
                hint="Give the texts themselves, or the model whose tokenizer was used.",
            )
        return text


def _apart(
    labeled: LabeledSet, validation: LabeledSet | None, held_out: LabeledSet | None, metric: str
) -> tuple[LabeledSet, LabeledSet | None]:
    """Training and validation texts without those that a later set holds, too."""
    evaluated = {normalise(text) for text in held_out.texts} if held_out else set()
    later = evaluated | {normalise(text) for text in validation.texts} if validation else evaluated
    labeled = remove_leaks(labeled, later, name="labeled", held_out_name="validation or evaluation")
    if validation is not None:
        validation = remove_leaks(validation, evaluated, name="validation", held_out_name="evaluation")
        if not (validation.counts[-1] if metric == "f1-binary" else len(validation)):
            raise DataError(
                f"{validation.origin}: no text is left that {metric} can be measured on.",
                hint="Name other validation texts by --validation.",
            )
    return labeled, validation


def _checkpoints(output_dir: Path) -> Path:
    output_dir = output_dir.absolute()
    return output_dir.with_name(f"{output_dir.name}.checkpoints")


def _fingerprint(
    config: FinetuneRunConfig, labeled: LabeledSet, validation: LabeledSet | None, body: SentenceTransformer
) -> str:
    """A name for all that decides what comes out of a training, the batches that are usual on the device among it."""
    sets = [[data.texts, data.labels.tolist()] for data in (labeled, validation) if data is not None]
    size = resolve_batch_size(resolve_device(config.device), config)
    return fingerprint(FinetuneConfig.fingerprinted(config), size, content_hash(body), sets)


def _check_output(folder: Path, *, overwrite: bool) -> set[str]:
    """Refuse a folder that cannot take a model, before any work is done; return the names that are replaced in it.

    Raises:
        OutputError: It holds anything, and is not to be replaced or was not written by a fine-tuning.
    """
    with write_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file, not a folder.", hint="Choose another --output-dir.")
        if not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir()):
            return {LOCK}
    try:
        metrics = read_json(folder / METRICS)
        if not {"looks", "settings"} <= metrics.keys():
            raise ValueError("it is not of a fine-tuning")
        written = {str(name) for name in metrics.get(_FILES, [METRICS])}
    except (OSError, ValueError, AttributeError, TypeError):
        raise OutputError(
            f"The folder {folder} holds something else than a model that was fine-tuned here.",
            hint="Choose another --output-dir.",
        ) from None
    if not overwrite:
        raise OutputError(f"The folder {folder} is not empty.", hint="Choose another --output-dir, or add --overwrite.")
    return {LOCK, *written}
