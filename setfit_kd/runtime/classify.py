"""Classify texts with a bundle that `setfit-kd export` made.

It needs numpy and tokenizers, and for ONNX bundles onnxruntime. Nothing in a bundle is ever executed but this file, a
copy of which lies in each:

    python classify.py "some text" "another"      # a JSON object a text
    python classify.py < texts.txt                # a text a line
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

logger = logging.getLogger("setfit_kd.runtime")  # by this name in a bundle too

FORMAT = 1
MANIFEST, LABELS, TOKENIZER = "manifest.json", "labels.json", "tokenizer.json"
ONNX_MODEL, VECTORS, HEAD = "model.onnx", "embeddings.safetensors", "head.safetensors"
_INPUTS = {"input_ids", "attention_mask"}
_OTHER_FILE = b"\n\x08location"
"""As an ONNX graph, a protocol buffer, writes the key of a tensor that lies in another file."""
_WINDOW = 2048
"""Most texts that are tokenised and sorted by length at once."""
_MAX_BYTES = {".json": 64 << 20, ".safetensors": 1 << 31, ".onnx": 1 << 31}
"""Sizes above which files are not read."""
_REPEATING = {"Loop", "Scan"}
"""Operators by which a small graph can run for ever; what `setfit-kd export` writes has none of them."""
MAX_CHARACTERS = 1_000_000
"""Most characters that are read of a text, and most that are tokenised at once."""
_CHARACTERS_PER_TOKEN, _SPARE_TOKENS = 8, 32
"""An upper guess, and the tokens next to a cut that may differ from those of the whole text."""
_GAP = re.compile(r"(?<=[^ \t\r\n])[ \t\r\n]")
_UNSHOWN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing them."""
_NUMBERS: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2"}

Floats = npt.NDArray[np.float32]
Files = Mapping[str, bytes]
Manifest = Mapping[str, Any]
T = TypeVar("T")


class BundleError(ValueError):
    """A bundle is not whole, is not what its manifest says, or is of a later format."""


class Prediction(NamedTuple):
    """What a classifier says of a text."""

    text: str
    label: str
    probability: float


def shorten(text: str, tokenizer: Any) -> str:
    """Shorten a long text before it is tokenized, without changing the tokens that truncation leaves of it.

    Longer and longer prefixes, cut at white space, are tokenized until one has enough tokens, or the text is whole:
    suffixes, where the tokenizer truncates on the left. Without truncation, only `MAX_CHARACTERS` is the limit.
    """
    truncation = getattr(tokenizer, "truncation", None) or {}
    is_left = truncation.get("direction") == "left"
    text = text[-MAX_CHARACTERS:] if is_left else text[:MAX_CHARACTERS]
    enough = truncation.get("max_length", MAX_CHARACTERS) + _SPARE_TOKENS
    size = _CHARACTERS_PER_TOKEN * enough
    while size < len(text):
        if gap := _GAP.search(text, len(text) - size if is_left else size):
            part = text[gap.start() :] if is_left else text[: gap.start()]
            kept = tokenizer.encode(part, add_special_tokens=False)
            total = sum(sum(piece.attention_mask) for piece in (kept, *kept.overflowing))
            if total - truncation["stride"] * len(kept.overflowing) >= enough:
                return part
            size = max(size, len(part))
        elif not is_left:
            break  # no more white space
        size *= 2
    return text


def in_windows(
    items: Iterable[T], most: int, *, text_of: Callable[[Any], str | None] = lambda item: item
) -> Iterator[list[T]]:
    """Split texts into lists of at most ``most`` texts and `MAX_CHARACTERS` characters, or of one longer text.

    The items are texts, or what ``text_of`` takes the text from. A warning at the end counts the longer texts, since
    `shorten` cuts them.
    """
    window: list[T] = []
    total = n_long = 0
    for item in items:
        length = len(text_of(item) or "")
        n_long += length > MAX_CHARACTERS
        if window and total + length > MAX_CHARACTERS:
            yield window
            window, total = [], 0
        window.append(item)
        total += length
        if len(window) == most:  # at once, since the next text may be long in coming
            yield window
            window, total = [], 0
    if window:
        yield window
    if n_long:
        logger.warning("Number of texts cut to %s characters: %d.", f"{MAX_CHARACTERS:,}", n_long)


class Classifier:
    """A classifier read from a bundle. Several threads may use one at the same time.

    Args:
        path: The bundle's folder.
        threads: Most threads that a batch may take; None leaves it to the libraries. With 1, tokenizing is held to one
            too, in the whole process, unless TOKENIZERS_PARALLELISM is set.
        batch_size: Texts a forward pass of an ONNX bundle.

    Attributes:
        labels: Names of the classes.
        manifest: What the bundle says of itself.

    Raises:
        BundleError: The bundle is not whole, not what it was when it was made, or of a later format.
        ImportError: It is an ONNX bundle and onnxruntime is not installed.

    Example:
        >>> classifier = Classifier("bundle")  # doctest: +SKIP
        >>> classifier.predict(["Rain stops play on the third day"])  # doctest: +SKIP
        ['Sports']
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, batch_size: int = 32) -> None:
        if batch_size < 1 or (threads is not None and threads < 1):
            raise ValueError("threads and batch_size must be 1 or more")
        folder = Path(path)
        self.manifest = _read_manifest(folder)
        files = _read_files(folder, self.manifest)
        self.batch_size = batch_size
        if threads == 1:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with _explained(str(folder)):
            self.labels = _read_labels(files[LABELS])
            self._tokenizer = _read_tokenizer(files[TOKENIZER])
            self._model: _Model = _KINDS[self.manifest["kind"]](files, self.manifest, threads)
        tokens, classes = self._model.n_tokens, self._model.n_classes
        if tokens is not None and max(self._tokenizer.get_vocab().values(), default=0) >= tokens:
            raise BundleError(f"{folder} has vectors for {tokens} tokens, fewer than its tokenizer knows.")
        if classes != len(self.labels):
            raise BundleError(f"{folder} names {len(self.labels)} labels for {classes} classes.")

    def predict_proba(self, texts: Sequence[str]) -> Floats:
        """Class probabilities of n texts: (n, n_classes) float32, rows summing to 1, columns as in ``labels``."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts, not a single string")
        with _explained("The bundle"):
            parts = [self._classify(window) for window in in_windows(texts, _WINDOW)]
        found = np.concatenate([np.empty((0, len(self.labels)), np.float32), *parts])
        if not np.isfinite(found).all():
            raise BundleError("The bundle gives probabilities that are not numbers.")
        return found

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each text."""
        return [self.labels[column] for column in self.predict_proba(texts).argmax(axis=1)]

    def stream(self, texts: Iterable[str], *, at_once: int = 256) -> Iterator[Prediction]:
        """Classify texts as they come, in their order, however many; at most ``at_once`` of them are held in memory.

        Nothing is said of a text before ``at_once`` of them have come, or the last has: take 1 for a live source.
        """
        if at_once < 1:
            raise ValueError("at_once must be 1 or more")
        for part in in_windows(texts, at_once):
            for text, row in zip(part, self._classify(part), strict=True):
                column = int(row.argmax())
                yield Prediction(text, self.labels[column], float(row[column]))

    def _classify(self, texts: list[str]) -> Floats:
        prefix, special = self.manifest["prefix"], self.manifest["special_tokens"]
        inputs = [prefix + shorten(text, self._tokenizer) for text in texts]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(inputs, add_special_tokens=special)]
        size = self.batch_size if self._model.pads else len(ids)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row])) if self._model.pads else range(len(ids))
        found = np.empty((len(texts), len(self.labels)), np.float32)
        for start in range(0, len(order), size):
            rows = list(order[start : start + size])
            found[rows] = self._model.probabilities([ids[row] for row in rows])
        return found


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the tokenizer and the session raise into `BundleError`: bare exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_theirs or isinstance(error, (BundleError, ImportError, MemoryError)):
            raise
        raise BundleError(f"{name} cannot be used ({type(error).__name__}: {error}).") from error


class _Model(Protocol):
    """From token ids to probabilities.

    Attributes:
        pads: Whether the texts of a batch are padded to its longest, so that they had better be of like length.
        n_classes: Classes.
        n_tokens: Tokens that it knows, where it can tell.
    """

    pads: bool
    n_classes: int
    n_tokens: int | None

    def probabilities(self, ids: list[list[int]]) -> Floats:
        """(n, n_classes) of the token ids of n texts."""


class _Static:
    """The mean of the tokens' vectors, and a linear head."""

    pads = False

    def __init__(self, files: Files, manifest: Manifest, threads: int | None) -> None:
        vectors = read_safetensors(files[VECTORS])["embeddings"]
        head = read_safetensors(files[HEAD])
        self._coef, self._intercept = head["coef"], head["intercept"]
        if vectors.ndim != 2 or self._coef.shape != (*self._intercept.shape, vectors.shape[1]):
            raise BundleError(
                f"The vectors {vectors.shape}, the head {self._coef.shape} and its intercept {self._intercept.shape} "
                "do not fit together."
            )
        self.n_tokens, self.n_classes = len(vectors), len(self._intercept)
        self._normalizes = bool(manifest["normalize"])
        # A linear head of a mean is the mean of the head's values: a text needs no more than n_classes numbers a token.
        self._table = vectors if self._normalizes else vectors @ self._coef.T

    def probabilities(self, ids: list[list[int]]) -> Floats:
        """(n, n_classes) of the token ids of n texts; a text without tokens has the mean 0."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
        means = np.zeros((len(ids), self._table.shape[1]), np.float32)
        filled = np.flatnonzero(lengths)
        if len(filled):
            starts = np.concatenate([[0], np.cumsum(lengths[filled])[:-1]])
            means[filled] = np.add.reduceat(self._table[flat], starts, axis=0) / lengths[filled, None]
        if self._normalizes:
            means = (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)) @ self._coef.T
        logits = means + self._intercept
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=1, keepdims=True), np.float32)


class _Onnx:
    """Body, pooling and head as one ONNX graph."""

    pads = True
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
        if _OTHER_FILE in files[ONNX_MODEL]:
            raise BundleError(f"{ONNX_MODEL} names other files to be read: a bundle has none.")
        # As a protocol buffer writes the type of a node, in the graph or in a function of the model's own.
        if any(b'"' + bytes([len(name)]) + name.encode() in files[ONNX_MODEL] for name in _REPEATING):
            raise BundleError(f"{ONNX_MODEL} holds loops: a bundle has none.")
        self._session = onnxruntime.InferenceSession(files[ONNX_MODEL], options, providers=["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if {one.name for one in inputs} != _INPUTS or outputs[0].name != "probabilities" or len(outputs[0].shape) != 2:
            raise BundleError(f"{ONNX_MODEL} does not go from token ids and mask to probabilities.")
        self.n_classes = int(outputs[0].shape[1])
        self._pad = int(manifest["pad_id"])

    def probabilities(self, ids: list[list[int]]) -> Floats:
        """(n, n_classes) of the token ids of n texts."""
        longest = max(1, *map(len, ids))
        tokens = np.full((len(ids), longest), self._pad, np.int64)
        mask = np.zeros((len(ids), longest), np.int64)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
        (found,) = self._session.run(["probabilities"], {"input_ids": tokens, "attention_mask": mask})
        return np.asarray(found, np.float32)


_KINDS: dict[str, Any] = {"static": _Static, "onnx": _Onnx}
_FILES = {"static": (VECTORS, HEAD), "onnx": (ONNX_MODEL,)}
_FIELDS: dict[str, tuple[type, ...]] = {
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
        raise BundleError(f"{folder} is no bundle: there is no {MANIFEST} in it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read ({error}).") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise BundleError(f"{file} is not the manifest of a bundle.")
    if manifest["format"] > FORMAT:
        raise BundleError(
            f"{folder} is of format {manifest['format']}, and this version reads up to {FORMAT}: upgrade, or use the "
            "classify.py that lies in the bundle."
        )
    wrong = [name for name, kinds in _FIELDS.items() if name not in manifest or not isinstance(manifest[name], kinds)]
    if wrong:
        raise BundleError(f"{file} does not say what a bundle must say of {', '.join(wrong)}.")
    if manifest["kind"] not in _KINDS:
        raise BundleError(f"{folder} is of kind {manifest['kind']!r}; there are {', '.join(_KINDS)}.")
    return manifest


def _read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """What the bundle is made of, each file as it was when the bundle was made."""
    expected = manifest["files"]
    for name in expected:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
            raise BundleError(f"{folder / MANIFEST} names {name!r}, which is not a file of the bundle.")
    needed = (LABELS, TOKENIZER, *_FILES[manifest["kind"]])
    missing = [name for name in needed if name not in expected]
    if missing:
        raise BundleError(f"{folder / MANIFEST} does not name {', '.join(missing)}.")
    contents = {}
    for name in needed:
        try:
            contents[name] = _read(folder / name)
        except OSError as error:
            raise BundleError(f"{folder / name} cannot be read ({error.strerror}): the bundle is not whole.") from None
        if hashlib.sha256(contents[name]).hexdigest() != expected[name]:
            raise BundleError(f"{folder / name} is not what it was when the bundle was made: copy the bundle again.")
    return contents


def _read(path: Path) -> bytes:
    """The content of a regular file of no more than `_MAX_BYTES`; of anything else, reading might never end."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if about.st_size > _MAX_BYTES[path.suffix]:
        raise OSError(errno.EFBIG, "too large")
    return path.read_bytes()


def _read_labels(content: bytes) -> list[str]:
    labels = json.loads(content)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{LABELS} does not hold a list of names.")
    return labels


def _read_tokenizer(content: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    return tokenizer


def read_safetensors(content: bytes) -> dict[str, Floats]:
    """The arrays, in single precision, that a safetensors file of half or single precision holds.

    Its format: eight bytes of the header's length, the header as JSON, the numbers (huggingface/safetensors).

    Raises:
        BundleError: It is no such file.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        header, numbers = json.loads(content[8 : 8 + size]), content[8 + size :]
        header.pop("__metadata__", None)
        arrays, read = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != read:
                raise ValueError("its arrays overlap or leave gaps")
            read = end
            flat = np.frombuffer(numbers[begin:end], np.dtype(_NUMBERS[entry["dtype"]]))
            arrays[name] = flat.reshape(entry["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"This is no safetensors file of half or single precision ({error}).") from None
    return arrays


def _printable(text: str) -> str:
    """Text, or JSON, with control characters escaped as JSON escapes them."""
    return _UNSHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def main() -> None:
    """Classify the arguments, or the lines of stdin."""
    parser = argparse.ArgumentParser(description="Classify texts: a JSON object a text on stdout.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, the lines of stdin")
    parser.add_argument("--bundle", default=Path(__file__).parent, metavar="FOLDER", help="the bundle [this folder]")
    parser.add_argument("--threads", type=int, metavar="N", help="most threads to take [the libraries' own choice]")
    arguments = parser.parse_args()
    try:
        classifier = Classifier(arguments.bundle, threads=arguments.threads)
    except (ValueError, ImportError) as error:
        sys.exit(_printable(f"Error: {error}"))
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    given = [text.encode("utf-8", "surrogateescape") for text in arguments.texts]
    lines = given or (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    texts = (text.decode("utf-8", "replace") for text in lines)
    for prediction in classifier.stream(texts, at_once=1 if sys.stdin.isatty() else 256):
        print(_printable(json.dumps(prediction._asdict(), ensure_ascii=False)))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever reads has seen enough; nothing is left to be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
