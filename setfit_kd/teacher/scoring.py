"""A teacher's one pass over the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from setfit_kd.errors import DataError
from setfit_kd.models import embed, head_proba
from setfit_kd.signals import TeacherSignals

if TYPE_CHECKING:
    from setfit import SetFitModel


def score(
    teacher: SetFitModel,
    texts: Sequence[str],
    *,
    encode_batch_size: int = 32,
    origin: str = "a SetFit teacher",
) -> TeacherSignals:
    """Embed a pool and label it softly; each text passes through the teacher once.

    Args:
        teacher: A trained SetFit model, on the device it shall run on.
        texts: n texts.
        encode_batch_size: Texts a forward pass.
        origin: Where the signals come from, for the record.

    Returns:
        Signals with probabilities (n, n_classes) and embeddings (n, d).

    Raises:
        DataError: There are no texts, or the teacher has no labels.
    """
    if isinstance(texts, str):
        raise DataError("A single string is no pool.", hint="Give a list of texts.")
    texts = [str(text) for text in texts]
    if not texts:
        raise DataError("There are no texts to score.", hint="Give a pool of at least two.")
    if not teacher.labels:
        raise DataError("The teacher does not name its labels.", hint="Set teacher.labels.")
    embeddings = embed(
        teacher.model_body,
        texts,
        batch_size=encode_batch_size,
        normalize=teacher.normalize_embeddings,
        description="Scoring pool",
    )
    return TeacherSignals(texts, head_proba(teacher, embeddings), tuple(teacher.labels), embeddings, origin)
