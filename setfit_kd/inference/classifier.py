"""Load a run's student, a SetFit model or a bundle behind one interface; bundles run without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from setfit_kd.errors import ConfigError, ModelError, UnavailableError
from setfit_kd.models.bodies import family_of, takes_pairs
from setfit_kd.models.heads import head_task, head_thresholds
from setfit_kd.models.io import BUNDLE, classifier_folder, load_classifier
from setfit_kd.runtime.classify import MANIFEST, PAIR_SEPARATOR, BundleError, Classifier, Text
from setfit_kd.utils.arrays import Floats
from setfit_kd.utils.console import show_progress

logger = logging.getLogger(__name__)
CHUNK_SIZE = 1024  # maximum number of texts in memory
_MANY = 256  # texts at once, from which on the fastest forward pass is chosen


class TorchClassifier:
    """A SetFit model with the interface of a bundle: its attributes and `predict_proba`."""

    def __init__(self, model: Any, batch_size: int | None = None, *, exact: bool = False) -> None:
        self.model = model
        self.labels = [str(label) for label in model.labels or ()]
        thresholds = head_thresholds(model.model_head)
        self.task = head_task(model.model_head).name
        self.takes_pairs = takes_pairs(model.model_body)
        self.thresholds = None if thresholds is None else np.asarray(thresholds, np.float32)
        self.batch_size, self.exact = batch_size, exact
        self._forward: Any = None

    @property
    def embed_and_predict(self) -> Callable[[Sequence[str]], tuple[Floats, npt.NDArray[np.float32]]] | None:
        """Function that returns the embeddings (n, d) and class probabilities of n texts; None for a transformer."""
        return None if family_of(self.model.model_body) == "transformer" else self._embed_and_predict

    def predict_proba(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Predict the class probabilities (n, n_classes) of n texts."""
        return self._embed_and_predict(texts)[1]

    def _embed_and_predict(self, texts: Sequence[str]) -> tuple[Floats, npt.NDArray[np.float32]]:
        from setfit_kd.models.encode import choose_forward, embed, head_proba

        if not self.exact and self._forward is None and len(texts) >= _MANY:
            n_texts = len(texts) * (10 if len(texts) >= CHUNK_SIZE else 1)  # a full chunk is usually followed by others
            self._forward = choose_forward(self.model, texts, n_texts=n_texts)
        options: Any = {"batch_size": self.batch_size, "forward": self._forward}
        options |= {"cache_tokens": False, "share": False}  # sending the model for every chunk would take longer
        with show_progress(False):
            embeddings = embed(self.model.model_body, texts, normalize=self.model.normalize_embeddings, **options)
            return embeddings, head_proba(self.model, embeddings)


class _BundleClassifier(Classifier):
    """A bundle with errors of setfit-kd."""

    def predict_proba(self, texts: Sequence[Text]) -> npt.NDArray[np.float32]:
        with convert_bundle_errors():
            return super().predict_proba(texts)


@contextmanager
def convert_bundle_errors() -> Iterator[None]:
    """Context manager that raises errors of a bundle as errors of setfit-kd."""
    try:
        yield
    except BundleError as error:
        raise ModelError(str(error), hint="Export or copy the bundle again.") from None
    except ImportError as error:
        raise UnavailableError("This bundle needs onnxruntime.", hint="Install it: pip install onnxruntime") from error


def is_bundle(path: str | Path) -> bool:
    """Whether a folder contains the manifest of a bundle."""
    return (Path(path) / MANIFEST).is_file()


def check_pairs(name: object, texts: Sequence[str], *, takes_pairs: bool) -> None:
    """Raise a `ConfigError` if a model takes pairs and the texts are not pairs, or the other way round."""
    if takes_pairs != (PAIR_SEPARATOR in texts[0]):
        kinds = {True: "pairs of texts", False: "single texts"}
        message = f"{name} classifies {kinds[takes_pairs]}, got {kinds[not takes_pairs]}."
        how = "with --text-column and --pair-column" if takes_pairs else "without --pair-column"
        raise ConfigError(message, hint=f"Pass --unlabeled {how}.")


def check_pair_column(name: object, classifier: TorchClassifier | Classifier, column: Sequence[str] | None) -> None:
    """Raise a `ConfigError` if a model takes pairs and there is no column of second texts, or the other way round."""
    if (column is not None) != classifier.takes_pairs:
        expected = "pairs of texts" if classifier.takes_pairs else "single texts"
        hint = f"{'Pass' if classifier.takes_pairs else 'Remove'} --pair-column."
        raise ConfigError(f"{name} classifies {expected}.", hint=hint)


def open_classifier(
    path: str | Path,
    *,
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    trust_pickle: bool = False,
    exact: bool = False,
    use_bundle: bool = False,
) -> TorchClassifier | Classifier:
    """Open the student of a run, a SetFit model in a folder or on the hub, or a bundle.

    ``device`` and ``trust_pickle`` are as in `setfit_kd.load`; bundles run on the CPU. ``threads`` limits the CPU
    threads; None leaves the choice to the libraries. ``exact`` is as in `RunConfig`. With ``use_bundle``, a
    student is opened from the bundle in its folder, if it has one and neither ``device`` nor ``exact`` demands torch.

    Raises:
        SetFitKDError: As in `setfit_kd.load`, or if a bundle is incomplete or needs onnxruntime.
    """
    if is_bundle(path):
        with convert_bundle_errors():
            return _BundleClassifier(path, threads=threads, batch_size=batch_size or 32)
    if use_bundle and not exact and device in ("auto", "cpu") and Path(path).is_dir():
        bundle = classifier_folder(path) / BUNDLE
        if is_bundle(bundle):
            try:
                return open_classifier(bundle, threads=threads, batch_size=batch_size)
            except (ModelError, UnavailableError) as error:
                level = logging.WARNING if isinstance(error, ModelError) else logging.DEBUG
                logger.log(level, "The bundle of the student is not used: %s", error.message)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    model = load_classifier(path, device=device, trust_pickle=trust_pickle)
    return TorchClassifier(model, batch_size, exact=exact)
