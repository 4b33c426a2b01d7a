"""Writing files and folders: whole or not at all, and with an error that says what to do."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from setfit_kd.errors import OutputError, SetFitKDError, error_chain

logger = logging.getLogger(__name__)
LOCK = ".lock"
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}")
_REASONS = {
    errno.ENOSPC: "The disk is full: free some space, or",
    errno.EDQUOT: "The disk quota is used up: free some space, or",
    errno.EROFS: "The file system is read-only:",
    errno.EACCES: "Permission is missing:",
    errno.EPERM: "Permission is missing:",
    errno.ENOTDIR: "A part of the path is a file:",
}

_TORCH_CANNOT_WRITE = ("inline_container.cc", "iostream error")
"""What torch says where it cannot write an archive; it does not tell why."""


@contextmanager
def write_errors(path: Path, *, elsewhere: str = "choose another --output-dir") -> Iterator[None]:
    """Turn any failure to write to ``path`` into an `OutputError` that says what to do.

    ``elsewhere`` says how to have it written to another place.

    The tensor writers below us wrap the system's error in types of their own, so its number is looked for in the
    chain of causes and, failing that, in the text.
    """
    try:
        yield
    except SetFitKDError:
        raise
    except Exception as error:
        code = _find_errno(error)
        if code is None:
            raise
        hint = f"{_REASONS[code]} {elsewhere}." if code in _REASONS else f"{elsewhere[0].upper()}{elsewhere[1:]}."
        raise OutputError(f"Cannot write {path}: {error} [{errno.errorcode[code]}]", hint=hint) from error


def temporary_path(path: Path) -> Path:
    """A new name beside ``path`` for what is being written or deleted; it matches `TEMPORARY_NAME`."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path``, and remove the file or folder that has it at the end."""
    part = temporary_path(path)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # what keeps it from being removed has kept it from being written
            part.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that is renamed to it at the end: whole, or not there at all.

    Raises:
        OutputError: Something is there already, or it cannot be written.
    """
    target = Path(path).absolute()
    with write_errors(Path(path)), _temporary(target) as part:
        if target.exists():
            raise OutputError(f"{path} is there already.", hint="Choose another name, or remove it first.")
        part.mkdir(parents=True)
        yield part
        _apply_umask(part)
        part.rename(target)


@contextmanager
def replace_folder(path: str | Path, *, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Yield the path of a folder to be made beside ``path``, which then takes its place and that of an earlier one.

    Until the new one is whole, the earlier one stays as it is. Files and folders in it whose names are not ``is_ours``
    are kept.

    Raises:
        OutputError: It cannot be written.
    """
    target = Path(path).resolve()  # a link to a folder stays one
    with _temporary(target) as part, _temporary(target) as earlier:
        yield part
        try:
            with write_errors(Path(path)):
                if target.is_dir():
                    for kept in target.iterdir():
                        if not is_ours(kept.name):
                            _link_or_copy(kept, part / kept.name)
                    target.rename(earlier)
                part.rename(target)
        finally:
            if earlier.is_dir() and not target.exists():
                earlier.rename(target)


def _link_or_copy(source: Path, target: Path) -> None:
    """Make a file or folder appear at ``target`` too, without copying its content where the file system allows that."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other, follow_symlinks=False)
        except OSError:
            shutil.copy2(one, other, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder within ``folder``, the files in which take the place of those of the same name.

    Each is whole or the earlier one at any moment; all together they are not.

    Raises:
        OutputError: They cannot be written.
    """
    with write_errors(folder), _temporary(folder / "new") as part:
        part.mkdir()
        yield part
        _apply_umask(part)
        for file in part.iterdir():
            file.replace(folder / file.name)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse links among the named files and folders within ``folder``, and anywhere below them.

    Writing or deleting through a link would change what lies elsewhere. Links at or above ``folder`` are followed.

    Raises:
        OutputError: There is one.
    """
    for name in names:
        below = (Path(parent) / each for parent, folders, files in os.walk(folder / name) for each in folders + files)
        link = next((path for path in (folder / name, *below) if path.is_symlink()), None)
        if link is not None:
            raise OutputError(
                f"{link} is a link: nothing is written or deleted through links inside an output folder.",
                hint="Replace it by what it points to, or choose another folder.",
            )


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Create a folder and let no other process work in it within this block; the lock of a process that ended is free.

    A folder that is created here and is still empty at the end is removed.

    Raises:
        OutputError: Another process works in it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    is_new = not path.exists()
    refuse_links(path, [LOCK])
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(
                f"Another process{_holder(path / LOCK)} is working in {path}.",
                hint="Wait until it has ended, or choose another --output-dir.",
            ) from None
        except NotImplementedError:
            logger.debug("%s lies on a file system without locks.", path)
    try:
        if lock.is_locked:
            with suppress(OSError):
                (path / LOCK).write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        if is_new and path.is_dir() and not any(file.name != LOCK for file in path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
        lock.release()


def _holder(lock: Path) -> str:
    try:
        return f" ({int(lock.read_text(encoding='utf-8'))})"
    except (OSError, ValueError):
        return ""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file beside ``path`` that takes its place at the end: whole, or not there at all.

    Raises:
        OutputError: It cannot be written.
    """
    with write_errors(path, elsewhere="choose another file"), _temporary(path) as part:
        with part.open("wb") as file:
            yield file
        part.replace(path)


def write_text(path: Path, text: str, *, elsewhere: str = "choose another --output-dir") -> None:
    """Write a text file whole, over an earlier one, or not at all; ``elsewhere`` as in `write_errors`.

    Raises:
        OutputError: It cannot be written.
    """
    with write_errors(path, elsewhere=elsewhere), _temporary(path) as part:
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _apply_umask(folder: Path) -> None:
    """Give files the mode that the user's umask gives to new ones: some writers below us leave them to one user."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _find_errno(error: BaseException) -> int | None:
    for link in error_chain(error):
        if isinstance(link, OSError) and link.errno in errno.errorcode:
            return link.errno
        text = str(link)
        told = re.search(r"\(os error (\d+)\)", text)  # as the tensor writers tell it
        if told and int(told[1]) in errno.errorcode:
            return int(told[1])
        if "No space left on device" in text:
            return errno.ENOSPC
        if "Read-only file system" in text:
            return errno.EROFS
        if any(sign in text for sign in _TORCH_CANNOT_WRITE):
            return errno.EIO
    return None
