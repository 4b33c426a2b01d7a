"""Export a classifier as a bundle and check the bundle against the classifier."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from setfit_kd import __version__
from setfit_kd.errors import ModelError, OutputError
from setfit_kd.export.formats import head_weights, quantize, write_onnx, write_static
from setfit_kd.models.bodies import default_prompt, is_static
from setfit_kd.models.encode import predict_proba
from setfit_kd.runtime import classify
from setfit_kd.utils.atomic_io import atomic_folder, raise_output_errors, replace_folder
from setfit_kd.utils.escape import escape_markdown, short_class_name, truncate
from setfit_kd.utils.files import folder_megabytes, read_json
from setfit_kd.utils.hashing import file_hash

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

MIN_AGREEMENT = {"onnx": 0.999, "onnx-int8": 0.98, "static": 0.999}
"""Default minimum share of texts that the bundle must label like the classifier, by format."""
_README_FILE, _SCRIPT, _SINGLE_PRECISION_MODEL = "README.md", "classify.py", ".single.onnx"
_FILES = (classify.MANIFEST, classify.LABELS, classify.TOKENIZER, classify.ONNX_MODEL, classify.VECTORS, classify.HEAD)
_NO_LIMIT = 1_000_000
"""Tokenizers without a length limit report a number far above this."""
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
class Bundle:
    """An exported bundle.

    Attributes:
        path: Folder of the bundle.
        format: ``onnx``, ``onnx-int8`` or ``static``; ``onnx`` also if ``onnx-int8`` was requested but rejected.
        parity: Comparison with the original classifier: the number of ``texts``, the ``agreement`` (share of texts
            with the same label), and the ``largest_difference`` between two probabilities.
        megabytes: Size in 10^6 bytes.
        int8_rejection_reason: Reason why ``onnx-int8`` was rejected; None if it was not.
    """

    path: Path
    format: str
    parity: dict[str, Any]
    megabytes: float
    int8_rejection_reason: str | None = None


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise an `OutputError` if a folder exists, unless it contains a bundle and ``overwrite`` is set."""
    with raise_output_errors(folder):
        if not folder.exists():
            return
    try:
        is_bundle = str(read_json(folder / classify.MANIFEST)["made_by"]).startswith("setfit-kd")
    except (OSError, ValueError, LookupError, TypeError):
        is_bundle = False
    if not is_bundle or not overwrite:
        problem = " and is not a bundle" if overwrite else ""
        alternative = "pass --overwrite" if is_bundle else "remove it"
        raise OutputError(f"{folder} already exists{problem}.", hint=f"Choose another path, or {alternative}.")


def export_bundle(
    model: SetFitModel,
    folder: str | Path,
    *,
    texts: Sequence[str],
    format: str | None = None,  # noqa: A002 - the name of the setting
    min_agreement: float | None = None,
    title: str = "Text classifier",
    overwrite: bool = False,
) -> Bundle:
    """Export a classifier as a bundle, a folder that `setfit_kd.runtime.Classifier` runs without torch.

    Before it is saved, the bundle is compared with the classifier on ``texts``. If 8 bits reduce the agreement too much
    or are not faster than single precision on this CPU, the bundle is saved in single precision.

    Args:
        model: Classifier with a logistic regression head; it is moved to the CPU.
        folder: Output folder.
        texts: Typical texts, such as the pool; at most 1,000 are used, evenly spaced.
        format: ``onnx``, ``onnx-int8`` or ``static``; None selects ``static`` for static bodies and ``onnx-int8`` for
            all others.
        min_agreement: Minimum share of texts, from 0 to 1, that the bundle must label like the classifier. [default:
            0.98 for ``onnx-int8``, 0.999 for the others]
        title: Title of the bundle's README.
        overwrite: Replace an earlier bundle in the folder; other files in it are kept.

    Raises:
        ModelError: If the classifier cannot be exported, or its agreement with the bundle is too low.
        OutputError: If the folder exists and is not to be overwritten, or cannot be written.
        UnavailableError: If a package for ONNX is missing.
    """
    format = format or ("static" if is_static(model.model_body) else "onnx-int8")  # noqa: A001
    check_output(Path(folder), overwrite=overwrite)
    texts = [texts[row] for row in np.unique(np.linspace(0, len(texts) - 1, 1000).astype(int))]
    head_weights(model)  # fail early if the head cannot be exported
    model.model_body.to("cpu")
    expected = predict_proba(model, texts, description="Classifying with torch")
    if not np.isfinite(expected).all():
        raise ModelError("The classifier predicts probabilities that are not finite.", hint="Train it again.")
    with ExitStack() as stack:
        is_ours = (_README_FILE, _SCRIPT, *_FILES).__contains__
        target = stack.enter_context(replace_folder(folder, is_ours=is_ours)) if overwrite else folder
        part = stack.enter_context(atomic_folder(target))
        draft = _Draft(part, _write_common_files(model, part), texts, expected, min_agreement)
        reason = None
        if format == "static":
            draft.manifest["normalize"] = write_static(model, part)
            parity = draft.verify("static")
        else:
            write_onnx(model, part / classify.ONNX_MODEL)
            parity = draft.verify("onnx")
        if format == "onnx-int8":
            parity, reason = draft.try_int8(parity)
            format = "onnx" if reason else format  # noqa: A001
        (part / _README_FILE).write_text(_readme(model, format, parity, title), encoding="utf-8")
        megabytes = folder_megabytes(part)
    return Bundle(Path(folder), format, parity, round(megabytes, 1), reason)


@dataclass(frozen=True)
class _Draft:
    """Bundle that is being written and checked against the probabilities ``expected`` from the classifier."""

    folder: Path
    manifest: dict[str, Any]
    texts: list[str]
    expected: npt.NDArray[np.float32]
    min_agreement: float | None

    def verify(self, format: str) -> dict[str, Any]:  # noqa: A002
        """Compare the bundle with the classifier and write the manifest; refuse a bundle with low agreement."""
        self.write_manifest(format, None)
        probabilities = classify.Classifier(self.folder).predict_proba(self.texts)
        agreement = float((probabilities.argmax(axis=1) == self.expected.argmax(axis=1)).mean())
        difference = float(np.abs(probabilities - self.expected).max())
        threshold = MIN_AGREEMENT[format] if self.min_agreement is None else self.min_agreement
        if agreement < threshold:
            raise ModelError(
                f"The {format} bundle and the classifier agree on {agreement:.2%} of {len(self.texts):,} texts, "
                f"expected at least {threshold:.2%}.",
                hint="Use another --format or a lower --min-agreement.",
            )
        parity = {"texts": len(self.texts), "agreement": agreement, "largest_difference": difference}
        self.write_manifest(format, parity)
        return parity

    def try_int8(self, single: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Quantize the bundle to 8 bits, or restore single precision and return the reason with the comparison."""
        model, backup = self.folder / classify.ONNX_MODEL, self.folder / _SINGLE_PRECISION_MODEL
        before = self.measure_seconds()
        model.rename(backup)
        quantize(backup, model)
        try:
            parity = self.verify("onnx-int8")
            after = self.measure_seconds()
            if after < before:
                backup.unlink()
                return parity, None
            reason = f"not faster on this CPU ({after / before:.2f} times the time)"
        except ModelError as error:
            reason = f"agreement too low: {error.message[0].lower()}{error.message[1:-1]}"
        logger.warning("The bundle is saved in single precision instead of 8 bits: %s.", reason)
        backup.replace(model)
        self.write_manifest("onnx", single)
        return single, reason

    def measure_seconds(self) -> float:
        """Return the shortest of several times that the bundle takes for some of the texts."""
        classifier = classify.Classifier(self.folder)
        return min(repeat(lambda: classifier.predict_proba(self.texts[:128]), number=1, repeat=4))

    def write_manifest(self, format: str, parity: dict[str, Any] | None) -> None:  # noqa: A002
        """Write the settings, the comparison and the hash of each file."""
        others = (classify.MANIFEST, _SINGLE_PRECISION_MODEL)
        self.manifest.update(
            kind="static" if format == "static" else "onnx",
            weights={"static": "fp16", "onnx": "fp32", "onnx-int8": "int8"}[format],
            parity=parity,
            files={path.name: file_hash(path) for path in sorted(self.folder.iterdir()) if path.name not in others},
        )
        (self.folder / classify.MANIFEST).write_text(_to_json(self.manifest), encoding="utf-8")


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _write_common_files(model: SetFitModel, folder: Path) -> dict[str, Any]:
    """Write the tokenizer, which includes truncation, the labels and the script, and return the manifest so far."""
    from tokenizers import Tokenizer

    body, labels = model.model_body, [str(label) for label in model.labels or ()]
    original, prefix = body.tokenizer, default_prompt(body)
    if prefix and not all(getattr(module, "include_prompt", True) for module in body):
        raise ModelError("Cannot export a body that excludes its prompt from the embedding.")
    if is_static(body):
        tokenizer = original
    elif getattr(original, "backend_tokenizer", None) is None:
        raise ModelError("Only models with a fast tokenizer can be exported.", hint="Use another student body.")
    else:
        tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        max_length = min(filter(None, (body.max_seq_length, original.model_max_length)), default=_NO_LIMIT)
        if max_length < _NO_LIMIT:
            tokenizer.enable_truncation(int(max_length), direction=original.truncation_side)
    (folder / classify.TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / classify.LABELS).write_text(_to_json(labels), encoding="utf-8")
    shutil.copyfile(classify.__file__, folder / _SCRIPT)
    return {
        "format": classify.FORMAT,
        **dict.fromkeys(("kind", "weights")),
        "n_classes": len(labels),
        "max_length": tokenizer.truncation and int(tokenizer.truncation["max_length"]),
        "special_tokens": not is_static(body),
        "pad_id": int(getattr(original, "pad_token_id", None) or 0),
        "prefix": prefix,
        "normalize": False,
        "parity": None,
        "made_by": f"setfit-kd {__version__}",
    }


def _readme(model: SetFitModel, format: str, parity: dict[str, Any], title: str) -> str:  # noqa: A002
    packages = ["numpy", "tokenizers", *([] if format == "static" else ["onnxruntime"])]
    labels = model.labels or ()
    return _README.format(
        title=escape_markdown(truncate(title)),
        n_classes=len(labels),
        labels=escape_markdown(", ".join(map(short_class_name, labels))),
        requirements=" and ".join([", ".join(packages[:-1]), packages[-1]]),
        packages=" ".join(packages),
        **parity,
    )
