"""Ways to run a body on a batch: with torch in several precisions, or with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from setfit_kd.memory.devices import attention_kernels, to_device
from setfit_kd.models.bodies import has_token_types

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

METHODS = ("fp32", "bf16", "fp16", "tf32", "onnx")


class ForwardPass:
    """Run a body in inference mode.

    Args:
        body: The body; batches run on its current device.
        method: ``fp32``, ``bf16``, ``fp16`` (by autocast) or ``tf32``. See `OnnxForwardPass` for ``onnx``.
    """

    def __init__(self, body: SentenceTransformer, method: str = "fp32") -> None:
        self.body, self.method = body, method

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context manager that sets the precision and, until its end, keeps weights that are cast to half precision."""
        import torch

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.method)
        with torch.autocast(self.body.device.type, dtype=dtype, enabled=dtype is not None), ExitStack() as stack:
            stack.enter_context(attention_kernels(self.body.device))
            if self.method == "tf32":
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
            yield

    def __call__(self, features: dict[str, Any]) -> Tensor:
        """Map the features of B texts to their (B, d) embeddings."""
        import torch

        device = self.body.device
        moved = {name: to_device(v, device) if isinstance(v, torch.Tensor) else v for name, v in features.items()}
        embeddings: Tensor = self.body(moved)["sentence_embedding"]
        return embeddings


class OnnxForwardPass(ForwardPass):
    """Run a copy of a body on the CPU in single precision with ONNX Runtime.

    Raises:
        UnavailableError: If a package for ONNX is missing.
    """

    def __init__(self, body: SentenceTransformer) -> None:
        import torch

        from setfit_kd.models.onnx import write_graph

        class Graph(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = body

            def forward(self, *inputs: Tensor) -> Tensor:
                features = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=False))
                return self.body(features)["sentence_embedding"]  # type: ignore[no-any-return]

        super().__init__(body, "onnx")
        with TemporaryDirectory(prefix="setfit-kd-") as folder:
            file = Path(folder, "body.onnx")
            write_graph(Graph(), file, outputs=["embeddings"], token_types=has_token_types(body))
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __reduce__(self) -> Any:  # pickled without the session
        return OnnxForwardPass, (self.body,)

    def __call__(self, features: dict[str, Any]) -> Tensor:
        """Map the features of B texts to their (B, d) embeddings."""
        import torch

        inputs = {node.name: features[node.name].numpy() for node in self._session.get_inputs()}
        return torch.from_numpy(self._session.run(None, inputs)[0])
