"""A student on the hub: its files and its card in one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from setfit_kd import hub
from setfit_kd.errors import InputError, ModelError
from setfit_kd.models import classifier_folder, load_folder, load_head, module_folders, transformer_classes

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
"""What sentence-transformers, transformers, SetFit and setfit-kd call the files of a model."""
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PLACEHOLDER = b'"path/to/this/folder"'


@dataclass(frozen=True)
class Publication:
    """What goes to the hub.

    Attributes:
        name: ``owner/name`` there.
        files: What is uploaded, by its path in the repository.
        left_out: Files of the folder that are no part of a model, and stay where they are.
    """

    name: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]

    @property
    def address(self) -> str:
        """Where it is to be found afterwards."""
        return f"{hub.address()}/{self.name}"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


def prepare_publication(model: str | Path, name: str) -> Publication:
    """Gather what belongs to a classifier on the hub; asks nobody.

    Only regular files that lie inside the folder are taken. The pickled head, without which SetFit itself would start
    with a random one, is made from ``head.safetensors`` rather than taken as it is.

    Args:
        model: A run's folder, one of its students, or the folder of another SetFit model or transformer.
        name: ``owner/name``.

    Raises:
        InputError: The name is none.
        ModelError: There is no such classifier, or it does not load.
    """
    if not hub.is_name(name):
        raise InputError(f"{name!r} is no name on the hub.", hint="Name it OWNER/NAME.")
    if not Path(model).is_dir():
        raise ModelError(f"There is no folder {model}.", hint="Name a run, or a model's folder.")
    folder = classifier_folder(model)
    head = load_head(folder)
    if head is None and transformer_classes(folder) is None:
        raise ModelError(f"{folder} holds no classifier of setfit-kd's.", hint="Name a run, or one of its students.")
    load_folder(folder)  # what does not load here is of no use there
    modules = {"", *module_folders(folder)}
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        place = path.relative_to(folder).as_posix()
        if place == _PICKLED_HEAD and head is not None:
            continue
        belongs = place.rpartition("/")[0] in modules and (path.name in _FILES or _WEIGHTS.fullmatch(path.name))
        if belongs and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            files[place] = path
        else:
            left_out.append(place)
    if not any(_WEIGHTS.fullmatch(Path(place).name) for place in files):
        raise ModelError(f"{folder} holds no weights in safetensors.", hint="Save the model anew.")
    if CARD in files:
        files[CARD] = (folder / CARD).read_bytes().replace(_PLACEHOLDER, f'"{name}"'.encode())
    if head is not None:
        import joblib

        pickled = BytesIO()
        joblib.dump(head, pickled)
        files[_PICKLED_HEAD] = pickled.getvalue()
    return Publication(name, files, tuple(left_out))


def publish(publication: Publication, *, message: str | None = None, private: bool | None = None) -> str:
    """Upload it, all in one commit, over what an earlier one has put there. Returns its address.

    Raises:
        UnavailableError: The hub cannot be reached, or fails; no file was committed, as far as it told.
        InputError: The hub does not take it.
    """
    return hub.upload(publication.name, publication.files, message=message or "Upload by setfit-kd", private=private)
