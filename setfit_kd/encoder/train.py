"""Train a sentence encoder on labeled sentence pairs, or distil a larger encoder."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.config.encoder import NLI_OBJECTIVES, EncoderConfig, parse_encoder_objective
from setfit_kd.data.sources import SentencePairs, Source, read_pairs, stream_texts
from setfit_kd.data.splits import normalize
from setfit_kd.errors import ConfigError, DataError
from setfit_kd.memory.backoff import move_model, shared_backoff
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import BodySource, locate_body
from setfit_kd.models.forward import ForwardPass
from setfit_kd.signals.embedding_cache import cached_embed
from setfit_kd.student.kinds import locate_student
from setfit_kd.training.precision import check_precision
from setfit_kd.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Training rows of an encoder.

    Attributes:
        texts: m distinct texts.
        columns: Numbers of the texts in each text column, (n,) each, or -1 for no text.
        labels: (n,) class of each pair, or number of each text; unused in ranking.
        objectives: Weight of each objective by name.
    """

    texts: list[str]
    columns: list[npt.NDArray[np.int64]]
    labels: npt.NDArray[np.int64]
    objectives: dict[str, float]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)


def train_encoder(
    model: str | Path | SentenceTransformer,
    *,
    nli: SentencePairs | Source | None = None,
    teacher: str | Path | SentenceTransformer | None = None,
    texts: Source | None = None,
    config: EncoderConfig | None = None,
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> SentenceTransformer:
    """Train a sentence encoder on labeled sentence pairs, or distil a larger encoder on unlabeled texts.

    Args:
        model: The model: a hub name or folder of sentence-transformers or transformers, as in `locate_student`
            ``layers:0,2,5@NAME``, ``static@NAME`` or ``blank:CONFIG``, or a loaded body, which is trained in place.
        nli: Sentence pairs labeled with entailment, contradiction and neutral: any source of `read`.
        teacher: The encoder to distil, instead of ``nli``; ``layers:0,2,5`` are then its layers.
        texts: The texts to distil the teacher on: any source of `read`.
        config: The settings; they can also be passed as keyword arguments, as in ``train_encoder(..., epochs=5)``.
        checkpoints: Folder for checkpoints. Training resumes from a checkpoint that is already in it, so use a separate
            folder for each training.

    Returns:
        A `sentence_transformers.SentenceTransformer`.

    Raises:
        ConfigError: Unless either ``nli`` or both ``teacher`` and ``texts`` are passed, with an objective for them.
        SetFitKDError: As `train_teacher`.
    """
    config = EncoderConfig.merged(config, settings)
    check_settings(config, nli=nli, teacher=teacher, texts=texts)
    rows = read_rows(config, nli=nli, texts=texts)
    device = resolve_device(config.device)
    with shared_backoff(cpu_fallback=config.cpu_fallback):
        body, teacher = load_models(model, teacher, rows.texts, config, device)
        train_on_rows(body, rows, teacher, config, device, checkpoints=checkpoints)
    return body


def train_on_rows(
    body: SentenceTransformer,
    rows: TrainingRows,
    teacher: SentenceTransformer | None,
    config: EncoderConfig,
    device: torch.device,
    *,
    checkpoints: str | Path | None,
) -> None:
    """Train a body in place on rows from `read_rows`, with the embeddings of the teacher, if any."""
    check_precision(config.precision, device)
    with quiet_libraries():
        from setfit_kd.encoder.trainer import create_trainer
        from setfit_kd.losses.ranking import distinct_batches
        from setfit_kd.training.loop import train

        embeddings = None
        if teacher is not None:
            move_model(teacher, device, phase="Embedding texts")
            options: dict[str, Any] = {"methods": ["fp32"], "normalize": False, "batch_size": config.encode_batch_size}
            forward = partial(ForwardPass, teacher)
            embeddings = cached_embed(forward, teacher, rows.texts, description="Embedding texts", **options)
            teacher.to("cpu")
        # In a ranking, a second row with the same text would have a false negative.
        keys = np.stack(rows.columns if "ranking" in rows.objectives else [np.arange(len(rows))], axis=1)
        batches = distinct_batches(keys, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
        train(
            body,
            partial(create_trainer, body, rows, batches, embeddings),
            config,
            device=device,
            texts=rows.texts,
            batch_texts=min(config.batch_size, len(rows)) * len(rows.columns),
            steps=len(batches),
            description="Training encoder",
            checkpoints=checkpoints,
        )


def check_settings(config: EncoderConfig, *, nli: object, teacher: object, texts: object) -> None:
    """Raise a `ConfigError` unless exactly one training is chosen, with an objective for it."""
    if (nli is None) == (teacher is None):
        number = "neither" if nli is None else "both"
        message = f"Expected either sentence pairs (--nli) or a teacher (--teacher), got {number}."
        raise ConfigError(message, hint="Pass --nli FILE, or --teacher MODEL with --texts FILE.")
    if (teacher is None) != (texts is None):
        message = f"Expected --teacher and --texts together, got only {'--texts' if teacher is None else '--teacher'}."
        raise ConfigError(message, hint="A teacher is distilled on unlabeled texts: pass both, or --nli alone.")
    if any((name in NLI_OBJECTIVES) != (teacher is None) for name in _objectives(config, teacher)):
        message = (
            f"The objective {config.objective} cannot be combined with {'--nli' if teacher is None else '--teacher'}."
        )
        raise ConfigError(message, hint="Use ranking or softmax with --nli, similarity or embedding with --teacher.")


def _objectives(config: EncoderConfig, teacher: object) -> dict[str, float]:
    return parse_encoder_objective(config.objective or ("ranking" if teacher is None else "similarity,embedding"))


def read_rows(config: EncoderConfig, *, nli: SentencePairs | Source | None, texts: Source | None) -> TrainingRows:
    """Read the training rows from sentence pairs or texts; a `DataError` if they cannot be used."""
    objectives = _objectives(config, texts)
    if nli is None:
        assert texts is not None
        distinct, _ = _number([*stream_texts(texts, text_column=config.text_column)])
        if len(distinct) < 2:
            raise DataError("Expected at least two different texts, got one.", hint="Add texts with --texts.")
        rows = np.arange(len(distinct))
        return TrainingRows(distinct, [rows], rows, objectives)
    if not isinstance(nli, SentencePairs):
        nli = read_pairs(nli, config.first_column, config.second_column, config.label_column)
    if "ranking" in objectives:
        return _ranking_rows(nli, config, objectives)
    names = sorted(set(nli.values))
    if len(names) < 2:
        raise DataError(f"{nli.origin}: all labels are {names[0]!r}.", hint="Use pairs with at least two labels.")
    distinct, numbers = _number(nli.first, nli.second)
    return TrainingRows(distinct, [*numbers], np.array([names.index(label) for label in nli.values]), objectives)


def _ranking_rows(pairs: SentencePairs, config: EncoderConfig, objectives: dict[str, float]) -> TrainingRows:
    """Return one row per entailed pair: anchor, positive and, if the anchor has one, a contradicting sentence."""
    labels = [label.casefold() for label in pairs.values]
    for label in filter(None, (config.entailment, config.contradiction)):
        if label.casefold() not in labels:
            present = ", ".join(repr(name) for name in sorted(set(pairs.values))[:10])
            message = f"{pairs.origin} has no pairs with the label {label!r}; it has {present}."
            raise DataError(message, hint="Name the labels with --entailment and --contradiction.")
    texts, numbers = _number(pairs.first, pairs.second)
    positives, negatives = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    kinds = {(config.contradiction or "contradiction").casefold(): negatives, config.entailment.casefold(): positives}
    for first, second, label in zip(*numbers.tolist(), labels, strict=True):
        if label in kinds and second not in kinds[label][first]:
            kinds[label][first].append(second)
    rows = []
    for anchor, entailed in positives.items():
        hard = [text for text in negatives[anchor] if text not in entailed] or [-1]
        rows += [(anchor, text, hard[index % len(hard)]) for index, text in enumerate(entailed)]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    n_hard = int((columns[2] >= 0).sum())
    logger.info("%s: %d entailed pairs, %d of them with a hard negative.", pairs.origin, len(rows), n_hard)
    return TrainingRows(texts, columns, np.zeros(len(rows), np.int64), objectives)


def _number(*columns: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the distinct texts, by `normalize`, of k columns of n texts; and the (k, n) numbers of the texts."""
    keys = [[normalize(text) for text in column] for column in columns]
    texts: dict[str, str] = {}
    for key, text in zip(chain(*keys), chain(*columns), strict=True):
        texts.setdefault(key, text)
    number = {key: index for index, key in enumerate(texts)}
    return list(texts.values()), np.array([[number[key] for key in column] for column in keys])


def load_models(
    model: str | Path | SentenceTransformer,
    teacher: str | Path | SentenceTransformer | None,
    texts: Sequence[str],
    config: EncoderConfig,
    device: torch.device,
) -> tuple[SentenceTransformer, SentenceTransformer | None]:
    """Load or create the untrained encoder, and load its teacher, if any, unless they are loaded."""
    import torch

    if isinstance(teacher, str | Path):
        teacher = _checked(locate_body(teacher), teacher).load()
    if not isinstance(model, str | Path):
        return model, teacher
    source = locate_student(str(model))
    if isinstance(source.model, BodySource):
        _checked(source.model, model)
    with torch.random.fork_rng(devices=[]):  # a masked language model lacks some weights of an encoder
        torch.manual_seed(config.seed)
        prepared = source.prepare(teacher, seed=config.seed)
    return prepared.create_body(teacher, texts, device), teacher


def _checked(source: BodySource, name: str | Path) -> BodySource:
    if source.family == "transformer":
        raise ConfigError(f"Expected a sentence encoder, got the classifier {name}.", hint="Remove transformer:.")
    return source
