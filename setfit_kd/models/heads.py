"""Heads: scikit-learn's logistic regression, fitted on soft or gold labels."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

logger = logging.getLogger(__name__)

HEAD_WEIGHTS = "head.safetensors"
HEAD_CONFIG = "head.json"
_FORMAT, _KIND = 1, "logistic-regression"
DEFAULT_C = 10.0


def new_head() -> LogisticRegression:
    """Create an unfitted head."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=DEFAULT_C, max_iter=1000)


def fit_head(
    embeddings: npt.NDArray[np.floating],
    probabilities: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating] | None = None,
    *,
    C: float = DEFAULT_C,  # noqa: N803 - scikit-learn's name
    balance: bool = False,
) -> LogisticRegression:
    """Fit a logistic regression to soft labels.

    Minimizes ``C * sum_i w_i CE(p_i, softmax(W x_i + b)) + |W|² / 2`` by L-BFGS. This is scikit-learn's objective with
    distributions instead of hard labels. Memory is that of the embeddings in double precision, regardless of the
    number of classes.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes), rows summing to 1; at least two classes.
        weights: (n,) weight of each text; None weights all texts equally.
        C: Inverse of the regularization strength, as in scikit-learn.
        balance: Give all classes the same total weight, regardless of their frequency.

    Returns:
        A head over the classes 0 to n_classes - 1.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit, logsumexp

    features = np.asarray(embeddings, np.float64)
    targets = np.asarray(probabilities, np.float64)
    n, d = features.shape
    share = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if balance:
        targets, share = _balanced(targets, share)
    total = max(share.sum(), np.finfo(np.float64).tiny)
    share = share / total
    penalty = 1 / (C * total)
    is_binary = targets.shape[1] == 2
    n_rows = 1 if is_binary else targets.shape[1]

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        matrix = flat.reshape(n_rows, d + 1)
        coef, intercept = matrix[:, :d], matrix[:, d]
        logits = features @ coef.T + intercept  # (n, n_rows)
        if is_binary:
            z, p = logits[:, 0], targets[:, 1]
            loss = -(share * (p * log_expit(z) + (1 - p) * log_expit(-z))).sum()
            slope = (share * (expit(z) - p))[:, None]
        else:
            log_probabilities = logits - logsumexp(logits, axis=1, keepdims=True)
            loss = -(share[:, None] * targets * log_probabilities).sum()
            slope = share[:, None] * (np.exp(log_probabilities) - targets)
        gradient = np.empty_like(matrix)
        gradient[:, :d] = slope.T @ features + penalty * coef
        gradient[:, d] = slope.sum(axis=0)
        return float(loss + 0.5 * penalty * np.square(coef).sum()), gradient.ravel()

    result = minimize(
        objective,
        np.zeros(n_rows * (d + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "gtol": 1e-5, "ftol": 1e-10},
    )
    if not result.success:
        logger.debug("Fitting the head did not converge: %s", result.message)
    matrix = result.x.reshape(n_rows, d + 1)
    head = new_head().set_params(C=C)
    head.classes_ = np.arange(targets.shape[1])
    head.coef_, head.intercept_ = matrix[:, :d].copy(), matrix[:, d].copy()
    head.n_features_in_, head.n_iter_ = d, np.array([result.nit], np.int32)
    return head


def softmax_weights(head: LogisticRegression) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Return weights (n_classes, d) and biases (n_classes,) of a softmax with the probabilities of a head."""
    coef, intercept = head.coef_, head.intercept_
    if len(coef) == 1:  # a binary head has a single row
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return coef, intercept


def _balanced(
    targets: npt.NDArray[np.float64], share: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rescale labels and weights so that all classes with any weight have the same total; the overall sum is kept."""
    mass = share @ targets  # (n_classes,)
    present = mass > 1e-9 * share.sum()
    factor = np.where(present, share.sum() / present.sum() / np.where(present, mass, 1), 0)
    scaled = targets * factor
    row_sums = scaled.sum(axis=1)
    return scaled / np.maximum(row_sums, 1e-300)[:, None], share * row_sums


def resolve_c(
    head_c: float | str,
    embeddings: npt.NDArray[np.floating] | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Resolve the setting of C: ``auto`` means `choose_c`, or `DEFAULT_C` without labeled texts."""
    if not isinstance(head_c, str):
        return head_c
    if embeddings is None or labels is None or not len(labels):
        return DEFAULT_C
    return choose_c(embeddings, labels, seed=seed)


C_GRID = (1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 5


def choose_c(embeddings: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], *, seed: int = 0) -> float:
    """Choose the C of `C_GRID` with the lowest log loss on gold labels in stratified cross-validation.

    If a class has only one text, which cannot be held out, the result is `DEFAULT_C`.

    Args:
        embeddings: (n, d) of labeled texts.
        labels: (n,) their classes, from 0.
        seed: Seed of the folds.
    """
    from sklearn.model_selection import StratifiedKFold

    folds = min(_FOLDS, int(np.bincount(labels).min()))
    if folds < 2:
        return DEFAULT_C
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(embeddings, labels))

    def loss(c: float) -> float:
        losses = []
        for training, held_out in splits:
            predicted = fit_head(embeddings[training], one_hot[training], C=c).predict_proba(embeddings[held_out])
            losses.append(-np.log(np.maximum(predicted[np.arange(len(held_out)), labels[held_out]], 1e-12)).mean())
        return float(np.mean(losses))

    return min(C_GRID, key=loss)


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
    """Read a head written by `save_head`; None if the folder has none.

    Raises:
        ModelError: If the files are damaged, do not match or have a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / HEAD_CONFIG).is_file():
        return None
    try:
        description = read_json(folder / HEAD_CONFIG)
        weights = load_file(check_regular_file(folder / HEAD_WEIGHTS))
        if description["format"] != _FORMAT or description["kind"] != _KIND:
            kind, number = description["kind"], description["format"]
            raise ModelError(
                f"The head in {folder} must be {_KIND} of format {_FORMAT}, got {kind} of format {number}.",
                hint="Upgrade setfit-kd.",
            )
        head = new_head()
        head.classes_ = np.array(description["classes"]).reshape(len(description["classes"]))
        head.coef_, head.intercept_ = weights["coef"], weights["intercept"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"Cannot read the head in {folder}: {error}", hint="Train the model again.") from None
    n_rows = 1 if len(head.classes_) == 2 else len(head.classes_)
    if head.coef_.ndim != 2 or head.coef_.shape[0] != n_rows or head.intercept_.shape != (n_rows,):
        n_classes = len(head.classes_)
        raise ModelError(f"The head in {folder} does not match its {n_classes} classes.", hint="Train the model again.")
    if not (np.isfinite(head.coef_).all() and np.isfinite(head.intercept_).all()):
        raise ModelError(f"The weights of the head in {folder} are not all finite.", hint="Train the model again.")
    head.n_features_in_ = head.coef_.shape[1]
    return head
