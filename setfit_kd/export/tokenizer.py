"""Convert the tokenizer, the head and the labels of a classifier for a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.models.bodies import default_prompt, is_static

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_NO_LIMIT = 1_000_000
"""Tokenizers without a length limit report a number far above this."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Content of ``tokenizer.json``, which includes truncation, and the manifest fields about tokenization."""

    tokenizer: str
    max_length: int | None
    special_tokens: bool
    pad_id: int
    prefix: str


def tokenizer_settings(body: SentenceTransformer) -> TokenizerSettings:
    """Return the tokenizer settings of a body.

    Raises:
        ModelError: If the body has no fast tokenizer, or excludes its prompt from the embedding.
    """
    from tokenizers import Tokenizer

    prefix = default_prompt(body)
    if prefix and not all(getattr(module, "include_prompt", True) for module in body):
        raise ModelError("Cannot export a body that excludes its prompt from the embedding.")
    if is_static(body):
        truncation = body.tokenizer.truncation
        max_length = truncation and int(truncation["max_length"])
        return TokenizerSettings(body.tokenizer.to_str(), max_length, False, 0, prefix)
    backend = getattr(body.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("Only models with a fast tokenizer can be exported.", hint="Use another student body.")
    limits = (body.max_seq_length, body.tokenizer.model_max_length)
    length = min((limit for limit in limits if limit), default=_NO_LIMIT)
    max_length = int(length) if length < _NO_LIMIT else None
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_padding()
    if max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length, direction=body.tokenizer.truncation_side)
    pad = body.tokenizer.pad_token_id
    return TokenizerSettings(tokenizer.to_str(), max_length, True, 0 if pad is None else int(pad), prefix)


def head_weights(model: SetFitModel) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the weights of a head: coefficients (n_classes, d) and intercept (n_classes,) of a softmax.

    A binary head is converted to two rows.

    Raises:
        ModelError: If the head is not a fitted logistic regression, or the model has no labels.
    """
    from sklearn.linear_model import LogisticRegression

    head = model.model_head
    if not isinstance(head, LogisticRegression) or not hasattr(head, "coef_"):
        raise ModelError(
            f"The head is a {type(head).__name__}; only a fitted logistic regression can be exported.",
            hint="Train the classifier with setfit-kd.",
        )
    if not model.labels:
        raise ModelError("The model has no labels.", hint="Set model.labels.")
    coef, intercept = np.asarray(head.coef_, np.float32), np.asarray(head.intercept_, np.float32)
    if len(coef) == 1:
        coef, intercept = np.concatenate([0 * coef, coef]), np.concatenate([0 * intercept, intercept])
    return coef, intercept


def labels_json(model: SetFitModel) -> str:
    """Return the names of the classes as JSON."""
    return json.dumps([str(label) for label in model.labels or ()], ensure_ascii=False, indent=1) + "\n"
