"""Loading models from folders that anybody may have made: their code never runs, and only regular files are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.errors import ModelError
from setfit_kd.memory import first_line, is_out_of_memory
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

from collections.abc import Callable
from typing import TYPE_CHECKING

from setfit_kd.utils.files import check_regular_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODULES = "modules.json"
"""What a sentence-transformers folder has."""
LOCAL_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options of every load. Without the second, transformers asks on stdin whether it may run a model's own code."""
_MAX_BYTES = {
    **dict.fromkeys((".json", ".txt", ".model", ".jinja", ".md"), 64 << 20),
    **dict.fromkeys((".safetensors", ".bin", ".pkl"), float("inf")),
}


def load_local(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """Call ``load``, such as ``AutoTokenizer.from_pretrained``, on a checked folder, with `LOCAL_OPTIONS`.

    Raises:
        OSError: A file is not a regular one, or too large.
        ModelError: ``modules.json`` names a folder outside.
        Exception: Whatever ``load`` raises, for a model that needs code of its own among the rest.
    """
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if path.suffix in _MAX_BYTES and not path.is_dir():
                check_regular_file(path, limit=_MAX_BYTES[path.suffix])
    module_folders(folder)
    return load(str(folder), **LOCAL_OPTIONS, **options)


def module_folders(folder: Path) -> list[str]:
    """The folders of a model's modules, relative to its own, in their order; ``[""]`` without ``modules.json``.

    Raises:
        OSError: ``modules.json`` cannot be read.
        ModelError: It does not hold what it must, or names a folder outside.
    """
    if not (folder / MODULES).exists():
        return [""]
    modules = read_json(folder / MODULES)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / MODULES} does not list modules.", hint="Get the model again.")
    paths = [module.get("path") for module in modules]
    for path in paths:
        if not isinstance(path, str) or not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise ModelError(
                f"{folder / MODULES} names the folder {path!r}, which is not inside the model's.",
                hint="Get the model from somebody you trust.",
            )
    return paths


def check_finite(body: SentenceTransformer, name: str | Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ModelError: There are some.
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
    hint: str = "Give a sentence-transformers, SetFit or transformers model in safetensors.",
) -> Iterator[None]:
    """Within this block, what keeps the model in a folder from being loaded is told as a `ModelError`.

    ``kind`` says as what it was to be loaded, and ``hint`` what to give instead.
    """
    try:
        yield
    except ModelError as error:
        where = "" if str(folder) in error.message else f"{folder}: "
        raise ModelError(where + error.message, hint=error.hint) from None
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        reason = f"{type(error).__name__}: {first_line(str(error))}"
        raise ModelError(f"The model in {folder} does not load{kind} ({reason}).", hint=hint) from error
