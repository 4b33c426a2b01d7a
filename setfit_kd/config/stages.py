"""The settings of each stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from setfit_kd.config.base import StageConfig
from setfit_kd.config.values import Columns, Name, Objectives


class DataConfig(StageConfig):
    """Where the texts come from and how they are sampled."""

    labeled: Name | None = Field(
        None, description="Labeled texts: file (CSV, TSV, JSONL, Parquet), datasets folder, or hub name."
    )
    unlabeled: Name | None = Field(None, description="Unlabeled pool: the same kinds, or a text file, a text a line.")
    eval: Name | None = Field(None, description="Labeled texts to evaluate on; never trained on.")
    text_column: Columns = Field(("text",), description="Text column; several, comma-separated, are joined by a space.")
    label_column: Name = Field("label", description="Label column.")
    shots: int | None = Field(None, ge=2, description="Labels drawn for each class [all].")
    pool_size: int | None = Field(None, ge=2, description="Pool texts drawn [all].")
    signals: Name | None = Field(
        None,
        description="File of texts with their label probabilities, from any source, in the place of teacher and pool "
        "(JSONL, Parquet, CSV or TSV, as predict writes them).",
    )


class TeacherConfig(StageConfig):
    """How the teacher is fine-tuned on the few labels."""

    teacher_objective: Literal["in-batch", "pairs"] = Field(
        "in-batch", description="Teacher's objective: contrastive over whole batches, or SetFit's own pairs."
    )
    teacher_steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the in-batch teacher [20, or two passes over the labels if that is more], or of a "
        "transformer [three passes, or 150 if that is more].",
    )
    teacher_batch_size: int | None = Field(
        None,
        ge=4,
        description="Texts in a teacher's batch, evenly of each class if in-batch [64; of a transformer 16, or 32 on "
        "an accelerator].",
    )
    teacher_learning_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The teacher's learning rate [6e-5; 1e-3 for a static body, 5e-5 for a transformer].",
    )
    teacher_dropout: bool | None = Field(
        None, description="Keep dropout on while the teacher is fine-tuned [off; on for a transformer]."
    )


class AugmentConfig(StageConfig):
    """Further pool texts, made of those that there are."""

    augment: int | None = Field(
        None,
        ge=1,
        description="Further pool texts made of the pool's and the labeled ones, for the teacher to label [none].",
    )
    augment_model: Name | None = Field(
        None, description="Masked language model that some of them are made by, word for word [none]."
    )
    augment_confidence: float = Field(
        0.6, ge=0, le=1, description="Least confidence of the teacher with which such a text is kept."
    )


class SignalsConfig(StageConfig):
    """How the teacher labels the pool."""

    refine: Literal["none", "self-training", "label-spreading"] = Field(
        "self-training", description="How the teacher's head is fitted anew on the pool before it labels it."
    )
    cache: bool = Field(
        True, description="Keep the teacher's embeddings on disk, and take them from there when nothing has changed."
    )


class StudentConfig(StageConfig):
    """How the student learns from the teacher's signals."""

    objective: Objectives | None = Field(
        None,
        description="Student's objective: similarity, embedding, soft-labels, a weighted sum of them as in "
        "similarity,soft-labels=0.5, or pairs [similarity,soft-labels=3; soft-labels for a transformer, and where the "
        "signals hold no embeddings].",
    )
    epochs: int = Field(3, ge=1, description="Passes over the pool.")
    batch_size: int = Field(32, ge=4, description="Texts in a student batch.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The student's learning rate [3e-4; 1e-3 for a static body, 2e-5 for a transformer].",
    )
    dropout: bool | None = Field(
        None, description="Keep the student's dropout on while distilling [off; on for a transformer]."
    )
    freeze_embeddings: bool | None = Field(
        None, description="Leave the student's word embeddings as they are [on; off for a transformer]."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop when agreement with the teacher on held-out pool texts, measured once a pass or more, has "
        "not risen so many times in a row [off].",
    )
    temperature: float | None = Field(
        None,
        ge=0.01,
        le=100,
        allow_inf_nan=False,
        description="Temperature of the soft-labels objective; 1 at prediction [1; 5 for a transformer].",
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="Share of the gold label, where a text has one, in the soft-labels objective."
    )
    gold_weight: float = Field(
        3.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of a gold label in the student's head, where a pool text counts 1.",
    )


class FinetuneConfig(StageConfig):
    """How a transformer is fine-tuned end to end on labels."""

    epochs: int = Field(3, ge=1, description="Passes over the labeled texts.")
    steps: int | None = Field(None, ge=1, description="Steps, in the place of passes.")
    batch_size: int | None = Field(None, ge=1, description="Texts in a batch [16, or 32 on an accelerator].")
    learning_rate: float | None = Field(None, gt=0, lt=1, description="The learning rate at its height [2e-5].")
    dropout: bool | None = Field(None, description="Keep dropout on [on].")
    schedule: Literal["linear", "cosine", "constant", "plateau"] = Field(  # type: ignore[assignment]
        "linear",
        description="How the learning rate goes on from its height; plateau halves it after each look at the "
        "validation texts that was no better.",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between two looks at the validation texts [one pass over the labeled texts]."
    )
    metric: Literal["accuracy", "f1-macro", "f1-weighted", "f1-binary"] = Field(
        "accuracy", description="By which looks are compared: the best one's weights are kept."
    )
    patience: int | None = Field(None, ge=1, description="Stop after so many looks without a better one [off].")
