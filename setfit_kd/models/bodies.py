"""Locate, load and hash model bodies; nothing runs code from a model folder or reads other than regular files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from setfit_kd.config.base import Family
from setfit_kd.errors import ModelError, first_line, is_out_of_memory
from setfit_kd.models.demo import locate_demo
from setfit_kd.runtime.classify import PAIR_SEPARATOR
from setfit_kd.utils.console import quiet_libraries
from setfit_kd.utils.files import check_regular_file, hash_parts, read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODULES = "modules.json"  # lists the modules in a sentence-transformers folder
_MAX_BYTES: dict[str, float] = dict.fromkeys((".json", ".txt", ".model", ".jinja", ".md"), 64 << 20)
_MAX_BYTES |= dict.fromkeys((".safetensors", ".bin", ".pkl"), float("inf"))
TRANSFORMER_PREFIX = "transformer:"  # of model names that are loaded as a transformer classifier, trained end to end
CLASSIFIER_SUFFIX = "ForSequenceClassification"  # of the architecture names of transformer classifiers
PAIRS_HINT = "Use transformers for teacher and student: transformer:NAME, layers:3 of such a teacher, or blank:CONFIG."
_LOAD_HINT = "Use a sentence-transformers, SetFit or transformers model with safetensors weights."


class BodySource(NamedTuple):
    """Folder of a body and the model family to load it as."""

    folder: Path
    family: Family = "setfit"

    def load(self, label_names: Sequence[str] = (), *, seed: int = 0) -> SentenceTransformer:
        """Load the body in fp32 on the CPU; raise a `ModelError` if that fails.

        ``label_names`` are the classes of the last layer of a transformer, and ``seed`` is for weights that it lacks.
        """
        with model_errors(self.folder), quiet_libraries(with_setfit=False):
            from setfit_kd.models.transformer import load_encoder, load_transformer

            if self.family == "transformer":
                body = load_transformer(self.folder, label_names, seed=seed)
            else:
                # Weights may be stored in half precision, in which training would lose most updates.
                body = load_encoder(self.folder).float()
            check_finite(body, self.folder)
            return body


def check_finite(body: SentenceTransformer, name: object) -> None:
    """Raise a `ModelError` if a weight of a body is infinite or NaN; ``name`` is what the message calls the model."""
    for weight, value in body.state_dict().items():
        # `isfinite` of all weights would take ten times as long; both extremes of a tensor with a NaN are NaN.
        is_checked = value.is_floating_point() and value.numel()
        if is_checked and not all(extreme.isfinite() for extreme in value.aminmax()):
            message = f"The weights {weight} of {name} are not all finite."
            raise ModelError(message, hint="Train the model again.")


def load_body(folder: Path) -> SentenceTransformer:
    """Load a body of the setfit family, see `BodySource.load`."""
    return BodySource(folder).load()


def locate_body(name: str | Path) -> BodySource:
    """Locate a body by name, see `locate_model`; names that start with ``transformer:`` are transformers."""
    return BodySource(locate_model(name), "transformer" if str(name).startswith(TRANSFORMER_PREFIX) else "setfit")


def locate_model(name: str | Path) -> Path:
    """Return the folder of a model: a local folder, a demo model, or a hub download in the local cache.

    Raises:
        ModelError: If the folder holds no model, or as in `locate_demo`.
        UnavailableError: If a demo package is not installed, or the hub cannot be reached.
        InputError: If the hub does not have the model or denies access to it.
    """
    full_name, name = str(name), str(name).removeprefix(TRANSFORMER_PREFIX)
    if not name.strip():
        message = f"The model name is missing in {full_name!r}."
        raise ModelError(message, hint="Add it, as in transformer:bert-base-uncased.")
    if name.startswith("demo:"):
        return locate_demo(name)
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (MODULES, "config.json")):
            message = f"The folder {path} is not a model: it has no modules.json or config.json."
            raise ModelError(message, hint="Pass a folder written by sentence-transformers, SetFit or transformers.")
        return path
    if path.exists() or name.partition("@")[0].count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"No such model folder: {name}", hint="Check the path.")
    from setfit_kd.hub.client import snapshot

    return snapshot(name, "model")


def transformer_label_names(folder: Path) -> tuple[str, ...] | None:
    """Read the label names of a sequence-classification transformer; None for other models."""
    path = folder / "config.json"
    if (folder / MODULES).is_file() or not path.is_file():
        return None
    try:
        config = read_json(path)
        if not any(name.endswith(CLASSIFIER_SUFFIX) for name in config.get("architectures") or ()):
            return None
        names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"Cannot read {path}: {error}", hint="Download the model again.") from None
    return tuple(names[index] for index in sorted(names)) or ("LABEL_0", "LABEL_1")


def load_local(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """Call ``load``, such as ``AutoTokenizer.from_pretrained``, on a folder, without network access or remote code.

    Before that, check that all files are regular and not too large, and that ``modules.json`` stays in the folder.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.suffix in _MAX_BYTES and not path.is_dir():
            check_regular_file(path, limit=_MAX_BYTES[path.suffix])
    module_folders(folder)
    # Without the second option, transformers asks on stdin whether to run code from the model.
    return load(str(folder), local_files_only=True, trust_remote_code=False, **options)


def module_folders(folder: Path) -> list[str]:
    """Return the folders of a model's modules, in order and relative to its own; ``[""]`` without ``modules.json``."""
    if not (folder / MODULES).exists():
        return [""]
    modules = read_json(folder / MODULES)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{folder / MODULES} must hold a list of modules.", hint="Download the model again.")
    paths = [module.get("path") for module in modules]
    for path in paths:
        if not isinstance(path, str) or not (folder / path).resolve().is_relative_to(folder.resolve()):
            message = f"{folder / MODULES} points to {path!r}, which is not in the model folder."
            raise ModelError(message, hint="Use a model from a source you trust.")
    return paths


@contextmanager
def model_errors(folder: Path, *, kind: str = "", hint: str = _LOAD_HINT) -> Iterator[None]:
    """Context manager that raises a `ModelError` for any error while loading the model in a folder."""
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


def family_of(body: SentenceTransformer) -> Family:
    """Return the model family that a body was loaded as."""
    return "transformer" if getattr(body[0], "transformer_task", None) == "sequence-classification" else "setfit"


def takes_pairs(body: SentenceTransformer) -> bool:
    """Return whether a body classifies pairs of texts."""
    return bool(getattr(body[0], "takes_pairs", False))


def has_token_types(body: SentenceTransformer) -> bool:
    """Return whether the texts of pairs have different token types, which are an input of the body."""
    return takes_pairs(body) and "token_type_ids" in body.tokenizer.model_input_names


def set_pairs(body: SentenceTransformer, texts: Sequence[str]) -> None:
    """Mark a body as one that classifies pairs if the texts are pairs; raise a `ModelError` if it cannot."""
    is_pair = any(PAIR_SEPARATOR in text for text in texts[:1])
    if family_of(body) == "transformer":
        features: Any = body[0]
        features.takes_pairs = is_pair
    elif is_pair:
        raise ModelError("Pairs of texts can only be classified by transformers.", hint=PAIRS_HINT)


def is_static(body: SentenceTransformer) -> bool:
    """Return whether a body consists of static embeddings, one vector per token."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(body[0], StaticEmbedding)


def default_prompt(body: SentenceTransformer) -> str:
    """Return the prompt that ``encode`` puts before every text, or an empty string."""
    return str(body.prompts.get(body.default_prompt_name) or "") if body.default_prompt_name else ""


def content_hash(body: SentenceTransformer) -> str:
    """Hash everything that affects the embeddings of a body: modules, weights, tokenizer and settings."""
    return hash_parts(_hashed_parts(body))


def _hashed_parts(body: SentenceTransformer) -> Iterator[bytes]:
    import torch

    prompt = body.prompts.get(body.default_prompt_name or "")
    yield f"{body.max_seq_length} {body.truncate_dim} {prompt!r}".encode()
    yield repr(body).encode()
    for name, module in body.named_modules():
        if "Dropout" not in type(module).__name__:  # inactive while encoding
            yield f"{name} {type(module).__name__} {module.extra_repr()}".encode()
    config = getattr(getattr(body[0], "auto_model", None), "config", None)
    if config is not None:
        yield json.dumps({**config.to_dict(), "_name_or_path": ""}, sort_keys=True, default=str).encode()
    yield json.dumps(_describe_tokenizer(body.tokenizer), sort_keys=True, default=str).encode()
    for name, value in body.state_dict().items():
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return everything that affects the tokens of a tokenizer, without its path."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        description: dict[str, Any] = json.loads(backend.to_str())
    else:
        text = repr(tokenizer).replace(repr(getattr(tokenizer, "name_or_path", "")), "")
        description = {"tokenizer": text, "vocabulary": getattr(tokenizer, "get_vocab", dict)()}
    if backend is not tokenizer:  # transformers sets both before each use; a bare tokenizer keeps its own
        description.update(truncation=None, padding=None)
    settings = ["model_max_length", "truncation_side", "padding_side", "pad_token_type_id", "model_input_names"]
    settings += ["special_tokens_map", "split_special_tokens", "encode_special_tokens", "chat_template"]
    return {**description, **{name: getattr(tokenizer, name, None) for name in settings}}
