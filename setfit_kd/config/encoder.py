"""Configs of training a sentence encoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from setfit_kd.config.base import OutputConfig, StageConfig
from setfit_kd.config.values import Columns, Name, parse_objectives

NLI_OBJECTIVES, DISTILLATION_OBJECTIVES = ("ranking", "softmax"), ("similarity", "embedding")


def parse_encoder_objective(text: str) -> dict[str, float]:
    """Parse ``ranking``, ``softmax``, or a weighted sum such as ``similarity,embedding=0.5``, see `parse_objectives`.

    Raises:
        ValueError: As `parse_objectives`, or if an objective on labeled pairs is combined with others or weighted.
    """
    weights = parse_objectives(text, (*NLI_OBJECTIVES, *DISTILLATION_OBJECTIVES))
    alone = next((name for name in NLI_OBJECTIVES if name in weights), None)
    if alone and weights != {alone: 1.0}:
        raise ValueError(f"{alone} cannot be combined with other objectives or have a weight")
    return weights


def _check_objective(text: str) -> str:
    parse_encoder_objective(text)
    return text


class EncoderConfig(StageConfig):
    """Settings of training a sentence encoder, on labeled sentence pairs or by distillation."""

    objective: Annotated[str, AfterValidator(_check_objective)] | None = None
    """With --nli: ranking, or softmax for a classifier of the pairs. With --teacher: similarity, embedding, or a
    weighted sum such as similarity,embedding=0.5. [default: ranking; similarity,embedding with --teacher]"""
    epochs: int = Field(3, ge=1)
    """Epochs over the pairs or texts."""
    batch_size: int = Field(32, ge=2)
    """Batch size. With ranking and similarity, each text is compared with all others of its batch."""
    learning_rate: float | None = Field(None, gt=0, lt=1)
    """Learning rate. [default: 1e-4; 3e-4 with --teacher; 1e-3 for a static body]"""
    entailment: Name = "entailment"
    """Label of the pairs whose second sentence follows from the first; case is ignored."""
    contradiction: Name | None = None
    """Label of the pairs whose sentences contradict each other. [default: contradiction, if there is such a label]"""
    first_column: Name = "premise"
    """Column of the first sentence in --nli and --sts."""
    second_column: Name = "hypothesis"
    """Column of the second sentence in --nli and --sts."""
    label_column: Name = "label"
    """Label column in --nli."""
    text_column: Columns = ("text",)
    """Text column in --texts. Several, separated by commas, are joined by a space."""
    score_column: Name = "score"
    """Column of the similarity score in --sts, on any scale."""


class EncoderRunConfig(EncoderConfig, OutputConfig):
    """All settings of training and evaluating a sentence encoder."""

    model: Name
    """Model to train: hub name, folder, layers:0,2,5@NAME, static@NAME or blank:CONFIG."""
    nli: Name | None = None
    """Train on sentence pairs labeled with entailment and contradiction: file (CSV, TSV, JSONL, Parquet), datasets
    folder, or hub name."""
    teacher: Name | None = None
    """Distil this sentence encoder: hub name, folder, or demo:all-MiniLM-L6-v2. Requires --texts."""
    texts: Name | None = None
    """Unlabeled texts to distil the teacher on: file (CSV, TSV, JSONL, Parquet, or text with one text per line),
    datasets folder, or hub name."""
    sts: Name | None = None
    """Sentence pairs with similarity scores to evaluate on: as for --nli; never used for training."""
