"""Telling an out-of-memory error from all others."""

from __future__ import annotations

import errno
import re

from setfit_kd.errors import SetFitKDError, error_chain

_OOM_MESSAGE = re.compile(
    r"(CUDA|HIP|XPU|MPS|NPU)[^\n]*out of memory"
    r"|error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUSOLVER_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_(ALLOC_FAILED|NOT_SUPPORTED)"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|[Ff]ailed to allocate memory for requested buffer"
    r"|std::bad_alloc"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from or while handling, says that memory ran out.

    By type where there is one (`torch.OutOfMemoryError`, `MemoryError`, the system's ENOMEM), else by what the
    libraries write: CUDA, cuBLAS and cuDNN, HIP, MPS, torch's CPU allocator, onnxruntime. Only errors of the kinds that
    those raise are read, so that a text about memory in, say, a `KeyError` is taken for nothing else.
    """
    return isinstance(error, Exception) and any(map(_is_oom, error_chain(error)))


def _is_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # ours is one too
        return True
    if isinstance(error, SetFitKDError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    library = type(error).__module__.partition(".")[0]
    # torch.OutOfMemoryError is a RuntimeError; onnxruntime's own errors derive from Exception.
    return (isinstance(error, RuntimeError) or library == "onnxruntime") and bool(
        type(error).__name__ == "OutOfMemoryError" or _OOM_MESSAGE.search(str(error))
    )


def first_line(text: str) -> str:
    """What an error says, without the explanations that CUDA adds to everything."""
    return text.strip().partition("\n")[0] or "no reason given"
