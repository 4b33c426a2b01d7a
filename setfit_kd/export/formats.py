"""Formats of bundles: one ONNX graph from token ids to probabilities, or static token vectors and a head."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.models.bodies import is_static
from setfit_kd.runtime.classify import HEAD, VECTORS
from setfit_kd.utils.console import suppress_warnings

if TYPE_CHECKING:
    from setfit import SetFitModel


def head_weights(model: SetFitModel) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the weights of a head: coefficients (n_classes, d) and intercept (n_classes,) of a softmax.

    A binary head is converted to two rows.

    Raises:
        ModelError: If the head is not a fitted logistic regression.
    """
    from sklearn.linear_model import LogisticRegression

    head = model.model_head
    if not isinstance(head, LogisticRegression) or not hasattr(head, "coef_"):
        raise ModelError(
            f"The head is a {type(head).__name__}; only a fitted logistic regression can be exported.",
            hint="Train the classifier with setfit-kd.",
        )
    coef, intercept = np.asarray(head.coef_, np.float32), np.asarray(head.intercept_, np.float32)
    if len(coef) == 1:
        coef, intercept = np.concatenate([0 * coef, coef]), np.concatenate([0 * intercept, intercept])
    return coef, intercept


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
        ModelError: If the body is static, or the head cannot be exported.
        UnavailableError: If a required package is missing.
    """
    if is_static(model.model_body):
        raise ModelError("A static body cannot be exported as ONNX.", hint="Use --format static.")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        hint = "Install the extra: pip install 'setfit-kd[onnx]'"
        raise UnavailableError(f"Exporting to ONNX needs {error.name}.", hint=hint) from None
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
            opset_version=17,  # the oldest with LayerNormalization, supported by all recent versions of onnxruntime
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


def write_static(model: SetFitModel, folder: Path) -> bool:
    """Write token vectors in half precision and the head; return whether the mean vectors are normalized.

    Raises:
        ModelError: If the body is not static.
    """
    from safetensors.numpy import save
    from sentence_transformers.sentence_transformer.modules import Normalize

    body = model.model_body
    if not is_static(body) or not all(isinstance(module, Normalize) for module in list(body)[1:]):
        raise ModelError(
            "Only static bodies can be exported as static.",
            hint="Use --format onnx-int8, or train with --student static.",
        )
    vectors = body[0].embedding.weight.detach().cpu().numpy()
    largest = float(np.abs(vectors).max(initial=0))
    # Half precision ranges from 6e-8 to 65,504. If vectors are scaled, the head is scaled inversely.
    scale = 1.0 if 0.1 <= largest <= 1e4 or not largest else 1 / largest
    coef, intercept = head_weights(model)
    normalizes = len(body) > 1 or bool(model.normalize_embeddings)
    # Written as bytes, because safetensors creates files that only their owner can read.
    (folder / VECTORS).write_bytes(save({"embeddings": (vectors * scale).astype(np.float16)}))
    scaled = coef if normalizes else coef / np.float32(scale)
    (folder / HEAD).write_bytes(save({"coef": scaled, "intercept": intercept}))
    return normalizes


@contextmanager
def _silence_warnings() -> Iterator[None]:
    """Suppress warnings of the ONNX exporter and quantizer, which the check of every bundle makes unnecessary.

    The quantizer logs with the root logger, which then prints all later messages again if it has no handler yet.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(), suppress_warnings("root"):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
