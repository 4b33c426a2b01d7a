"""Precision of training: fp32, or bf16 if it is faster on this machine."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ConfigError, is_out_of_memory
from setfit_kd.memory.backoff import clear_cache
from setfit_kd.memory.devices import attention_kernels
from setfit_kd.utils.atomic_io import write_text
from setfit_kd.utils.files import cache_folder, read_json

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_MIN_SPEEDUP = 1.1  # minimum speedup over fp32 to choose bf16, which has fewer digits
_N_PROBE_TEXTS = {"cpu": 8, "cuda": 64}  # texts in the measured steps; a GPU is only fast on large batches
_N_ROUNDS = 5
_MAX_ATTENTION_WEIGHTS = 1 << 19  # per head: 32 texts of 128 tokens
_CACHE_FILE = "precision.json"
_measured: dict[str, Precision] = {}


@dataclass(frozen=True)
class Precision:
    """``fp32``, ``bf16`` or ``fp16``, and the speedup of bf16 over fp32 if it was measured."""

    name: str
    speedup: float | None = None


def resolve_precision(name: str, body: SentenceTransformer, texts: Sequence[str]) -> Precision:
    """Resolve a precision setting; ``auto`` times a small training step on some texts in fp32 and in bf16.

    The speedup is measured once per machine and embedding size, and stored in ``precision.json`` in the cache folder.
    The body, on its device, is not changed.
    """
    device = body.device
    if name != "auto":
        return Precision(name)
    if not _has_bf16(device) or not hasattr(body[0], "auto_model"):
        return Precision("fp32")
    key = f"{_machine(device)}, dimension {body.get_embedding_dimension()}"
    if key not in _measured:
        folder = cache_folder()
        cached = _read_speedups(folder / _CACHE_FILE) if folder else {}
        speedup = cached.get(key) or _measure_speedup(body, texts[: _N_PROBE_TEXTS[device.type]])
        if speedup is None:
            return Precision("fp32")
        _measured[key] = Precision("bf16" if speedup >= _MIN_SPEEDUP else "fp32", speedup)
        logger.info("Precision: %s (speedup of bf16 over fp32: %.2f).", _measured[key].name, speedup)
        if folder and key not in cached:
            with suppress(OSError):  # an error in the cache must not fail a run
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / _CACHE_FILE, json.dumps({**cached, key: speedup}, indent=2) + "\n")
    return _measured[key]


def check_precision(name: str, device: torch.device) -> None:
    """Raise a `ConfigError` if a device cannot train in a precision."""
    if name == "fp16" and device.type != "cuda":
        message = f"Training in fp16 needs a CUDA device, got {device.type}."
        raise ConfigError(message, hint="Use --precision auto, fp32 or bf16.")
    if name == "bf16" and not _has_bf16(device):
        raise ConfigError(f"The device {device} cannot train in bf16.", hint="Use --precision auto or fp32.")


def training_attention(columns: Iterable[Mapping[str, Any]], *, bf16: bool) -> AbstractContextManager[None]:
    """Context manager that selects the kernels for the attention of a batch that is trained on.

    In bf16 on a CPU, the backward pass of flash attention takes nearly half of a training step on short texts. The
    plain implementation is ten times as fast, but stores (T, T) attention weights for every text of T tokens.
    """
    masks = [features["attention_mask"] for features in columns if "attention_mask" in features]
    if not masks:
        return nullcontext()
    device = masks[0].device
    return attention_kernels(
        device, plain=bf16 and device.type == "cpu" and _n_weights(masks) <= _MAX_ATTENTION_WEIGHTS
    )


def _n_weights(masks: list[torch.Tensor]) -> int:
    return sum(int(mask.sum(dim=1).square().sum()) for mask in masks)


def _has_bf16(device: torch.device) -> bool:
    import torch

    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def _machine(device: torch.device) -> str:
    """Describe what the speed of a training step depends on, apart from the body."""
    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        name = re.findall(r"model name\s*: (.+)|$", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[0] or name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _read_speedups(path: Path) -> dict[str, float]:
    """Read the speedups by machine and width; return an empty dict if the file is missing or invalid."""
    try:
        speedups: dict[str, float] = read_json(path)
        return speedups if all(0 < speedup < math.inf for speedup in speedups.values()) else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measure_speedup(body: SentenceTransformer, texts: Sequence[str]) -> float | None:
    """Measure the speedup of bf16 over fp32, halving the texts if memory runs out; None if that is not possible."""
    while True:
        try:
            fp32, bf16 = _step_seconds(body, texts)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(texts) == 1:
                logger.debug("Precision: fp32, because the speed of bf16 could not be measured (%s).", str(error))
                return None
        else:
            return round(fp32 / bf16, 2)
        clear_cache(body.device)
        texts = texts[: len(texts) // 2]


def _step_seconds(body: SentenceTransformer, texts: Sequence[str]) -> tuple[float, float]:
    """Return the minimum seconds of a forward and backward pass in fp32 and in bf16, measured alternately."""
    import torch
    from sentence_transformers.util import batch_to_device

    batch = batch_to_device(body.preprocess(list(texts)), body.device)
    parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]

    def step(enabled: bool) -> float:
        started = time.perf_counter()
        autocast = torch.autocast(body.device.type, dtype=torch.bfloat16, enabled=enabled)
        with torch.enable_grad(), autocast, training_attention([batch], bf16=enabled):
            embeddings = body(dict(batch))["sentence_embedding"]
        torch.autograd.grad(embeddings.float().sum(), parameters, allow_unused=True)
        if body.device.type == "cuda":
            torch.cuda.synchronize(body.device)
        return time.perf_counter() - started

    rounds = [(step(False), step(True)) for _ in range(_N_ROUNDS + 1)][1:]  # the first round is a warmup
    return min(fp32 for fp32, _ in rounds), min(bf16 for _, bf16 in rounds)
