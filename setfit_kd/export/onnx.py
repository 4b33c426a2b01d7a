"""Export a classifier as one ONNX graph from token ids to probabilities: body, pooling, normalization and head."""

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
from setfit_kd.models.bodies import is_static
from setfit_kd.utils.console import suppress_warnings

if TYPE_CHECKING:
    from setfit import SetFitModel

_OPSET = 17
"""The oldest opset with LayerNormalization, supported by all recent versions of onnxruntime."""


class _ClassifierGraph(nn.Module):
    """Module that maps (B, T) token ids and attention mask to (B, n_classes) probabilities."""

    def __init__(self, model: SetFitModel) -> None:
        super().__init__()
        self.body = model.model_body
        self.normalizes = bool(model.normalize_embeddings)
        coef, intercept = head_weights(model)
        # A MatMul node, because the quantizer renames Gemm nodes and could not exclude the head from quantization.
        self.coef = nn.Parameter(torch.as_tensor(coef.T.copy()), requires_grad=False)
        self.intercept = nn.Parameter(torch.as_tensor(intercept), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings = self.body({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]
        if self.normalizes:
            embeddings = nn.functional.normalize(embeddings)
        return torch.softmax(embeddings @ self.coef + self.intercept, dim=1)


def write_onnx(model: SetFitModel, file: Path) -> None:
    """Write a classifier as an ONNX graph in single precision.

    Raises:
        ModelError: If the body is static, or the head or labels cannot be exported.
        UnavailableError: If a required package is missing.
    """
    if is_static(model.model_body):
        raise ModelError("A static body cannot be exported as ONNX.", hint="Use --format static.")
    _require_packages("onnx", "onnxruntime")
    graph = _ClassifierGraph(model).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    axes = {0: "texts", 1: "tokens"}
    with _silence_warnings(), torch.inference_mode():
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
    """Quantize the weights of a graph to 8-bit integers with one scale per column, and activations at run time.

    The head, the last matrix product of the graph, remains in single precision.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    head = [node.name for node in onnx.load(str(source)).graph.node if node.op_type == "MatMul"][-1:]
    with _silence_warnings():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=head)


def _require_packages(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UnavailableError(
            f"Exporting to ONNX needs {' and '.join(missing)}.", hint="Install the extra: pip install 'setfit-kd[onnx]'"
        )


@contextmanager
def _silence_warnings() -> Iterator[None]:
    """Suppress warnings of the ONNX exporter and quantizer for the duration of the block.

    They warn of graphs that may compute different results, which the check of every bundle detects.
    """
    with warnings.catch_warnings(), suppress_warnings("root"):
        warnings.simplefilter("ignore")
        yield
