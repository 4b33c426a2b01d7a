"""Convert between the last layer of a transformer and a logistic regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.models.heads import new_head, softmax_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from torch import nn

    from setfit_kd.models.transformer import TransformerFeatures


def transformer_module(body: SentenceTransformer) -> TransformerFeatures:
    """Return the only module of a body of the transformer family."""
    first: Any = body[0]
    return first  # type: ignore[no-any-return]


def last_layer(body: SentenceTransformer) -> nn.Linear:
    """Return the last layer of a transformer, which maps (B, d) embeddings to (B, n_classes) logits."""
    return transformer_module(body).head


def get_head(body: SentenceTransformer) -> LogisticRegression:
    """Convert the last layer of a transformer to a logistic regression with the same probabilities."""
    layer = last_layer(body)
    weight, bias = layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy()
    head = new_head()
    head.classes_ = np.arange(len(weight))
    if len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    head.coef_, head.intercept_ = weight, bias
    head.n_features_in_ = weight.shape[1]
    return head


def set_head(head: LogisticRegression, body: SentenceTransformer) -> None:
    """Set the last layer of a transformer to the probabilities of a logistic regression over its features."""
    import torch

    current = get_head(body)
    if np.array_equal(current.coef_, head.coef_) and np.array_equal(current.intercept_, head.intercept_):
        return  # converting a binary head back and forth would change the last digits
    layer = last_layer(body)
    weight, bias = softmax_weights(head)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(bias))
