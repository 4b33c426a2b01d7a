"""Export a static classifier as token vectors and head weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.errors import ModelError
from setfit_kd.export.tokenizer import head_weights
from setfit_kd.models.bodies import is_static
from setfit_kd.runtime.classify import HEAD, VECTORS

if TYPE_CHECKING:
    from setfit import SetFitModel


def write_static(model: SetFitModel, folder: Path) -> bool:
    """Write token vectors in half precision and the head in single precision.

    Returns:
        Whether the mean vectors are normalized.

    Raises:
        ModelError: If the body is not static, or the head or labels cannot be exported.
    """
    from safetensors.numpy import save
    from sentence_transformers.sentence_transformer.modules import Normalize

    body = model.model_body
    if not is_static(body) or not all(isinstance(module, Normalize) for module in list(body)[1:]):
        raise ModelError(
            "Only static bodies can be exported as static.",
            hint="Use --format onnx-int8, or train with --student static.",
        )
    vectors = body[0].embedding.weight.detach().cpu().numpy()
    largest = float(np.abs(vectors).max(initial=0))
    # Half precision ranges from 6e-8 to 65,504. If vectors are scaled, the head is scaled inversely.
    scale = 1.0 if 0.1 <= largest <= 1e4 or not largest else 1 / largest
    coef, intercept = head_weights(model)
    normalizes = len(body) > 1 or bool(model.normalize_embeddings)
    # Written as bytes, because safetensors creates files that only their owner can read.
    (folder / VECTORS).write_bytes(save({"embeddings": (vectors * scale).astype(np.float16)}))
    scaled = coef if normalizes else coef / np.float32(scale)
    (folder / HEAD).write_bytes(save({"coef": scaled, "intercept": intercept}))
    return normalizes
