"""Which numbers to train in: single precision, or half where the machine is the faster for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from setfit_kd.errors import ConfigError
from setfit_kd.memory import clear_cache, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_WORTH_IT = 1.1
"""How many times as fast as fp32 bf16 must be, since it costs digits."""
_PROBE_TEXTS = {"cpu": 8, "cuda": 64}
"""A GPU shows its speed on whole batches only."""
_measured: dict[tuple[str, int], Precision] = {}


@dataclass(frozen=True)
class Precision:
    """What to train in, and why.

    Attributes:
        name: ``fp32``, ``bf16`` or ``fp16``.
        speedup: How many times as fast as fp32 the probe found bf16; None where nothing was probed.
    """

    name: str
    speedup: float | None = None


def resolve_precision(name: str, body: SentenceTransformer, texts: Sequence[str]) -> Precision:
    """The precision that a setting names; ``auto`` times one small training step in fp32 and in bf16.

    A body of one width is probed once a device and process.

    Args:
        name: As in `RunConfig`.
        body: The body that shall be trained, on its device; it is left as it is.
        texts: Some of the texts that it shall be trained on.
    """
    device = body.device
    if name != "auto":
        return Precision(name)
    if not _has_bf16(device) or not hasattr(body[0], "auto_model"):
        return Precision("fp32")
    key = (str(device), body.get_embedding_dimension() or 0)
    if key not in _measured:
        _measured[key] = _probe(body, texts[: _PROBE_TEXTS[device.type]])
    return _measured[key]


def _probe(body: SentenceTransformer, texts: Sequence[str]) -> Precision:
    """Time fewer texts where so many do not fit."""
    while True:
        try:
            fp32, bf16 = _step_seconds(body, texts)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                logger.debug("Precision: fp32, since bf16 does not run here (%s).", str(error))
                return Precision("fp32")
            if len(texts) == 1:
                raise
        body.zero_grad(set_to_none=True)
        clear_cache(body.device)
        texts = texts[: len(texts) // 2]
    found = Precision("bf16" if fp32 / bf16 >= _WORTH_IT else "fp32", round(fp32 / bf16, 2))
    logger.info("Precision: %s (bf16 is %.2f times as fast as fp32 here).", found.name, found.speedup)
    return found


def check_precision(name: str, device: torch.device) -> None:
    """Refuse a precision that a device cannot train in.

    Raises:
        ConfigError: It cannot.
    """
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"Training in fp16 needs a CUDA device, not {device.type}.", hint="Take --precision auto, fp32 or bf16."
        )
    if name == "bf16" and not _has_bf16(device):
        raise ConfigError(f"{device} cannot train in bf16.", hint="Take --precision auto or fp32.")


def _has_bf16(device: torch.device) -> bool:
    import torch

    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def _step_seconds(body: SentenceTransformer, texts: Sequence[str]) -> tuple[float, float]:
    """Seconds of a forward and a backward pass over the texts, in fp32 and in bf16: the better of two, warmed up."""
    import torch
    from sentence_transformers.util import batch_to_device

    batch = batch_to_device(body.preprocess(list(texts)), body.device)
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]

    def step(enabled: bool) -> float:
        started = time.perf_counter()
        with torch.enable_grad(), torch.autocast(body.device.type, dtype=torch.bfloat16, enabled=enabled):
            embeddings = body(dict(batch))["sentence_embedding"]
        torch.autograd.grad(embeddings.float().sum(), parameters, allow_unused=True)
        if body.device.type == "cuda":
            torch.cuda.synchronize(body.device)
        return time.perf_counter() - started

    seconds = {enabled: [step(enabled) for _ in range(3)] for enabled in (False, True)}
    return min(seconds[False][1:]), min(seconds[True][1:])
