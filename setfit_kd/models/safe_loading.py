"""Load models from untrusted folders without running their code, reading only regular files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.memory.oom_errors import first_line, is_out_of_memory
from setfit_kd.utils.files import check_regular_file, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODULES = "modules.json"
"""File in a sentence-transformers folder that lists its modules."""
LOCAL_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options of every load. Without the second, transformers asks on stdin whether to run code from the model."""
_MAX_BYTES = {
    **dict.fromkeys((".json", ".txt", ".model", ".jinja", ".md"), 64 << 20),
    **dict.fromkeys((".safetensors", ".bin", ".pkl"), float("inf")),
}


def load_local(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """Check a folder and call ``load``, such as ``AutoTokenizer.from_pretrained``, with `LOCAL_OPTIONS`.

    Raises:
        OSError: If a file is too large or not a regular file.
        ModelError: If ``modules.json`` points outside the folder.
        Exception: If ``load`` fails, for example because the model needs custom code.
    """
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if path.suffix in _MAX_BYTES and not path.is_dir():
                check_regular_file(path, limit=_MAX_BYTES[path.suffix])
    module_folders(folder)
    return load(str(folder), **LOCAL_OPTIONS, **options)


def module_folders(folder: Path) -> list[str]:
    """Return the folders of a model's modules, in order and relative to its own; ``[""]`` without ``modules.json``.

    Raises:
        OSError: If ``modules.json`` cannot be read.
        ModelError: If ``modules.json`` is not a list of modules, or points outside the folder.
    """
    if not (folder / MODULES).exists():
        return [""]
    modules = read_json(folder / MODULES)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / MODULES} must hold a list of modules.", hint="Download the model again.")
    paths = [module.get("path") for module in modules]
    for path in paths:
        if not isinstance(path, str) or not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise ModelError(
                f"{folder / MODULES} points to {path!r}, which is not in the model folder.",
                hint="Use a model from a source you trust.",
            )
    return paths


def check_finite(body: SentenceTransformer, name: str | Path) -> None:
    """Check that all weights are finite.

    Raises:
        ModelError: If a weight is infinite or NaN.
    """
    import torch

    for key, value in body.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(f"The weights {key} of {name} are not all finite.", hint="Train the model again.")


@contextmanager
def model_errors(
    folder: Path,
    *,
    kind: str = "",
    hint: str = "Use a sentence-transformers, SetFit or transformers model with safetensors weights.",
) -> Iterator[None]:
    """Context manager that raises a `ModelError` for any error while loading the model in a folder.

    Args:
        folder: The model folder, named in the message.
        kind: Ending of the message for a model of a certain type, such as " as a masked language model".
        hint: Hint of the `ModelError`.
    """
    try:
        yield
    except ModelError as error:
        prefix = "" if str(folder) in error.message else f"{folder}: "
        raise ModelError(prefix + error.message, hint=error.hint) from None
    except BaseException as error:
        # A panic in the tokenizers library is not an Exception.
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        reason = f"{type(error).__name__}: {first_line(str(error))}"
        raise ModelError(f"Cannot load the model in {folder}{kind} ({reason}).", hint=hint) from error
