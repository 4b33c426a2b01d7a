"""A classifier as one ONNX graph: body, pooling, normalisation and head; probabilities out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.export.tokenizer import head_weights
from setfit_kd.models import is_static
from setfit_kd.utils.console import without_warnings

if TYPE_CHECKING:
    from setfit import SetFitModel

_OPSET = 17
"""The oldest with LayerNormalization: any onnxruntime of the last years runs it."""


class _Graph(nn.Module):
    """From (B, T) token ids and mask to (B, n_classes) probabilities."""

    def __init__(self, model: SetFitModel) -> None:
        super().__init__()
        self.body = model.model_body
        self.normalizes = bool(model.normalize_embeddings)
        coef, intercept = head_weights(model)
        # A plain product: as a Gemm, the quantizer would rename it, and could not be told to leave it alone.
        self.coef = nn.Parameter(torch.as_tensor(coef.T.copy()), requires_grad=False)
        self.intercept = nn.Parameter(torch.as_tensor(intercept), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings = self.body({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]
        if self.normalizes:
            embeddings = nn.functional.normalize(embeddings)
        return torch.softmax(embeddings @ self.coef + self.intercept, dim=1)


def write_onnx(model: SetFitModel, file: Path) -> None:
    """Write the graph in single precision.

    Raises:
        ModelError: The body is static, or cannot be traced.
        UnavailableError: A package is missing.
    """
    if is_static(model.model_body):
        raise ModelError("A static body is no network to be exported as ONNX.", hint="Take --format static.")
    _require("onnx", "onnxruntime")
    graph = _Graph(model).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    axes = {0: "texts", 1: "tokens"}
    with _quiet_tracing(), torch.inference_mode():
        torch.onnx.export(
            graph,
            (ids, mask),
            str(file),
            input_names=["input_ids", "attention_mask"],
            output_names=["probabilities"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "probabilities": {0: "texts"}},
            opset_version=_OPSET,
            dynamo=False,
        )


def quantize(source: Path, target: Path) -> None:
    """Write a graph with its weights as 8-bit integers, one scale a column; activations are quantized as they come.

    The head, the last product of the graph, stays in single precision.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    head = [node.name for node in onnx.load(str(source)).graph.node if node.op_type == "MatMul"][-1:]
    with _quiet_tracing():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=head)


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UnavailableError(
            f"Exporting to ONNX needs {' and '.join(missing)}.", hint="Install it: pip install 'setfit-kd[onnx]'"
        )


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Within this block, the exporter's and quantizer's advice to their callers is not passed on to ours.

    What their warnings are about, a graph that gives other results, is what the check of every bundle finds out.
    """
    with warnings.catch_warnings(), without_warnings("root"):
        warnings.simplefilter("ignore")
        yield
