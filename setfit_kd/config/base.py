"""What the settings of every stage share."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from setfit_kd.config.values import Device, HeadC
from setfit_kd.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_SEED = 2**32

_NOT_FINGERPRINTED = frozenset(
    {
        "device",
        "cpu_fallback",
        "micro_batch_size",
        "gradient_checkpointing",
        "checkpoint_seconds",
        "encode_batch_size",
        "cache",
    }
)
"""Settings that change how a stage is gone through, not what comes out of it."""


Family = Literal["setfit", "transformer"]
"""SetFit models, a head on a sentence-transformers body; or transformers with a last layer of theirs, trained whole."""

_FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    "setfit": {
        "teacher_batch_size": 64,
        "teacher_dropout": False,
        "objective": "similarity,soft-labels=3",
        "dropout": False,
        "freeze_embeddings": True,
        "temperature": 1.0,
    },
    "transformer": {
        "teacher_learning_rate": 5e-5,
        "max_length": 128,
        "objective": "soft-labels",
        "learning_rate": 2e-5,
        "dropout": True,
        "freeze_embeddings": False,
        "temperature": 5.0,
    },
}
"""What is usual for a family where a setting is not given."""


Value = TypeVar("Value")


def resolved(value: Value | None) -> Value:
    """A setting of a config that `StageConfig.of_family` has settled."""
    assert value is not None
    return value


class StageConfig(BaseModel):
    """What every stage shares: a frozen model that refuses unknown names, a seed and a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, lt=MAX_SEED, description="Seed of every random choice.")
    device: Device = Field(
        "auto", description="Where to train and run: auto, cuda, cuda:N, mps or cpu; auto takes the first that works."
    )
    cpu_fallback: bool = Field(
        True, description="Let the CPU take over where an accelerator's memory is too small for a single text."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Numbers to train in; auto takes bf16 where a timed probe finds it faster than fp32."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most texts of a batch held in memory at once; without dropout, changes memory and time but not "
        "the result [all].",
    )
    max_length: int | None = Field(
        None,
        ge=8,
        description="Most tokens of a text that a body reads; the rest is cut off [the body's own; 128 of a "
        "transformer].",
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps in which the learning rate rises to its height [a tenth of all, 500 at most]."
    )
    weight_decay: float = Field(0.01, ge=0, lt=1, description="Weight decay of the body's training.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate goes on from its height."
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep no layer's activations in training but compute them twice: less memory, more time."
    )
    checkpoint_seconds: float = Field(
        120, gt=0, description="About how many seconds of a training a kill may cost, where its state is kept."
    )
    encode_batch_size: int = Field(32, ge=1, description="Texts encoded at once when scoring and evaluating.")
    head_c: HeadC = Field(
        10.0, description="C of the logistic regressions, or auto: by cross-validation on the labeled texts."
    )
    balance: bool = Field(False, description="Let every class weigh the same in a head, however frequent it is.")
    num_iterations: int = Field(
        20, ge=1, description="Pairs drawn for each text by the pairs objectives (twice that for the teacher)."
    )

    @classmethod
    def fingerprinted(cls, config: StageConfig) -> dict[str, Any]:
        """This stage's settings that decide what comes out of it, taken from a ``config`` that has them all."""
        found = {name: getattr(config, name) for name in cls.model_fields if name not in _NOT_FINGERPRINTED}
        if not any(value == "pairs" for name, value in found.items() if name.endswith("objective")):
            del found["num_iterations"]
        return found

    def with_family_defaults(self, family: Family) -> Self:
        """The same with what is usual for a family of models in the place of what is not set."""
        usual = {name: value for name, value in _FAMILY_DEFAULTS[family].items() if getattr(self, name, value) is None}
        return self.model_copy(update=usual)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The settings given, defaults for the rest.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            unknown = any(item["type"] == "extra_forbidden" for item in error.errors())
            hint = f"There are: {', '.join(cls.model_fields)}." if unknown else "Check the value."
            raise ConfigError(_explain(error), hint=hint) from None

    @classmethod
    def merged(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """A stage's settings: those of ``config``, if there is one, with ``settings`` over them.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        if config is None or not settings:
            return config or cls.of(**settings)
        return type(config).of(**{**config.model_dump(), **settings})


_REASONS = {"extra_forbidden": "is not a setting", "missing": "must be given"}


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        reason = _REASONS.get(item["type"], item["msg"].removeprefix("Value error, "))
        got = "" if item["type"] in ("extra_forbidden", "missing") else f" (got {reprlib.repr(item['input'])})"
        problems.append(f"{name}: {reason}{got}" if name else reason)
    return "Invalid settings: " + "; ".join(problems) + "."
