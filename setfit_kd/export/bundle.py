"""Making a bundle, and checking it against the classifier that it was made of."""

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

from setfit_kd import __version__, runtime
from setfit_kd.config import BUNDLE_FORMATS
from setfit_kd.errors import ConfigError, DataError, ModelError
from setfit_kd.export.onnx import quantize, write_onnx
from setfit_kd.export.static import write_static
from setfit_kd.export.tokenizer import head_weights, labels_json, tokenizer_settings
from setfit_kd.models import check_finite, is_static, predict_proba
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.escape import class_name, markdown, truncate
from setfit_kd.utils.files import folder_megabytes
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

MIN_AGREEMENT = {"onnx": 0.999, "onnx-int8": 0.98, "static": 0.999}
"""Share of texts that a bundle must label as its classifier does, unless told otherwise."""
MAX_TEXTS = 1000
"""Texts of the check."""
_TIMED_TEXTS, _TRIES = 128, 3
_README = """# {title}

A text classifier over {n_classes} classes: {labels}.

It needs {needs}, and no torch:

```
pip install {packages}
python classify.py "some text"
python classify.py < texts.txt
```

```python
from classify import Classifier  # or: from setfit_kd.runtime import Classifier

classifier = Classifier("path/to/this/folder")
classifier.predict(["some text"])
classifier.predict_proba(["some text"])  # (n, {n_classes}) float32, columns as in classifier.labels
```

It labels {agreement:.1%} of {texts:,} texts as the model it was made of does; the largest difference of a probability
is {largest_difference:.2g}. `manifest.json` tells how texts are read, and holds the hashes that are checked on loading.
"""


@dataclass(frozen=True)
class Parity:
    """How a bundle compares with the classifier that it was made of.

    Attributes:
        texts: Texts that both classified.
        agreement: Share of them that both give the same label.
        largest_difference: Of any probability.
    """

    texts: int
    agreement: float
    largest_difference: float


@dataclass(frozen=True)
class Bundle:
    """A bundle that was made.

    Attributes:
        path: Its folder.
        format: One of `BUNDLE_FORMATS`; ``onnx`` also where ``onnx-int8`` was asked for and would have been no gain.
        parity: Its check.
        megabytes: Its size, in 10^6 bytes.
        why_not_int8: Why it is not in 8 bits although that was asked for.
    """

    path: Path
    format: str
    parity: Parity
    megabytes: float
    why_not_int8: str | None = None


def export_bundle(
    model: SetFitModel,
    folder: str | Path,
    *,
    texts: Sequence[str],
    format: str | None = None,  # noqa: A002 - the setting's name everywhere
    min_agreement: float | None = None,
    title: str = "Text classifier",
) -> Bundle:
    """Write a classifier as a bundle, a folder that `setfit_kd.runtime.Classifier` runs without torch.

    Every bundle is run on ``texts`` before it takes its place, and held against the classifier itself. Where 8 bits
    cost too much agreement, or are slower on this CPU than single precision, single precision is kept.

    Args:
        model: A classifier with a logistic regression as its head; it is moved to the CPU.
        folder: Where to; there must be nothing yet.
        texts: Texts of the kind that it is for, such as the pool; at most `MAX_TEXTS` are taken, evenly.
        format: ``onnx``, ``onnx-int8`` or ``static``; None takes ``static`` for static bodies and ``onnx-int8`` for all
            others.
        min_agreement: Least share of the texts with the label that the classifier gives, from 0 to 1 [0.98 for
            ``onnx-int8``, 0.999 for the others].
        title: Of its README.

    Raises:
        ConfigError: There is no such format, or the share is none.
        DataError: There are no texts.
        ModelError: The classifier cannot be exported, or its bundle agrees with it too little.
        OutputError: The folder is there already or cannot be written.
        UnavailableError: A package for ONNX is missing.
    """
    format = format or ("static" if is_static(model.model_body) else "onnx-int8")  # noqa: A001
    if format not in BUNDLE_FORMATS:
        raise ConfigError(f"There is no format {format!r}.", hint=f"There are: {', '.join(BUNDLE_FORMATS)}.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"An agreement of {min_agreement} cannot be.", hint="Give a share from 0 to 1.")
    if not len(texts):
        raise DataError("There are no texts to check the bundle on.", hint="Give some of the kind that it is for.")
    texts = [texts[row] for row in np.unique(np.linspace(0, len(texts) - 1, MAX_TEXTS).astype(int))]
    floors = {name: floor if min_agreement is None else min_agreement for name, floor in MIN_AGREEMENT.items()}
    head_weights(model)  # what has none cannot be exported, whatever the format
    model.model_body.to("cpu")
    check_finite(model.model_body, title)
    expected = predict_proba(model, texts, description="Classifying by torch")
    if not np.isfinite(expected).all():
        raise ModelError("The classifier gives probabilities that are not numbers.", hint="Train it again.")
    with atomic_folder(folder) as part:
        draft = _Draft(model, part, texts, expected)
        if format == "static":
            draft.normalizes = write_static(model, part)
            made = draft.checked("static", floors)
        else:
            write_onnx(model, part / runtime.ONNX_MODEL)
            made = draft.checked("onnx", floors)
            if format == "onnx-int8":
                made = draft.in_8_bits(made, floors)
        (part / "README.md").write_text(_readme(model, made, title), encoding="utf-8")
        size = folder_megabytes(part)
    return replace(made, path=Path(folder), megabytes=round(size, 1))


class _Draft:
    """A bundle in the making."""

    def __init__(self, model: SetFitModel, folder: Path, texts: list[str], expected: npt.NDArray[np.float32]) -> None:
        self.model, self.folder, self.texts, self.expected = model, folder, texts, expected
        self.normalizes = False
        self.reading = tokenizer_settings(model.model_body)
        (folder / runtime.TOKENIZER).write_text(self.reading.tokenizer, encoding="utf-8")
        (folder / runtime.LABELS).write_text(labels_json(model), encoding="utf-8")
        shutil.copyfile(runtime.SOURCE, folder / "classify.py")

    def checked(self, format: str, floors: dict[str, float]) -> Bundle:  # noqa: A002
        """Write the manifest of what lies in the folder, with the figures of its check.

        Raises:
            ModelError: It agrees too little.
        """
        self._write_manifest(format, None)
        found = runtime.Classifier(self.folder).predict_proba(self.texts)
        parity = Parity(
            texts=len(self.texts),
            agreement=float((found.argmax(axis=1) == self.expected.argmax(axis=1)).mean()),
            largest_difference=float(np.abs(found - self.expected).max()),
        )
        if parity.agreement < floors[format]:
            raise ModelError(
                f"As {format}, the classifier labels {parity.agreement:.2%} of {parity.texts:,} texts as it does in "
                f"torch, less than {floors[format]:.2%}.",
                hint="Take another --format, or a lower --min-agreement if that will do.",
            )
        self._write_manifest(format, parity)
        return Bundle(self.folder, format, parity, 0.0)

    def in_8_bits(self, single: Bundle, floors: dict[str, float]) -> Bundle:
        """The bundle in 8 bits, or as it was with the reason why."""
        model, kept = self.folder / runtime.ONNX_MODEL, self.folder / "single.onnx"
        before = self._seconds()
        model.rename(kept)
        quantize(kept, model)
        try:
            made = self.checked("onnx-int8", floors)
            after = self._seconds()
            reason = None if after < before else f"it is not faster on this CPU ({after / before:.2f} times the time)"
        except ModelError as error:
            reason = f"too much is lost: {error.message[0].lower()}{error.message[1:-1]}"
        if reason is None:
            kept.unlink()
            return made
        logger.warning("The bundle stays in single precision. In 8 bits, %s.", reason)
        kept.replace(model)
        self._write_manifest("onnx", single.parity)
        return replace(single, why_not_int8=reason)

    def _seconds(self) -> float:
        """The least time that the bundle takes for some of the texts."""
        classifier, texts = runtime.Classifier(self.folder), self.texts[:_TIMED_TEXTS]
        return min(repeat(lambda: classifier.predict_proba(texts), number=1, repeat=1 + _TRIES))

    def _write_manifest(self, format: str, parity: Parity | None) -> None:  # noqa: A002
        files = {
            file.name: file_hash(file)
            for file in sorted(self.folder.iterdir())
            if file.name not in (runtime.MANIFEST, "single.onnx")
        }
        manifest: dict[str, Any] = {
            "format": runtime.FORMAT,
            "kind": "static" if format == "static" else "onnx",
            "weights": {"static": "fp16", "onnx": "fp32", "onnx-int8": "int8"}[format],
            "n_classes": len(self.model.labels or ()),
            **{name: value for name, value in vars(self.reading).items() if name != "tokenizer"},
            "normalize": self.normalizes,
            "parity": parity and asdict(parity),
            "made_by": f"setfit-kd {__version__}",
            "files": files,
        }
        content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (self.folder / runtime.MANIFEST).write_text(content, encoding="utf-8")


def _readme(model: SetFitModel, bundle: Bundle, title: str) -> str:
    packages = ["numpy", "tokenizers", *([] if bundle.format == "static" else ["onnxruntime"])]
    labels = model.labels or ()
    return _README.format(
        title=markdown(truncate(title)),
        n_classes=len(labels),
        labels=markdown(", ".join(map(class_name, labels))),
        needs=" and ".join([", ".join(packages[:-1]), packages[-1]]),
        packages=" ".join(packages),
        **asdict(bundle.parity),
    )
