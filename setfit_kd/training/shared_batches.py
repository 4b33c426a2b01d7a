"""Batches whose texts are embedded by several processes, as if by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from setfit_kd.distributed.ranks import OtherRanks, connection_errors, local_device, other_ranks
from setfit_kd.losses.base import BatchLoss, take_texts, text_lengths, to_float32
from setfit_kd.losses.tokens import TokenLoss
from setfit_kd.models.bodies import is_static
from setfit_kd.training.precision import training_attention

logger = logging.getLogger(__name__)


def share_batches(loss: BatchLoss, arguments: Any) -> SharedBatches | None:
    """Let all processes embed the texts of a loss; return None if rank 0 trains alone.

    ``arguments`` are those of transformers' trainer. Losses over tokens and static bodies are trained by rank 0.
    """
    ranks = other_ranks()
    if ranks is None:
        return None
    if isinstance(loss, TokenLoss) or is_static(loss.model) or arguments.device.type not in ("cpu", "cuda"):  # type: ignore[arg-type]
        logger.warning("This training uses only one of the %d processes.", ranks.count + 1)
        return None
    return SharedBatches(ranks, loss, arguments)


class SharedBatches:
    """Batches of a training on rank 0, which computes the loss; all processes embed some texts of each batch.

    The embeddings and their gradients are exchanged, then the gradients of the body's weights are summed on rank 0.
    """

    def __init__(self, ranks: OtherRanks, loss: BatchLoss, arguments: Any) -> None:
        self._ranks, self._loss, self._seed, self._column = ranks, loss, arguments.seed, 0
        part, buffer = _Part(loss, bf16=arguments.bf16, fp16=arguments.fp16), BytesIO()
        torch.save(part, buffer)
        ranks.submit(_start, [(buffer.getvalue(), arguments.device)] * ranks.count)
        self._weights = _FlatWeights(loss.model)
        ranks.collect()
        loss.shared_embed = self._embed

    def run_step(self, run: Callable[[], Tensor], step: int) -> Tensor:
        """Run the forward and backward pass of a training step, whose gradients are then those of the whole batch."""
        ranks, self._column = self._ranks, 0
        try:
            seeds = [hash((self._seed, step, rank)) % 2**32 for rank in range(ranks.count)]
            ranks.submit(_call, [("begin", self._loss.micro_batch_size, seed) for seed in seeds])
            self._exchange("broadcast")
            loss = run()
            self._exchange("sum_gradients")
        except Exception:
            ranks.discard()
            raise
        return loss

    def _exchange(self, name: str) -> None:
        self._ranks.submit(_call, [(name,)] * self._ranks.count)
        with connection_errors():
            getattr(self._weights, name)()
        self._ranks.collect()

    def _embed(self, features: dict[str, Tensor], n_columns: int) -> Tensor:
        """Embed B texts: (B, d); texts of similar length are dealt out to the processes in turn."""
        mask, column = features["attention_mask"], self._column
        self._column += 1
        lengths, n_parts = text_lengths(mask), self._ranks.count + 1
        order = np.argsort(-lengths, kind="stable")
        rows = [order[start::n_parts] for start in range(min(n_parts, len(order)))]
        own, *others = (take_texts(features, mask, part, int(lengths[part[0]])) for part in rows)
        self._ranks.submit(_call, [("embed_column", column, _to(part, "cpu"), n_columns) for part in others])
        parts = [self._loss.embed_rows(own, n_columns=n_columns)]
        if others:
            received = torch.cat(self._ranks.collect()).to(mask.device).requires_grad_()
            sizes = [len(part) for part in rows[1:]]

            def send_gradient(gradient: Tensor) -> None:
                gradients = gradient.cpu().split(sizes)
                self._ranks.submit(_call, [("backward", column, part.clone()) for part in gradients])

            received.register_hook(send_gradient)
            parts.append(received)
        return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(rows))).to(mask.device)]


class _FlatWeights:
    """Trained weights of a body, or their gradients, in one buffer that processes exchange without allocations."""

    def __init__(self, body: nn.Module) -> None:
        self._weights = [weight for weight in body.parameters() if weight.requires_grad]
        self._tensors = [*self._weights, *(buffer for buffer in body.buffers() if buffer.is_floating_point())]
        self._flat = torch.cat([tensor.detach().flatten() for tensor in self._tensors])
        views = self._flat.split([tensor.numel() for tensor in self._tensors])
        self._views = [view.view_as(tensor) for view, tensor in zip(views, self._tensors, strict=True)]

    @torch.no_grad()
    def broadcast(self) -> None:
        """Copy the weights of rank 0 to the other processes."""
        torch._foreach_copy_(self._views, self._tensors)
        distributed.broadcast(self._flat, src=0)
        torch._foreach_copy_(self._tensors, self._views)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Sum the gradients of all processes on rank 0."""
        self._flat.zero_()
        pairs = [(weight.grad, view) for weight, view in zip(self._weights, self._views, strict=False)]
        for gradient, view in pairs:
            if gradient is not None:
                view.copy_(gradient)
        distributed.reduce(self._flat, dst=0)
        for gradient, view in pairs:
            if gradient is not None:
                gradient.copy_(view)


class _Part(BatchLoss):
    """Embeddings of some texts of each batch, on another process than the loss."""

    def __init__(self, loss: BatchLoss, *, bf16: bool, fp16: bool) -> None:
        super().__init__(loss.model, dropout=loss.dropout)
        self.dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else None

    def start(self, device: torch.device) -> None:
        """Move the body to a device, and allocate what the steps need."""
        self.device, self.weights = device, _FlatWeights(self.to(device).model)

    def begin(self, micro_batch_size: int | None, seed: int) -> None:
        """Begin a step, or begin it again."""
        self.columns: dict[int, tuple[dict[str, Any], Tensor]] = {}
        self.micro_batch_size = micro_batch_size
        self.zero_grad(set_to_none=True)
        self.model.train(self.dropout)
        torch.manual_seed(seed)  # of the dropout

    def broadcast(self) -> None:
        """Receive the weights."""
        self.weights.broadcast()

    def embed_column(self, column: int, features: dict[str, Any], n_columns: int) -> Tensor:
        """Embed the texts of a column and keep the graph: (B, d) on the CPU."""
        features = _to(features, self.device)
        keeps_weights = self.micro_batch_size is None  # see `LossTrainer.compute_loss`
        with (
            training_attention([features], bf16=self.dtype is torch.bfloat16),
            torch.autocast(self.device.type, enabled=False) if keeps_weights else nullcontext(),
        ):
            embeddings = self.embed_rows(features, n_columns=n_columns)
        self.columns[column] = features, embeddings
        return embeddings.detach().cpu()

    def backward(self, column: int, gradient: Tensor) -> None:
        """Add the gradients of a column to those of the weights; ``gradient`` is that of its embeddings."""
        features, embeddings = self.columns.pop(column)
        with training_attention([features], bf16=self.dtype is torch.bfloat16):
            embeddings.backward(gradient.to(self.device))

    def sum_gradients(self) -> None:
        """Send the gradients of the weights."""
        self.weights.sum_gradients()

    def compute_loss(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Not used: rank 0 computes the loss."""
        raise NotImplementedError

    def _encode(self, features: dict[str, Tensor]) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return to_float32(super()._encode(features))


_parts: list[_Part] = []  # the one of the current training, on a rank other than 0


def _start(data: bytes, device: torch.device) -> None:
    _parts.clear()
    device = local_device(device)
    _parts.append(torch.load(BytesIO(data), map_location=device, weights_only=False))  # written by rank 0
    _parts[0].start(device)


def _call(name: str, *arguments: Any) -> Any:
    return getattr(_parts[0], name)(*arguments)


def _to(features: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}
