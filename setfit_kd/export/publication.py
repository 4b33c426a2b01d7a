"""Collect the files of a classifier and its model card for the hub."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import joblib
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from setfit_kd.errors import InputError, ModelError
from setfit_kd.models.bodies import module_folders, transformer_label_names
from setfit_kd.models.heads import load_head
from setfit_kd.models.io import BUNDLE, classifier_folder, no_classifier_error, read_classifier

_CARD, _PICKLED_HEAD = "README.md", "model_head.pkl"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_FILES = re.compile(
    rf"README\.md|{_WEIGHTS.pattern}|model\.safetensors\.index\.json|head\.(json|safetensors)|modules\.json"
    r"|config(_sentence_transformers|_setfit)?\.json|sentence_bert_config\.json|merges\.txt|vocab\.(txt|json)"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|(spiece|sentencepiece\.bpe|tokenizer)\.model"
)
"""Names of the model files of sentence-transformers, transformers, SetFit and setfit-kd."""


def collect_files(model: str | Path, name: str) -> tuple[dict[str, Path | bytes], list[str]]:
    """Collect the files of a classifier for the hub, without network access; only regular files inside the folder.

    SetFit needs a pickled head, so a pickle is created from ``head.safetensors``; an existing one is never uploaded.

    Args:
        model: Folder of a run, of one of its students, or of another SetFit model or transformer.
        name: ``owner/name`` of the repository.

    Returns:
        Files or their content by path in the repository, and the files that do not belong to the model.

    Raises:
        InputError: If the name is not a valid repository name.
        ModelError: If the folder does not exist, is not a classifier, or cannot be loaded.
    """
    try:
        validate_repo_id(name if "/" in name else f"{name}/")
    except HFValidationError:
        raise InputError(f"{name!r} is not a valid repository name.", hint="Use OWNER/NAME.") from None
    if not Path(model).is_dir():
        raise ModelError(f"No such folder: {model}.", hint="Pass the folder of a run or of a model.")
    folder = classifier_folder(model)
    if (head := load_head(folder)) is None and transformer_label_names(folder) is None:
        raise no_classifier_error(folder)
    read_classifier(folder)  # a model that cannot be loaded must not be published
    modules = {"", *module_folders(folder)}
    files: dict[str, Path | bytes] = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        file = path.relative_to(folder).as_posix()
        if path.is_relative_to(folder / BUNDLE):
            continue
        is_inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
        if is_inside and file.rpartition("/")[0] in modules and _FILES.fullmatch(path.name):
            files[file] = path
        elif file != _PICKLED_HEAD or head is None:
            skipped.append(file)
    if not any(_WEIGHTS.fullmatch(Path(file).name) for file in files):
        raise ModelError(f"Found no safetensors weights in {folder}.", hint="Save the model again.")
    if _CARD in files:
        files[_CARD] = (folder / _CARD).read_bytes().replace(b'"path/to/this/folder"', f'"{name}"'.encode())
    if head is not None:
        buffer = BytesIO()
        joblib.dump(head, buffer)
        files[_PICKLED_HEAD] = buffer.getvalue()
    return files, skipped
