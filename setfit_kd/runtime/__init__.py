"""Classify texts with a bundle, without torch. Every bundle contains a copy of `classify.py`."""

from setfit_kd.runtime.classify import Classifier as Classifier
