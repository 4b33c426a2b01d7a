"""Loss of the first and last tokens of answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setfit_kd.losses.tokens import TokenLoss
from setfit_kd.qa.windows import UNKNOWN


class AnswerLoss(TokenLoss):
    """Cross-entropy of the first and last token of the answer, and KL divergence from a teacher's distributions.

    Both are means over the first and the last token. With a teacher, the loss of a window is T² KL(teacher at T ‖
    student at T). If the gold answer is known, this term has weight 1 - alpha, and the cross-entropy at T = 1 has
    weight alpha. Only the tokens of the context and the first token, which stands for no answer, can be chosen. The
    loss is the mean over the windows of the batch.

    Args:
        model: The body to train, see `TokenModel`.
        temperature: T, above 0.
        alpha: Weight of the gold answer, from 0 to 1.
        options: See `TokenLoss`.

    References:
        - Hinton, Vinyals and Dean, 2015, "Distilling the Knowledge in a Neural Network".

    Inputs:
        Windows of T tokens with ``answer_mask`` (B, T), true for tokens that can be chosen, and ``answer_tokens``
        (B, 2), the first and last token of the gold answer or `UNKNOWN`.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 2.0, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(model, **options)
        self.temperature, self.alpha = temperature, alpha

    def count_targets(self, features: dict[str, Tensor]) -> int:
        """Count the windows."""
        return len(features["answer_tokens"])

    def sum_loss(self, features: dict[str, Tensor]) -> Tensor:
        """Compute the sum of the losses of the windows of a chunk."""
        gold, mask = features["answer_tokens"], features["answer_mask"][:, None]
        logits = answer_logits(self.model, features)  # (B, 2, T)
        targets = gold.clamp(min=0)[..., None]
        hard = -_log_softmax(logits, mask).gather(2, targets).mean(dim=(1, 2))  # (B,)
        is_known = gold[:, 0] != UNKNOWN
        if (teacher := self.teacher) is None:
            return (hard * is_known).sum()
        with torch.no_grad():
            target = _log_softmax(answer_logits(teacher, features) / self.temperature, mask)
        student = _log_softmax(logits / self.temperature, mask)
        soft = self.temperature**2 * (target.exp() * (target - student)).sum(dim=2).mean(dim=1)
        share = self.alpha * is_known
        return (share * hard + (1 - share) * soft).sum()


def answer_logits(body: Any, features: dict[str, Tensor]) -> Tensor:
    """Compute the logits that a token is the first, and the last, of the answer: (B, 2, T) float32."""
    output = body[0].apply_head(body(dict(features))["token_embeddings"])
    return torch.stack([output.start_logits, output.end_logits], dim=1).float()


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the log-softmax over the tokens in a mask; others get a finite number, whose exponential is 0."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).log_softmax(dim=-1)
