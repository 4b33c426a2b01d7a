"""The manifest of a run, ``run.json``."""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from setfit_kd import __version__
from setfit_kd.errors import DataError
from setfit_kd.run_folder.names import RUN_FILE, StagePath
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from typing_extensions import Self

_PACKAGES = (
    *("setfit", "sentence-transformers", "transformers", "datasets", "huggingface-hub"),
    *("torch", "scikit-learn", "numpy"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    result = {"python": platform.python_version(), "setfit-kd": __version__}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result


class _Stage(BaseModel):
    inputs: str
    seconds: float = Field(allow_inf_nan=False)
    out_of_memory: list[dict[str, Any]]
    losses: list[float]


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


DIVERGED = 1e9
"""Loss of a trial whose training diverged; JSON has no infinity."""


class _Trial(BaseModel):
    """Settings tried by a search, and their loss."""

    settings: dict[str, int | float]
    loss: float


class Manifest(BaseModel):
    """Fields of ``run.json`` that are read; an unfinished run lacks most of them."""

    format: Literal[1]
    finished: bool
    stages: dict[StagePath, _Stage]
    versions: dict[str, str] = {}
    device: str = ""
    precision: _Precision = _Precision(name="")
    data: dict[str, int] = {}
    seconds: dict[str, float] = {}
    students: dict[str, StagePath] = {}
    evaluated: list[StagePath] = []
    estimated: list[StagePath] = []
    out_of_memory: list[_OutOfMemoryEvent] = []
    seeds: list[int] = []
    revisions: dict[str, str] = {}
    teacher_shares: dict[str, float] = {}
    search: dict[str, Annotated[list[_Trial], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _check_finished(self) -> Self:
        required = {"versions", "device", "precision", "data", "seconds", "students", "evaluated"}
        missing = sorted(required - self.model_fields_set) if self.finished else []
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        if len(self.seeds) == 1:
            raise ValueError("expected at least two seeds, got one")
        return self

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the ``run.json`` of a finished run.

        Raises:
            DataError: If it cannot be read or the run is not finished.
        """
        command = f"setfit-kd run --resume {shlex.quote(str(folder))}"
        manifest, _ = _read_manifest(folder, action="read", hint=f"Run it again with `{command}`.")
        if not manifest.finished:
            raise DataError(f"The run in {folder} is not finished.", hint=f"Resume it with `{command}`.")
        return manifest


def _read_manifest(folder: Path, *, action: str, hint: str) -> tuple[Manifest, dict[str, Any]]:
    """Read the ``run.json`` in a folder: validated, and as it is; ``action`` and ``hint`` are parts of the error."""
    path = folder / RUN_FILE
    try:
        content = read_json(path)
        return Manifest.model_validate(content, strict=True), content
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        message = f"Cannot {action} {path} with this version of setfit-kd ({field}: {first['msg']})."
        raise DataError(message, hint=hint) from None
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.", hint="Start a new run in another --output-dir.") from None


def read_resumable_manifest(folder: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run to resume.

    Raises:
        DataError: If it cannot be read.
    """
    hint = "Start again with --overwrite, or use the version of setfit-kd that started the run."
    return _read_manifest(folder, action="resume from", hint=hint)[1]


def is_run_folder(path: Path) -> bool:
    """Return whether a folder contains the ``run.json`` of a run."""
    try:
        manifest = read_json(path / RUN_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "stages"} <= manifest.keys()
