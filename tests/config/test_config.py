"""Settings: what may be written, and what is said of what may not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from setfit_kd.config import RunConfig, StudentConfig, parse_objectives
from setfit_kd.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "weights"),
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
def test_objectives_and_their_weights(written: str, weights: dict[str, float]) -> None:
    parsed = parse_objectives(written)
    assert parsed == weights
    assert list(parsed) == list(weights)
    assert StudentConfig.of(objective=written).objective


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "no ''"),
        ("nonsense", "no 'nonsense'"),
        ("Similarity", "no 'Similarity'"),
        ("soft_labels", "no 'soft_labels'"),
        ("similarity,", "no ''"),
        (",similarity", "no ''"),
        ("similarity;embedding", "no 'similarity;embedding'"),
        ("similarity soft-labels", "no 'similarity soft-labels'"),
        ("=1", "no ''"),
        ("similarity,similarity=2", "similarity stands twice"),
        ("similarity=", "the weight '' of similarity is no number"),
        ("similarity=much", "the weight 'much' of similarity is no number"),
        ("similarity=1=2", "the weight '1=2' of similarity is no number"),
        ("similarity=0", "the weight of similarity must be above 0"),
        ("similarity,embedding=-1", "the weight of embedding must be above 0"),
        ("similarity=nan", "the weight of similarity must be above 0"),
        ("similarity=inf", "the weight of similarity must be above 0"),
        ("similarity=1e-999", "the weight of similarity must be above 0"),
        ("pairs,similarity", "pairs goes alone"),
        ("soft-labels=0.5,pairs", "pairs goes alone"),
    ],
)
def test_objectives_written_wrongly(written: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_objectives(written)
    with pytest.raises(ConfigError) as refused:
        StudentConfig.of(objective=written)
    assert says in refused.value.message
    assert "objective" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("written", [5, 0.5, ["similarity"]])
def test_objectives_are_a_string(written: Any) -> None:
    with pytest.raises(ConfigError, match="objective"):
        StudentConfig.of(objective=written)


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
def test_settings_out_of_range(name: str, value: Any) -> None:
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
def test_settings_at_the_edge(name: str, value: Any) -> None:
    assert getattr(RunConfig.of(**{name: value}), name) == value
