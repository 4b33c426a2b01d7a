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
        ("similarity", {"similarity": 1}),
        ("embedding", {"embedding": 1}),
        ("soft-labels", {"soft-labels": 1}),
        ("pairs", {"pairs": 1}),
        ("similarity=2", {"similarity": 2}),
        ("similarity,soft-labels=0.5", {"similarity": 1, "soft-labels": 0.5}),
        ("soft-labels=.25,embedding=1e-3,similarity=3", {"soft-labels": 0.25, "embedding": 1e-3, "similarity": 3}),
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
        ("nonsense", "unknown objective 'nonsense'"),
        ("Similarity", "unknown objective 'Similarity'"),
        ("soft_labels", "unknown objective 'soft_labels'"),
        ("similarity,", "unknown objective ''"),
        (",similarity", "unknown objective ''"),
        ("similarity;embedding", "unknown objective 'similarity;embedding'"),
        ("similarity soft-labels", "unknown objective 'similarity soft-labels'"),
        ("=1", "unknown objective ''"),
        ("similarity,similarity=2", "similarity is listed twice"),
        ("similarity=", "the weight of similarity must be a number, got ''"),
        ("similarity=much", "the weight of similarity must be a number, got 'much'"),
        ("similarity=1=2", "the weight of similarity must be a number, got '1=2'"),
        ("similarity=0", "the weight of similarity must be positive and finite"),
        ("similarity,embedding=-1", "the weight of embedding must be positive and finite"),
        ("similarity=nan", "the weight of similarity must be positive and finite"),
        ("similarity=inf", "the weight of similarity must be positive and finite"),
        ("similarity=1e-999", "the weight of similarity must be positive and finite"),
        ("pairs,similarity", "pairs cannot be combined"),
        ("soft-labels=0.5,pairs", "pairs cannot be combined"),
    ],
)
def test_rejects_invalid_objectives(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_objectives(text)
    with pytest.raises(ConfigError) as error:
        StudentConfig.of(objective=text)
    assert message in error.value.message
    assert "objective" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("value", [5, 0.5, ["similarity"]])
def test_rejects_objectives_that_are_not_a_string(value: Any) -> None:
    with pytest.raises(ConfigError, match="objective"):
        StudentConfig.of(objective=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_size", 0),
        ("patience", 0),
        ("temperature", 0),
        ("temperature", float("inf")),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("gold_weight", -1),
        ("gold_weight", float("nan")),
        ("precision", "fp8"),
        ("refine", "magic"),
    ],
)
def test_rejects_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RunConfig.of(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("micro_batch_size", 1),
        ("micro_batch_size", None),
        ("patience", 1),
        ("alpha", 0),
        ("alpha", 1),
        ("gold_weight", 0),
    ],
)
def test_accepts_settings_at_the_limit(name: str, value: Any) -> None:
    assert getattr(RunConfig.of(**{name: value}), name) == value
