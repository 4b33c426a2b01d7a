"""Run of `setfit-kd finetune`: read the data, fine-tune, evaluate and write the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.run import FinetuneRunConfig
from setfit_kd.config.stages import FinetuneConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, evaluation_sources, read
from setfit_kd.data.splits import normalize, remove_leaks
from setfit_kd.errors import DataError
from setfit_kd.evaluation.measure import Evaluation, evaluate
from setfit_kd.finetune.train import check_settings, finetune, resolve_batch_size, resolve_metric
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, content_hash, load_local, locate_model, model_errors
from setfit_kd.models.io import save_model
from setfit_kd.utils.files import fingerprint
from setfit_kd.utils.output_folder import OutputFolder, open_output_folder

if TYPE_CHECKING:
    from setfit import SetFitModel

_HISTORY = "validation_history"  # key in ``metrics.json``
_MIN_ROWS = 8  # minimum number of tokenized rows to decide whether another tokenizer was used


@dataclass(frozen=True)
class FinetuneResult:
    """Classifier on the device of the run, and its metrics; ``evaluations`` are by the name of the evaluation set.

    ``validation``, only without an evaluation set, is optimistic: the best weights were selected on the same texts.
    """

    model: SetFitModel
    evaluations: dict[str, Evaluation]
    validation: Evaluation | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # step and metrics of each validation in training
    leaks: dict[str, int] = field(default_factory=dict)  # number of texts removed because a later set contains them
    output_dir: Path | None = None

    @property
    def evaluation(self) -> Evaluation | None:
        """Evaluation on the main evaluation set, if any."""
        return next(iter(self.evaluations.values()), None)

    @property
    def metrics(self) -> dict[str, Any]:
        """All metrics, as in ``metrics.json``."""
        more = {name: _metrics(evaluation) for name, evaluation in self.evaluations.items()}
        main, validation = more.pop(next(iter(more), ""), None), self.validation and _metrics(self.validation)
        metrics = {"evaluation": main, "validation": validation, **({"more_evaluations": more} if more else {})}
        return {**metrics, "leaks": self.leaks, _HISTORY: self.history}


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.as_dict(), **evaluation.quality.scores}


def finetune_run(config: FinetuneRunConfig) -> FinetuneResult:
    """Fine-tune a transformer on labeled texts, evaluate it, and write it to a folder in the format of transformers.

    An interrupted run that is started again resumes from its last checkpoint, in a folder next to the output folder.

    Raises:
        SetFitKDError: If an input or a setting cannot be used; no partial files are left behind.
    """
    options: Any = {"overwrite": config.overwrite, "command": "finetune", "keys": {_HISTORY}}
    with (
        open_output_folder(config.output_dir, **options) as output,
        shared_backoff(cpu_fallback=config.cpu_fallback),
    ):
        return _finetune_run(config, output)


def _finetune_run(config: FinetuneRunConfig, output: OutputFolder) -> FinetuneResult:
    # The data is checked first, which takes no time compared with loading torch and a model.
    locate = cache(partial(locate_model, config.model))
    columns = {**config.columns, "decode": _Decoder(locate)}
    labeled = encode_labels(read(config.labeled, **columns))
    check_classes(labeled)
    names = labeled.label_names

    def load(source: Source, role: str) -> LabeledSet:
        return encode_labels(read(source, **columns, role=role), names, labeled.task)

    validation = None if config.validation is None else load(config.validation, "validation")
    held_out = {name: load(source, "test") for name, source in evaluation_sources(config.eval).items()}
    check_settings(config, labeled, validation)
    n_labeled, n_validation = len(labeled), len(validation or ())
    seen = {normalize(text) for text in validation.texts} if validation else set()
    test = {normalize(text) for data in held_out.values() for text in data.texts}
    labeled = remove_leaks(labeled, seen | test, name="labeled", held_out_name="validation or evaluation")
    if validation is not None:
        validation = remove_leaks(validation, test, name="validation", held_out_name="evaluation")
        if not (validation.counts[-1] if config.metric == "f1-binary" else len(validation)):
            metric = resolve_metric(config, validation.task)
            message = f"{validation.origin}: no texts are left to compute {metric} on."
            raise DataError(message, hint="Pass other validation texts with --validation.")
    leaks = {"labeled": n_labeled - len(labeled), "validation": n_validation - len(validation or ())}
    device = resolve_device(config.device)
    body = BodySource(locate(), "transformer").load(names, seed=config.seed)
    sets = [[data.texts, data.labels.tolist()] for data in (labeled, validation) if data is not None]
    batch_size = resolve_batch_size(device, config)  # its default depends on the device
    training = fingerprint(FinetuneConfig.fingerprint_inputs(config), batch_size, content_hash(body), sets)
    history: list[dict[str, float]] = []
    options: dict[str, Any] = {"config": config, "checkpoints": output.checkpoints / training, "history": history}
    model = finetune(labeled, body, validation=validation, **options)
    move_model(model.model_body, device, phase="Evaluating")
    measure = partial(evaluate, model, encode_batch_size=config.encode_batch_size, exact=config.exact)
    evaluations = {name: measure(data, description=f"Evaluating on {name}") for name, data in held_out.items()}
    validation_evaluation = None if held_out or validation is None else measure(validation)
    result = FinetuneResult(model, evaluations, validation_evaluation, history, leaks, output.path)
    content = {**result.metrics, "settings": config.model_dump(mode="json")}
    output.write(partial(save_model, model, title="Text classifier"), content)
    return result


class _Decoder:
    """Decode token ids to text with the tokenizer of a model, which is located and loaded on the first call."""

    def __init__(self, locate: Callable[[], Path]) -> None:
        self._locate = locate
        self._n_rows = self._n_mismatched = 0

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with model_errors(self._locate()):
            return load_local(AutoTokenizer.from_pretrained, self._locate())

    def __call__(self, ids: Sequence[int]) -> str:
        """Return the text of one row; a `DataError` if most rows so far are from another tokenizer."""
        tokenizer = self._tokenizer
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        tokens = [token for token in ids if token not in special]
        text: str = tokenizer.decode(tokens)
        self._n_rows += 1
        self._n_mismatched += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != tokens
        if self._n_rows >= _MIN_ROWS and self._n_mismatched > self._n_rows / 2:
            example = f"for example those of {text[:40]!r}"
            message = f"The tokens of most rows do not match the tokenizer in {self._locate()}, {example}."
            raise DataError(message, hint="Pass the texts themselves, or the model whose tokenizer was used.")
        return text
