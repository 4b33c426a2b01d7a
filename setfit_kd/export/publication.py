"""Publish a classifier and its model card on the hub in one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from setfit_kd import hub
from setfit_kd.errors import InputError, ModelError
from setfit_kd.models.bodies import transformer_label_names
from setfit_kd.models.heads import load_head
from setfit_kd.models.io import classifier_folder, load_folder
from setfit_kd.models.safe_loading import module_folders

CARD, _PICKLED_HEAD = "README.md", "model_head.pkl"
_FILES = frozenset(
    {
        CARD,
        *("config.json", "config_sentence_transformers.json", "config_setfit.json", "sentence_bert_config.json"),
        *("modules.json", "model.safetensors.index.json", "head.json", "head.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    }
)
"""Names of the model files of sentence-transformers, transformers, SetFit and setfit-kd."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PLACEHOLDER = b'"path/to/this/folder"'


@dataclass(frozen=True)
class Publication:
    """Files to upload to the hub.

    Attributes:
        name: ``owner/name`` of the repository.
        files: Files or their content, by path in the repository.
        skipped: Files of the folder that do not belong to the model and are not uploaded.
    """

    name: str
    files: Mapping[str, Path | bytes]
    skipped: tuple[str, ...]

    @property
    def url(self) -> str:
        """Address of the repository on the hub."""
        return f"{hub.display_endpoint()}/{self.name}"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each file in bytes."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


def prepare_publication(model: str | Path, name: str) -> Publication:
    """Collect the files of a classifier for the hub, without network access.

    Only regular files inside the folder are included. SetFit loads a pickled head and otherwise starts with a random
    one, so a pickle is created from ``head.safetensors``; an existing pickle is never uploaded.

    Args:
        model: Folder of a run, of one of its students, or of another SetFit model or transformer.
        name: ``owner/name`` of the repository.

    Raises:
        InputError: If the name is not a valid repository name.
        ModelError: If the folder does not exist, is not a classifier, or cannot be loaded.
    """
    if not hub.is_repo_id(name):
        raise InputError(f"{name!r} is not a valid repository name.", hint="Use OWNER/NAME.")
    if not Path(model).is_dir():
        raise ModelError(f"No such folder: {model}.", hint="Pass the folder of a run or of a model.")
    folder = classifier_folder(model)
    head = load_head(folder)
    if head is None and transformer_label_names(folder) is None:
        raise ModelError(f"Found no classifier in {folder}.", hint="Pass the folder of a run or of a student.")
    load_folder(folder)  # a model that cannot be loaded must not be published
    modules = {"", *module_folders(folder)}
    files: dict[str, Path | bytes] = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name_in_repo = path.relative_to(folder).as_posix()
        if name_in_repo == _PICKLED_HEAD and head is not None:
            continue
        is_model_file = path.name in _FILES or _WEIGHTS.fullmatch(path.name)
        belongs = name_in_repo.rpartition("/")[0] in modules and is_model_file
        if belongs and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            files[name_in_repo] = path
        else:
            skipped.append(name_in_repo)
    if not any(_WEIGHTS.fullmatch(Path(file).name) for file in files):
        raise ModelError(f"Found no safetensors weights in {folder}.", hint="Save the model again.")
    if CARD in files:
        files[CARD] = (folder / CARD).read_bytes().replace(_PLACEHOLDER, f'"{name}"'.encode())
    if head is not None:
        import joblib

        buffer = BytesIO()
        joblib.dump(head, buffer)
        files[_PICKLED_HEAD] = buffer.getvalue()
    return Publication(name, files, tuple(skipped))


def publish(publication: Publication, *, message: str | None = None, private: bool | None = None) -> str:
    """Upload all files in one commit, replacing those of earlier uploads, and return the address of the repository.

    Raises:
        UnavailableError: If the hub cannot be reached or fails. No commit was reported.
        InputError: If the hub rejects the upload.
    """
    return hub.upload(publication.name, publication.files, message=message or "Upload by setfit-kd", private=private)
