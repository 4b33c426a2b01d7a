"""Classify texts with a bundle, using numpy and tokenizers, and onnxruntime for ONNX bundles.

It does not import torch or other packages of setfit-kd. Every bundle contains a copy of `classify.py`.
"""

from setfit_kd.runtime.classify import Classifier as Classifier
