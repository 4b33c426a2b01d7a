"""Masked language modeling loss, with optional distillation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from setfit_kd.losses.base import to_float32
from setfit_kd.losses.tokens import TokenLoss

IGNORED = -100
"""Label of the tokens that are not predicted."""


class MaskedLanguageLoss(TokenLoss):
    """Mean cross-entropy of the masked tokens; the head is computed for these only.

    With a teacher, the loss is alpha times the cross-entropy, plus 1 - alpha times T² KL(teacher at T ‖ student at T),
    both averaged over the masked tokens, plus a weight times the mean of 1 - cosine between the last hidden states of
    teacher and student, over all tokens without padding; the latter only if their dimensions agree.

    Args:
        model: The body to train, with an output for each token and a head.
        teacher: A body of the same kind that tokenizes alike; None without distillation.
        temperature: T, above 0.
        alpha: Weight of the cross-entropy, from 0 to 1.
        cosine_weight: Weight of the cosine loss.
        options: See `BatchLoss`.

    References:
        - Sanh et al., 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter".

    Inputs:
        One column with ``labels`` (B, T): ids of the masked tokens, and `IGNORED` for all others.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
        alpha: float = 0.1,
        cosine_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, teacher=teacher, **options)
        self.temperature, self.alpha, self.cosine_weight = temperature, alpha, cosine_weight

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Compute the loss, a scalar."""
        (features,) = sentence_features
        # Sums over a chunk are divided by the number of targets, which turns this factor into a mean over all tokens.
        factor = self.count_targets(features) / features["attention_mask"].sum()
        return super().forward([{**features, "cosine_factor": factor}], labels)

    def count_targets(self, features: dict[str, Tensor]) -> int:
        """Count the masked tokens."""
        return int((features["labels"] != IGNORED).sum())

    def sum_loss(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the sum of the losses of all masked tokens in the features of a chunk."""
        is_target = features["labels"] != IGNORED
        hidden, logits = _run(self.model, features, is_target)
        loss = cross_entropy(logits, features["labels"][is_target], reduction="sum")
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_hidden, teacher_logits = _run(self.teacher, features, is_target)
        student, target = (torch.log_softmax(x / self.temperature, dim=-1) for x in (logits, teacher_logits))
        divergence = kl_div(student, target, log_target=True, reduction="sum")
        loss = self.alpha * loss + (1 - self.alpha) * self.temperature**2 * divergence
        if hidden.shape == teacher_hidden.shape and self.cosine_weight:
            is_token = features["attention_mask"].bool()
            distance = 1 - cosine_similarity(hidden[is_token], teacher_hidden[is_token], dim=-1)
            loss = loss + self.cosine_weight * features["cosine_factor"] * distance.sum()
        return loss


def _run(body: Any, features: dict[str, Tensor], is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last hidden states (B, T, d) of a body, and its logits of the M targets, (M, n_tokens)."""
    hidden = to_float32(body(dict(features))["token_embeddings"])
    return hidden, to_float32(body[0].apply_head(hidden[is_target][None]).logits[0])
