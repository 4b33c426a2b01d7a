"""Configs of a distillation run and of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from setfit_kd.config.base import MAX_SEED, Family, OutputConfig, StageConfig, resolved
from setfit_kd.config.stages import (
    AugmentConfig,
    ColumnsConfig,
    DataConfig,
    FinetuneConfig,
    SignalsConfig,
    StudentConfig,
    TeacherConfig,
)
from setfit_kd.config.values import CROSS_VALIDATED, Name, Names, OutputDir, Weights, parse_weights

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_TEXTS, MAX_GROWTH = 1000, 8
"""Smaller pools are augmented by default up to this number of texts, and at most by this factor."""


class FinetuneRunConfig(FinetuneConfig, ColumnsConfig, OutputConfig):
    """All settings of a fine-tuning run."""

    model: Name
    """Transformer: hub name, folder, or demo:all-MiniLM-L6-v2."""
    labeled: Name
    """Training texts: file (CSV, TSV, JSONL, Parquet), datasets folder, or hub name. A source with splits uses
    train."""
    validation: Name | None = None
    """Validation texts: as for --labeled. A source with splits uses validation."""
    eval: Names | None = None
    """Evaluation texts: as for --labeled. A source with splits uses test. Repeat the option to evaluate on several
    sets; the first is the main one."""


class RunConfig(DataConfig, AugmentConfig, TeacherConfig, SignalsConfig, StudentConfig):
    """All settings of a distillation run."""

    teacher: Names = ("sentence-transformers/paraphrase-mpnet-base-v2",)
    """Teacher body: hub name, folder, demo:all-MiniLM-L6-v2 or demo:all-mpnet-base-v2. transformer:NAME fine-tunes it
    end to end as a sequence-classification transformer. Repeat the option to average several teachers."""
    teacher_weights: Weights | None = None
    """Weights of several teachers, such as 2,1; or cross-validated to weight each by its accuracy on held-out labels.
    [default: equal weights]"""
    student: Names = ("sentence-transformers/paraphrase-MiniLM-L3-v2",)
    """Student body: as for --teacher; layers:3 or layers:0,2,5 to copy layers of the teacher; static[:128] for one
    vector per token; or blank:CONFIG for an untrained transformer. Repeat the option to train several students."""
    baseline: bool = True
    """Also train a baseline: the same student trained on the labels only, without distillation."""
    bundle: bool = True
    """Keep a bundle in the folder of each student, with which predict classifies texts in arguments without loading
    torch. For a network, onnx and onnxruntime must be installed, and it may have at most 70 million parameters."""
    output_dir: OutputDir | None = None
    """Output folder of the run. [default: runs/NAME]"""
    target_accuracy: float | None = Field(None, gt=0, le=1)
    """Report the confidence threshold that reaches this accuracy."""
    seeds: int = Field(1, ge=1, le=100)
    """Number of seeds. Repeat sampling and training with consecutive seeds, starting at --seed, and report mean and
    standard deviation. The run itself uses the first seed."""
    search: int = Field(0, ge=0)
    """Number of trials of each of two searches for better settings: for the steps and learning rate of the teacher, by
    its log loss in cross-fitting, and for the epochs and learning rate of the student, by its agreement with the
    teacher on held-out pool texts. The evaluation set is not used. Requires optuna. 0: no search."""
    overwrite: bool = False
    """Replace an earlier run in the output folder."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.seed + self.seeds > MAX_SEED:
            raise ValueError(f"seeds: all seeds must be less than {MAX_SEED}, got {self.seed + self.seeds - 1}")
        if self.augment_model is not None and not self.augment:
            raise ValueError("augment_model: set augment to the number of augmented texts")
        if self.augment and self.signals is not None:
            raise ValueError("augment: cannot be combined with signals; a teacher must label the augmented texts")
        if self.augment and self.pair_column is not None:
            raise ValueError("augment: cannot be combined with pair_column")
        if self.search and (len(self.teacher) > 1 or len(self.student) > 1):
            raise ValueError("search: expected one teacher and one student")
        weights, n = self.teacher_weights, len(self.teacher)
        if weights not in (None, CROSS_VALIDATED) and len(parse_weights(resolved(weights))) != n:
            raise ValueError(f"teacher_weights: number of weights must be {n}, one per teacher, got {weights}")
        return self

    def n_augmented(self, n_texts: int) -> int:
        """Return the number of augmented texts to add to n pool and labeled texts."""
        if self.augment is not None or self.signals is not None or self.pair_column is not None:
            return self.augment or 0
        return max(0, min(MIN_TEXTS, MAX_GROWTH * n_texts) - n_texts)

    def calibrates(self, family: Family) -> bool:
        """Whether a teacher of a family is calibrated by cross-fitting."""
        return resolved(self.with_family_defaults(family).calibrate)

    def cross_fits(self, family: Family) -> bool:
        """Whether the labeled texts are predicted by cross-fitting, to calibrate a teacher or to weight it."""
        is_weighted = len(self.teacher) > 1 and self.teacher_weights == CROSS_VALIDATED
        return is_weighted or self.calibrates(family)

    @classmethod
    def resolve(cls, base: Mapping[str, Any], *layers: Mapping[str, Any]) -> RunConfig:
        """Override the settings of a preset by ``layers``; later layers take precedence.

        If a layer sets ``labeled``, ``unlabeled`` or ``signals``, all data settings of a preset with data are dropped,
        so that labels are never combined with the pool of another dataset.

        Raises:
            ConfigError: If a setting is unknown or out of range.
        """
        data_settings = set(DataConfig.model_fields) - set(StageConfig.model_fields)
        sources = ("labeled", "unlabeled", "signals")
        if base.get("labeled") and any(layer.get(name) is not None for layer in layers for name in sources):
            base = {name: value for name, value in base.items() if name not in data_settings}
        merged = dict(base)
        for layer in layers:
            merged.update(layer)
        return cls.of(**merged)
