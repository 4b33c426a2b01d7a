"""The last layer of a transformer, which is its head."""

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
    """The one module of a body of the transformer family."""
    first: Any = body[0]
    return first  # type: ignore[no-any-return]


def last_layer(body: SentenceTransformer) -> nn.Linear:
    """From (B, d) features, the embeddings of a body of the transformer family, to (B, n_classes) logits."""
    return transformer_module(body).head


def get_head(body: SentenceTransformer) -> LogisticRegression:
    """The last layer of a transformer as the logistic regression that gives the same probabilities."""
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
    """Make the last layer of a transformer give the probabilities of a logistic regression over its features."""
    import torch

    own = get_head(body)
    if np.array_equal(own.coef_, head.coef_) and np.array_equal(own.intercept_, head.intercept_):
        return  # two rows less one another would not come back to the last digit
    layer = last_layer(body)
    weight, bias = softmax_weights(head)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(bias))
