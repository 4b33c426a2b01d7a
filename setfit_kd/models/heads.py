"""Heads: scikit-learn's logistic regression, fitted on soft and gold labels alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

HEAD_WEIGHTS = "head.safetensors"
HEAD_CONFIG = "head.json"
_FORMAT, _KIND = 1, "logistic-regression"
_NEGLIGIBLE = 1e-3
_VANISHING = 1e-6


def new_head() -> LogisticRegression:
    """An unfitted head; tight and long enough to converge on any set of a few thousand texts."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)


def fit_head(
    embeddings: npt.NDArray[np.float32],
    probabilities: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32] | None = None,
) -> LogisticRegression:
    """Fit a logistic regression to soft labels by weighted cross-entropy.

    A text with soft label p enters once for each class c, with weight p[c]: the sum of the weighted log-losses is the
    cross-entropy against p, so any solver that takes sample weights minimises it. Shares below 0.001 are left out,
    which keeps the rows near n for confident teachers. A class without any share keeps its place in the head, by a
    vanishing weight on the text nearest to it.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes), rows summing to 1; two classes or more.
        weights: (n,) weight of each text; None weighs all alike.
    """
    rows, classes = np.nonzero(probabilities > _NEGLIGIBLE)
    sample_weight = probabilities[rows, classes].astype(np.float64)
    if weights is not None:
        sample_weight = sample_weight * weights[rows]
    empty = np.setdiff1d(np.arange(probabilities.shape[1]), classes[sample_weight > 0])
    rows = np.concatenate([rows, probabilities[:, empty].argmax(axis=0)])
    classes = np.concatenate([classes, empty])
    sample_weight = np.concatenate([sample_weight, np.full(len(empty), _VANISHING)])
    head = new_head()
    head.fit(embeddings[rows], classes, sample_weight=sample_weight)
    return head


def save_head(head: Any, folder: Path) -> bool:
    """Write a logistic regression as ``head.safetensors`` and ``head.json``; return False for any other head."""
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression

    if not isinstance(head, LogisticRegression):
        return False
    weights = {"coef": np.ascontiguousarray(head.coef_), "intercept": np.ascontiguousarray(head.intercept_)}
    save_file(weights, folder / HEAD_WEIGHTS)
    description = {"format": _FORMAT, "kind": _KIND, "classes": head.classes_.tolist()}
    (folder / HEAD_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return True


def load_head(folder: Path) -> LogisticRegression | None:
    """Read a head that `save_head` wrote; None where there is none.

    Raises:
        ModelError: The files do not belong together or are of a later format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / HEAD_CONFIG).is_file():
        return None
    try:
        description = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / HEAD_WEIGHTS)
        if description["format"] != _FORMAT or description["kind"] != _KIND:
            raise ModelError(
                f"The head in {folder} is {description['kind']} of format {description['format']}; this version reads "
                f"{_KIND} of format {_FORMAT}.",
                hint="Upgrade setfit-kd.",
            )
        head = new_head()
        head.classes_ = np.array(description["classes"]).reshape(len(description["classes"]))
        head.coef_, head.intercept_ = weights["coef"], weights["intercept"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"The head in {folder} cannot be read ({error}).", hint="Train the model again.") from None
    n_rows = 1 if len(head.classes_) == 2 else len(head.classes_)
    if head.coef_.ndim != 2 or head.coef_.shape[0] != n_rows or head.intercept_.shape != (n_rows,):
        raise ModelError(f"The head in {folder} does not fit its {len(head.classes_)} classes.", hint="Train it again.")
    head.n_features_in_ = head.coef_.shape[1]
    return head
