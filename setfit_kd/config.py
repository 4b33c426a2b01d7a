"""Settings: one frozen model a stage, all of them together as `RunConfig`, and the presets as data.

A setting has one name everywhere: the field here, the keyword in Python, the key in a YAML file and, with dashes, the
flag on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from setfit_kd.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self


def _as_tuple(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _as_names(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]} stands twice")
    return names


def _one_or_several(names: tuple[str, ...]) -> str | list[str]:
    return names[0] if len(names) == 1 else list(names)


def _not_blank(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("must not be empty")
    return value


def _path(value: object) -> object:
    return _not_blank(value) if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(_not_blank)]
Columns = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_as_names),
    AfterValidator(_all_different),
    PlainSerializer(_one_or_several),
    Field(min_length=1),
]
OutputDir = Annotated[Path, BeforeValidator(_path)]


_MOST_SEEDS = 2**32
BUNDLE_FORMATS = ("onnx", "onnx-int8", "static")
IN_BATCH_OBJECTIVES = ("similarity", "embedding", "soft-labels")


def parse_objectives(written: str) -> dict[str, float]:
    """``similarity,soft-labels=0.5`` to ``{"similarity": 1.0, "soft-labels": 0.5}``.

    Raises:
        ValueError: A name is unknown or stands twice, a weight is not positive, or ``pairs`` has company.
    """
    weights: dict[str, float] = {}
    for part in written.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in (*IN_BATCH_OBJECTIVES, "pairs"):
            raise ValueError(f"there are {', '.join(IN_BATCH_OBJECTIVES)} and pairs, no {name!r}")
        if name in weights:
            raise ValueError(f"{name} stands twice")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight {weight!r} of {name} is no number") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"the weight of {name} must be above 0")
    if "pairs" in weights and len(weights) > 1:
        raise ValueError("pairs goes alone: its batches are pairs of texts")
    return weights


def _objectives(written: str) -> str:
    """The one way in which the same objectives are written."""
    weights = parse_objectives(written)
    if "pairs" in weights:
        return "pairs"
    return ",".join(name if weight == 1 else f"{name}={weight:.12g}" for name, weight in weights.items())


CROSS_VALIDATED = "cross-validated"


def parse_weights(written: str) -> list[float]:
    """``2,1`` to ``[2.0, 1.0]``.

    Raises:
        ValueError: One is no number above 0.
    """
    try:
        weights = [float(part) for part in written.split(",")]
    except ValueError:
        raise ValueError(f"write them as in 2,1, or {CROSS_VALIDATED}") from None
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError("they must be above 0")
    return weights


def _weights(written: str) -> str:
    """The one way in which the same weights are written."""
    if written == CROSS_VALIDATED:
        return written
    return ",".join(f"{weight:.12g}" for weight in parse_weights(written))


def _positive(value: float | str) -> float | str:
    if isinstance(value, float) and not 0 < value < float("inf"):
        raise ValueError("must be above 0, or auto")
    return value


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ValueError("there are auto, cuda, cuda:N, mps and cpu")
    return name


Device = Annotated[str, AfterValidator(_device)]
HeadC = Annotated[float | Literal["auto"], AfterValidator(_positive)]
Weights = Annotated[str, AfterValidator(_weights)]
Objectives = Annotated[str, AfterValidator(_objectives)]


_NOT_DECIDING = frozenset(
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

_USUAL: dict[Family, dict[str, Any]] = {
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


def settled(value: Value | None) -> Value:
    """A setting of a config that `StageConfig.of_family` has settled."""
    assert value is not None
    return value


class StageConfig(BaseModel):
    """What every stage shares: a frozen model that refuses unknown names, a seed and a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, lt=_MOST_SEEDS, description="Seed of every random choice.")
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
    def deciding(cls, config: StageConfig) -> dict[str, Any]:
        """This stage's settings that decide what comes out of it, taken from a ``config`` that has them all."""
        found = {name: getattr(config, name) for name in cls.model_fields if name not in _NOT_DECIDING}
        if not any(value == "pairs" for name, value in found.items() if name.endswith("objective")):
            del found["num_iterations"]
        return found

    def of_family(self, family: Family) -> Self:
        """The same with what is usual for a family of models in the place of what is not set."""
        usual = {name: value for name, value in _USUAL[family].items() if getattr(self, name, value) is None}
        return self.model_copy(update=usual)

    def passes(self, texts: int, *, columns: int = 1) -> int:
        """Forward passes of a training step on ``columns`` times so many texts; micro-batches take two each."""
        in_memory = self.micro_batch_size is None or columns * texts <= self.micro_batch_size
        return columns * texts * (1 if in_memory else 2)

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
    def given(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """A stage's settings: those of ``config``, if there is one, with ``settings`` over them.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        if config is None or not settings:
            return config or cls.of(**settings)
        return type(config).of(**{**config.model_dump(), **settings})


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
        if self.seed + self.seeds > _MOST_SEEDS:
            raise ValueError(f"seeds: there is no seed {self.seed + self.seeds - 1}")
        return self

    @model_validator(mode="after")
    def _made_texts_need_a_teacher(self) -> Self:
        if self.augment_model is not None and self.augment is None:
            raise ValueError("augment_model: say by augment how many texts shall be made")
        if self.augment is not None and self.signals is not None:
            raise ValueError("augment: with signals from elsewhere, there is no teacher to label texts that are made")
        return self

    @model_validator(mode="after")
    def _a_weight_a_teacher(self) -> Self:
        written = self.teacher_weights
        if written not in (None, CROSS_VALIDATED) and len(parse_weights(settled(written))) != len(self.teacher):
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


_REASONS = {"extra_forbidden": "is not a setting", "missing": "must be given"}


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        reason = _REASONS.get(item["type"], item["msg"].removeprefix("Value error, "))
        got = "" if item["type"] in ("extra_forbidden", "missing") else f" (got {item['input']!r})"
        problems.append(f"{name}: {reason}{got}" if name else reason)
    return "Invalid settings: " + "; ".join(problems) + "."


PRESETS: dict[str, dict[str, Any]] = {
    "ag_news": {
        "labeled": "ag_news",
        "unlabeled": "ag_news",
        "eval": "ag_news",
        "teacher": "sentence-transformers/paraphrase-mpnet-base-v2",
        "student": "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "shots": 16,
        "pool_size": 1000,
    },
    "newswire": {
        "labeled": "bundled:newswire",
        "unlabeled": "bundled:newswire",
        "eval": "bundled:newswire",
        "teacher": "demo:all-MiniLM-L6-v2",
        "student": "layers:0,2,5",
        "shots": 16,
    },
}
DEFAULT_PRESET = "ag_news"
OFFLINE_COMMAND = "setfit-kd run --preset newswire --output-dir runs/newswire"


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}.", hint=f"There are: {', '.join(PRESETS)}.")
    return dict(PRESETS[name])


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet validated.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the settings {path}: {error.strerror}.", hint="Check --config.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", hint="Save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line} is not valid YAML.", hint="Write one `name: value` a line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold settings.", hint="Write one `name: value` a line.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
