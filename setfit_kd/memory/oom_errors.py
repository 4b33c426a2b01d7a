"""Recognize out-of-memory errors."""

from __future__ import annotations

import errno
import re

from setfit_kd.errors import SetFitKDError, error_chain

_OOM_MESSAGE = re.compile(
    r"(CUDA|HIP|XPU|MPS|NPU)[^\n]*out of memory"
    r"|error: out of memory"
    r"|(CUBLAS|CUSOLVER|CUDNN)_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_NOT_SUPPORTED"  # also seen when memory is short
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|[Ff]ailed to allocate memory for requested buffer"
    r"|std::bad_alloc"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or any error in its chain of causes, reports that memory ran out.

    Recognizes errors by type where possible (`torch.OutOfMemoryError`, `MemoryError`, errno ENOMEM), otherwise by the
    messages of CUDA, cuBLAS and cuDNN, HIP, MPS, torch's CPU allocator and onnxruntime. Messages count only for the
    error types that these libraries raise, so a `KeyError` that mentions memory does not match.
    """
    # Ctrl+C while an out-of-memory error is handled must end the run: a KeyboardInterrupt is no Exception.
    return isinstance(error, Exception) and any(map(_reports_oom, error_chain(error)))


def _reports_oom(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # includes our OutOfMemoryError
        return True
    if isinstance(error, SetFitKDError):  # may quote the message of another error
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    library = type(error).__module__.partition(".")[0]
    # torch.OutOfMemoryError is a RuntimeError; onnxruntime's own errors derive from Exception.
    if not isinstance(error, RuntimeError) and library != "onnxruntime":
        return False
    return type(error).__name__ == "OutOfMemoryError" or _OOM_MESSAGE.search(str(error)) is not None


def first_line(text: str) -> str:
    """Return the first line of an error message, without the explanations that CUDA adds."""
    return text.strip().partition("\n")[0] or "unknown reason"
