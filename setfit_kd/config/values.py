"""What a setting may hold, and how it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer


def _to_tuple(value: object) -> object:
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
Columns = Annotated[tuple[Name, ...], BeforeValidator(_to_tuple), Field(min_length=1)]
Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_as_names),
    AfterValidator(_all_different),
    PlainSerializer(_one_or_several),
    Field(min_length=1),
]
OutputDir = Annotated[Path, BeforeValidator(_path)]


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
