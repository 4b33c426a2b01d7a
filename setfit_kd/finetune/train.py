"""Fine-tune a transformer on labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.stages import FinetuneConfig
from setfit_kd.config.values import parse_threshold_objective
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, read
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, family_of, locate_model
from setfit_kd.models.io import new_model
from setfit_kd.tasks.classification import SINGLE_LABEL, Task
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel


def finetune(
    labeled: LabeledSet | Source,
    model: str | Path | SentenceTransformer,
    *,
    validation: LabeledSet | Source | None = None,
    config: FinetuneConfig | None = None,
    description: str = "Fine-tuning",
    checkpoints: str | Path | None = None,
    history: list[dict[str, float]] | None = None,
    **settings: Any,
) -> SetFitModel:
    """Fine-tune a transformer end to end on labels.

    Args:
        labeled: Labeled texts: a `LabeledSet`, or any source of `read` with the columns ``text`` and ``label``.
        model: The transformer: a hub name, a folder, ``demo:all-MiniLM-L6-v2``, or a loaded body of the transformer
            family, which is changed in place.
        validation: Labeled texts to evaluate on during training; the weights with the best metric are restored. With
            several labels per text, the thresholds of the labels are fitted on them.
        config: The settings; they can also be passed as keyword arguments, as in ``finetune(..., epochs=5)``.
        description: Name of the phase in the progress bar and in messages.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.
        history: List that the evaluations on the validation texts are appended to, each with ``step``, ``accuracy`` and
            F1.

    Returns:
        A `setfit.SetFitModel` with the transformer up to its classification layer as the body, and this layer as the
        head. `save_model` writes it in the format of transformers.

    Raises:
        SetFitKDError: As `train_teacher`.
    """
    config = FinetuneConfig.merged(config, settings).with_family_defaults("transformer")
    if not isinstance(labeled, LabeledSet):
        labeled = encode_labels(read(labeled, label_column="label"))
    check_classes(labeled)
    if validation is not None and not isinstance(validation, LabeledSet):
        rows = read(validation, label_column="label", role="validation")
        validation = encode_labels(rows, labeled.label_names, labeled.task)
    if validation is not None and validation.label_names != labeled.label_names:
        message = f"{validation.origin} and {labeled.origin} have different classes."
        raise DataError(message, hint="Use the same classes in both.")
    check_settings(config, labeled, validation)
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if isinstance(model, str | Path):
        model = BodySource(locate_model(model), "transformer").load(labeled.label_names, seed=config.seed)
    if family_of(model) != "transformer":
        raise ModelError("A SetFit body has no classification layer to fine-tune.", hint="Use setfit_kd.train_teacher.")

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.finetune.trainer import FinetuneTrainer
        from setfit_kd.training.loop import train

        # A CPU fallback must not change the batch size.
        batch_size = resolve_batch_size(device, config)
        results = [] if history is None else history
        return train(
            model,
            partial(FinetuneTrainer, new_model(model, labeled.label_names, labeled.task), labeled, validation, results),
            config.model_copy(update={"batch_size": batch_size}),
            device=device,
            texts=labeled.texts,
            batch_texts=min(batch_size, len(labeled)),
            steps=finetune_steps(config, len(labeled), device),
            description=description,
            checkpoints=checkpoints,
        )


def check_settings(config: FinetuneConfig, labeled: LabeledSet, validation: LabeledSet | None) -> None:
    """Raise a `ConfigError` if the data lacks what a setting requires."""
    needs_validation = {"patience": config.patience, "schedule=plateau": config.schedule == "plateau"}
    needs_validation |= {"thresholds": parse_threshold_objective(config.thresholds)[0] in ("precision", "recall")}
    for name, is_set in needs_validation.items():
        if validation is None and is_set:
            raise ConfigError(f"The setting {name} requires validation texts.", hint="Pass --validation, or remove it.")
    if config.metric == "f1-binary" and (len(labeled.label_names) != 2 or labeled.task is not SINGLE_LABEL):
        unit = "" if labeled.task is SINGLE_LABEL else " independent labels"
        message = f"The metric f1-binary requires 2 classes, got {len(labeled.label_names)}{unit}."
        raise ConfigError(message, hint="Use --metric f1-macro.")
    if config.metric == "f1-micro" and labeled.task is SINGLE_LABEL:
        message = "The metric f1-micro is for several labels per text; with one label, it equals the accuracy."
        raise ConfigError(message, hint="Use --metric accuracy.")


def resolve_metric(config: FinetuneConfig, task: Task) -> str:
    """Return the metric in the settings, or the default for the task."""
    return config.metric or ("accuracy" if task is SINGLE_LABEL else "f1-macro")


def resolve_batch_size(device: torch.device, config: FinetuneConfig) -> int:
    """Return the batch size in the settings, or the default for the device."""
    return config.batch_size or (16 if device.type == "cpu" else 32)


def finetune_steps(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Return the maximum number of training steps on ``texts`` labeled texts."""
    return config.steps or config.epochs * steps_per_epoch(config, texts, device)


def steps_per_epoch(config: FinetuneConfig, texts: int, device: torch.device) -> int:
    """Return the number of training steps per epoch over ``texts`` texts."""
    return -(-texts // resolve_batch_size(device, config))
