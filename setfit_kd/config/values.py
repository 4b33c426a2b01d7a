"""Types of setting values, with parsing and validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer


def check_unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names; raise a `ValueError` if one is listed twice."""
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"{duplicates[0]} is listed twice")
    return names


def _check_not_blank(value: object) -> object:
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("must not be empty")
    return value


def _the_only(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise ValueError(f"expected one for this task, got {len(value)}")
    return value[0]


Name = Annotated[str, AfterValidator(_check_not_blank)]
Columns = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value),
    Field(min_length=1),
]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    AfterValidator(check_unique),
    PlainSerializer(lambda names: names[0] if len(names) == 1 else list(names)),
    Field(min_length=1),
]
One = Annotated[Name, BeforeValidator(_the_only)]
OutputDir = Annotated[Path, BeforeValidator(_check_not_blank)]

BUNDLE_FORMATS = ("onnx", "onnx-int8", "static")
IN_BATCH_OBJECTIVES = ("similarity", "embedding", "soft-labels")


def parse_objectives(text: str, names: Sequence[str] = (*IN_BATCH_OBJECTIVES, "pairs")) -> dict[str, float]:
    """Parse ``similarity,soft-labels=0.5`` to ``{"similarity": 1.0, "soft-labels": 0.5}``.

    Raises:
        ValueError: If a name is unknown or listed twice, a weight is not a positive number, or ``pairs`` is combined
            with other objectives.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name not in names:
            raise ValueError(f"unknown objective {name!r}, expected {', '.join(names[:-1])} or {names[-1]}")
        if name in weights:
            raise ValueError(f"{name} is listed twice")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight of {name} must be a number, got {weight!r}") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"the weight of {name} must be positive and finite, got {weight}")
    if "pairs" in weights and len(weights) > 1:
        raise ValueError("pairs cannot be combined with other objectives: its batches are pairs of texts")
    return weights


def _normalize_objectives(text: str) -> str:
    """Return the canonical spelling of objectives and their weights."""
    weights = parse_objectives(text)
    if "pairs" in weights:
        return "pairs"
    return ",".join(name if weight == 1 else f"{name}={weight:.12g}" for name, weight in weights.items())


CROSS_VALIDATED = "cross-validated"


def parse_weights(text: str) -> list[float]:
    """Parse ``2,1`` to ``[2.0, 1.0]``.

    Raises:
        ValueError: If a weight is not a positive, finite number.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"weights must be numbers such as 2,1, or {CROSS_VALIDATED}") from None
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError("weights must be positive and finite")
    return weights


def _normalize_weights(text: str) -> str:
    """Return the canonical spelling of teacher weights."""
    return text if text == CROSS_VALIDATED else ",".join(f"{weight:.12g}" for weight in parse_weights(text))


def parse_threshold_objective(text: str) -> tuple[str, float]:
    """Parse ``f1``, ``precision=0.8``, ``recall=0.8`` or ``0.3`` to the name, or ``threshold``, and the number.

    Raises:
        ValueError: If it is none of these, or the number is not between 0 and 1.
    """
    name, _, number = text.rpartition("=")
    try:
        value = 1.0 if text == "f1" else float(number)
    except ValueError:
        value = 0.0
    if name not in ("", "precision", "recall") or text.startswith("=") or not 0 < value <= 1:
        raise ValueError("must be f1, precision=X, recall=X or a threshold X, with X above 0 and at most 1")
    return ("f1" if text == "f1" else name or "threshold"), value


def _check_threshold_objective(text: str) -> str:
    parse_threshold_objective(text)
    return text


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ValueError("must be auto, cuda, cuda:N, mps or cpu")
    return name


ThresholdObjective = Annotated[
    str,
    BeforeValidator(lambda value: f"{value:g}" if isinstance(value, int | float) else value),
    AfterValidator(_check_threshold_objective),
]
Device = Annotated[str, AfterValidator(_check_device)]
Weights = Annotated[str, AfterValidator(_normalize_weights)]
Objectives = Annotated[str, AfterValidator(_normalize_objectives)]
