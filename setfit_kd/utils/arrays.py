"""Arrays with one row per text, memory-mapped if they are large."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from tokenize import TokenError
from typing import IO

import numpy as np
import numpy.typing as npt

from setfit_kd.utils.atomic_io import raise_output_errors
from setfit_kd.utils.files import check_regular_file

Floats = npt.NDArray[np.floating]
MAX_IN_MEMORY_BYTES = 1 << 28  # in float32; larger arrays are memory-mapped float16 files
_CHUNK_ROWS = 1 << 14


def allocate_array(shape: tuple[int, int]) -> npt.NDArray[np.floating]:
    """Allocate an array: float32 in memory, or memory-mapped float16 above `MAX_IN_MEMORY_BYTES`.

    The file of a memory map is deleted together with the array. A full disk raises an `OutputError`.
    """
    if not is_large(shape):
        return np.empty(shape, np.float32)
    with raise_output_errors(Path(gettempdir()), alternative="set TMPDIR to a disk with free space"):
        folder = TemporaryDirectory(prefix="setfit-kd-", ignore_cleanup_errors=True)
        path = Path(folder.name, "rows.npy")
        with path.open("wb") as file:
            _write_header(file, np.float16, shape)
            for start in range(0, shape[0], _CHUNK_ROWS):  # writing to a memory map on a full disk kills the process
                file.write(bytes(2 * shape[1] * min(_CHUNK_ROWS, shape[0] - start)))
        array = np.lib.format.open_memmap(path, mode="r+")
    weakref.finalize(array, folder.cleanup)
    return array


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is memory-mapped."""
    return int(np.prod(shape, dtype=np.int64)) * 4 > MAX_IN_MEMORY_BYTES


def iter_chunks(array: npt.NDArray[np.floating]) -> Iterator[npt.NDArray[np.floating]]:
    """Yield an array in chunks of rows, to limit the memory that a computation takes."""
    for start in range(0, len(array), _CHUNK_ROWS):
        yield array[start : start + _CHUNK_ROWS]


def iter_batches(lengths: npt.NDArray[np.int64], max_texts: int, max_tokens: float) -> Iterator[npt.NDArray[np.int64]]:
    """Cut texts with these numbers of tokens into batches of similar length, longest first; yield indices.

    A batch has at most ``max_texts`` texts and, unless it is a single text, ``max_tokens`` tokens including padding.
    """
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(1, int(min(max_texts, max_tokens // longest)))
        yield order[start : start + size]
        start += size


def normalize_rows(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Scale rows to unit L2 norm; leave zero rows unchanged."""
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), np.float32)


def sample_rows(rows: npt.NDArray[np.int64], max_rows: int, *, seed: list[int]) -> npt.NDArray[np.int64]:
    """Return all rows, or a sorted random sample of ``max_rows`` if there are more."""
    if len(rows) <= max_rows:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, max_rows, replace=False))


def save_rows(array: npt.NDArray[np.floating], path: Path, *, half_if_large: bool = True) -> None:
    """Write an array as a ``.npy`` file: float32, or float16 if it is large and ``half_if_large`` is set."""
    dtype = np.float16 if half_if_large and is_large(array.shape) else np.float32
    with path.open("wb") as file:  # the errors of np.save do not include the cause
        _write_header(file, dtype, array.shape)
        for chunk in iter_chunks(array):
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


def load_rows(path: Path) -> npt.NDArray[np.floating]:
    """Read an array written by `save_rows`, memory-mapped if large; raise an `OSError` or `ValueError` if it cannot."""
    try:
        array = np.lib.format.open_memmap(check_regular_file(path), mode="r")
    except (SyntaxError, TokenError, TypeError, EOFError, OverflowError) as error:  # numpy parses the header as Python
        raise ValueError(f"{path.name} has a damaged header ({error})") from None
    if array.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path.name} must be a float16 or float32 array, got {array.dtype}")
    return array if is_large(array.shape) else np.array(array)


def _write_header(file: IO[bytes], dtype: type[np.floating], shape: tuple[int, ...]) -> None:
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
