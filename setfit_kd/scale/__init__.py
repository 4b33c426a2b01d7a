"""Predictions for any number of files: by array jobs, or by Ray on several machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setfit_kd.scale.ray_engine import BatchClassifier

__all__ = ["BatchClassifier"]


def __getattr__(name: str) -> Any:
    if name == "BatchClassifier":  # loads numpy
        from setfit_kd.scale.ray_engine import BatchClassifier

        return BatchClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
