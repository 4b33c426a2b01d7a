"""Batches whose texts are embedded by several processes, as if by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from setfit_kd.distributed.ranks import OtherRanks, connection_errors, other_ranks
from setfit_kd.losses.base import BatchLoss, take_texts, text_lengths, to_float32
from setfit_kd.losses.tokens import TokenLoss
from setfit_kd.models.bodies import is_static
from setfit_kd.training.precision import training_attention

logger = logging.getLogger(__name__)


def share_batches(body: Any, loss: BatchLoss, arguments: Any) -> SharedBatches | None:
    """Let all processes embed the texts of a loss; None if rank 0 trains alone, as with losses over tokens.

    ``arguments`` are those of transformers' trainer.
    """
    ranks = other_ranks()
    if ranks is None:
        return None
    if isinstance(loss, TokenLoss) or is_static(body) or arguments.device.type == "mps":
        logger.warning("Training in one of the %d processes: static models, QA and MLM are not split.", ranks.count + 1)
        return None
    return SharedBatches(ranks, loss, arguments)


class SharedBatches:
    """Batches of a training on rank 0, which computes the loss; all processes embed some texts of each batch.

    The embeddings and their gradients are exchanged, then the gradients of the body's weights are summed on rank 0.
    """

    def __init__(self, ranks: OtherRanks, loss: BatchLoss, arguments: Any) -> None:
        self._ranks, self._loss, self._seed, self._column = ranks, loss, arguments.seed, 0
        ranks.submit(_start, [(_Part(loss, bf16=arguments.bf16, fp16=arguments.fp16),)] * ranks.count)
        ranks.collect()
        loss.shared_embed = self._embed

    def run_step(self, run: Callable[[], Tensor], step: int) -> Tensor:
        """Run the forward and backward pass of a training step, whose gradients are then those of the whole batch."""
        ranks, self._column = self._ranks, 0
        with ranks.session():
            seeds = [hash((self._seed, step, rank)) % 2**32 for rank in range(ranks.count)]  # of the dropout
            ranks.submit(_call, [("begin", self._loss.micro_batch_size, seed) for seed in seeds])
            _exchange(distributed.broadcast, _state(self._loss.model))
            loss = run()
            gradients = [weight.grad for weight in _weights(self._loss.model)]
            ranks.submit(_call, [("sum_gradients", [gradient is not None for gradient in gradients])] * ranks.count)
            _exchange(distributed.reduce, [gradient for gradient in gradients if gradient is not None])
            ranks.collect()
        return loss

    def _embed(self, features: dict[str, Tensor], n_columns: int) -> Tensor:
        """Embed the B texts of the next column: (B, d)."""
        mask, column = features["attention_mask"], self._column
        self._column += 1
        lengths = text_lengths(mask)
        rows = self._ranks.deal(lengths)
        own, *others = (take_texts(features, mask, part, int(lengths[part[0]])) for part in rows)
        self._ranks.submit(_call, [("embed_column", column, part, n_columns) for part in others])
        parts = [self._loss.embed_rows(own, n_columns=n_columns), *self._ranks.collect()]
        if others:
            received = torch.cat(parts[1:]).to(mask.device).requires_grad_()

            def send_gradient(gradient: Tensor) -> None:
                gradients = torch.split(gradient, [len(part) for part in rows[1:]])
                self._ranks.submit(_call, [("backward", column, part.clone()) for part in gradients])

            received.register_hook(send_gradient)  # type: ignore[no-untyped-call]
            parts = [parts[0], received]
        return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(rows))).to(mask.device)]


class _Part(BatchLoss):
    """Embeddings of some texts of each batch, on another process than the loss."""

    def __init__(self, loss: BatchLoss, *, bf16: bool, fp16: bool) -> None:
        super().__init__(loss.model, dropout=loss.dropout)
        self._dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else None

    def begin(self, micro_batch_size: int | None, seed: int) -> None:
        """Begin a step, or begin it again, with the weights of rank 0."""
        self._columns: dict[int, tuple[Any, Tensor]] = {}
        self.micro_batch_size = micro_batch_size
        self.zero_grad(set_to_none=False)
        self.model.train(self.dropout)
        _exchange(distributed.broadcast, _state(self.model))
        torch.manual_seed(seed)

    def embed_column(self, column: int, features: dict[str, Any], n_columns: int) -> Tensor:
        """Embed the texts of a column, and keep the graph."""
        device = features["attention_mask"].device.type
        keeps_weights = self.micro_batch_size is None  # as in `LossTrainer.compute_loss`
        with self._attention(features), torch.autocast(device, enabled=False) if keeps_weights else nullcontext():
            embeddings = self.embed_rows(features, n_columns=n_columns)
        self._columns[column] = features, embeddings
        return embeddings.detach()

    def backward(self, column: int, gradient: Tensor) -> None:
        """Compute the gradients of the weights from that of the embeddings of a column, and add them."""
        features, embeddings = self._columns.pop(column)
        with self._attention(features):
            torch.autograd.backward(embeddings, gradient)

    def sum_gradients(self, is_used: list[bool]) -> None:
        """Add the gradients of the weights that the loss depends on to those of rank 0."""
        gradients = [weight.grad for weight in _weights(self.model) if weight.grad is not None]
        _exchange(distributed.reduce, [gradient for gradient, used in zip(gradients, is_used, strict=True) if used])

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Not used: rank 0 computes the loss."""
        raise NotImplementedError

    def _attention(self, features: dict[str, Any]) -> Any:
        return training_attention([features], bf16=self._dtype is torch.bfloat16)

    def _encode(self, features: dict[str, Tensor]) -> Tensor:
        device = features["attention_mask"].device.type
        with torch.autocast(device, dtype=self._dtype, enabled=self._dtype is not None):
            return to_float32(super()._encode(features))


def _weights(body: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in body.parameters() if weight.requires_grad]


def _state(body: nn.Module) -> list[Tensor]:
    return [*_weights(body), *(buffer for buffer in body.buffers() if buffer.is_floating_point())]


def _exchange(collective: Any, tensors: Sequence[Tensor]) -> None:
    """Broadcast tensors from rank 0, or sum them there, in place and at the same time on all processes."""
    with connection_errors():
        for work in [collective(tensor.detach(), 0, async_op=True) for tensor in tensors]:
            work.wait()


_parts: list[_Part] = []  # that of the current training, on a rank other than 0


def _start(part: _Part) -> None:
    _parts[:] = [part]
    for weight in _weights(part.model):  # an exchange must not allocate memory: the others would wait if that failed
        weight.grad = torch.zeros_like(weight)


def _call(name: str, *arguments: Any) -> Any:
    return getattr(_parts[0], name)(*arguments)
