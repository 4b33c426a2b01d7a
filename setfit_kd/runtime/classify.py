"""Classify texts with a bundle written by `setfit-kd export`.

Requires numpy and tokenizers, and onnxruntime for ONNX bundles. Every bundle contains a copy of this file, the only
file of a bundle that is ever executed:

    python classify.py "some text" "another"      # prints one JSON object per text
    python classify.py < texts.txt                # reads one text per line, and answers as the lines arrive

If it classifies pairs of texts, two arguments are a pair, and a tab separates the texts of a pair on a line.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import hashlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

logger = logging.getLogger("setfit_kd.runtime")  # the same name in the copy inside a bundle

FORMAT = 3  # of bundles for pairs of texts; multi-label bundles have format 2, others format 1
SINGLE_LABEL, MULTI_LABEL = "single-label", "multi-label"
MANIFEST, LABELS, TOKENIZER = "manifest.json", "labels.json", "tokenizer.json"
ONNX_MODEL, VECTORS, HEAD = "model.onnx", "embeddings.safetensors", "head.safetensors"
_EXTERNAL_DATA = b"\n\x08location"  # marks a tensor in an ONNX graph, a protocol buffer, that is in another file
_CHUNK_SIZE = 2048  # maximum number of texts that are tokenized and sorted by length together
_MAX_BYTES = {".json": 64 << 20, ".safetensors": 1 << 31, ".onnx": 1 << 31}  # larger files are not read
_LOOP_OPERATORS = {"Loop", "Scan"}  # let a small graph run forever; `setfit-kd export` never writes them
MAX_CHARACTERS = 1_000_000  # maximum number of characters that are read of one text, and tokenized together
_CHARACTERS_PER_TOKEN = 8  # an upper estimate
_MARGIN_TOKENS = 32  # number of tokens next to a cut that may differ from those of the full text
_WHITESPACE = re.compile(r"(?<=[^ \t\r\n])[ \t\r\n]")
_READ_BYTES = 1 << 18
_IGNORABLE = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    r"\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
INVISIBLE, _VISIBLE = re.compile(f"[{_IGNORABLE}]"), re.compile(rf"[^\s{_IGNORABLE}]")
"""Invisible: Unicode's Default_Ignorable_Code_Point (zero-width characters, direction marks, variation selectors, tags,
...) and interlinear annotation marks. Visible: everything else but white space."""
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal interprets instead of displaying."""

PAIR_SEPARATOR = "\x1f"
"""Separates the two texts of a pair, which is one string: the unit separator of ASCII."""

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
Text: TypeAlias = "str | tuple[str, str]"


class BundleError(ValueError):
    """A bundle is incomplete, does not match its manifest, or has a newer format; or a pair lacks a text."""


class Prediction(NamedTuple):
    """A text with its most probable label and the probability of that label; None for a text without label."""

    text: str
    label: str | None
    probability: float | None


class MultiLabelPrediction(NamedTuple):
    """A text with its labels and their probabilities; None for a text without visible characters."""

    text: str
    labels: list[str] | None
    probabilities: list[float] | None


def has_text(text: str) -> bool:
    """Return whether a text, or both of a pair, have a visible character; other texts get no label."""
    return all(_VISIBLE.search(part) for part in split_pair(text))


def join_pair(first: str, second: str) -> str:
    """Join the texts of a pair to one string."""
    return PAIR_SEPARATOR.join(text.replace(PAIR_SEPARATOR, " ") for text in (first, second))


def split_pair(text: str) -> tuple[str, ...]:
    """Split a pair into its texts; a text that is no pair remains one."""
    return tuple(text.split(PAIR_SEPARATOR, 1))


def shorten(text: str, tokenizer: Any) -> str:
    """Shorten a long text before it is tokenized, without changing the tokens that remain after truncation.

    Tokenizes longer and longer prefixes (suffixes if the tokenizer truncates on the left), cut at whitespace, until one
    has enough tokens. Without truncation, only `MAX_CHARACTERS` limits the text. Both texts of a pair are shortened.
    """
    if PAIR_SEPARATOR in text:
        return PAIR_SEPARATOR.join(shorten(part, tokenizer) for part in split_pair(text))
    truncation = getattr(tokenizer, "truncation", None) or {}
    is_left = truncation.get("direction") == "left"
    text = text[-MAX_CHARACTERS:] if is_left else text[:MAX_CHARACTERS]
    min_tokens = truncation.get("max_length", MAX_CHARACTERS) + _MARGIN_TOKENS
    size = _CHARACTERS_PER_TOKEN * min_tokens
    while size < len(text):
        if match := _WHITESPACE.search(text, len(text) - size if is_left else size):
            part = text[match.start() :] if is_left else text[: match.start()]
            encoding = tokenizer.encode(part, add_special_tokens=False)
            n_tokens = sum(sum(piece.attention_mask) for piece in (encoding, *encoding.overflowing))
            if n_tokens - truncation["stride"] * len(encoding.overflowing) >= min_tokens:
                return part
            size = max(size, len(part))
        elif not is_left:
            break  # no more whitespace
        size *= 2
    return text


class Lines:
    """Lines of a UTF-8 stream, read as they arrive; ``is_waiting`` says that the next line may arrive much later."""

    def __init__(self, stream: Any, *, errors: str = "strict") -> None:
        self.is_waiting = False
        self._stream = stream
        self._decoder = IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(errors), translate=True)

    def __iter__(self) -> Iterator[str]:
        parts: list[str] = []
        while block := self._stream.read1(_READ_BYTES):
            *lines, rest = self._decoder.decode(block).split("\n")
            if lines:
                lines[0] = "".join([*parts, lines[0]])
                parts = []
            parts.append(rest)
            for number, line in enumerate(lines, 1):
                self.is_waiting = number == len(lines)
                yield line
        if last := "".join([*parts, self._decoder.decode(b"", final=True)]):
            yield last.removesuffix("\n")


def chunk_texts(
    items: Iterable[T],
    max_items: int,
    *,
    get_text: Callable[[Any], str | None] = lambda item: item,
    is_waiting: Callable[[], bool] = lambda: False,
) -> Iterator[list[T]]:
    """Split texts into lists of at most ``max_items`` texts and `MAX_CHARACTERS` characters, or of one longer text.

    The items are texts, or anything from which ``get_text`` returns the text. A list is shorter if ``is_waiting`` says
    that the next item has not arrived. Logs a warning at the end with the number of texts of more than
    `MAX_CHARACTERS` characters, because `shorten` truncates them.
    """
    if isinstance(items, str):
        raise TypeError("expected a list of texts, got a single string")
    chunk: list[T] = []
    n_characters = n_long = 0
    for item in items:
        length = len(get_text(item) or "")
        n_long += length > MAX_CHARACTERS
        if chunk and n_characters + length > MAX_CHARACTERS:
            yield chunk
            chunk, n_characters = [], 0
        chunk.append(item)
        n_characters += length
        if len(chunk) >= max_items or is_waiting():
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk
    if n_long:
        logger.warning("Number of texts truncated to %s characters: %d.", f"{MAX_CHARACTERS:,}", n_long)


class Classifier:
    """A classifier loaded from a bundle; safe to use from several threads.

    Args:
        path: Folder of the bundle.
        threads: Maximum number of threads per batch; None leaves the choice to the libraries. With 1, tokenization is
            also limited to one thread, in the whole process, unless TOKENIZERS_PARALLELISM is set.
        batch_size: Texts per forward pass of an ONNX bundle.

    Attributes:
        folder: Folder of the bundle.
        labels: Names of the classes.
        task: ``single-label`` or ``multi-label``.
        takes_pairs: Whether pairs of texts are classified, which are passed as tuples of two texts.
        thresholds: (n_classes,) float32, minimum probability of each label of a multi-label bundle; None means 0.5.
        manifest: Content of ``manifest.json``.

    Raises:
        BundleError: If the bundle is incomplete, has changed since its export, or has a newer format.
        ImportError: If the bundle needs onnxruntime, which is not installed.

    Example:
        >>> classifier = Classifier("bundle")  # doctest: +SKIP
        >>> classifier.predict(["Rain stops play on the third day"])  # doctest: +SKIP
        ['Sports']
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, batch_size: int = 32) -> None:
        if batch_size < 1 or (threads is not None and threads < 1):
            raise ValueError(f"threads and batch_size must be 1 or more, got {threads} and {batch_size}")
        self.folder = folder = Path(path)
        kinds = {kind: (LABELS, TOKENIZER, *model.files) for kind, model in _MODELS.items()}
        self.manifest, files = read_bundle(folder, kinds, _FIELDS)
        self.batch_size = batch_size
        if threads == 1:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with convert_errors(str(folder)):
            self.labels = json.loads(files[LABELS])
            if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
                raise BundleError(f"{LABELS} must contain a list of strings.")
            self.task, self.thresholds = self._read_task()
            self.takes_pairs = bool(self.manifest.get("pairs"))
            self._tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
            self._tokenizer.no_padding()
            self._model = _MODELS[self.manifest["kind"]](files, self.manifest, threads)
        n_tokens, n_classes = self._model.n_tokens, self._model.n_classes
        if n_tokens is not None and max(self._tokenizer.get_vocab().values(), default=0) >= n_tokens:
            raise BundleError(f"{folder} has vectors for {n_tokens} tokens, but its tokenizer uses higher token ids.")
        if n_classes != len(self.labels):
            raise BundleError(f"{folder} has {len(self.labels)} labels for {n_classes} classes.")

    def predict_proba(self, texts: Sequence[Text]) -> Floats:
        """Predict class probabilities: (n, n_classes) float32, columns in the order of ``labels``.

        Each row sums to 1 if single-label; the probabilities of a multi-label bundle are independent of each other.

        Raises:
            BundleError: If the tokenizer or the model fails, or a probability is not finite.
        """
        parts = [self._classify(chunk) for chunk in chunk_texts(self._read(texts), _CHUNK_SIZE)]
        return np.concatenate([np.empty((0, len(self.labels)), np.float32), *parts])

    def predict(self, texts: Sequence[Text]) -> list[Any]:
        """Predict the most probable label of each text; None for a text without visible characters.

        A multi-label bundle predicts a list with all labels whose probability reaches their threshold.
        """
        return [prediction[1] for prediction in self.stream(texts, chunk_size=_CHUNK_SIZE)]

    def stream(
        self, texts: Iterable[Text], *, chunk_size: int = 256, is_waiting: Callable[[], bool] = lambda: False
    ) -> Iterator[Any]:
        """Classify any number of texts in their order, with at most ``chunk_size`` of them in memory.

        A `Prediction` per text, or a `MultiLabelPrediction` if multi-label, is yielded once ``chunk_size`` texts have
        arrived, ``is_waiting`` says that the next text has not arrived, or the input ends. A ``chunk_size`` below 1
        raises a ValueError.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
        for chunk in chunk_texts(self._read(texts), chunk_size, is_waiting=is_waiting):
            for text, row in zip(chunk, self._classify(chunk), strict=True):
                yield self.decide(text, row)

    def decide(self, text: str, row: Floats) -> Any:
        """Return the prediction for a text with probabilities (n_classes,), as in `stream`."""
        if self.task == SINGLE_LABEL:
            column = int(row.argmax())
            return Prediction(text, *((self.labels[column], float(row[column])) if has_text(text) else (None, None)))
        columns = np.flatnonzero(row >= (0.5 if self.thresholds is None else self.thresholds))
        answer = [self.labels[column] for column in columns], row[columns].tolist()
        return MultiLabelPrediction(text, *(answer if has_text(text) else (None, None)))

    def _read(self, texts: Iterable[Text]) -> Iterator[str]:
        """Yield the texts, pairs as one string; raise a TypeError if they are not what the bundle classifies."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got a single string")
        for text in texts:
            is_pair = not isinstance(text, str) or PAIR_SEPARATOR in text
            if is_pair != self.takes_pairs and not (is_pair and isinstance(text, str)):
                expected = "pairs of texts" if self.takes_pairs else "texts, not pairs"
                raise TypeError(f"this bundle classifies {expected}, got {text!r:.60}")
            yield text if isinstance(text, str) else join_pair(*text)

    def _read_task(self) -> tuple[str, Floats | None]:
        """Return the task and the thresholds in the manifest."""
        task, thresholds = self.manifest.get("task", SINGLE_LABEL), self.manifest.get("thresholds")
        if task not in (SINGLE_LABEL, MULTI_LABEL):
            raise BundleError(f"The bundle has task {task!r}, expected {SINGLE_LABEL} or {MULTI_LABEL}.")
        if thresholds is None:
            return task, None
        array = np.array(thresholds, np.float32)
        if task == SINGLE_LABEL or array.shape != (len(self.labels),) or not ((array >= 0) & (array <= 1)).all():
            raise BundleError("The thresholds must be a number from 0 to 1 for each label of a multi-label bundle.")
        return task, array

    def _classify(self, texts: list[str]) -> Floats:
        prefix, special = self.manifest["prefix"], self.manifest["special_tokens"]
        with convert_errors("The bundle"):
            inputs = [prefix + shorten(text, self._tokenizer) for text in texts]
            items: Any = [split_pair(text) for text in inputs] if self.takes_pairs else inputs
            encodings = self._tokenizer.encode_batch_fast(items, add_special_tokens=special)
            order, size = list(range(len(encodings))), len(encodings)
            if self._model.needs_padding:
                order, size = sorted(order, key=lambda row: len(encodings[row].ids)), self.batch_size
            probabilities = np.empty((len(texts), len(self.labels)), np.float32)
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                probabilities[rows] = self._model.predict_proba([encodings[row] for row in rows])
        if not np.isfinite(probabilities).all():
            raise BundleError("The bundle predicts probabilities that are not finite.")
        return probabilities


@contextmanager
def convert_errors(name: str) -> Iterator[None]:
    """Convert errors of the tokenizer and the ONNX session to `BundleError`."""
    try:
        yield
    except (BundleError, ImportError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a panic of the tokenizer
            raise
        raise BundleError(f"{name} cannot be used ({type(error).__name__}: {error}).") from error


class _StaticModel:
    """Mean of token vectors, followed by a linear head."""

    files, needs_padding = (VECTORS, HEAD), False

    def __init__(self, files: dict[str, bytes], manifest: dict[str, Any], threads: int | None) -> None:
        vectors = read_safetensors(files[VECTORS])["embeddings"]
        head = read_safetensors(files[HEAD])
        self._coef, self._intercept = head["coef"], head["intercept"]
        if vectors.ndim != 2 or self._coef.shape != (*self._intercept.shape, vectors.shape[1]):
            shapes = f"vectors {vectors.shape}, head {self._coef.shape}, intercept {self._intercept.shape}"
            raise BundleError(f"Shapes do not match: {shapes}.")
        self.n_tokens, self.n_classes = len(vectors), len(self._intercept)
        self._normalizes = bool(manifest["normalize"])
        self._is_multi_label = manifest.get("task") == MULTI_LABEL
        # A linear head of a mean is the mean of the head's outputs, so n_classes numbers per token are enough.
        self._table = vectors if self._normalizes else vectors @ self._coef.T

    def predict_proba(self, encodings: list[Any]) -> Floats:
        """Predict (n, n_classes) probabilities from tokenized texts; a text without tokens has mean 0."""
        ids = [encoding.ids for encoding in encodings]
        means = np.empty((len(ids), self._table.shape[1]), np.float32)
        for mean, tokens in zip(means, ids, strict=True):  # text by text, which stays in the processor's cache
            np.add.reduce(self._table.take(np.array(tokens, np.int64), axis=0), axis=0, out=mean)
        means /= np.array([[max(len(tokens), 1)] for tokens in ids], np.float32)
        if self._normalizes:
            means = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)) @ self._coef.T
        logits = means + self._intercept
        if self._is_multi_label:
            return np.asarray(np.exp(-np.logaddexp(np.float32(0), -logits)))  # sigmoid without overflow
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)


def open_session(model: bytes, threads: int | None) -> Any:
    """Load an ONNX graph with ONNX Runtime, on the CPU; a `BundleError` if it has loops or reads other files."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("This bundle needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    if threads is not None:
        options.intra_op_num_threads = threads
    if _EXTERNAL_DATA in model:
        raise BundleError(f"{ONNX_MODEL} stores tensors in other files, which is not allowed in a bundle.")
    # Bytes by which a protocol buffer stores the type of a node, in the graph or in a function of the model.
    if any(b'"' + bytes([len(name)]) + name.encode() in model for name in _LOOP_OPERATORS):
        raise BundleError(f"{ONNX_MODEL} contains loops, which are not allowed in a bundle.")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _OnnxModel:
    """Body, pooling and head as one ONNX graph; similar lengths in a batch need less padding."""

    files, needs_padding, n_tokens = (ONNX_MODEL,), True, None

    def __init__(self, files: dict[str, bytes], manifest: dict[str, Any], threads: int | None) -> None:
        self._session = open_session(files[ONNX_MODEL], threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = {node.name for node in inputs}
        self._has_types = "token_type_ids" in names
        is_known = names - {"token_type_ids"} == {"input_ids", "attention_mask"}
        if not is_known or outputs[0].name != "probabilities" or len(outputs[0].shape) != 2:
            raise BundleError(f"{ONNX_MODEL} must map input_ids and attention_mask to probabilities (n, n_classes).")
        self.n_classes = int(outputs[0].shape[1])
        self._pad = int(manifest["pad_id"])

    def predict_proba(self, encodings: list[Any]) -> Floats:
        """Predict (n, n_classes) probabilities from tokenized texts."""
        longest = max(1, *(len(encoding.ids) for encoding in encodings))
        tokens = np.full((len(encodings), longest), self._pad, np.int64)
        mask, types = np.zeros((2, *tokens.shape), np.int64)
        for row, encoding in enumerate(encodings):
            n = len(encoding.ids)
            tokens[row, :n], mask[row, :n], types[row, :n] = encoding.ids, 1, encoding.type_ids
        inputs = {"input_ids": tokens, "attention_mask": mask} | ({"token_type_ids": types} if self._has_types else {})
        (probabilities,) = self._session.run(["probabilities"], inputs)
        return np.asarray(probabilities, np.float32)


_MODELS: dict[str, Any] = {"static": _StaticModel, "onnx": _OnnxModel}
_FIELDS = {"normalize": bool, "pad_id": int, "prefix": str, "special_tokens": bool}


def read_bundle(
    folder: Path, kinds: dict[str, tuple[str, ...]], fields: dict[str, Any], *, max_format: int = FORMAT
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the manifest of a bundle and its files, and check them against the hashes in the manifest.

    ``kinds`` lists the files of each kind of bundle that can be read, and ``fields`` the types of fields.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(_read(file))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"Cannot read {file}: {error}.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise BundleError(f"{file} is not the manifest of a bundle.")
    if isinstance(manifest.get("kind"), str) and manifest["kind"] not in kinds:
        raise BundleError(f"{folder} has kind {manifest['kind']!r}, expected {' or '.join(kinds)}.")
    if manifest["format"] > max_format:
        problem = f"has format {manifest['format']}, but this version reads formats up to {max_format}"
        raise BundleError(f"{folder} {problem}: upgrade, or use the classify.py or answer.py in the bundle.")
    fields = {"files": dict, "kind": str, **fields}
    invalid = [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]
    if invalid:
        raise BundleError(f"{file} has missing or invalid fields: {', '.join(invalid)}.")
    hashes, contents = manifest["files"], {}
    for name in hashes:
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise BundleError(f"{file} lists {name!r}, which is not a plain file name.")
    required = kinds[manifest["kind"]]
    missing = [name for name in required if name not in hashes]
    if missing:
        raise BundleError(f"{file} does not list {', '.join(missing)}.")
    for name in required:
        try:
            contents[name] = _read(folder / name)
        except OSError as error:
            raise BundleError(f"Cannot read {folder / name} ({error.strerror}): the bundle is incomplete.") from None
        if hashlib.sha256(contents[name]).hexdigest() != hashes[name]:
            raise BundleError(f"{folder / name} has changed since the bundle was exported: copy the bundle again.")
    return manifest, contents


def _read(path: Path) -> bytes:
    """Read a regular file of at most `_MAX_BYTES`; reading anything else might never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES[path.suffix]:
        raise OSError(errno.EINVAL, "not a regular file, or too large")
    return path.read_bytes()


def read_safetensors(content: bytes) -> dict[str, Floats]:
    """Read the arrays of a safetensors file in half or single precision, as float32; else raise `BundleError`.

    Format: the length of the header in eight bytes, the header as JSON, the numbers (huggingface/safetensors).
    """
    try:
        size = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        header.pop("__metadata__", None)
        arrays, position = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != position:
                raise ValueError("its arrays overlap or leave gaps")
            position = end
            flat = np.frombuffer(data[begin:end], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"Expected a safetensors file in half or single precision ({error}).") from None
    return arrays


def escape_control_characters(text: str) -> str:
    """Escape control characters in a text or in JSON, as JSON does."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_pairs(texts: Sequence[str] | Lines) -> Iterator[tuple[str, str]]:
    """Yield pairs from a list of their first and second texts in turn, or from lines with a tab between both."""
    if not isinstance(texts, Lines):
        if len(texts) % 2:
            raise BundleError(f"Expected two texts for each pair, got an odd number of texts, {len(texts)}.")
        yield from zip(texts[::2], texts[1::2], strict=True)
        return
    for line in texts:
        first, _, second = line.partition("\t")
        yield first, second


def main() -> None:
    """Classify the arguments or the lines of stdin."""
    parser = argparse.ArgumentParser(description="Classify texts and print one JSON object per text.")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="Texts to classify. [default: the lines of stdin]")
    add("--bundle", default=Path(__file__).parent, metavar="FOLDER", help="The bundle. [default: this folder]")
    add("--threads", type=int, metavar="N", help="Maximum number of threads. [default: chosen by the libraries]")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    lines = Lines(sys.stdin and sys.stdin.buffer, errors="replace")
    texts = [text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in arguments.texts] or lines
    try:
        classifier = Classifier(arguments.bundle, threads=arguments.threads)
        items: Any = read_pairs(texts) if classifier.takes_pairs else texts
        for prediction in classifier.stream(items, is_waiting=lambda: lines.is_waiting):
            record = prediction._asdict()
            if classifier.takes_pairs:
                record = dict(zip(("text", "text_pair"), split_pair(record.pop("text")), strict=True)) | record
            line = escape_control_characters(json.dumps(record, ensure_ascii=False))
            print(line, flush=lines.is_waiting)
        sys.stdout.flush()
    except (BrokenPipeError, KeyboardInterrupt) as error:  # discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 0)
    except (ValueError, ImportError) as error:
        sys.exit(escape_control_characters(f"Error: {error}"))


if __name__ == "__main__":
    main()
