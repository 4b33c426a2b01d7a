"""Static embeddings: one vector per token and no network, distilled from a teacher's body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from setfit_kd.errors import ModelError
from setfit_kd.models.encode import embed_tokens
from setfit_kd.runtime.classify import chunk_texts, shorten

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_DIMENSION = 128
_SIF = 1e-2  # parameter a of smooth inverse frequency; Arora et al. used 1e-3, but the weights are trained further here
_TOKENIZE_CHUNK = 10_000


def check_static_teacher(teacher: SentenceTransformer, dimension: int) -> None:
    """Raise a `ModelError` if a body has no fast tokenizer or smaller embeddings than static ones distilled from it."""
    if getattr(teacher.tokenizer, "backend_tokenizer", None) is None:
        message = "Static embeddings can only be distilled from a transformer with a fast tokenizer."
        raise ModelError(message, hint="Choose another model with static@NAME.")
    limit = teacher.get_embedding_dimension() or 0
    if dimension > limit:
        message = f"Static embeddings must have at most {limit} dimensions, as the teacher has, got {dimension}."
        raise ModelError(message, hint=f"Use static:{limit} or less.")


def static_body(teacher: SentenceTransformer, texts: Sequence[str], *, dimension: int) -> SentenceTransformer:
    """Distil static embeddings from a teacher's body: that of a text is the mean of its token vectors, at length 1.

    The teacher embeds each token of its vocabulary as a separate text. The vectors are reduced by PCA and weighted by
    smooth inverse frequency, a / (a + p), where p is the relative frequency of the token in the texts (Arora et al.,
    2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"; Tulkens and van Dongen, 2024, model2vec). The
    result, on the CPU, can be trained like any other body.

    Args:
        teacher: A transformer body with a fast tokenizer and at least ``dimension`` dimensions.
        texts: Texts to count tokens in, such as the pool.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from sklearn.decomposition import PCA

    check_static_teacher(teacher, dimension)
    vectors = embed_tokens(teacher)
    reduced = PCA(dimension, random_state=0).fit_transform(vectors) if dimension < vectors.shape[1] else vectors
    tokenizer = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    weighted = reduced * _sif_weights(tokenizer, texts, len(vectors))
    static = StaticEmbedding(tokenizer, embedding_weights=weighted.astype(np.float32))
    return SentenceTransformer(modules=[static, Normalize()], device="cpu")


def _sif_weights(tokenizer: Tokenizer, texts: Sequence[str], n_tokens: int) -> npt.NDArray[np.float64]:
    """Compute the weight of each token: (n_tokens, 1)."""
    counts = np.zeros(n_tokens, np.int64)
    for chunk in chunk_texts(texts, _TOKENIZE_CHUNK):
        shortened = [shorten(text, tokenizer) for text in chunk]
        for encoding in tokenizer.encode_batch_fast(shortened, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
    share = counts / max(counts.sum(), 1)
    return np.asarray(_SIF / (_SIF + share))[:, None]
