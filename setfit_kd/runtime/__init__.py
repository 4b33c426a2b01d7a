"""Classifying from a bundle: numpy and tokenizers, and for ONNX bundles onnxruntime; no torch, no other room.

A copy of its one file, `SOURCE`, lies in every bundle.
"""

from pathlib import Path

from setfit_kd.runtime.classify import (
    FORMAT,
    HEAD,
    LABELS,
    MANIFEST,
    ONNX_MODEL,
    TOKENIZER,
    VECTORS,
    BundleError,
    Classifier,
    Prediction,
    in_windows,
    shorten,
)

SOURCE = Path(__file__).with_name("classify.py")

__all__ = [
    "FORMAT",
    "HEAD",
    "LABELS",
    "MANIFEST",
    "ONNX_MODEL",
    "SOURCE",
    "TOKENIZER",
    "VECTORS",
    "BundleError",
    "Classifier",
    "Prediction",
    "in_windows",
    "shorten",
]
