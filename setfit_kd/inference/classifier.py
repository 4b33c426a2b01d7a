"""Load a run's student, a SetFit model or a bundle behind one interface; bundles run without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.runtime.classify import MANIFEST, BundleError, Classifier
from setfit_kd.utils.console import show_progress


class TorchClassifier:
    """A SetFit model with the interface of a bundle: ``labels``, ``batch_size`` and `predict_proba`."""

    def __init__(self, model: Any, batch_size: int) -> None:
        self.model = model
        self.labels = [str(label) for label in model.labels or ()]
        self.batch_size = batch_size

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Predict the class probabilities (n, n_classes) of n texts."""
        from setfit_kd.models.encode import predict_proba

        with show_progress(False):
            return predict_proba(self.model, texts, batch_size=self.batch_size)


class _BundleClassifier(Classifier):
    """A bundle with errors of setfit-kd."""

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        with _convert_bundle_errors():
            return super().predict_proba(texts)


@contextmanager
def _convert_bundle_errors() -> Iterator[None]:
    try:
        yield
    except BundleError as error:
        raise ModelError(str(error), hint="Export or copy the bundle again.") from None
    except ImportError as error:
        raise UnavailableError("This bundle needs onnxruntime.", hint="Install it: pip install onnxruntime") from error


def is_bundle(path: str | Path) -> bool:
    """Whether a folder contains the manifest of a bundle."""
    return (Path(path) / MANIFEST).is_file()


def open_classifier(
    path: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 32,
    threads: int | None = None,
    trust_pickle: bool = False,
) -> TorchClassifier | Classifier:
    """Open the student of a run, a SetFit model in a folder or on the hub, or a bundle.

    ``device`` and ``trust_pickle`` are as in `setfit_kd.load`; bundles run on the CPU. ``threads`` limits the CPU
    threads; None leaves the choice to the libraries.

    Raises:
        SetFitKDError: As in `setfit_kd.load`, or if a bundle is incomplete or needs onnxruntime.
    """
    if is_bundle(path):
        with _convert_bundle_errors():
            return _BundleClassifier(path, threads=threads, batch_size=batch_size)
    from setfit_kd.models.io import load

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchClassifier(load(path, device=device, trust_pickle=trust_pickle), batch_size)
