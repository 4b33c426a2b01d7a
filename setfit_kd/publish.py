"""A student on the hub: its files and its card in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from setfit_kd import hub
from setfit_kd.errors import InputError, ModelError
from setfit_kd.models import classifier_folder, load_folder, load_head

CARD = "README.md"
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "model_head.pkl", CARD)
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

    Args:
        model: A run's folder, one of its students, or another SetFit model's folder.
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
    if load_head(folder) is None:
        raise ModelError(f"{folder} holds no classifier of setfit-kd's.", hint="Name a run, or one of its students.")
    load_folder(folder)  # what does not load here is of no use there
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(folder).as_posix()
        is_hidden = any(part.startswith(".") for part in Path(place).parts)
        if is_hidden or not any(fnmatch(path.name, pattern) for pattern in _PATTERNS):
            left_out.append(place)
        else:
            files[place] = path
    card = folder / CARD
    if card.is_file():
        files[CARD] = card.read_bytes().replace(_PLACEHOLDER, f'"{name}"'.encode())
    return Publication(name, files, tuple(left_out))


def publish(publication: Publication, *, message: str | None = None, private: bool | None = None) -> str:
    """Upload it, all in one commit, over what an earlier one has put there. Returns its address.

    Raises:
        UnavailableError: The hub cannot be reached, or fails; nothing has changed there.
        InputError: The hub does not take it.
    """
    return hub.upload(publication.name, publication.files, message=message or "Upload by setfit-kd", private=private)
