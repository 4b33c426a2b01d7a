"""Every setting of a run, and of a fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, model_validator

from setfit_kd.config.base import MAX_SEED, StageConfig, resolved
from setfit_kd.config.stages import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    SignalsConfig,
    StudentConfig,
    TeacherConfig,
)
from setfit_kd.config.values import CROSS_VALIDATED, Columns, Name, Names, OutputDir, Weights, parse_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class FinetuneRunConfig(FinetuneConfig):
    """Every setting of a whole fine-tuning."""

    model: Name = Field(description="The transformer: hub name, folder, or demo:all-MiniLM-L6-v2.")
    labeled: Name = Field(
        description="Texts to train on: file (CSV, TSV, JSONL, Parquet), datasets folder, or hub name; of several "
        "splits, train."
    )
    validation: Name | None = Field(
        None, description="Texts to look at while training: the same kinds; of several splits, validation."
    )
    eval: Name | None = Field(
        None, description="Texts to measure the model on at the end: the same kinds; of several splits, test."
    )
    text_column: Columns = Field(("text",), description="Text column; several, comma-separated, are joined by a space.")
    label_column: Name = Field("label", description="Label column.")
    output_dir: OutputDir = Field(description="Folder that the model is written to.")
    overwrite: bool = Field(False, description="Replace an earlier model in the output folder.")


class RunConfig(DataConfig, AugmentConfig, TeacherConfig, SignalsConfig, StudentConfig):
    """Every setting of a run."""

    teacher: Names = Field(
        ("sentence-transformers/paraphrase-mpnet-base-v2",),
        description="Teacher's body: hub name, folder, or demo:all-MiniLM-L6-v2; transformer:NAME trains it end to end "
        "as a sequence-classification transformer. May be repeated: the teachers are averaged.",
    )
    teacher_weights: Weights | None = Field(
        None,
        description="Weights of several teachers, as in 2,1; or cross-validated, by how often each is right on labels "
        "held out from it, which trains each four times more [all alike].",
    )
    student: Names = Field(
        ("sentence-transformers/paraphrase-MiniLM-L3-v2",),
        description="Student's body: the same; layers:3 or layers:0,2,5, cut out of the teacher's; static[:128], a "
        "vector a token; or blank:CONFIG, an untrained transformer. May be repeated.",
    )
    baseline: bool = Field(True, description="Also train the student's body on the labels alone, to compare.")
    output_dir: OutputDir | None = Field(None, description="Folder that the run is written to [runs/NAME].")
    target_accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Accuracy wanted of the answers: tells the confidence below which to answer nothing.",
    )
    seeds: int = Field(
        1,
        ge=1,
        le=100,
        description="Go through the run so many times, from --seed upwards, with draws and trainings of its own, and "
        "tell mean and deviation; the first is the run itself.",
    )
    overwrite: bool = Field(False, description="Replace an earlier run in the output folder.")

    @model_validator(mode="after")
    def _seeds_exist(self) -> Self:
        if self.seed + self.seeds > MAX_SEED:
            raise ValueError(f"seeds: there is no seed {self.seed + self.seeds - 1}")
        return self

    @model_validator(mode="after")
    def _augmenting_needs_a_teacher(self) -> Self:
        if self.augment_model is not None and self.augment is None:
            raise ValueError("augment_model: say by augment how many texts shall be made")
        if self.augment is not None and self.signals is not None:
            raise ValueError("augment: with signals from elsewhere, there is no teacher to label texts that are made")
        return self

    @model_validator(mode="after")
    def _a_weight_a_teacher(self) -> Self:
        written = self.teacher_weights
        if written not in (None, CROSS_VALIDATED) and len(parse_weights(resolved(written))) != len(self.teacher):
            raise ValueError(f"teacher_weights: {written} are not as many as the {len(self.teacher)} teachers")
        return self

    @classmethod
    def resolve(cls, base: Mapping[str, Any], *layers: Mapping[str, Any]) -> RunConfig:
        """Lay settings over a preset's; later layers win.

        The data settings go together: where a layer names its own labeled or unlabeled texts, every data setting of the
        preset is dropped, so that nobody's labels ever meet another data set's pool.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        own = set(DataConfig.model_fields) - set(StageConfig.model_fields)
        if any(layer.get(name) is not None for layer in layers for name in ("labeled", "unlabeled", "signals")):
            base = {name: value for name, value in base.items() if name not in own}
        merged = dict(base)
        for layer in layers:
            merged.update(layer)
        return cls.of(**merged)

    def to_yaml(self) -> str:
        """The settings as YAML that `read_config` reads back to an equal `RunConfig`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
