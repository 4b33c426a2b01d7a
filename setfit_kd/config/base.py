"""Settings that all stages share."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from setfit_kd.config.values import Device, OutputDir, ThresholdObjective
from setfit_kd.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_SEED = 2**32

_NOT_FINGERPRINTED = (
    *("device", "cpu_fallback", "micro_batch_size", "gradient_checkpointing", "checkpoint_seconds"),
    *("encode_batch_size", "exact", "cache"),
)
"""Settings that affect how a stage runs, but not its result."""

_VERSION = 3
"""Version of the trainings; results of another version are not reused when a run is resumed."""

_SOFT_LABELS_C = 3.0

Family = Literal["setfit", "transformer"]
"""Model family: SetFit (a head on a sentence-transformers body) or a transformers classifier trained end to end."""

_FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    "setfit": {
        "teacher_batch_size": 64,
        "teacher_dropout": False,
        "calibrate": True,
        "objective": "similarity,soft-labels=3",
        "dropout": False,
        "freeze_embeddings": True,
        "temperature": 1.0,
    },
    "transformer": {
        "teacher_learning_rate": 5e-5,
        "calibrate": False,
        "max_length": 128,
        "objective": "soft-labels",
        "learning_rate": 2e-5,
        "dropout": True,
        "freeze_embeddings": False,
        "temperature": 5.0,
    },
}
"""Defaults that depend on the model family."""

Value = TypeVar("Value")
Config = TypeVar("Config", bound="StageConfig")


def resolved(value: Value | None) -> Value:
    """Return a setting that `StageConfig.with_family_defaults` has resolved, and which is therefore not None."""
    assert value is not None
    return value


class StageConfig(BaseModel):
    """Base class of the configs: frozen, rejects unknown settings, and holds the settings that all stages share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int = Field(0, ge=0, lt=MAX_SEED)
    """Random seed."""
    device: Device = "auto"
    """Device: auto, cuda, cuda:N, mps or cpu. auto selects the first one that works."""
    cpu_fallback: bool = True
    """Fall back to the CPU if the accelerator's memory is too small for a single text."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision. auto selects bf16 if a short timing test finds it faster than fp32."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Maximum number of texts of a batch in memory at a time. Without dropout, it affects memory and time, but not the
    result. [default: the whole batch]"""
    max_length: int | None = Field(None, ge=8)
    """Maximum number of tokens per text; longer texts are truncated. [default: the body's own limit; 128 for a
    transformer]"""
    warmup_steps: int | None = Field(None, ge=0)
    """Warmup steps. [default: 10% of all steps, at most 500]"""
    weight_decay: float = Field(0.01, ge=0, lt=1)
    """Weight decay for training the body."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after warmup."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    checkpoint_seconds: float = Field(120, gt=0)
    """Seconds between checkpoints."""
    encode_batch_size: int | None = Field(None, ge=1)
    """Batch size for scoring and evaluating. [default: as many texts as have a suitable number of tokens for the
    device]"""
    exact: bool = False
    """Score, evaluate and predict in single precision with torch. By default, half precision or ONNX Runtime is used
    if it is faster and the probabilities are nearly the same."""
    head_c: float | None = Field(None, gt=0, allow_inf_nan=False)
    """C (inverse regularization strength) of the logistic regression heads, on embeddings scaled to unit variance.
    [default: 2.5 times the number of classes, or 5 for each of several labels; 3 for those of a refined teacher and of
    a student]"""
    balance: float = Field(0.5, ge=0, le=1)
    """Weight of rare classes when fitting a head: a class with n labels is weighted by this power of 1/n. 0 weights all
    texts equally, 1 all classes of the labeled texts."""
    thresholds: ThresholdObjective = "f1"
    """How to choose the threshold of each label, with several labels per text: f1, precision=X or recall=X for the best
    threshold with this value, or a number. Fine-tuning chooses them on the validation texts."""
    num_iterations: int = Field(20, ge=1)
    """Pairs drawn per text by the pairs objectives (twice as many for the teacher)."""

    @property
    def soft_labels_c(self) -> float:
        """C of a head that is fitted on soft labels of a pool, which are many and noisy."""
        return self.head_c or _SOFT_LABELS_C

    @classmethod
    def fingerprint_inputs(cls, config: StageConfig) -> dict[str, Any]:
        """Return the settings in ``config`` that determine the result of this stage."""
        inputs = {name: getattr(config, name) for name in cls.model_fields if name not in _NOT_FINGERPRINTED}
        inputs["version"] = _VERSION
        if not any(value == "pairs" for name, value in inputs.items() if name.endswith("objective")):
            del inputs["num_iterations"]
        return inputs

    def part(self, config_class: type[Config]) -> Config:
        """Return the settings of a base class as a config of its own."""
        return config_class(**{name: getattr(self, name) for name in config_class.model_fields})

    def with_family_defaults(self, family: Family) -> Self:
        """Return a copy in which the defaults of a model family replace unset (None) settings."""
        defaults = {key: value for key, value in _FAMILY_DEFAULTS[family].items() if getattr(self, key, value) is None}
        return self.model_copy(update=defaults)

    def to_yaml(self) -> str:
        """Return the settings as YAML, from which `read_config` restores an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Create a config from settings, with defaults for the rest.

        Raises:
            ConfigError: If a setting is unknown or out of range.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            unknown = any(item["type"] == "extra_forbidden" for item in error.errors())
            hint = f"Available settings: {', '.join(cls.model_fields)}." if unknown else "Check the value."
            raise ConfigError(_explain(error), hint=hint) from None

    @classmethod
    def merged(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """Override settings of a config, or of the defaults if ``config`` is None.

        Raises:
            ConfigError: If a setting is unknown or out of range.
        """
        if config is None or not settings:
            return config or cls.of(**settings)
        return type(config).of(**{**config.model_dump(), **settings})


class OutputConfig(StageConfig):
    """Settings of a command that writes a folder."""

    output_dir: OutputDir
    """Output folder."""
    overwrite: bool = False
    """Replace an earlier result in the output folder."""


_REASONS = {"extra_forbidden": "unknown setting", "missing": "is required"}


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        reason = _REASONS.get(item["type"], item["msg"].removeprefix("Value error, "))
        has_got = item["type"] not in _REASONS and not isinstance(item["input"], list | tuple)
        got = f" (got {reprlib.repr(item['input'])})" if has_got else ""
        problems.append(f"{name}: {reason}{got}" if name else reason)
    return "Invalid settings: " + "; ".join(problems) + "."
