"""Classify texts with a bundle, using numpy and tokenizers, and onnxruntime for ONNX bundles.

It does not import torch or other packages of setfit-kd. Every bundle contains a copy of `SOURCE`.
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
    chunk_texts,
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
    "chunk_texts",
    "shorten",
]
