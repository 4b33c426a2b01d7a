"""Export a classifier as a bundle and check the bundle against the classifier."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from setfit_kd import __version__
from setfit_kd.errors import ConfigError, DataError, ModelError, OutputError, first_line
from setfit_kd.models.bodies import check_finite, default_prompt, has_token_types, is_static, takes_pairs
from setfit_kd.models.encode import predict_proba
from setfit_kd.models.heads import head_task, head_thresholds, linear_weights
from setfit_kd.models.onnx import silence_warnings, write_graph
from setfit_kd.runtime import classify
from setfit_kd.tasks.classification import MULTI_LABEL, TASKS
from setfit_kd.utils.atomic_io import atomic_folder, raise_output_errors, replace_folder
from setfit_kd.utils.console import escape_markdown, short_class_name, show_progress, truncate
from setfit_kd.utils.files import file_hash, folder_megabytes, read_json

if TYPE_CHECKING:
    from setfit import SetFitModel

logger = logging.getLogger(__name__)

MIN_AGREEMENT = {"onnx": 0.999, "onnx-int8": 0.98, "static": 0.999}  # defaults, see `export_bundle`
README_FILE, _SCRIPTS, _SINGLE_PRECISION_MODEL = "README.md", ("classify.py", "answer.py"), ".single.onnx"
_FILES = (classify.MANIFEST, classify.LABELS, classify.TOKENIZER, classify.ONNX_MODEL, classify.VECTORS, classify.HEAD)
_KEPT_TEXTS, _KEPT_CHARACTERS = 4, 200  # number and length of the texts to check the bundle in a student's folder on
_MAX_KEPT_DIFFERENCE = 1e-3  # of the probabilities of a bundle in a student's folder
_MAX_KEPT_PARAMETERS = 70_000_000  # the bundle of a larger student takes more than five seconds
_NO_LIMIT = 1_000_000  # tokenizers without a length limit report a number far above this
_README = """# {title}

A text classifier with {n_classes} classes: {labels}.{decision}

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

On {texts:,} texts, {agreement:.1%} of the {unit} are the same as those of the original model, and probabilities differ
by at most {largest_difference:.2g}. `manifest.json` contains the tokenizer settings and the file hashes that are
verified on loading.
"""
_MULTI_LABEL_DECISION = """

A text gets each label whose probability reaches the label's threshold: any number of labels, or none. The thresholds
are 0.5, or those in `manifest.json`."""


@dataclass(frozen=True)
class Bundle:
    """An exported bundle; ``parity`` compares it with the classifier.

    ``parity`` holds the number of ``texts``, the ``agreement`` (share of texts with the same label; if
    multi-label, share of the pairs of a text and a label with the same decision), and the
    ``largest_difference`` between two probabilities.
    """

    path: Path
    format: str  # onnx also if onnx-int8 was requested but rejected
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
        format: ``onnx``, ``onnx-int8`` or ``static``. [default: ``static`` for static bodies, else ``onnx-int8``]
        min_agreement: Minimum agreement of the bundle with the classifier, from 0 to 1, see `Bundle`. [default:
            0.98 for ``onnx-int8``, 0.999 for the others]
        title: Title of the bundle's README.
        overwrite: Replace an earlier bundle in the folder; other files in it are kept.

    Raises:
        ConfigError: If ``format`` or ``min_agreement`` is unknown or out of range.
        DataError: If there are no texts.
        ModelError: If the classifier cannot be exported, or its agreement with the bundle is too low.
        OutputError: If the folder exists and is not to be overwritten, or cannot be written.
        UnavailableError: If a package for ONNX is missing.
    """
    format = format or ("static" if is_static(model.model_body) else "onnx-int8")  # noqa: A001
    if format not in MIN_AGREEMENT:
        raise ConfigError(f"Unknown bundle format {format!r}.", hint=f"Use one of {', '.join(MIN_AGREEMENT)}.")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement must be from 0 to 1, got {min_agreement}.", hint="Pass a share such as 0.98.")
    if not len(texts):
        raise DataError("Cannot check a bundle without texts.", hint="Pass texts like those to be classified.")
    check_output(Path(folder), overwrite=overwrite)
    texts = [texts[row] for row in np.unique(np.linspace(0, len(texts) - 1, 1000).astype(int))]
    head_weights(model)  # fail early if the head cannot be exported
    check_finite(model.model_body.to("cpu"), title)
    expected = predict_proba(model, texts, description="Classifying with torch")
    if not np.isfinite(expected).all():
        raise ModelError("The classifier predicts probabilities that are not finite.", hint="Train it again.")
    with bundle_folder(folder, overwrite=overwrite) as part:
        draft = Draft(part, _write_common_files(model, part), texts, expected, min_agreement)
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
        (part / README_FILE).write_text(_readme(model, format, parity, title), encoding="utf-8")
        megabytes = folder_megabytes(part)
    return Bundle(Path(folder), format, parity, round(megabytes, 1), reason)


def keep_bundle(model: SetFitModel, folder: Path, *, texts: Sequence[str]) -> None:
    """Export a classifier beside its other files, in single precision or as static embeddings.

    Networks with more than `_MAX_KEPT_PARAMETERS` are left out, and all networks if the packages for ONNX are not
    installed. A failed export is only a warning.
    """
    kind = "static" if is_static(model.model_body) else "onnx"
    is_large = sum(parameter.numel() for parameter in model.model_body.parameters()) > _MAX_KEPT_PARAMETERS
    if kind == "onnx" and (is_large or not (find_spec("onnx") and find_spec("onnxruntime"))):
        return
    some = [texts[row][:_KEPT_CHARACTERS] for row in np.linspace(0, len(texts) - 1, _KEPT_TEXTS).astype(int)]
    some.append(" ".join(some * 10))  # longer than most models read
    try:
        with show_progress(False):
            bundle = export_bundle(model, folder, texts=some, format=kind)
        if bundle.parity["largest_difference"] > _MAX_KEPT_DIFFERENCE:
            shutil.rmtree(folder)
            raise ModelError(f"its probabilities differ by {bundle.parity['largest_difference']:.2g}.")
    except Exception as error:
        reason = getattr(error, "message", f"{type(error).__name__}: {first_line(str(error))}")
        logger.warning("The student has no bundle, so predict takes longer to start: %s", reason)


@contextmanager
def bundle_folder(folder: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Create or replace a bundle atomically: yield a temporary folder; other files in the replaced folder are kept."""
    with ExitStack() as stack:
        is_ours = (README_FILE, *_SCRIPTS, *_FILES).__contains__
        target = stack.enter_context(replace_folder(folder, is_ours=is_ours)) if overwrite else folder
        yield stack.enter_context(atomic_folder(target))


@dataclass(frozen=True)
class Draft:
    """Bundle that is being written and checked against what is ``expected``: the probabilities from the classifier."""

    folder: Path
    manifest: dict[str, Any]
    texts: Sequence[Any]
    expected: Any
    min_agreement: float | None
    kind: str = "onnx"

    def verify(self, format: str) -> dict[str, Any]:  # noqa: A002
        """Compare the bundle with the classifier and write the manifest; refuse a bundle with low agreement."""
        self.write_manifest(format, None)
        agreement, difference = self.compare()
        threshold = MIN_AGREEMENT[format] if self.min_agreement is None else self.min_agreement
        if agreement < threshold:
            shares = f"{agreement:.2%} of {len(self.texts):,} texts, expected at least {threshold:.2%}"
            message = f"The {format} bundle and the classifier agree on {shares}."
            raise ModelError(message, hint="Use another --format or a lower --min-agreement.")
        parity = {"texts": len(self.texts), "agreement": agreement, "largest_difference": difference}
        self.write_manifest(format, parity)
        return parity

    def compare(self) -> tuple[float, float]:
        """Return the agreement of the bundle with the classifier, and the largest difference of a probability."""
        classifier = classify.Classifier(self.folder)
        probabilities, decide = classifier.predict_proba(self.texts), TASKS[classifier.task].decide
        labels = (decide(values, classifier.thresholds) for values in (probabilities, self.expected))
        return float(np.mean(np.equal(*labels))), float(np.abs(probabilities - self.expected).max())

    def try_int8(self, single: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Quantize the bundle to 8 bits, or restore single precision and return the reason with the comparison.

        If the agreement is too low, the layers of `quantize` with ``mixed`` are left in single precision.
        """
        model, backup = self.folder / classify.ONNX_MODEL, self.folder / _SINGLE_PRECISION_MODEL
        before = self.measure_seconds()
        model.rename(backup)
        for mixed in (False, True):
            quantize(backup, model, mixed=mixed)
            try:
                parity = self.verify("onnx-int8")
            except ModelError as error:
                reason = f"agreement too low: {error.message[0].lower()}{error.message[1:-1]}"
                continue
            after = self.measure_seconds()
            if after < before:
                if mixed:
                    message = "Layers with fewer outputs than inputs are left in single precision (%s)."
                    logger.info(message, reason)
                backup.unlink()
                return parity, None
            reason = f"not faster on this CPU ({after / before:.2f} times the time)"
            break
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
            kind="static" if format == "static" else self.kind,
            weights={"static": "fp16", "onnx": "fp32", "onnx-int8": "int8"}[format],
            parity=parity,
            files={path.name: file_hash(path) for path in sorted(self.folder.iterdir()) if path.name not in others},
        )
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        (self.folder / classify.MANIFEST).write_text(text, encoding="utf-8")


def _write_common_files(model: SetFitModel, folder: Path) -> dict[str, Any]:
    """Write the tokenizer, which includes truncation, the labels and the script, and return the manifest so far."""
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
    (folder / classify.LABELS).write_text(json.dumps(labels, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(classify.__file__, folder / Path(classify.__file__).name)
    task: dict[str, Any] = {"format": 1}
    if head_task(model.model_head) is MULTI_LABEL:
        thresholds = head_thresholds(model.model_head)
        listed = None if thresholds is None else thresholds.tolist()
        task = {"format": 2, "task": MULTI_LABEL.name, "thresholds": listed}
    if takes_pairs(body):
        task |= {"format": classify.FORMAT, "pairs": True}
    return {
        **task,
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
    labels, is_multi_label = model.labels or (), head_task(model.model_head) is MULTI_LABEL
    return _README.format(
        title=escape_markdown(truncate(title)),
        n_classes=len(labels),
        labels=escape_markdown(", ".join(map(short_class_name, labels))),
        requirements=" and ".join([", ".join(packages[:-1]), packages[-1]]),
        packages=" ".join(packages),
        decision=_MULTI_LABEL_DECISION if is_multi_label else "",
        unit="decisions for a label" if is_multi_label else "labels",
        **parity,
    )


def head_weights(model: SetFitModel) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return weights (n_classes, d) and biases (n_classes,) of a head, see `linear_weights`, in single precision.

    Raises:
        ModelError: If the head does not consist of fitted logistic regressions, or the model has no labels.
    """
    from sklearn.linear_model import LogisticRegression

    head = model.model_head
    if not model.labels:
        raise ModelError("The model has no labels.", hint="Set model.labels.")
    rows = getattr(head, "estimators_", [head]) if head_task(head) is MULTI_LABEL else [head]
    if not all(isinstance(row, LogisticRegression) and hasattr(row, "coef_") for row in rows):
        message = f"The head is a {type(head).__name__}; only a fitted logistic regression can be exported."
        raise ModelError(message, hint="Train the classifier with setfit-kd.")
    coef, intercept = (np.asarray(values, np.float32) for values in linear_weights(head))
    return coef, intercept


class _ClassifierGraph(nn.Module):
    """Module that maps (B, T) token ids, attention mask and any token types to (B, n_classes) probabilities."""

    def __init__(self, model: SetFitModel) -> None:
        super().__init__()
        self.body, self.normalizes = model.model_body, bool(model.normalize_embeddings)
        coef, intercept = head_weights(model)
        self.is_multi_label = head_task(model.model_head) is MULTI_LABEL
        # A MatMul node, because the quantizer renames Gemm nodes and could not exclude the head from quantization.
        self.coef = nn.Parameter(torch.as_tensor(coef.T.copy()), requires_grad=False)
        self.intercept = nn.Parameter(torch.as_tensor(intercept), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        features = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=False))
        embeddings = self.body(features)["sentence_embedding"]
        if self.normalizes:
            embeddings = nn.functional.normalize(embeddings)
        logits = embeddings @ self.coef + self.intercept
        return torch.sigmoid(logits) if self.is_multi_label else torch.softmax(logits, dim=1)


def write_onnx(model: SetFitModel, file: Path) -> None:
    """Write a classifier with a body that is not static as an ONNX graph in single precision."""
    if is_static(model.model_body):
        raise ModelError("A static body cannot be exported as ONNX.", hint="Use --format static.")
    graph = _ClassifierGraph(model)
    write_graph(graph, file, outputs=["probabilities"], token_types=has_token_types(model.model_body))


def quantize(source: Path, target: Path, *, mixed: bool = False) -> None:
    """Quantize weights to 8 bits with one scale per column, and activations at run time; the head remains as it is.

    With ``mixed``, so do layers with fewer outputs than inputs, such as the last of each feed-forward block, whose
    inputs have outliers.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The head is the last matrix product of the graph.
    graph = onnx.load(str(source)).graph
    products = [node for node in graph.node if node.op_type == "MatMul"]
    narrowing = {array.name for array in graph.initializer if len(array.dims) == 2 and array.dims[0] > array.dims[1]}
    kept = [node.name for node in products if mixed and narrowing & set(node.input)] + [products[-1].name]
    with silence_warnings():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8, nodes_to_exclude=kept)


def write_static(model: SetFitModel, folder: Path) -> bool:
    """Write token vectors in half precision and the head of a model; return whether the mean vectors are normalized."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    body = model.model_body
    if not is_static(body) or not all(isinstance(module, Normalize) for module in list(body)[1:]):
        hint = "Use --format onnx-int8, or train with --student static."
        raise ModelError("Only static bodies can be exported as static.", hint=hint)
    vectors = body[0].embedding.weight.detach().cpu().numpy()
    largest = float(np.abs(vectors).max(initial=0))
    # Half precision ranges from 6e-8 to 65,504. If vectors are scaled, the head is scaled inversely.
    scale = 1.0 if 0.1 <= largest <= 1e4 or not largest else 1 / largest
    coef, intercept = head_weights(model)
    normalizes = len(body) > 1 or bool(model.normalize_embeddings)
    # Written as bytes, because safetensors creates files that only their owner can read.
    (folder / classify.VECTORS).write_bytes(save({"embeddings": (vectors * scale).astype(np.float16)}))
    scaled = coef if normalizes else coef / np.float32(scale)
    (folder / classify.HEAD).write_bytes(save({"coef": scaled, "intercept": intercept}))
    return normalizes
