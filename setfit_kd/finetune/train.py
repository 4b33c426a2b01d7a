"""From labels to a fine-tuned transformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config import FinetuneConfig
from setfit_kd.data import LabeledSet, Source, check_classes, encode_labels, read
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.finetune.steps import finetune_steps, resolve_batch_size
from setfit_kd.memory import resolve_device, shared_backoff
from setfit_kd.models import BodySource, family_of, locate, new_model
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
    looks: list[dict[str, float]] | None = None,
    **settings: Any,
) -> SetFitModel:
    """Fine-tune a transformer end to end on labels.

    Args:
        labeled: The labels: a `LabeledSet`, or anything that `read` takes, with the columns ``text`` and ``label``.
        model: The transformer: a hub name, a folder, ``demo:all-MiniLM-L6-v2``, or a loaded body of the transformer
            family, which is changed in place.
        validation: Labeled texts that are looked at from time to time: the weights that are best on them are kept.
        config: The settings; any of them may also be given by keyword, as in ``finetune(..., epochs=5)``.
        description: What to call the step on the progress bar.
        checkpoints: Folder in which the training's state is kept from time to time. A training that finds the state of
            an earlier one there goes on from it: give a folder to one training alone.
        looks: A list that the looks at the validation texts are added to, each with its ``step``, ``accuracy`` and F1.

    Returns:
        A `setfit.SetFitModel` whose body is the transformer up to its last layer, and whose head is that layer.
        `save_model` writes it as transformers has it.

    Raises:
        ConfigError: A setting is unknown or out of range.
        DataError: The labels cannot be used.
        ModelError: The model does not load.
        OutOfMemoryError: Not even one text at once fits, on the CPU neither.
        TrainingError: The loss or the weights are no longer finite.
        UnavailableError: The hub cannot be reached.
    """
    config = FinetuneConfig.merged(config, settings).with_family_defaults("transformer")
    if not isinstance(labeled, LabeledSet):
        labeled = encode_labels(read(labeled, label_column="label"))
    check_classes(labeled)
    if validation is not None and not isinstance(validation, LabeledSet):
        validation = encode_labels(read(validation, label_column="label", role="validation"), labeled.label_names)
    if validation is not None and validation.label_names != labeled.label_names:
        raise DataError(
            f"{validation.origin} is over other classes than {labeled.origin}.", hint="Give both the same classes."
        )
    if validation is None and (config.patience is not None or config.schedule == "plateau"):
        raise ConfigError(
            "Without validation texts, nobody sees whether it gets better.",
            hint="Name them by --validation, or drop --patience and --schedule plateau.",
        )
    if config.metric == "f1-binary" and len(labeled.label_names) != 2:
        raise ConfigError(
            f"There are {len(labeled.label_names)} classes, binary F1 is of two.", hint="Take --metric f1-macro."
        )
    device = resolve_device(config.device)
    check_precision(config.precision, device)
    if isinstance(model, str | Path):
        body = BodySource(locate(model), "transformer").load(labeled.label_names, seed=config.seed)
    else:
        body = model
    if family_of(body) != "transformer":
        raise ModelError("A SetFit body has no last layer to be fine-tuned with.", hint="Take setfit_kd.train_teacher.")

    with quiet_libraries(), shared_backoff(cpu_fallback=config.cpu_fallback):
        from setfit_kd.finetune.trainer import FinetuneTrainer
        from setfit_kd.training.loop import train

        trainer: FinetuneTrainer | None = None

        def make(settled: FinetuneConfig, device: torch.device, scratch: str) -> FinetuneTrainer:
            nonlocal trainer
            trainer = FinetuneTrainer(
                new_model(body, labeled.label_names), labeled, validation, settled, device, scratch
            )
            return trainer

        trained = train(
            body,
            make,
            # A change of device on the way must not change the batches.
            config.model_copy(update={"batch_size": resolve_batch_size(device, config)}),
            device=device,
            texts=labeled.texts,
            batch_texts=min(resolve_batch_size(device, config), len(labeled)),
            steps=finetune_steps(config, len(labeled), device),
            description=description,
            checkpoints=checkpoints,
        )
        if looks is not None and trainer is not None and trainer.looks is not None:
            looks.extend(trainer.looks.scores)
        return trained
