"""Write modules as ONNX graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from setfit_kd.errors import UnavailableError
from setfit_kd.utils.console import suppress_warnings


def write_graph(
    module: nn.Module, file: Path, *, outputs: Sequence[str], token_types: bool = False, per_token: bool = False
) -> None:
    """Write a module on the CPU in single precision; it maps (B, T) token ids and attention mask to (B, ...) outputs.

    With ``token_types``, these are a third input; with ``per_token``, the outputs have the shape (B, T).

    Raises:
        UnavailableError: If a package for ONNX is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        hint = "Install the extra: pip install 'setfit-kd[onnx]'"
        raise UnavailableError(f"Exporting to ONNX needs {error.name}.", hint=hint) from None
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    example = (ids, mask, torch.zeros_like(mask)) if token_types else (ids, mask)
    inputs, axes = ["input_ids", "attention_mask", "token_type_ids"][: len(example)], {0: "texts", 1: "tokens"}
    output_axes = axes if per_token else {0: "texts"}
    settings: dict[str, Any] = {
        "input_names": inputs,
        "output_names": list(outputs),
        "dynamic_axes": {**dict.fromkeys(inputs, axes), **dict.fromkeys(outputs, output_axes)},
        "opset_version": 17,  # the oldest with LayerNormalization, supported by all recent versions of onnxruntime
    }
    with silence_warnings(), torch.inference_mode():
        torch.onnx.export(module.eval(), tuple(example), str(file), dynamo=False, **settings)


@contextmanager
def silence_warnings() -> Iterator[None]:
    """Suppress warnings of the ONNX exporter and quantizer; the caller compares the graph with the module instead."""
    # The quantizer logs with the root logger, which then prints all later messages again if it has no handler yet.
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(), suppress_warnings("root"):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
