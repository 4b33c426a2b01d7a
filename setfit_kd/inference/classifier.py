"""Load a run's student, a SetFit model or a bundle behind one interface; bundles run without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ModelError, UnavailableError
from setfit_kd.runtime.classify import MANIFEST, BundleError, Classifier
from setfit_kd.utils.console import show_progress

if TYPE_CHECKING:
    from setfit import SetFitModel


class TextClassifier(Protocol):
    """Interface of all classifiers.

    Attributes:
        labels: Names of the classes.
        batch_size: Texts per forward pass.
    """

    labels: list[str]
    batch_size: int

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Predict the class probabilities (n, n_classes) of n texts."""


class TorchClassifier:
    """`TextClassifier` around a SetFit model."""

    def __init__(self, model: SetFitModel, batch_size: int) -> None:
        self.model = model
        self.labels = [str(label) for label in model.labels or ()]
        self.batch_size = batch_size

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Predict the class probabilities (n, n_classes) of n texts."""
        from setfit_kd.models.encode import predict_proba

        with show_progress(None):
            return predict_proba(self.model, texts, batch_size=self.batch_size)


@contextmanager
def _convert_bundle_errors() -> Iterator[None]:
    """Convert errors of `setfit_kd.runtime` to errors of setfit-kd."""
    try:
        yield
    except BundleError as error:
        raise ModelError(str(error), hint="Export or copy the bundle again.") from None
    except ImportError as error:
        raise UnavailableError("This bundle needs onnxruntime.", hint="Install it: pip install onnxruntime") from error


class _BundleClassifier(Classifier):
    """`TextClassifier` around a bundle, with errors of setfit-kd."""

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        with _convert_bundle_errors():
            return super().predict_proba(texts)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder contains the manifest of a bundle."""
    return (Path(path) / MANIFEST).is_file()


def classifier_path(path: str | Path) -> Path | None:
    """Return the folder of a bundle, of a model or of a run's student; None for a model on the hub."""
    if not Path(path).is_dir():
        return None
    if is_bundle(path):
        return Path(path)
    from setfit_kd.models.io import classifier_folder

    return classifier_folder(path)


def open_classifier(
    path: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 32,
    threads: int | None = None,
    trust_pickle: bool = False,
) -> TextClassifier:
    """Open the student of a run, a SetFit model in a folder or on the hub, or a bundle.

    Args:
        path: Folder or hub name.
        device: As in `RunConfig`; bundles run on the CPU.
        batch_size: Texts per forward pass.
        threads: Maximum number of CPU threads; None leaves the choice to the libraries.
        trust_pickle: Also load a head that is stored only as a pickle.

    Raises:
        ModelError: If the path is not a classifier, or the classifier is incomplete.
        UnavailableError: If the hub cannot be reached, or a bundle needs a package that is not installed.
        SetFitKDError: As in `setfit_kd.load`.
    """
    if is_bundle(path):
        with _convert_bundle_errors():
            return _BundleClassifier(path, threads=threads, batch_size=batch_size)
    from setfit_kd.models.io import load

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return TorchClassifier(load(path, device=device, trust_pickle=trust_pickle), batch_size)
