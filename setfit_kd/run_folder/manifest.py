"""The manifest of a run, ``run.json``."""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from setfit_kd import __version__
from setfit_kd.errors import DataError
from setfit_kd.run_folder.names import RUN_FILE, StagePath
from setfit_kd.utils.files import read_json

_PACKAGES = (
    "setfit",
    "sentence-transformers",
    "transformers",
    "datasets",
    "huggingface-hub",
    "torch",
    "scikit-learn",
    "numpy",
)

_ManifestType = TypeVar("_ManifestType", bound="_BaseManifest")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    result = {"python": platform.python_version(), "setfit-kd": __version__}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result


def _check_seeds(seeds: list[int]) -> list[int]:
    if len(seeds) == 1:
        raise ValueError("expected at least two seeds, got one")
    return seeds


class _Stage(BaseModel):
    losses: list[float]


class _ResumableStage(_Stage):
    inputs: str
    seconds: float = Field(allow_inf_nan=False)
    out_of_memory: list[dict[str, Any]]


class _Precision(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    speedup: float | None = None


class _Attempt(BaseModel):
    """Micro-batch size and device of an attempt."""

    texts: int
    device: str

    def __str__(self) -> str:
        return f"batch size {self.texts} on {self.device}"


class _OutOfMemoryEvent(BaseModel):
    """A step of the OOM backoff."""

    phase: str
    step: int | None
    before: _Attempt = Field(alias="from")
    after: _Attempt = Field(alias="to")


class _BaseManifest(BaseModel):
    """Fields of every ``run.json``."""

    format: Literal[1]
    finished: bool


class _ResumableManifest(_BaseManifest):
    """Fields of ``run.json`` that a resumed run reads; all others are kept as they are."""

    model_config = ConfigDict(extra="allow")

    stages: dict[StagePath, _ResumableStage]
    device: str = ""
    precision: _Precision | None = None


class Manifest(_BaseManifest):
    """Fields of the ``run.json`` of a finished run."""

    stages: dict[str, _Stage]
    versions: dict[str, str]
    device: str
    precision: _Precision
    data: dict[str, int]
    seconds: dict[str, float]
    students: dict[str, StagePath]
    evaluated: list[StagePath]
    out_of_memory: list[_OutOfMemoryEvent] = []
    seeds: Annotated[list[int], AfterValidator(_check_seeds)] = []
    revisions: dict[str, str] = {}
    teacher_shares: dict[str, float] = {}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the ``run.json`` of a finished run.

        Raises:
            DataError: If it cannot be read or the run is not finished.
        """
        command = f"setfit-kd run --resume {shlex.quote(str(folder))}"
        hint = f"Run it again with `{command}`."
        if not _read_manifest(folder, _BaseManifest, action="read", hint=hint).finished:
            raise DataError(f"The run in {folder} is not finished.", hint=f"Resume it with `{command}`.")
        return _read_manifest(folder, cls, action="read", hint=hint)


def _read_manifest(folder: Path, manifest_type: type[_ManifestType], *, action: str, hint: str) -> _ManifestType:
    """Read the ``run.json`` in a folder as one of the models above; ``action`` and ``hint`` are parts of the error."""
    path = folder / RUN_FILE
    try:
        return manifest_type.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(
            f"Cannot {action} {path} with this version of setfit-kd ({field}: {first['msg']}).", hint=hint
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.", hint="Start a new run in another --output-dir.") from None


def _read_resumable_manifest(folder: Path) -> dict[str, Any]:
    hint = "Start again with --overwrite, or use the version of setfit-kd that started the run."
    manifest = _read_manifest(folder, _ResumableManifest, action="resume from", hint=hint)
    return manifest.model_dump(exclude_unset=True)


def _is_run_folder(path: Path) -> bool:
    """Return whether a folder contains the ``run.json`` of a run."""
    try:
        manifest = read_json(path / RUN_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "stages"} <= manifest.keys()
