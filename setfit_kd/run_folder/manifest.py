"""The manifest of a run, ``run.json``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from setfit_kd import __version__
from setfit_kd.errors import DataError
from setfit_kd.run_folder.names import RUN, ArtifactPath
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

_Kind = TypeVar("_Kind", bound="_Run")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "setfit-kd": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _none_or_several(seeds: list[int]) -> list[int]:
    if len(seeds) == 1:
        raise ValueError("one seed alone")
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
    """What was tried where memory ran out."""

    texts: int
    device: str

    def __str__(self) -> str:
        return f"{self.texts} texts on {self.device}"


class _OutOfMemoryEvent(BaseModel):
    """A step down the backoff."""

    phase: str
    step: int | None
    before: _Attempt = Field(alias="from")
    after: _Attempt = Field(alias="to")


class _Run(BaseModel):
    """What every ``run.json`` holds."""

    format: Literal[1]
    finished: bool


class _ResumableRun(_Run):
    """What ``run.json`` holds of a run to go on with, besides what is only written again."""

    model_config = ConfigDict(extra="allow")

    stages: dict[ArtifactPath, _ResumableStage]
    device: str = ""
    precision: _Precision | None = None


class Manifest(_Run):
    """What ``run.json`` tells of a finished run."""

    stages: dict[str, _Stage]
    versions: dict[str, str]
    device: str
    precision: _Precision
    data: dict[str, int]
    seconds: dict[str, float]
    students: dict[str, ArtifactPath]
    evaluated: list[ArtifactPath]
    out_of_memory: list[_OutOfMemoryEvent] = []
    seeds: Annotated[list[int], AfterValidator(_none_or_several)] = []
    revisions: dict[str, str] = {}
    teacher_shares: dict[str, float] = {}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the ``run.json`` in a run's folder.

        Raises:
            DataError: It cannot be read, or the run is not finished.
        """
        go_on = f"setfit-kd run --resume {folder}"
        again = f"Go through it again: {go_on}"
        if not _read_run(folder, _Run, to="tell of", hint=again).finished:
            raise DataError(f"The run in {folder} has not come to its end.", hint=f"Go on: {go_on}")
        return _read_run(folder, cls, to="tell of", hint=again)


def _read_run(folder: Path, kind: type[_Kind], *, to: str, hint: str) -> _Kind:
    """Read the ``run.json`` in a folder as one of the models above; ``to`` and ``hint`` are parts of the error."""
    path = folder / RUN
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path} is not of a run that this version can {to} ({where}: {first['msg']}).", hint=hint
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).", hint="Run anew. Choose another --output-dir.") from None


def _read_resumable(folder: Path) -> dict[str, Any]:
    hint = "Run anew, with --overwrite, or take the version that began it."
    return _read_run(folder, _ResumableRun, to="go on with", hint=hint).model_dump(exclude_unset=True)


def _is_run(path: Path) -> bool:
    """Whether a folder was written by a run: it holds a ``run.json`` of one."""
    try:
        about = read_json(path / RUN)
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and {"format", "stages"} <= about.keys()
