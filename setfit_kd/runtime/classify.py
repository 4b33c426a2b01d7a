"""Classify texts with a bundle written by `setfit-kd export`.

Requires numpy and tokenizers, and onnxruntime for ONNX bundles. Every bundle contains a copy of this file, the only
file of a bundle that is ever executed:

    python classify.py "some text" "another"      # prints one JSON object per text
    python classify.py < texts.txt                # reads one text per line
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

logger = logging.getLogger("setfit_kd.runtime")  # the same name in the copy inside a bundle

FORMAT = 1
MANIFEST, LABELS, TOKENIZER = "manifest.json", "labels.json", "tokenizer.json"
ONNX_MODEL, VECTORS, HEAD = "model.onnx", "embeddings.safetensors", "head.safetensors"
_INPUTS = {"input_ids", "attention_mask"}
_EXTERNAL_DATA = b"\n\x08location"
"""Bytes by which an ONNX graph, a protocol buffer, marks a tensor that is stored in another file."""
_CHUNK_SIZE = 2048
"""Maximum number of texts that are tokenized and sorted by length together."""
_MAX_BYTES = {".json": 64 << 20, ".safetensors": 1 << 31, ".onnx": 1 << 31}
"""Maximum file sizes in bytes; larger files are not read."""
_LOOP_OPERATORS = {"Loop", "Scan"}
"""Operators that let a small graph run forever; `setfit-kd export` never writes them."""
MAX_CHARACTERS = 1_000_000
"""Maximum number of characters that are read of one text and that are tokenized together."""
_CHARACTERS_PER_TOKEN, _MARGIN_TOKENS = 8, 32
"""An upper estimate, and the number of tokens next to a cut that may differ from those of the full text."""
_WHITESPACE = re.compile(r"(?<=[^ \t\r\n])[ \t\r\n]")
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal interprets instead of displaying."""
_DTYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2"}

Floats = npt.NDArray[np.float32]
Files = Mapping[str, bytes]
Manifest = Mapping[str, Any]
T = TypeVar("T")


class BundleError(ValueError):
    """A bundle is incomplete, does not match its manifest, or has a newer format."""


class Prediction(NamedTuple):
    """A text with its most probable label and the probability of that label."""

    text: str
    label: str
    probability: float


def shorten(text: str, tokenizer: Any) -> str:
    """Shorten a long text before it is tokenized, without changing the tokens that remain after truncation.

    Tokenizes longer and longer prefixes, cut at whitespace, until one has enough tokens or the whole text is reached.
    Uses suffixes if the tokenizer truncates on the left. Without truncation, only `MAX_CHARACTERS` limits the text.
    """
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


def chunk_texts(
    items: Iterable[T], max_items: int, *, get_text: Callable[[Any], str | None] = lambda item: item
) -> Iterator[list[T]]:
    """Split texts into lists of at most ``max_items`` texts and `MAX_CHARACTERS` characters, or of one longer text.

    The items are texts, or anything from which ``get_text`` returns the text. Logs a warning at the end with the
    number of texts of more than `MAX_CHARACTERS` characters, because `shorten` truncates them.
    """
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
        if len(chunk) == max_items:  # without waiting for the next text, which may arrive much later
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
        labels: Names of the classes.
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
        folder = Path(path)
        self.manifest = _read_manifest(folder)
        files = _read_files(folder, self.manifest)
        self.batch_size = batch_size
        if threads == 1:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with _convert_errors(str(folder)):
            self.labels = _read_labels(files[LABELS])
            self._tokenizer = _read_tokenizer(files[TOKENIZER])
            self._model: _Model = _MODEL_CLASSES[self.manifest["kind"]](files, self.manifest, threads)
        n_tokens, n_classes = self._model.n_tokens, self._model.n_classes
        if n_tokens is not None and max(self._tokenizer.get_vocab().values(), default=0) >= n_tokens:
            raise BundleError(f"{folder} has vectors for {n_tokens} tokens, but its tokenizer uses higher token ids.")
        if n_classes != len(self.labels):
            raise BundleError(f"{folder} has {len(self.labels)} labels for {n_classes} classes.")

    def predict_proba(self, texts: Sequence[str]) -> Floats:
        """Predict class probabilities: (n, n_classes) float32, each row sums to 1, columns in the order of ``labels``.

        Raises:
            BundleError: If the tokenizer or the model fails, or a probability is not finite.
        """
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got a single string")
        with _convert_errors("The bundle"):
            parts = [self._classify(chunk) for chunk in chunk_texts(texts, _CHUNK_SIZE)]
        probabilities = np.concatenate([np.empty((0, len(self.labels)), np.float32), *parts])
        if not np.isfinite(probabilities).all():
            raise BundleError("The bundle predicts probabilities that are not finite.")
        return probabilities

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Predict the most probable label of each text."""
        return [self.labels[column] for column in self.predict_proba(texts).argmax(axis=1)]

    def stream(self, texts: Iterable[str], *, chunk_size: int = 256) -> Iterator[Prediction]:
        """Classify any number of texts in their order, with at most ``chunk_size`` of them in memory.

        Predictions are yielded once ``chunk_size`` texts have arrived or the input ends; use 1 for a live source.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
        for chunk in chunk_texts(texts, chunk_size):
            for text, row in zip(chunk, self._classify(chunk), strict=True):
                column = int(row.argmax())
                yield Prediction(text, self.labels[column], float(row[column]))

    def _classify(self, texts: list[str]) -> Floats:
        prefix, special = self.manifest["prefix"], self.manifest["special_tokens"]
        inputs = [prefix + shorten(text, self._tokenizer) for text in texts]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(inputs, add_special_tokens=special)]
        size = self.batch_size if self._model.needs_padding else len(ids)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row])) if self._model.needs_padding else range(len(ids))
        probabilities = np.empty((len(texts), len(self.labels)), np.float32)
        for start in range(0, len(order), size):
            rows = list(order[start : start + size])
            probabilities[rows] = self._model.predict_proba([ids[row] for row in rows])
        return probabilities


@contextmanager
def _convert_errors(name: str) -> Iterator[None]:
    """Convert errors of the tokenizer and the ONNX session to `BundleError`.

    A panic of the tokenizer is not an `Exception` and is recognized by its name.
    """
    try:
        yield
    except BaseException as error:
        is_library_error = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_library_error or isinstance(error, (BundleError, ImportError, MemoryError)):
            raise
        raise BundleError(f"{name} cannot be used ({type(error).__name__}: {error}).") from error


class _Model(Protocol):
    """A model that maps token ids to class probabilities.

    Attributes:
        needs_padding: Whether texts are padded to the longest of their batch, so that similar lengths are faster.
        n_classes: Number of classes.
        n_tokens: Size of the vocabulary; None if unknown.
    """

    needs_padding: bool
    n_classes: int
    n_tokens: int | None

    def predict_proba(self, ids: list[list[int]]) -> Floats:
        """Predict (n, n_classes) probabilities from the token ids of n texts."""


class _StaticModel:
    """Mean of token vectors, followed by a linear head."""

    needs_padding = False

    def __init__(self, files: Files, manifest: Manifest, threads: int | None) -> None:
        vectors = read_safetensors(files[VECTORS])["embeddings"]
        head = read_safetensors(files[HEAD])
        self._coef, self._intercept = head["coef"], head["intercept"]
        if vectors.ndim != 2 or self._coef.shape != (*self._intercept.shape, vectors.shape[1]):
            raise BundleError(
                f"Shapes do not match: vectors {vectors.shape}, head {self._coef.shape}, intercept "
                f"{self._intercept.shape}."
            )
        self.n_tokens, self.n_classes = len(vectors), len(self._intercept)
        self._normalizes = bool(manifest["normalize"])
        # A linear head of a mean is the mean of the head's outputs, so n_classes numbers per token are enough.
        self._table = vectors if self._normalizes else vectors @ self._coef.T

    def predict_proba(self, ids: list[list[int]]) -> Floats:
        """Predict (n, n_classes) probabilities from the token ids of n texts; a text without tokens has mean 0."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
        means = np.zeros((len(ids), self._table.shape[1]), np.float32)
        nonempty = np.flatnonzero(lengths)
        if len(nonempty):
            starts = np.concatenate([[0], np.cumsum(lengths[nonempty])[:-1]])
            means[nonempty] = np.add.reduceat(self._table[flat], starts, axis=0) / lengths[nonempty, None]
        if self._normalizes:
            means = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)) @ self._coef.T
        logits = means + self._intercept
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)


class _OnnxModel:
    """Body, pooling and head as one ONNX graph."""

    needs_padding = True
    n_tokens = None

    def __init__(self, files: Files, manifest: Manifest, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("This bundle needs onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        if threads is not None:
            options.intra_op_num_threads = threads
        if _EXTERNAL_DATA in files[ONNX_MODEL]:
            raise BundleError(f"{ONNX_MODEL} stores tensors in other files, which is not allowed in a bundle.")
        # Bytes by which a protocol buffer stores the type of a node, in the graph or in a function of the model.
        if any(b'"' + bytes([len(name)]) + name.encode() in files[ONNX_MODEL] for name in _LOOP_OPERATORS):
            raise BundleError(f"{ONNX_MODEL} contains loops, which are not allowed in a bundle.")
        self._session = onnxruntime.InferenceSession(files[ONNX_MODEL], options, providers=["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        names = {node.name for node in inputs}
        if names != _INPUTS or outputs[0].name != "probabilities" or len(outputs[0].shape) != 2:
            raise BundleError(f"{ONNX_MODEL} must map input_ids and attention_mask to probabilities (n, n_classes).")
        self.n_classes = int(outputs[0].shape[1])
        self._pad = int(manifest["pad_id"])

    def predict_proba(self, ids: list[list[int]]) -> Floats:
        """Predict (n, n_classes) probabilities from the token ids of n texts."""
        longest = max(1, *map(len, ids))
        tokens = np.full((len(ids), longest), self._pad, np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
        (probabilities,) = self._session.run(["probabilities"], {"input_ids": tokens, "attention_mask": mask})
        return np.asarray(probabilities, np.float32)


_MODEL_CLASSES: dict[str, Any] = {"static": _StaticModel, "onnx": _OnnxModel}
_MODEL_FILES = {"static": (VECTORS, HEAD), "onnx": (ONNX_MODEL,)}
_MANIFEST_FIELDS: dict[str, tuple[type, ...]] = {
    "files": (dict,),
    "kind": (str,),
    "normalize": (bool,),
    "pad_id": (int,),
    "prefix": (str,),
    "special_tokens": (bool,),
}


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(_read(file))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"Cannot read {file}: {error}.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise BundleError(f"{file} is not the manifest of a bundle.")
    if manifest["format"] > FORMAT:
        raise BundleError(
            f"{folder} has format {manifest['format']}, but this version reads formats up to {FORMAT}: upgrade, or use "
            "the classify.py in the bundle."
        )
    invalid = [name for name, types in _MANIFEST_FIELDS.items() if not isinstance(manifest.get(name), types)]
    if invalid:
        raise BundleError(f"{file} has missing or invalid fields: {', '.join(invalid)}.")
    if manifest["kind"] not in _MODEL_CLASSES:
        raise BundleError(f"{folder} has kind {manifest['kind']!r}, expected {' or '.join(_MODEL_CLASSES)}.")
    return manifest


def _read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read the files of a bundle and check them against the hashes in its manifest."""
    hashes = manifest["files"]
    for name in hashes:
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise BundleError(f"{folder / MANIFEST} lists {name!r}, which is not a plain file name.")
    required = (LABELS, TOKENIZER, *_MODEL_FILES[manifest["kind"]])
    missing = [name for name in required if name not in hashes]
    if missing:
        raise BundleError(f"{folder / MANIFEST} does not list {', '.join(missing)}.")
    contents = {}
    for name in required:
        try:
            contents[name] = _read(folder / name)
        except OSError as error:
            raise BundleError(f"Cannot read {folder / name} ({error.strerror}): the bundle is incomplete.") from None
        if hashlib.sha256(contents[name]).hexdigest() != hashes[name]:
            raise BundleError(f"{folder / name} has changed since the bundle was exported: copy the bundle again.")
    return contents


def _read(path: Path) -> bytes:
    """Read a regular file of at most `_MAX_BYTES`; reading anything else might never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > _MAX_BYTES[path.suffix]:
        raise OSError(errno.EFBIG, "too large")
    return path.read_bytes()


def _read_labels(content: bytes) -> list[str]:
    labels = json.loads(content)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{LABELS} must contain a list of strings.")
    return labels


def _read_tokenizer(content: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    return tokenizer


def read_safetensors(content: bytes) -> dict[str, Floats]:
    """Read the arrays of a safetensors file in half or single precision, as float32.

    Format: the length of the header in eight bytes, the header as JSON, the numbers (huggingface/safetensors).

    Raises:
        BundleError: If the content is not such a file.
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
            flat = np.frombuffer(data[begin:end], np.dtype(_DTYPES[entry["dtype"]]))
            arrays[name] = flat.reshape(entry["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"Expected a safetensors file in half or single precision ({error}).") from None
    return arrays


def _escape_control_characters(text: str) -> str:
    """Escape control characters in a text or in JSON, as JSON does."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def main() -> None:
    """Classify the arguments or the lines of stdin."""
    parser = argparse.ArgumentParser(description="Classify texts and print one JSON object per text.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="Texts to classify. [default: the lines of stdin]")
    parser.add_argument(
        "--bundle", default=Path(__file__).parent, metavar="FOLDER", help="Folder of the bundle. [default: this folder]"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="Maximum number of threads. [default: chosen by the libraries]"
    )
    arguments = parser.parse_args()
    try:
        classifier = Classifier(arguments.bundle, threads=arguments.threads)
    except (ValueError, ImportError) as error:
        sys.exit(_escape_control_characters(f"Error: {error}"))
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    encoded = [text.encode("utf-8", "surrogateescape") for text in arguments.texts]
    lines = encoded or (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    texts = (text.decode("utf-8", "replace") for text in lines)
    for prediction in classifier.stream(texts, chunk_size=1 if sys.stdin.isatty() else 256):
        print(_escape_control_characters(json.dumps(prediction._asdict(), ensure_ascii=False)))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has closed the pipe; discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
