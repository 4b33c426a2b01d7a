"""Heads: logistic regression on soft or gold labels, its temperature, and its equivalent in a transformer."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError
from setfit_kd.tasks.classification import MULTI_LABEL, SINGLE_LABEL, Task
from setfit_kd.utils.arrays import Floats, sample_rows
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

HEAD_WEIGHTS, HEAD_CONFIG = "head.safetensors", "head.json"
_KINDS = {SINGLE_LABEL: "logistic-regression", MULTI_LABEL: "one-vs-rest"}
C_PER_CLASS = 2.5
"""Default of C, divided by the number of classes, or by two for a label: with more, margins need larger weights."""
_MAX_PRODUCTS = 1_000  # of a Hessian and a vector in one fit, which bounds its time; few fits need half as many
_FOLDS, _MAX_TEXTS = 5, 5_000  # of `held_out_logits`; a single parameter needs no more texts


def new_head(task: Task = SINGLE_LABEL) -> Any:
    """Create an unfitted head: a logistic regression or, for a multi-label task, one for each label."""
    from sklearn.linear_model import LogisticRegression

    head = LogisticRegression(max_iter=1000)
    if task is SINGLE_LABEL:
        return head
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(head)


def create_head(classes: Any, coef: Any, intercept: Any, task: Task = SINGLE_LABEL) -> Any:
    """Create a head with weights (n_classes, d) and biases (n_classes,); its probabilities are those of the task."""
    head = new_head(task)
    if task is MULTI_LABEL:
        from sklearn.preprocessing import LabelBinarizer

        rows = zip(coef, intercept, strict=True)
        head.estimators_ = [create_head(np.arange(2), row[None], np.array([bias])) for row, bias in rows]
        head.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(np.eye(len(coef), dtype=int))
        head.classes_, head.n_features_in_ = head.label_binarizer_.classes_, coef.shape[1]
        return head
    if len(coef) == 2:  # a binary head has a single row
        coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    head.classes_, head.coef_, head.intercept_, head.n_features_in_ = classes, coef, intercept, coef.shape[1]
    return head


def head_task(head: Any) -> Task:
    """Return the task of a fitted head."""
    # scikit-learn's one-vs-rest has the first attribute, SetFit's own head the second.
    return MULTI_LABEL if any(getattr(head, name, False) for name in ("multilabel_", "multitarget")) else SINGLE_LABEL


def head_thresholds(head: Any) -> Floats | None:
    """Return the (n_classes,) thresholds of a multi-label head; None if there are none, which means 0.5."""
    return getattr(head, "thresholds_", None)


def set_thresholds(head: Any, thresholds: Floats | None) -> Any:
    """Return a copy of a multi-label head with (n_classes,) thresholds."""
    head = copy.copy(head)
    head.thresholds_ = thresholds
    return head


def fit_head(
    embeddings: Floats,
    probabilities: Floats,
    weights: Floats | None = None,
    *,
    task: Task = SINGLE_LABEL,
    C: float | None = None,  # noqa: N803 - scikit-learn's name
    class_weights: Floats | None = None,
    start: Any = None,
) -> Any:
    """Fit a logistic regression over the classes 0 to n_classes - 1 to soft labels; if multi-label, one for each label.

    Minimizes ``C * sum_i w_i CE(p_i, softmax(W x_i + b)) + v |W|² / 2``, to about 1e-4 in the probabilities, where v is
    the mean squared distance of the embeddings from their mean; with a sigmoid instead of the softmax for a multi-label
    task. This is scikit-learn's objective on embeddings that are scaled to v = 1, with probabilities instead of hard
    labels: the result does not depend on the scale. The method is truncated Newton in a trust region (Steihaug, 1983)
    on whitened embeddings. Memory is that of the embeddings and the probabilities in float64.

    Args:
        embeddings: (n, d).
        probabilities: (n, n_classes); for a single-label task with at least two classes and rows summing to 1.
        weights: (n,) weight of each text or, in a multi-label task, (n, n_classes) of its labels; None: all equal.
        task: The task.
        C: Inverse of the regularization strength, as in scikit-learn. [default: `C_PER_CLASS` times n_classes, of one
            label two]
        class_weights: (n_classes,) factor of the loss of each class of a single-label task; the total weight of the
            texts does not change.
        start: Head over the same classes to start from; the closer to the result, the faster the fit.
    """
    from scipy.linalg import eigh, svd
    from scipy.optimize import minimize

    features, targets = np.array(embeddings, np.float64), np.asarray(probabilities, np.float64)
    is_single, n_classes = task is SINGLE_LABEL, targets.shape[1]
    n_alternatives = n_classes if is_single else 2
    C = C_PER_CLASS * n_alternatives if C is None else C  # noqa: N806
    share = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
    share = share.reshape(len(features), -1)  # (n, 1), or one weight for each label
    if class_weights is not None:
        targets = targets * class_weights
        factors = targets.sum(axis=1, keepdims=True)
        share = share * factors * (share.sum() / (share * factors).sum())
    if is_single:
        targets = targets / np.maximum(targets.sum(axis=1, keepdims=True), 1e-300)
    total = max(share.sum() / share.shape[1], np.finfo(np.float64).tiny)
    share = share / total
    text_share = share.mean(axis=1)
    mean, squared_norm = text_share @ features, text_share @ np.square(features).sum(axis=1)
    features -= mean
    # Embeddings that differ only by rounding errors are not scaled up.
    spread = max(text_share @ np.square(features).sum(axis=1), 1e-12 * squared_norm) or 1.0
    # Two classes are a softmax over rows of opposite signs, half as long as the single row that is penalized.
    penalty = (2 if is_single and n_classes == 2 else 1) * spread / (C * total)
    if len(features) < features.shape[1]:
        _, deviations, rows = svd(np.sqrt(text_share)[:, None] * features, full_matrices=False)
        variances, axes = deviations**2, rows.T
    else:
        variances, axes = eigh(features.T @ (text_share[:, None] * features))
    # Along the principal axes, and scaled by the expected curvature, the Hessian is close to the identity.
    curvature = 0.1 / n_alternatives  # p (1 - p) of fairly confident predictions
    scales = 1 / np.sqrt(curvature * np.maximum(variances, 0) + penalty)
    axes *= scales  # (d, r), where r = min(n, d)
    whitened = np.column_stack([features @ axes, np.full(len(features), curvature**-0.5)])  # last: the intercept
    del features
    penalties = np.append(penalty * scales**2, 0)
    rounded, rounded_share = whitened.astype(np.float32), share.astype(np.float32)
    current, predicted, n_products = np.empty(0), np.empty(0, np.float32), 0

    def objective(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        nonlocal current, predicted
        matrix = flat.reshape(n_classes, -1)
        slope = whitened @ matrix.T  # logits (n, n_classes)
        if is_single:
            slope -= slope.max(axis=1, keepdims=True)
            loss = -share[:, 0] @ np.einsum("ij,ij->i", targets, slope)
            np.exp(slope, out=slope)
            sums = slope.sum(axis=1, keepdims=True)
            slope /= sums
            loss += share[:, 0] @ np.log(sums[:, 0])
        else:
            loss = (share * (np.logaddexp(0, slope) - targets * slope)).sum()
            slope = task.to_probabilities(slope)
        current, predicted = flat.copy(), slope.astype(np.float32)
        slope = share * (slope - targets)
        loss += 0.5 * (np.square(matrix) @ penalties).sum()
        return float(loss), (slope.T @ whitened + penalties * matrix).ravel()

    def hessian_product(flat: npt.NDArray[np.float64], direction: npt.NDArray[np.float64]) -> Any:
        nonlocal n_products
        n_products += 1
        if n_products > _MAX_PRODUCTS:
            raise StopIteration
        if not np.array_equal(flat, current):  # the last step was rejected
            objective(flat)
        matrix = direction.reshape(n_classes, -1)
        change = rounded @ matrix.T.astype(np.float32)  # float32 suffices: only the gradient decides on the result
        if is_single:
            change -= np.einsum("ij,ij->i", predicted, change)[:, None]
        else:
            change *= 1 - predicted
        change *= predicted * rounded_share
        return (change.T @ rounded + penalties * matrix).ravel()

    initial = np.zeros((n_classes, len(penalties)))
    if start is not None:
        coef, intercept = linear_weights(start)
        initial = np.column_stack([coef @ axes / scales**2, (intercept + coef @ mean) * curvature**0.5])
    steps = [initial.ravel()]
    options: Any = {"method": "trust-ncg", "options": {"gtol": 1e-5, "maxiter": 200}, "callback": steps.append}
    with suppress(StopIteration):  # the limit of Hessian products: the last step is the best so far
        minimize(objective, steps[0], jac=True, hessp=hessian_product, **options)
    matrix = steps[-1].reshape(n_classes, -1)
    coef = matrix[:, :-1] @ axes.T
    head = create_head(np.arange(n_classes), coef, matrix[:, -1] * curvature**-0.5 - coef @ mean, task)
    head.C, head.n_iter_ = C, np.array([len(steps) - 1], np.int32)
    return head


def balanced_weights(counts: npt.NDArray[np.int64], exponent: float, task: Task = SINGLE_LABEL) -> Floats | None:
    """Return class weights for (n_classes,) numbers of labels: their power -exponent, 1 on average over the texts.

    An exponent of 0 weights all texts equally, 1 all classes. None if the weights are all equal, or multi-label.
    """
    weights = np.maximum(counts, 1.0) ** -exponent
    if np.ptp(weights) == 0 or task is MULTI_LABEL:
        return None
    return np.asarray(weights * counts.sum() / (counts @ weights))


def linear_weights(head: Any) -> tuple[Floats, Floats]:
    """Return weights (n_classes, d) and biases (n_classes,) of a softmax, or sigmoids, with a head's probabilities."""
    if head_task(head) is MULTI_LABEL:
        rows = head.estimators_
        return np.concatenate([row.coef_ for row in rows]), np.concatenate([row.intercept_ for row in rows])
    coef, intercept = head.coef_, head.intercept_
    if len(coef) == 1:  # a binary head has a single row
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return coef, intercept


def last_layer(body: SentenceTransformer) -> nn.Linear:
    """Return the last layer of a transformer, which maps (B, d) embeddings to (B, n_classes) logits."""
    module: Any = body[0]
    return module.head  # type: ignore[no-any-return]


def get_head(body: SentenceTransformer) -> Any:
    """Convert the last layer of a transformer to a head with the same probabilities."""
    module: Any = body[0]
    weight, bias = (value.detach().cpu().double().numpy() for value in last_layer(body).parameters())
    return create_head(np.arange(len(weight)), weight, bias, module.task)


def set_head(head: Any, body: SentenceTransformer) -> None:
    """Set the last layer of a transformer to the probabilities of a head over its features."""
    import torch

    if all(map(np.array_equal, linear_weights(get_head(body)), linear_weights(head))):
        return  # converting a binary head back and forth would change the last digits
    with torch.no_grad():
        for parameter, value in zip(last_layer(body).parameters(), linear_weights(head), strict=True):
            parameter.copy_(torch.as_tensor(value))


def head_logits(head: Any, embeddings: Floats) -> npt.NDArray[np.float64]:
    """Compute the logits of a head: (n, d) to (n, n_classes)."""
    coef, intercept = linear_weights(head)
    return np.asarray(np.asarray(embeddings, np.float64) @ coef.T + intercept)


def head_at_temperature(head: Any, temperature: float) -> Any:
    """Return a head with the probabilities of ``head`` at a temperature, without thresholds."""
    coef, intercept = linear_weights(head)
    return create_head(head.classes_, coef / temperature, intercept / temperature, head_task(head))


def shift_intercepts(head: Any, shift: Floats) -> Any:
    """Return a copy of a multi-label head with (n_classes,) numbers added to its logits."""
    coef, intercept = linear_weights(head)
    return create_head(head.classes_, coef, intercept + shift, MULTI_LABEL)


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


def at_temperature(probabilities: Floats, temperature: float, task: Task = SINGLE_LABEL) -> npt.NDArray[np.float64]:
    """Apply a temperature to (n, n_classes) probabilities: above 1 makes them flatter, below 1 sharper."""
    return np.asarray(task.to_probabilities(task.to_logits(probabilities) / temperature))


def fit_temperature(logits: Floats, targets: Floats, *, task: Task = SINGLE_LABEL, prior: float = math.inf) -> float:
    """Fit the temperature, from 1/20 to 20, with the lowest cross-entropy of (n, n_classes) logits and probabilities.

    As in Guo et al., 2017, "On Calibration of Modern Neural Networks". Without texts, the result is 1. ``prior`` is the
    standard deviation of a normal prior of its logarithm, which keeps it near 1 if there are few texts.
    """
    from scipy.optimize import minimize_scalar

    if not len(logits):
        return 1.0

    def cross_entropy(log_temperature: float) -> float:
        losses = task.cross_entropy(logits / np.exp(log_temperature), targets)
        return float(losses.mean() + (log_temperature / prior) ** 2 / (2 * len(losses)))

    result = minimize_scalar(cross_entropy, bounds=(np.log(1 / 20), np.log(20.0)), method="bounded")
    return float(np.exp(result.x))


def save_head(head: Any, folder: Path) -> None:
    """Write logistic regressions as ``head.safetensors`` and ``head.json``; skip any other head."""
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression

    task = head_task(head)
    rows = head.estimators_ if task is MULTI_LABEL else [head]
    if all(isinstance(row, LogisticRegression) for row in rows):
        coef, intercept = linear_weights(head) if task is MULTI_LABEL else (head.coef_, head.intercept_)
        weights = {"coef": np.ascontiguousarray(coef), "intercept": np.ascontiguousarray(intercept)}
        if (thresholds := head_thresholds(head)) is not None:
            weights["thresholds"] = np.asarray(thresholds, np.float64)
        save_file(weights, folder / HEAD_WEIGHTS)
        description = {"format": 1, "kind": _KINDS[task], "classes": head.classes_.tolist()}
        (folder / HEAD_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_head(folder: Path) -> Any:
    """Read a head written by `save_head`; None if the folder has none. Damaged files are a `ModelError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / HEAD_CONFIG).is_file():
        return None
    try:
        description = read_json(folder / HEAD_CONFIG)
        weights = load_file(check_regular_file(folder / HEAD_WEIGHTS))
        kind, version = description["kind"], description["format"]
        task = next((task for task, name in _KINDS.items() if name == kind), None)
        if task is None or version != 1:
            raise ValueError(f"expected {' or '.join(_KINDS.values())} of format 1, got {kind} of format {version}")
        classes, coef, intercept = np.array(description["classes"]), weights["coef"], weights["intercept"]
        n_rows = 1 if task is SINGLE_LABEL and len(classes) == 2 else len(classes)
        if classes.ndim != 1 or coef.ndim != 2 or len(coef) != n_rows or intercept.shape != (n_rows,):
            raise ValueError(f"the weights do not match the {len(classes)} classes")
        if not all(np.isfinite(weight).all() for weight in weights.values()):
            raise ValueError("the weights are not all finite")
        thresholds = weights.get("thresholds")
        if thresholds is not None and (task is SINGLE_LABEL or thresholds.shape != (n_rows,)):
            raise ValueError(f"the thresholds do not match the {len(classes)} classes")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        message = f"Cannot read the head in {folder}: {error}."
        raise ModelError(message, hint="Train the model again, or upgrade setfit-kd if it is newer.") from None
    head = create_head(classes, coef, intercept, task)
    return head if thresholds is None else set_thresholds(head, thresholds)
