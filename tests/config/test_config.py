"""Parsing and validation of settings."""

from __future__ import annotations

import re
from typing import Any

import pytest

from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import StudentConfig
from setfit_kd.config.values import parse_objectives
from setfit_kd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("pairs", {"pairs": 1}),
        ("soft-labels=.25,embedding=1e-3,similarity", {"soft-labels": 0.25, "embedding": 1e-3, "similarity": 1}),
        (" similarity , soft-labels = 0.5 ", {"similarity": 1, "soft-labels": 0.5}),
    ],
)
def test_parses_objectives_and_weights(text: str, weights: dict[str, float]) -> None:
    parsed = parse_objectives(text)
    assert parsed == weights
    assert list(parsed) == list(weights)
    assert StudentConfig.of(objective=text).objective


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown objective ''"),
        ("Similarity", "unknown objective 'Similarity'"),
        ("similarity,", "unknown objective ''"),
        ("similarity,similarity=2", "similarity is listed twice"),
        ("similarity=", "the weight of similarity must be a number, got ''"),
        ("similarity=1=2", "the weight of similarity must be a number, got '1=2'"),
        ("similarity,embedding=-1", "the weight of embedding must be positive and finite"),
        ("similarity=nan", "the weight of similarity must be positive and finite"),
        ("similarity=inf", "the weight of similarity must be positive and finite"),
        ("similarity=1e-999", "the weight of similarity must be positive and finite"),
        ("soft-labels=0.5,pairs", "pairs cannot be combined"),
    ],
)
def test_rejects_invalid_objectives(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        StudentConfig.of(objective=text)
    assert "objective" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("objective", 5),
        ("micro_batch_size", 0),
        ("patience", 0),
        ("temperature", float("inf")),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("gold_weight", float("nan")),
        ("precision", "fp8"),
        ("refine", "magic"),
    ],
)
def test_rejects_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RunConfig.of(**{name: value})


def test_accepts_settings_at_the_limit() -> None:
    for limits in ({"micro_batch_size": 1, "patience": 1, "alpha": 0, "gold_weight": 0}, {"alpha": 1}):
        config = RunConfig.of(**limits)
        assert {name: getattr(config, name) for name in limits} == limits
