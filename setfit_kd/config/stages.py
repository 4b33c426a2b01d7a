"""Configs of the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from setfit_kd.config.base import StageConfig
from setfit_kd.config.values import Columns, Name, Names, Objectives, check_unique

if TYPE_CHECKING:
    from typing_extensions import Self


class ColumnsConfig(StageConfig):
    """Columns of texts and labels."""

    text_column: Columns = ("text",)
    """Text column. Several, separated by commas, are joined by a space."""
    pair_column: Columns | None = None
    """Column of the second text, to classify pairs of texts; requires transformers, as in transformer:NAME."""
    label_column: Name = "label"
    """Label column. If it holds lists (in JSONL and Parquet), each text has any number of labels (multi-label)."""
    label_separator: str | None = Field(None, min_length=1)
    """Separator of several labels in the label column, such as "|" (multi-label)."""
    label_columns: Annotated[Columns, AfterValidator(check_unique)] | None = None
    """Columns of 0 and 1, one per label, separated by commas (multi-label); used instead of the label column."""

    @model_validator(mode="after")
    def _check_label_columns(self) -> Self:
        if self.label_columns is not None and self.label_separator is not None:
            raise ValueError("label_columns: cannot be combined with label_separator")
        return self

    @property
    def columns(self) -> dict[str, Any]:
        """Keyword arguments of `read` that name the columns."""
        names = ColumnsConfig.model_fields.keys() - StageConfig.model_fields.keys()
        return {name: getattr(self, name) for name in names}


class DataConfig(ColumnsConfig):
    """Sources of the texts, and how they are sampled."""

    labeled: Name | None = None
    """Labeled texts: file (CSV, TSV, JSONL, Parquet), datasets folder, or hub name."""
    unlabeled: Name | None = None
    """Unlabeled texts: file (CSV, TSV, JSONL, Parquet, or text with one text per line), datasets folder, or hub
    name."""
    eval: Names | None = None
    """Evaluation texts with labels; never used for training. Repeat the option to evaluate on several sets; the first
    is the main one."""
    shots: int | None = Field(None, ge=2)
    """Labels per class, drawn at random. [default: all]"""
    pool_size: int | None = Field(None, ge=2)
    """Number of pool texts, drawn at random. [default: all]"""
    signals: Name | None = None
    """File, folder or pattern of files of texts with label probabilities, from any source, that replaces teacher and
    pool (JSONL, Parquet, CSV or TSV, as written by predict)."""


class TeacherConfig(StageConfig):
    """Settings of teacher training."""

    teacher_objective: Literal["in-batch", "pairs"] = "in-batch"
    """Teacher objective: a contrastive loss over whole batches, or SetFit's own pairs."""
    teacher_steps: int | None = Field(None, ge=1)
    """Training steps of an in-batch or transformer teacher. [default: 2 epochs, at least 20 steps, or 80 with several
    labels per text; for a transformer 3 epochs, at least 150 steps]"""
    teacher_batch_size: int | None = Field(None, ge=4)
    """Teacher batch size; in-batch batches are balanced by class. [default: 64; for a transformer 16, or 32 on an
    accelerator]"""
    teacher_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Teacher learning rate. [default: 6e-5; 1e-3 for a static body, 5e-5 for a transformer]"""
    teacher_dropout: bool | None = None
    """Use dropout when training the teacher. [default: off; on for a transformer]"""


class AugmentConfig(StageConfig):
    """Settings of augmentation: further pool texts created from existing ones."""

    augment: int | None = Field(None, ge=0)
    """Number of augmented texts, created from pool and labeled texts and labeled by the teacher. [default: enough
    for 1,000 texts together with these, but at most seven per text]"""
    augment_model: Name | None = None
    """Masked language model that replaces words in some augmented texts. [default: none]"""
    augment_confidence: float = Field(0.6, ge=0, le=1)
    """Minimum teacher confidence to keep an augmented text."""


class SignalsConfig(StageConfig):
    """Settings of scoring the pool."""

    refine: Literal["none", "frequencies", "self-training"] | None = None
    """How to refine the teacher's head on the pool before scoring the pool: by self-training or, with several labels
    per text, by adapting it to the frequencies of the labels. [default: frequencies with several labels per text;
    self-training otherwise]"""
    calibrate: bool | None = None
    """Calibrate the teacher by cross-fitting: predict each third of the labeled texts by a teacher trained on the
    others. Without --eval, the accuracy is then estimated. [default: on; off for a transformer, as it is slow]"""
    cache: bool = True
    """Cache the teacher's embeddings on disk, and reuse them if nothing has changed."""


class StudentConfig(StageConfig):
    """Settings of student training."""

    objective: Objectives | None = None
    """Student objective: similarity, embedding, soft-labels, a weighted sum such as similarity,soft-labels=0.5, or
    pairs. [default: similarity,soft-labels=3; soft-labels for a transformer or if the signals have no embeddings]"""
    epochs: int = Field(3, ge=1)
    """Epochs over the pool."""
    batch_size: int = Field(32, ge=4)
    """Student batch size."""
    learning_rate: float | None = Field(None, gt=0, lt=1)
    """Student learning rate. [default: 3e-4; 1e-3 for a static body, 2e-5 for a transformer]"""
    dropout: bool | None = None
    """Use dropout when training the student. [default: off; on for a transformer]"""
    freeze_embeddings: bool | None = None
    """Freeze the student's word embeddings. [default: on; off for a transformer]"""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many consecutive evaluation steps without higher agreement with the teacher on held-out
    pool texts. There is at least one evaluation step per epoch. [default: off]"""
    temperature: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    """Temperature of the soft-labels loss; predictions use 1. [default: 1; 5 for a transformer]"""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the gold label in the soft-labels loss, for texts that have one."""
    gold_weight: float = Field(3.0, ge=0, allow_inf_nan=False)
    """Weight of texts with gold labels when fitting the student's head; pool texts have weight 1."""


class FinetuneConfig(StageConfig):
    """Settings of fine-tuning a transformer end to end on labels."""

    epochs: int = Field(3, ge=1)
    """Epochs over the training texts."""
    steps: int | None = Field(None, ge=1)
    """Training steps, instead of epochs."""
    batch_size: int | None = Field(None, ge=1)
    """Batch size. [default: 16; 32 on an accelerator]"""
    learning_rate: float | None = Field(None, gt=0, lt=1)
    """Peak learning rate. [default: 2e-5]"""
    dropout: bool | None = None
    """Use dropout. [default: on]"""
    schedule: Literal["linear", "cosine", "constant", "plateau"] = "linear"  # type: ignore[assignment]
    """Learning rate schedule after warmup. plateau halves the learning rate after each evaluation step without
    improvement."""
    eval_steps: int | None = Field(None, ge=1)
    """Training steps between two evaluation steps. [default: one epoch]"""
    metric: Literal["accuracy", "f1-macro", "f1-micro", "f1-weighted", "f1-binary"] | None = None
    """Metric on the validation texts that selects the best checkpoint. [default: accuracy; f1-macro with several labels
    per text]"""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many evaluation steps without improvement. [default: off]"""
