"""Static bodies: a vector a token, no network to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.models.encode import embed_tokens
from setfit_kd.runtime import in_windows, shorten

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

DEFAULT_DIMENSION = 128
_SIF = 1e-3
"""The parameter a of smooth inverse frequency; Arora et al. found 1e-3 to 1e-4 best on all their tasks."""
_COUNTED = 10_000
"""Most texts handed to the tokenizer at once."""


def check_static_teacher(teacher: SentenceTransformer, dimension: int) -> None:
    """Refuse a body that vectors of so many dimensions cannot be taken from.

    Raises:
        ModelError: It has no fast tokenizer, or shorter embeddings.
    """
    if getattr(teacher.tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            "Token vectors can only be taken from a transformer with a fast tokenizer.",
            hint="Name another model: static@NAME.",
        )
    width = teacher.get_embedding_dimension() or 0
    if dimension > width:
        raise ModelError(
            f"The teacher's embeddings have {width} dimensions, {dimension} are asked for.",
            hint=f"Take static:{width} or less.",
        )


def static_body(
    teacher: SentenceTransformer, texts: Sequence[str], *, dimension: int = DEFAULT_DIMENSION, batch_size: int = 1024
) -> SentenceTransformer:
    """A body whose embedding of a text is the mean of its tokens' vectors, taken from a teacher's body.

    Each token of the vocabulary passes through the teacher alone; the vectors are reduced by PCA and weighted by smooth
    inverse frequency, a / (a + p), p being the token's share of the texts (Arora et al., 2017, "A Simple but
    Tough-to-Beat Baseline for Sentence Embeddings"; Tulkens and van Dongen, 2024, model2vec). It trains like any other
    body.

    Args:
        teacher: A transformer body with a fast tokenizer.
        texts: Texts to count tokens in, such as the pool.
        dimension: Length of the vectors, at most the teacher's.
        batch_size: Tokens that pass through the teacher at once.

    Returns:
        A body of one `StaticEmbedding`, on the CPU.

    Raises:
        ModelError: See `check_static_teacher`.
        OutOfMemoryError: Not even one token at once fits.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from sklearn.decomposition import PCA

    check_static_teacher(teacher, dimension)
    vectors = embed_tokens(teacher, batch_size=batch_size)
    reduced = PCA(dimension, random_state=0).fit_transform(vectors) if dimension < vectors.shape[1] else vectors
    tokenizer = _plain_tokenizer(teacher)
    weighted = reduced * _sif_weights(tokenizer, texts, len(vectors))
    static = StaticEmbedding(tokenizer, embedding_weights=weighted.astype(np.float32))
    return SentenceTransformer(modules=[static], device="cpu")


def _plain_tokenizer(teacher: SentenceTransformer) -> Tokenizer:
    """The teacher's tokenizer, neither cutting nor padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _sif_weights(tokenizer: Tokenizer, texts: Sequence[str], n_tokens: int) -> npt.NDArray[np.float64]:
    """(n_tokens, 1) weight of each token."""
    counts = np.zeros(n_tokens, np.int64)
    for window in in_windows(texts, _COUNTED):
        shortened = [shorten(text, tokenizer) for text in window]
        for encoding in tokenizer.encode_batch_fast(shortened, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
    share = counts / max(counts.sum(), 1)
    weights: npt.NDArray[np.float64] = _SIF / (_SIF + share)
    return weights[:, None]
