"""Heads: logistic regression on soft or gold labels, its temperature, and its equivalent in a transformer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.utils.arrays import Floats, sample_rows
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from torch import nn

HEAD_WEIGHTS, HEAD_CONFIG, _KIND = "head.safetensors", "head.json", "logistic-regression"
DEFAULT_C, C_GRID = 10.0, (1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS, _MAX_TEXTS = 5, 5_000  # of `held_out_logits`; a single parameter needs no more texts


def new_head() -> LogisticRegression:
    """Create an unfitted head."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=DEFAULT_C, max_iter=1000)


def _create_head(classes: Any, coef: Any, intercept: Any) -> LogisticRegression:
    head = new_head()
    head.classes_, head.coef_, head.intercept_, head.n_features_in_ = classes, coef, intercept, coef.shape[1]
    return head


def fit_head(
    embeddings: Floats,
    probabilities: Floats,
    weights: Floats | None = None,
    *,
    C: float = DEFAULT_C,  # noqa: N803 - scikit-learn's name
    balance: bool = False,
) -> LogisticRegression:
    """Fit a logistic regression over the classes 0 to n_classes - 1 to soft labels.

    Minimizes ``C * sum_i w_i CE(p_i, softmax(W x_i + b)) + |W|² / 2`` by L-BFGS. This is scikit-learn's objective with
    distributions instead of hard labels. Memory is that of the embeddings in float64, for any number of classes.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes), rows summing to 1; at least two classes.
        weights: (n,) weight of each text; None weights all texts equally.
        C: Inverse of the regularization strength, as in scikit-learn.
        balance: Give all classes the same total weight, regardless of their frequency.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit, logsumexp

    features, targets = np.asarray(embeddings, np.float64), np.asarray(probabilities, np.float64)
    n, d = features.shape
    share = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if balance:  # all classes with any weight get the same total; the overall sum is kept
        mass = share @ targets  # (n_classes,)
        present = mass > 1e-9 * share.sum()
        targets = targets * np.where(present, share.sum() / present.sum() / np.where(present, mass, 1), 0)
        row_sums = targets.sum(axis=1)
        targets, share = targets / np.maximum(row_sums, 1e-300)[:, None], share * row_sums
    total = max(share.sum(), np.finfo(np.float64).tiny)
    share = share / total
    penalty = 1 / (C * total)
    n_classes = targets.shape[1]
    n_rows = 1 if n_classes == 2 else n_classes

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        matrix = flat.reshape(n_rows, d + 1)
        coef, intercept = matrix[:, :d], matrix[:, d]
        logits = features @ coef.T + intercept  # (n, n_rows)
        if n_classes == 2:
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

    options = {"maxiter": 1000, "gtol": 1e-5, "ftol": 1e-10}
    result = minimize(objective, np.zeros(n_rows * (d + 1)), jac=True, method="L-BFGS-B", options=options)
    matrix = result.x.reshape(n_rows, d + 1)
    head = _create_head(np.arange(n_classes), matrix[:, :d].copy(), matrix[:, d].copy())
    head.C, head.n_iter_ = C, np.array([result.nit], np.int32)
    return head


def softmax_weights(head: LogisticRegression) -> tuple[Floats, Floats]:
    """Return weights (n_classes, d) and biases (n_classes,) of a softmax with the probabilities of a head."""
    coef, intercept = head.coef_, head.intercept_
    if len(coef) == 1:  # a binary head has a single row
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return coef, intercept


def last_layer(body: SentenceTransformer) -> nn.Linear:
    """Return the last layer of a transformer, which maps (B, d) embeddings to (B, n_classes) logits."""
    module: Any = body[0]
    return module.head  # type: ignore[no-any-return]


def get_head(body: SentenceTransformer) -> LogisticRegression:
    """Convert the last layer of a transformer to a logistic regression with the same probabilities."""
    weight, bias = (value.detach().cpu().double().numpy() for value in last_layer(body).parameters())
    n_classes = len(weight)
    if n_classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return _create_head(np.arange(n_classes), weight, bias)


def set_head(head: LogisticRegression, body: SentenceTransformer) -> None:
    """Set the last layer of a transformer to the probabilities of a logistic regression over its features."""
    import torch

    current = get_head(body)
    if np.array_equal(current.coef_, head.coef_) and np.array_equal(current.intercept_, head.intercept_):
        return  # converting a binary head back and forth would change the last digits
    with torch.no_grad():
        for parameter, value in zip(last_layer(body).parameters(), softmax_weights(head), strict=True):
            parameter.copy_(torch.as_tensor(value))


def resolve_c(
    head_c: float | str, embeddings: Floats | None = None, labels: npt.NDArray[np.int64] | None = None, *, seed: int = 0
) -> float:
    """Resolve the setting of C from (n, d) embeddings of labeled texts and their (n,) classes, from 0.

    ``auto`` is the C of `C_GRID` with the lowest log loss in stratified cross-validation, or `DEFAULT_C` without that.
    """
    from sklearn.model_selection import StratifiedKFold

    if not isinstance(head_c, str):
        return head_c
    if embeddings is None or labels is None or not len(labels) or np.bincount(labels).min() < 2:
        return DEFAULT_C
    folds = StratifiedKFold(min(5, int(np.bincount(labels).min())), shuffle=True, random_state=seed)
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    splits = list(folds.split(embeddings, labels))

    def loss(c: float) -> float:
        losses = []
        for training, held_out in splits:
            predicted = fit_head(embeddings[training], one_hot[training], C=c).predict_proba(embeddings[held_out])
            losses.append(-np.log(np.maximum(predicted[np.arange(len(held_out)), labels[held_out]], 1e-12)).mean())
        return float(np.mean(losses))

    return min(C_GRID, key=loss)


def head_logits(head: Any, embeddings: Floats) -> npt.NDArray[np.float64]:
    """Compute the logits of a logistic regression: (n, d) to (n, n_classes); with two classes, the first's are 0."""
    logits: npt.NDArray[np.float64] = head.decision_function(np.asarray(embeddings, np.float64))
    return logits if logits.ndim == 2 else np.column_stack([np.zeros(len(logits)), logits])


def head_at_temperature(head: Any, temperature: float) -> Any:
    """Return a logistic regression with the probabilities of ``head`` at a temperature."""
    scaled = copy.copy(head)
    scaled.coef_, scaled.intercept_ = head.coef_ / temperature, head.intercept_ / temperature
    return scaled


def held_out_logits(
    embeddings: Floats, probabilities: Floats, weights: Floats, *, seed: int, **options: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Compute out-of-fold logits: each fold is predicted by a head fitted on the other folds, see `fit_head`.

    Return (k,) row indices of a sample of the texts and their (k, n_classes) logits.
    """
    rows = sample_rows(np.arange(len(embeddings)), _MAX_TEXTS, seed=[seed, 11])
    folds = np.random.default_rng([seed, 12]).permutation(len(rows)) % _FOLDS
    logits = np.zeros((len(rows), probabilities.shape[1]))
    for fold in range(min(_FOLDS, len(rows)) if len(rows) > 1 else 0):
        training, held_out = rows[folds != fold], rows[folds == fold]
        head = fit_head(embeddings[training], probabilities[training], weights[training], **options)
        logits[folds == fold] = head_logits(head, embeddings[held_out])
    return rows, logits


def log_probabilities(probabilities: Floats) -> npt.NDArray[np.float64]:
    """Compute logarithms of probabilities, finite even for 0; they are logits of the same distribution."""
    return np.asarray(np.log(np.maximum(np.asarray(probabilities, np.float64), np.finfo(np.float32).tiny)))


def at_temperature(probabilities: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Apply a temperature to (n, n_classes) probabilities: above 1 makes them flatter, below 1 sharper."""
    from scipy.special import softmax

    return np.asarray(softmax(log_probabilities(probabilities) / temperature, axis=1))


def fit_temperature(logits: Floats, targets: Floats) -> float:
    """Fit the temperature, from 1/20 to 20, with the lowest cross-entropy of (n, n_classes) logits and distributions.

    As in Guo et al., 2017, "On Calibration of Modern Neural Networks". Without texts, the result is 1.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if not len(logits):
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        return -float((targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    result = minimize_scalar(cross_entropy, bounds=(np.log(1 / 20), np.log(20.0)), method="bounded")
    return float(np.exp(result.x))


def save_head(head: Any, folder: Path) -> None:
    """Write a logistic regression as ``head.safetensors`` and ``head.json``; skip any other head."""
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression

    if isinstance(head, LogisticRegression):
        weights = {"coef": np.ascontiguousarray(head.coef_), "intercept": np.ascontiguousarray(head.intercept_)}
        save_file(weights, folder / HEAD_WEIGHTS)
        description = {"format": 1, "kind": _KIND, "classes": head.classes_.tolist()}
        (folder / HEAD_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_head(folder: Path) -> LogisticRegression | None:
    """Read a head written by `save_head`; None if the folder has none. Damaged files are a `ModelError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / HEAD_CONFIG).is_file():
        return None
    try:
        description = read_json(folder / HEAD_CONFIG)
        weights = load_file(check_regular_file(folder / HEAD_WEIGHTS))
        kind, version = description["kind"], description["format"]
        if (kind, version) != (_KIND, 1):
            raise ValueError(f"expected {_KIND} of format 1, got {kind} of format {version}")
        classes, coef, intercept = np.array(description["classes"]), weights["coef"], weights["intercept"]
        n_rows = 1 if len(classes) == 2 else len(classes)
        if classes.ndim != 1 or coef.ndim != 2 or len(coef) != n_rows or intercept.shape != (n_rows,):
            raise ValueError(f"the weights do not match the {len(classes)} classes")
        if not (np.isfinite(coef).all() and np.isfinite(intercept).all()):
            raise ValueError("the weights are not all finite")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        message = f"Cannot read the head in {folder}: {error}."
        raise ModelError(message, hint="Train the model again, or upgrade setfit-kd if it is newer.") from None
    return _create_head(classes, coef, intercept)
