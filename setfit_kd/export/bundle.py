"""Export a classifier as a bundle and check the bundle against the classifier."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd import __version__
from setfit_kd.config.values import BUNDLE_FORMATS
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.export.onnx import quantize, write_onnx
from setfit_kd.export.static import write_static
from setfit_kd.export.tokenizer import head_weights, labels_json, tokenizer_settings
from setfit_kd.models.bodies import is_static
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.safe_loading import check_finite
from setfit_kd.runtime import classify
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.escape import escape_markdown, short_class_name, truncate
from setfit_kd.utils.files import folder_megabytes
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

MIN_AGREEMENT = {"onnx": 0.999, "onnx-int8": 0.98, "static": 0.999}
"""Default minimum share of texts that the bundle must label like the classifier, by format."""
MAX_PARITY_TEXTS = 1000
"""Maximum number of texts in the check."""
_N_TIMED_TEXTS, _N_TIMED_RUNS = 128, 3
_SINGLE_PRECISION_MODEL = "single.onnx"
_README = """# {title}

A text classifier with {n_classes} classes: {labels}.

It requires {requirements}, but not torch:

```
pip install {packages}
python classify.py "some text"
python classify.py < texts.txt
```

```python
from classify import Classifier  # or: from setfit_kd.runtime import Classifier

classifier = Classifier("path/to/this/folder")
classifier.predict(["some text"])
classifier.predict_proba(["some text"])  # (n, {n_classes}) float32, columns in the order of classifier.labels
```

On {texts:,} texts, {agreement:.1%} of the labels are the same as those of the original model, and probabilities differ
by at most {largest_difference:.2g}. `manifest.json` contains the tokenizer settings and the file hashes that are
verified on loading.
"""


@dataclass(frozen=True)
class Parity:
    """Comparison of a bundle with the original classifier.

    Attributes:
        texts: Number of texts.
        agreement: Share of texts with the same label.
        largest_difference: Largest absolute difference between two probabilities.
    """

    texts: int
    agreement: float
    largest_difference: float


@dataclass(frozen=True)
class Bundle:
    """An exported bundle.

    Attributes:
        path: Folder of the bundle.
        format: One of `BUNDLE_FORMATS`; ``onnx`` also if ``onnx-int8`` was requested but rejected.
        parity: Comparison with the original classifier.
        megabytes: Size in 10^6 bytes.
        int8_rejection_reason: Reason why ``onnx-int8`` was rejected; None if it was not.
    """

    path: Path
    format: str
    parity: Parity
    megabytes: float
    int8_rejection_reason: str | None = None


def export_bundle(
    model: SetFitModel,
    folder: str | Path,
    *,
    texts: Sequence[str],
    format: str | None = None,  # noqa: A002 - the name of the setting
    min_agreement: float | None = None,
    title: str = "Text classifier",
) -> Bundle:
    """Export a classifier as a bundle, a folder that `setfit_kd.runtime.Classifier` runs without torch.

    Before it is saved, the bundle is compared with the classifier on ``texts``. If 8 bits reduce the agreement too much
    or are not faster than single precision on this CPU, the bundle is saved in single precision.

    Args:
        model: Classifier with a logistic regression head; it is moved to the CPU.
        folder: Output folder; it must not exist.
        texts: Typical texts, such as the pool; at most `MAX_PARITY_TEXTS` are used, evenly spaced.
        format: ``onnx``, ``onnx-int8`` or ``static``; None selects ``static`` for static bodies and ``onnx-int8`` for
            all others.
        min_agreement: Minimum share of texts, from 0 to 1, that the bundle must label like the classifier. [default:
            0.98 for ``onnx-int8``, 0.999 for the others]
        title: Title of the bundle's README.

    Raises:
        ConfigError: If the format is unknown or ``min_agreement`` is out of range.
        DataError: If ``texts`` is empty.
        ModelError: If the classifier cannot be exported, or its agreement with the bundle is too low.
        OutputError: If the folder exists or cannot be written.
        UnavailableError: If a package for ONNX is missing.
    """
    format = format or ("static" if is_static(model.model_body) else "onnx-int8")  # noqa: A001
    if format not in BUNDLE_FORMATS:
        raise ConfigError(f"Unknown bundle format {format!r}.", hint=f"Use one of {', '.join(BUNDLE_FORMATS)}.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement must be from 0 to 1, got {min_agreement}.", hint="Pass a share such as 0.98.")
    if not len(texts):
        raise DataError("Cannot check a bundle without texts.", hint="Pass texts like those to be classified.")
    texts = [texts[row] for row in np.unique(np.linspace(0, len(texts) - 1, MAX_PARITY_TEXTS).astype(int))]
    thresholds = {name: value if min_agreement is None else min_agreement for name, value in MIN_AGREEMENT.items()}
    head_weights(model)  # fail early if the head cannot be exported
    model.model_body.to("cpu")
    check_finite(model.model_body, title)
    expected = predict_proba(model, texts, description="Classifying with torch")
    if not np.isfinite(expected).all():
        raise ModelError("The classifier predicts probabilities that are not finite.", hint="Train it again.")
    with atomic_folder(folder) as temporary:
        writer = _BundleWriter(model, temporary, texts, expected)
        if format == "static":
            writer.normalizes = write_static(model, temporary)
            bundle = writer.verify("static", thresholds)
        else:
            write_onnx(model, temporary / classify.ONNX_MODEL)
            bundle = writer.verify("onnx", thresholds)
            if format == "onnx-int8":
                bundle = writer.try_int8(bundle, thresholds)
        (temporary / "README.md").write_text(_readme(model, bundle, title), encoding="utf-8")
        megabytes = folder_megabytes(temporary)
    return replace(bundle, path=Path(folder), megabytes=round(megabytes, 1))


class _BundleWriter:
    """Writes the files of a bundle and checks them against the predictions of the classifier."""

    def __init__(self, model: SetFitModel, folder: Path, texts: list[str], expected: npt.NDArray[np.float32]) -> None:
        self.model, self.folder, self.texts, self.expected = model, folder, texts, expected
        self.normalizes = False
        self.tokenizer_settings = tokenizer_settings(model.model_body)
        (folder / classify.TOKENIZER).write_text(self.tokenizer_settings.tokenizer, encoding="utf-8")
        (folder / classify.LABELS).write_text(labels_json(model), encoding="utf-8")
        shutil.copyfile(classify.__file__, folder / "classify.py")

    def verify(self, format: str, thresholds: dict[str, float]) -> Bundle:  # noqa: A002
        """Compare the bundle with the classifier and write the manifest.

        Raises:
            ModelError: If the agreement is too low.
        """
        self._write_manifest(format, None)
        probabilities = classify.Classifier(self.folder).predict_proba(self.texts)
        parity = Parity(
            texts=len(self.texts),
            agreement=float((probabilities.argmax(axis=1) == self.expected.argmax(axis=1)).mean()),
            largest_difference=float(np.abs(probabilities - self.expected).max()),
        )
        if parity.agreement < thresholds[format]:
            raise ModelError(
                f"The {format} bundle and the classifier agree on {parity.agreement:.2%} of {parity.texts:,} texts, "
                f"expected at least {thresholds[format]:.2%}.",
                hint="Use another --format or a lower --min-agreement.",
            )
        self._write_manifest(format, parity)
        return Bundle(self.folder, format, parity, 0.0)

    def try_int8(self, single: Bundle, thresholds: dict[str, float]) -> Bundle:
        """Quantize the bundle to 8 bits; restore single precision if agreement or speed is not sufficient."""
        model, backup = self.folder / classify.ONNX_MODEL, self.folder / _SINGLE_PRECISION_MODEL
        before = self._measure_seconds()
        model.rename(backup)
        quantize(backup, model)
        try:
            bundle = self.verify("onnx-int8", thresholds)
            after = self._measure_seconds()
            reason = None if after < before else f"not faster on this CPU ({after / before:.2f} times the time)"
        except ModelError as error:
            reason = f"agreement too low: {error.message[0].lower()}{error.message[1:-1]}"
        if reason is None:
            backup.unlink()
            return bundle
        logger.warning("The bundle is saved in single precision instead of 8 bits: %s.", reason)
        backup.replace(model)
        self._write_manifest("onnx", single.parity)
        return replace(single, int8_rejection_reason=reason)

    def _measure_seconds(self) -> float:
        """Return the shortest of several times that the bundle takes for some of the texts."""
        classifier, texts = classify.Classifier(self.folder), self.texts[:_N_TIMED_TEXTS]
        return min(repeat(lambda: classifier.predict_proba(texts), number=1, repeat=1 + _N_TIMED_RUNS))

    def _write_manifest(self, format: str, parity: Parity | None) -> None:  # noqa: A002
        files = {
            file.name: file_hash(file)
            for file in sorted(self.folder.iterdir())
            if file.name not in (classify.MANIFEST, _SINGLE_PRECISION_MODEL)
        }
        manifest: dict[str, Any] = {
            "format": classify.FORMAT,
            "kind": "static" if format == "static" else "onnx",
            "weights": {"static": "fp16", "onnx": "fp32", "onnx-int8": "int8"}[format],
            "n_classes": len(self.model.labels or ()),
            **{name: value for name, value in vars(self.tokenizer_settings).items() if name != "tokenizer"},
            "normalize": self.normalizes,
            "parity": parity and asdict(parity),
            "made_by": f"setfit-kd {__version__}",
            "files": files,
        }
        content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (self.folder / classify.MANIFEST).write_text(content, encoding="utf-8")


def _readme(model: SetFitModel, bundle: Bundle, title: str) -> str:
    packages = ["numpy", "tokenizers", *([] if bundle.format == "static" else ["onnxruntime"])]
    labels = model.labels or ()
    return _README.format(
        title=escape_markdown(truncate(title)),
        n_classes=len(labels),
        labels=escape_markdown(", ".join(map(short_class_name, labels))),
        requirements=" and ".join([", ".join(packages[:-1]), packages[-1]]),
        packages=" ".join(packages),
        **asdict(bundle.parity),
    )
