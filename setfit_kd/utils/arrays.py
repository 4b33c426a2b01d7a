"""Arrays of a row a text, which may be larger than memory should be asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from tokenize import TokenError
from typing import IO

import numpy as np
import numpy.typing as npt

from setfit_kd.utils.atomic_io import write_errors
from setfit_kd.utils.files import check_regular_file

MAPPED_BYTES = 1 << 28
"""Embeddings that would take more than this in single precision are kept on disk, in half, and mapped into memory."""
_PART_ROWS = 1 << 14


def large_array(shape: tuple[int, int]) -> npt.NDArray[np.floating]:
    """An array to be filled: float32, or above `MAPPED_BYTES` a mapped float16 whose file goes when the array does.

    Raises:
        OutputError: The temporary folder has no room.
    """
    if not is_large(shape):
        return np.empty(shape, np.float32)
    with write_errors(Path(gettempdir()), elsewhere="point TMPDIR at a disk with room"):
        folder = TemporaryDirectory(prefix="setfit-kd-", ignore_cleanup_errors=True)
        path = Path(folder.name)
        _reserve(path / "rows.npy", shape)
        array = np.lib.format.open_memmap(path / "rows.npy", mode="r+")
    weakref.finalize(array, folder.cleanup)
    return array


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is kept on disk."""
    return int(np.prod(shape, dtype=np.int64)) * 4 > MAPPED_BYTES


def iter_chunks(array: npt.NDArray[np.floating]) -> Iterator[npt.NDArray[np.floating]]:
    """The rows of an array in order, some at a time, so that what is computed of them stays small."""
    for start in range(0, len(array), _PART_ROWS):
        yield array[start : start + _PART_ROWS]


def normalise_rows(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1, zeros left as they are."""
    wide = np.asarray(rows, np.float32)
    lengths: npt.NDArray[np.float32] = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = wide / np.maximum(lengths, np.float32(1e-12))
    return unit


def sample_rows(rows: npt.NDArray[np.int64], most: int, *, seed: list[int]) -> npt.NDArray[np.int64]:
    """The rows, or where there are more than ``most``, so many of them, drawn by the seed and sorted."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def save_rows(array: npt.NDArray[np.floating], path: Path, *, half_if_large: bool = True) -> None:
    """Write an array as a ``.npy`` file, in single precision or, if it is large and may be, in half."""
    kind = np.float16 if half_if_large and is_large(array.shape) else np.float32
    with path.open("wb") as file:  # numpy's own writer does not tell why it could not write
        _write_header(file, kind, array.shape)
        for part in iter_chunks(array):
            file.write(np.ascontiguousarray(part, kind).tobytes())


def load_rows(path: Path) -> npt.NDArray[np.floating]:
    """Read what `save_rows` wrote; a large array is mapped, and only the rows that are used are read.

    Raises:
        OSError: There is no such file.
        ValueError: It is not one whole array of half or single precision.
    """
    try:
        array = np.lib.format.open_memmap(check_regular_file(path), mode="r")
    except (SyntaxError, TokenError, TypeError, EOFError, OverflowError) as error:  # numpy parses the header as Python
        raise ValueError(f"{path.name} has a damaged header ({error})") from None
    if array.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path.name} holds no floating rows")
    return array if is_large(array.shape) else np.array(array)


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """A file of zeros whose room on the disk is taken: writing to a map of a full disk would kill the process."""
    with path.open("wb") as file:
        _write_header(file, np.float16, shape)
        left = 2 * int(np.prod(shape, dtype=np.int64))
        zeros = bytes(1 << 20)
        while left > 0:
            left -= file.write(zeros[:left])


def _write_header(file: IO[bytes], kind: type[np.floating], shape: tuple[int, ...]) -> None:
    description = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
