"""Running a body over many texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.progress import track

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_CHUNK = 256


def embed(
    body: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    normalize: bool = False,
    description: str = "Encoding",
) -> npt.NDArray[np.float32]:
    """Embed texts, longest first so that a batch holds texts of like length; order is kept.

    Args:
        body: The body, on the device it shall run on.
        texts: n texts.
        batch_size: Texts a forward pass.
        normalize: Scale every embedding to length 1.
        description: What to call the step on the progress bar.

    Returns:
        (n, d) float32.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    parts = []
    with track(description, len(texts)) as advance:
        for start in range(0, len(texts), _CHUNK):
            rows = order[start : start + _CHUNK]
            part = body.encode(
                [texts[row] for row in rows],
                batch_size=batch_size,
                normalize_embeddings=normalize,
                show_progress_bar=False,
            )
            parts.append(np.asarray(part, np.float32))
            advance(len(rows))
    if not parts:
        return np.empty((0, body.get_embedding_dimension() or 0), np.float32)
    embeddings = np.empty((len(texts), parts[0].shape[1]), np.float32)
    embeddings[order] = np.concatenate(parts)
    return embeddings


def predict_proba(
    model: SetFitModel, texts: Sequence[str], *, batch_size: int = 32, description: str = "Predicting"
) -> npt.NDArray[np.float32]:
    """Class probabilities of texts: (n, n_classes) float32, rows summing to 1."""
    if not len(texts):
        return np.empty((0, len(model.labels or ())), np.float32)
    embeddings = embed(
        model.model_body,
        texts,
        batch_size=batch_size,
        normalize=model.normalize_embeddings,
        description=description,
    )
    return head_proba(model, embeddings)


def head_proba(model: SetFitModel, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Class probabilities of (n, d) embeddings, as (n, n_classes) float32 summing to 1 in float64."""
    import torch

    if model.has_differentiable_head:
        with torch.no_grad():
            tensor = model.model_head.predict_proba(torch.as_tensor(embeddings, device=model.model_head.device))
        return np.asarray(tensor.cpu().numpy(), np.float32)
    return np.asarray(model.model_head.predict_proba(embeddings), np.float32)
