"""What of a classifier goes into a bundle: its modules, its head and its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.models import default_prompt, is_static

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel

_ANY_LENGTH = 1_000_000
"""Tokenizers that know no longest text say a number far above this."""


@dataclass(frozen=True)
class TokenizerSettings:
    """How texts become token ids: the fields of a manifest that say so, and ``tokenizer.json``, which cuts texts."""

    tokenizer: str
    max_length: int | None
    special_tokens: bool
    pad_id: int
    prefix: str


def tokenizer_settings(body: SentenceTransformer) -> TokenizerSettings:
    """How a body reads texts.

    Raises:
        ModelError: Its tokenizer is not a fast one.
    """
    from tokenizers import Tokenizer

    prefix = default_prompt(body)
    if prefix and not all(getattr(module, "include_prompt", True) for module in body):
        raise ModelError("A body that leaves its prompt out of its embedding cannot be exported.")
    if is_static(body):
        cut = body.tokenizer.truncation
        return TokenizerSettings(body.tokenizer.to_str(), cut and int(cut["max_length"]), False, 0, prefix)
    backend = getattr(body.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("Only models with a fast tokenizer can be exported.", hint="Train a student on another body.")
    limits = (body.max_seq_length, body.tokenizer.model_max_length)
    length = min((limit for limit in limits if limit), default=_ANY_LENGTH)
    max_length = int(length) if length < _ANY_LENGTH else None
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_padding()
    if max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length, direction=body.tokenizer.truncation_side)
    pad = body.tokenizer.pad_token_id
    return TokenizerSettings(tokenizer.to_str(), max_length, True, 0 if pad is None else int(pad), prefix)


def head_weights(model: SetFitModel) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(n_classes, d) and (n_classes,) whose softmax gives the head's probabilities; two classes have two rows.

    Raises:
        ModelError: The head is no logistic regression.
    """
    from sklearn.linear_model import LogisticRegression

    head = model.model_head
    if not isinstance(head, LogisticRegression) or not hasattr(head, "coef_"):
        raise ModelError(
            f"The head is a {type(head).__name__}; only a fitted logistic regression can be exported.",
            hint="Train the classifier with setfit-kd.",
        )
    if not model.labels:
        raise ModelError("The model has no labels to name its classes by.", hint="Set model.labels.")
    coef, intercept = np.asarray(head.coef_, np.float32), np.asarray(head.intercept_, np.float32)
    if len(coef) == 1:
        coef, intercept = np.concatenate([0 * coef, coef]), np.concatenate([0 * intercept, intercept])
    return coef, intercept


def labels_json(model: SetFitModel) -> str:
    """The names of the classes as JSON."""
    return json.dumps([str(label) for label in model.labels or ()], ensure_ascii=False, indent=1) + "\n"
