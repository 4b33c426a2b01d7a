"""Predictions for any number of files, in array jobs or with Ray on several machines."""

from setfit_kd.scale.ray_engine import BatchClassifier

__all__ = ["BatchClassifier"]
