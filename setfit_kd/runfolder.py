"""The folder that a run is written to."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import platform
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from setfit_kd import __version__
from setfit_kd.config import RunConfig, read_config
from setfit_kd.errors import ConfigError, DataError, OutputError, SetFitKDError
from setfit_kd.escape import printable
from setfit_kd.files import HIDDEN_NAME, LOCK, hidden_name, locked_folder, read_json, refuse_links, write_whole, writing

CONFIG, METRICS, RUN, LOG = "config.yaml", "metrics.json", "run.json", "run.log"
TEACHER, BASELINE, STUDENT, SIGNALS = "teacher", "baseline", "student", "signals"
TEACHERS, BASELINES, STUDENTS = "teachers", "baselines", "students"
AUGMENTED, SCORED, WEIGHED = "augmented", "scored", "weighed"
"""Texts that were made; what each of several teachers says, and how often it is right on labels held out from it."""
SEEDS = "seeds"
EVALUATION, CHECKPOINTS = "evaluation", "checkpoints"
REPORT_HTML, REPORT_MARKDOWN = "report.html", "report.md"
RESULTS = (METRICS, REPORT_HTML, REPORT_MARKDOWN)
"""What is made of the stages' results at the end."""
_MODELS = (TEACHER, TEACHERS, BASELINE, BASELINES, STUDENT, STUDENTS)
_CONTENTS = (CONFIG, RUN, LOG, *RESULTS, *_MODELS, AUGMENTED, SIGNALS, SCORED, WEIGHED, EVALUATION, CHECKPOINTS, SEEDS)
_PLACE = re.compile(
    rf"({EVALUATION}/)?({TEACHER}|{BASELINE}|{STUDENT}|({TEACHERS}|{BASELINES}|{STUDENTS})/\w[\w.-]*)"
    rf"|{AUGMENTED}|{SIGNALS}|({SCORED}|{WEIGHED})/\w[\w.-]*"
)
_stage: ContextVar[str] = ContextVar("stage", default="")
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


logger = logging.getLogger(__name__)

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


def _place(name: str) -> str:
    if _PLACE.fullmatch(name) is None:
        raise ValueError(f"it tells of {name!r}, which no run has")
    return name


def _none_or_several(seeds: list[int]) -> list[int]:
    if len(seeds) == 1:
        raise ValueError("one seed alone")
    return seeds


Place = Annotated[str, AfterValidator(_place)]
"""A name that a run keeps something under in its folder; none leads out of it."""


@contextmanager
def logged_as(stage: str) -> Iterator[None]:
    """Within this block, ``run.log`` tells that what happens is of this stage; blocks nest as folders do."""
    token = _stage.set("/".join(filter(None, (_stage.get(), stage))))
    try:
        yield
    finally:
        _stage.reset(token)


def _tell_stage(record: logging.LogRecord) -> bool:
    record.stage = _stage.get() or "run"
    return True


def baseline_of(student: str) -> str:
    """What a student's baseline is called in the run's folder."""
    group, _, slug = student.partition("/")
    return f"{BASELINES}/{slug}" if group == STUDENTS else BASELINE


def compared_with(student: str, evaluated: Collection[str]) -> dict[str, str]:
    """What a student is compared with among what was evaluated: names in the folder, by what they are to it."""
    others = {TEACHER: TEACHER, BASELINE: baseline_of(student)}
    return {called: name for called, name in others.items() if name in evaluated}


def default_folder(config: RunConfig) -> Path:
    """Where a run goes that names no folder: ``runs/`` and the name of its labeled texts."""
    name = Path((config.labeled or "").removeprefix("bundled:")).stem
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run")


class _LogFile(logging.FileHandler):
    """A log that gives up quietly where it cannot be written: the stages' own writes tell of a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, with control characters escaped."""
        return printable(super().format(record), None)

    def close(self) -> None:
        """Close the file, whether or not its last lines fit."""
        with suppress(OSError):
            super().close()


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
    """A step down the ladder."""

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

    stages: dict[Place, _ResumableStage]
    device: str = ""
    precision: _Precision | None = None


class About(_Run):
    """What ``run.json`` tells of a finished run."""

    stages: dict[str, _Stage]
    versions: dict[str, str]
    device: str
    precision: _Precision
    data: dict[str, int]
    seconds: dict[str, float]
    students: dict[str, Place]
    evaluated: list[Place]
    out_of_memory: list[_OutOfMemoryEvent] = []
    seeds: Annotated[list[int], AfterValidator(_none_or_several)] = []
    revisions: dict[str, str] = {}
    teacher_shares: dict[str, float] = {}

    @classmethod
    def read(cls, folder: Path) -> About:
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


class RunFolder:
    """A run's folder. Every file and folder in it is written beside its place and renamed: whole or not there.

    ``run.json`` tells what has been made, and from what; what it does not tell of counts as not there.

    Attributes:
        path: Where it is.
        about: What ``run.json`` holds.
    """

    def __init__(self, path: Path, about: dict[str, Any] | None = None) -> None:
        self.path = path
        self.about: dict[str, Any] = {"format": 1, "finished": False, "stages": {}} if about is None else about

    @staticmethod
    def check(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Refuse a folder that cannot take a run, before any work is done; changes nothing.

        Raises:
            OutputError: It is a file, cannot be written, is not empty and neither ``overwrite`` nor ``resume`` is set,
                or holds no run to go on with.
        """
        another = "Choose another --output-dir"
        with writing(path):
            existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            if not existing.is_dir():
                raise OutputError(f"{existing} is a file, not a folder.", hint=f"{another}.")
            holds_files = path.is_dir() and any(file.name != LOCK for file in path.iterdir())
            if holds_files and not overwrite and not resume:
                go_on = f", or go on with the run in it: --resume {path}" if (path / RUN).is_file() else ""
                raise OutputError(f"The folder {path} is not empty.", hint=f"{another}, add --overwrite{go_on}.")
            if holds_files and not resume and any((path / name).exists() for name in _CONTENTS) and not _is_run(path):
                raise OutputError(f"The folder {path} holds files with a run's names, but no run.", hint=f"{another}.")
            RunFolder.refuse_links(path)
            if not os.access(existing, os.W_OK | os.X_OK):
                there = "Copy the run to where you may write." if resume else f"{another} that you may write to."
                raise OutputError(f"The folder {existing} cannot be written to.", hint=there)

    @staticmethod
    def refuse_links(path: Path) -> None:
        """Refuse a folder in which what a run writes or deletes is a link, or lies behind one.

        Raises:
            OutputError: It does.
        """
        half_written = (file.name for file in path.glob(".*") if HIDDEN_NAME.fullmatch(file.name))
        refuse_links(path, (*_CONTENTS, LOCK, *half_written))

    @staticmethod
    def settings(path: Path) -> dict[str, Any]:
        """The settings of the run in a folder.

        Raises:
            InputError: There is no run.
        """
        if not all((path / name).is_file() for name in (CONFIG, RUN)):
            raise ConfigError(f"There is no run in {path} to go on with.", hint="Name a run's folder.")
        return read_config(path / CONFIG)

    @staticmethod
    def has_begun(path: Path) -> bool:
        """Whether there is an unfinished run in a folder that has made something already and that nobody works in."""
        try:
            about = _read_resumable(path)
            if about.get("finished") or not (about["stages"] or any((path / CHECKPOINTS).glob("*/*"))):
                return False
            with locked_folder(path):
                return True
        except (DataError, OutputError, OSError):
            return False

    @classmethod
    def create(cls, config: RunConfig, path: Path) -> RunFolder:
        """Make the folder, take an earlier run's files out of it, and write the settings.

        Raises:
            OutputError: As `check`, or the disk is full.
        """
        cls.check(path, overwrite=config.overwrite)
        folder = cls(path)
        for name in _CONTENTS:
            if name != RUN:  # without which a folder that is half emptied would be nobody's run
                folder._remove(name)
        folder._remove_half_written()
        folder.tell()
        write_whole(path / CONFIG, config.to_yaml())
        return folder

    @classmethod
    def reopen(cls, config: RunConfig, path: Path) -> RunFolder:
        """Go on with the run in a folder, under these settings.

        Raises:
            DataError: What ``run.json`` says cannot be understood.
            OutputError: As `check`, or the disk is full.
        """
        cls.check(path, resume=True)
        folder = cls(path, _read_resumable(path))
        folder._remove_half_written()
        write_whole(path / CONFIG, config.to_yaml())
        return folder

    def _remove_half_written(self) -> None:
        """Take out what a process that was killed has left unfinished."""
        for pattern in (".*", *(f"{name}/{below}" for name in _CONTENTS for below in (".*", "*/.*"))):
            for left in self.path.glob(pattern):
                if HIDDEN_NAME.fullmatch(left.name):
                    self._remove(str(left.relative_to(self.path)))

    def stage(self, name: str, inputs: str) -> dict[str, Any] | None:
        """What is told of a stage, if it has been made from these inputs."""
        told: dict[str, Any] | None = self.about["stages"].get(name)
        return told if told is not None and told.get("inputs") == inputs and (self.path / name).is_dir() else None

    def forget(self, name: str) -> None:
        """Take out what a stage has made, and what was measured of the run."""
        self.about["stages"].pop(name, None)
        self.tell(finished=False)
        for made in (*RESULTS, name):
            self._remove(made)

    def tell(self, **what: Any) -> None:
        """Add to ``run.json``.

        Raises:
            OutputError: It cannot be written.
        """
        self.about.update(what)
        self.write_json(RUN, self.about)

    def holds_run(self, place: str) -> bool:
        """Whether there is a run to go on with in a folder within this one; what else is there is taken out."""
        path = self.path / place
        try:
            if _is_run(path):
                _read_resumable(path)
                return True
        except DataError as error:
            logger.warning("It is gone through again: %s", error.message)
        self._remove(place)
        return False

    def drop_seeds(self, *, keep: Collection[int]) -> None:
        """Take out the runs of other seeds than these."""
        if not keep:
            self._remove(SEEDS)
        for path in (self.path / SEEDS).glob("*"):
            if path.name not in map(str, keep):
                self._remove(f"{SEEDS}/{path.name}")

    def finish(self, metrics: Mapping[str, Any], **what: Any) -> None:
        """Write what was measured, and that the run is whole.

        Raises:
            OutputError: It cannot be written.
        """
        self.write_json(METRICS, metrics)
        self.tell(finished=True, **what)
        self._remove(CHECKPOINTS)

    def _remove(self, name: str) -> None:
        target = self.path / name
        with writing(target):
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            # Renamed first, so that a kill leaves no folder that looks whole.
            gone = target if target.name.startswith(".") else hidden_name(target)
            shutil.rmtree(target.rename(gone))
        if target.parent != self.path:
            with suppress(OSError):  # others are in it still
                target.parent.rmdir()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def keep_log(self, recorder: logging.handlers.MemoryHandler) -> None:
        """Write what `recorded` has so far, and from now on everything, to ``run.log``.

        Raises:
            OutputError: It cannot be written.
        """
        with writing(self.path / LOG):
            file = _LogFile(self.path / LOG, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(stage)s: %(message)s"))
        recorder.setTarget(file)
        recorder.flushLevel = logging.DEBUG
        recorder.flush()


class _PassOn(logging.Handler):
    """Hands records to the handlers that a logger had, at the level that it had."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self.before = logging.Logger(logger.name)
        vars(self.before).update(vars(logger))

    def emit(self, record: logging.LogRecord) -> None:
        """Do what the logger would have done; a warning that nobody handles goes to stderr."""
        self.before.callHandlers(record)


@contextmanager
def recorded() -> Iterator[logging.handlers.MemoryHandler]:
    """Within this block, keep everything that setfit-kd logs, until a run folder takes it; see `RunFolder.keep_log`.

    Handlers other than the recorder get what they would get without it.
    """
    recorder = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    recorder.addFilter(_tell_stage)
    logger = logging.getLogger("setfit_kd")
    others = _PassOn(logger)
    logger.handlers, logger.propagate = [recorder, others], False
    logger.setLevel(logging.DEBUG)
    try:
        yield recorder
    except SetFitKDError as error:
        logger.debug("The run ended: %s", error)
        raise
    except BaseException:
        logger.debug("The run ended.", exc_info=True)
        raise
    finally:
        logger.handlers, logger.propagate = others.before.handlers, others.before.propagate
        logger.setLevel(others.before.level)
        if recorder.target is not None:
            recorder.target.close()
        recorder.close()
