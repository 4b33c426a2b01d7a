"""Configs of extractive question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from setfit_kd.config.base import OutputConfig, StageConfig
from setfit_kd.config.values import Name, One

if TYPE_CHECKING:
    from typing_extensions import Self


class QuestionConfig(StageConfig):
    """Settings of training a transformer to answer questions, and of finding answers."""

    epochs: int = Field(3, ge=1)
    """Epochs over the windows of the training questions."""
    batch_size: int = Field(16, ge=1)
    """Windows per batch."""
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    """Peak learning rate."""
    dropout: bool = True
    """Use dropout."""
    max_length: int = Field(384, ge=16)
    """Maximum number of tokens of a window: a question and a part of its context. A longer context is split."""
    stride: int | None = Field(None, ge=0)
    """Number of context tokens that two consecutive windows of a question share (question answering). [default: 128,
    at most a third of the window]"""
    max_answer_tokens: int = Field(30, ge=1)
    """Maximum number of tokens of an answer (question answering)."""
    temperature: float = Field(2.0, ge=0.01, le=100, allow_inf_nan=False)
    """Temperature of the distillation loss; predictions use 1."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the gold answer in the distillation loss, for questions that have one."""

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride is not None and self.stride >= self.max_length:
            raise ValueError(f"stride: must be less than max_length, {self.max_length}, got {self.stride}")
        return self


class QuestionFinetuneConfig(QuestionConfig, OutputConfig):
    """All settings of fine-tuning a transformer to answer questions."""

    model: Name
    """Transformer: hub name, folder, or demo:all-MiniLM-L6-v2."""
    labeled: Name
    """Training questions: file (JSON in SQuAD format, JSONL, Parquet), datasets folder, or hub name."""
    validation: Name | None = None
    """Questions, some without an answer, on which the threshold for giving no answer is chosen."""
    eval: One | None = None
    """Evaluation questions."""
