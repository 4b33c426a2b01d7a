"""Which numbers to train in: single precision, or half where the machine is the faster for it."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.errors import ConfigError
from setfit_kd.memory import clear_cache, is_out_of_memory
from setfit_kd.utils.atomic_io import write_text
from setfit_kd.utils.files import cache_folder, read_json

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

_MIN_SPEEDUP = 1.1
"""How many times as fast as fp32 bf16 must be, since it costs digits."""
_PROBE_TEXTS = {"cpu": 8, "cuda": 64}
"""A GPU shows its speed on whole batches only."""
_ROUNDS = 5
_CACHE = "precision.json"
_measured: dict[str, Precision] = {}


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

    A machine is probed once for bodies of one width: the speedup is kept in ``precision.json`` in the cache folder.

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
    key = f"{_machine(device)}, width {body.get_embedding_dimension()}"
    if key not in _measured:
        folder = cache_folder()
        kept = _read_speedups(folder / _CACHE) if folder else {}
        speedup = kept.get(key) or _probe(body, texts[: _PROBE_TEXTS[device.type]])
        if speedup is None:
            return Precision("fp32")
        _measured[key] = Precision("bf16" if speedup >= _MIN_SPEEDUP else "fp32", speedup)
        logger.info("Precision: %s (bf16 is %.2f times as fast as fp32 here).", _measured[key].name, speedup)
        if folder and key not in kept:
            with suppress(OSError):  # the cache never fails a run
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / _CACHE, json.dumps({**kept, key: speedup}, indent=2) + "\n")
    return _measured[key]


def _machine(device: torch.device) -> str:
    """What decides the speed of a training step, apart from the body."""
    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        name = re.findall(r"model name\s*: (.+)|$", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[0] or name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _read_speedups(path: Path) -> dict[str, float]:
    """The speedups in a file, by machine and width; none where it cannot be read or holds anything else."""
    try:
        kept: dict[str, float] = read_json(path)
        return kept if all(0 < speedup < math.inf for speedup in kept.values()) else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _probe(body: SentenceTransformer, texts: Sequence[str]) -> float | None:
    """How many times as fast as fp32 bf16 is, by fewer texts where so many do not fit; None where it does not run."""
    while True:
        try:
            fp32, bf16 = _step_seconds(body, texts)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                logger.debug("Precision: fp32, since bf16 does not run here (%s).", str(error))
                return None
            if len(texts) == 1:
                raise
        body.zero_grad(set_to_none=True)
        clear_cache(body.device)
        texts = texts[: len(texts) // 2]
    return round(fp32 / bf16, 2)


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
    """Seconds of a forward and a backward pass over the texts, in fp32 and in bf16, by turns: the best of each."""
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

    rounds = [(step(False), step(True)) for _ in range(_ROUNDS + 1)][1:]  # the first one warms up
    return min(fp32 for fp32, _ in rounds), min(bf16 for _, bf16 in rounds)
