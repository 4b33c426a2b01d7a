"""Configs of masked language modeling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from setfit_kd.config.base import OutputConfig, StageConfig
from setfit_kd.config.values import Columns, Name

if TYPE_CHECKING:
    from typing_extensions import Self


class MlmConfig(StageConfig):
    """Settings of training a masked language model."""

    epochs: int = Field(3, ge=1)
    """Epochs over the training texts. Other tokens are masked in each."""
    steps: int | None = Field(None, ge=1)
    """Training steps, instead of epochs."""
    head_steps: int = Field(100, ge=1)
    """Training steps of the head alone, if the model has none."""
    batch_size: int = Field(16, ge=1)
    """Batch size, in blocks of --max-length tokens."""
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    """Peak learning rate."""
    dropout: bool = True
    """Use dropout."""
    max_length: int = Field(128, ge=8)
    """Maximum number of tokens of a block."""
    pack: bool = True
    """Join the texts and cut them into blocks of the maximum length. If off, each text is a block of its own, and
    longer texts are truncated."""
    mask_probability: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens to predict. Of these, 80% are masked and 10% are replaced by random tokens."""
    whole_words: bool = False
    """Mask all tokens of a word together."""
    temperature: float = Field(2.0, ge=0.01, le=100, allow_inf_nan=False)
    """Temperature of the distillation loss."""
    alpha: float = Field(0.1, ge=0, le=1)
    """Weight of the masked tokens themselves; the teacher's distribution of these tokens has the remaining weight."""
    cosine_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the cosine loss between the last hidden states of teacher and student, if their dimensions agree."""


class PretrainConfig(MlmConfig, OutputConfig):
    """All settings of `setfit-kd pretrain`."""

    model: Name
    """Transformer: hub name, folder, demo:all-MiniLM-L6-v2, or blank:CONFIG for an untrained one; with a teacher also
    layers:0,2,4 or layers:3."""
    texts: Name
    """Training texts: file (CSV, TSV, JSONL, Parquet, or text with one text per line), datasets folder, or hub name."""
    text_column: Columns = ("text",)
    """Text column. Several, separated by commas, are joined by a space."""
    eval: Name | None = None
    """Evaluation texts: as for --texts. A source with splits uses test. They are removed from the training texts."""
    add_vocab: int | None = Field(None, ge=1)
    """Number of words to add to the vocabulary: frequent words of the training texts that have several tokens."""
    vocab_file: Name | None = None
    """Text file of words to add to the vocabulary, one per line."""
    teacher: Name | None = None
    """Masked language model to distil the model from: hub name or folder. It must have the same vocabulary."""

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        given = [name for name in ("add_vocab", "vocab_file", "teacher") if getattr(self, name) is not None]
        if len(given) > 1:
            reason = "the student has the teacher's vocabulary" if "teacher" in given else "choose one"
            raise ValueError(f"{given[0]}: cannot be combined with {given[1]}; {reason}")
        return self
