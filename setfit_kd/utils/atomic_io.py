"""Write files and folders atomically. All functions raise an `OutputError` with a hint if they cannot write."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from setfit_kd.errors import OutputError, SetFitKDError, error_chain

LOCK_FILE = ".lock"
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}")
_ANOTHER_FOLDER = "choose another --output-dir"
_HINTS = {
    errno.ENOSPC: "The disk is full: free some space, or ",
    errno.EDQUOT: "The disk quota is used up: free some space, or ",
    errno.EROFS: "The file system is read-only: ",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "No permission to write: "),
    errno.ENOTDIR: "Part of the path is a file: ",
}
_MESSAGES = {
    "No space left on device": errno.ENOSPC,
    "Read-only file system": errno.EROFS,
    **dict.fromkeys(("inline_container.cc", "iostream error"), errno.EIO),  # of torch, without the cause
    **{f"(os error {code})": code for code in errno.errorcode},  # of safetensors
}


@contextmanager
def raise_output_errors(path: Path, *, alternative: str = _ANOTHER_FOLDER) -> Iterator[None]:
    """Turn failures to write to ``path``, found by errno or message, into an `OutputError`.

    ``alternative`` is the clause of the hint that says how to choose another path.
    """
    try:
        yield
    except SetFitKDError:
        raise
    except Exception as error:
        code = _find_errno(error)
        if code is None:
            raise
        hint = f"{_HINTS.get(code, '')}{alternative}."
        text = str(error)
        reason = text.removeprefix(f"[Errno {code}] ")
        message = f"Cannot write {path}: {reason}" + f" [{errno.errorcode[code]}]" * (reason == text)
        raise OutputError(message, hint=hint[0].upper() + hint[1:]) from error


def _find_errno(error: BaseException) -> int | None:
    for cause in error_chain(error):
        if isinstance(cause, OSError) and cause.errno in errno.errorcode:
            return cause.errno
        for fragment, code in _MESSAGES.items():
            if fragment in str(cause):
                return code
    return None


def temporary_path(path: Path) -> Path:
    """Return a new hidden path beside ``path`` that matches `TEMPORARY_NAME`."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; remove it at the end."""
    part = temporary_path(path)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # it does not exist, or the folder is read-only
            part.unlink()


@contextmanager
def atomic_file(path: Path, *, alternative: str = "choose another file") -> Iterator[IO[bytes]]:
    """Write or replace a file atomically: yield a temporary file that is renamed to ``path`` at the end."""
    with raise_output_errors(path, alternative=alternative), _temporary_sibling(path) as part:
        with part.open("wb") as file:
            yield file
        part.replace(path)


def write_text(path: Path, text: str, *, alternative: str = _ANOTHER_FOLDER) -> None:
    """Write or replace a text file atomically; see `atomic_file`."""
    with atomic_file(path, alternative=alternative) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder atomically: yield a temporary folder that is renamed to ``path`` at the end."""
    target = Path(path).absolute()
    with raise_output_errors(Path(path)), _temporary_sibling(target) as part:
        if target.exists():
            raise OutputError(f"{path} already exists.", hint="Choose another path, or remove it.")
        part.mkdir(parents=True)
        yield part
        _apply_umask(part)
        part.rename(target)


@contextmanager
def replace_folder(path: str | Path, *, is_ours: Callable[[str], bool]) -> Iterator[Path]:
    """Create or replace a folder atomically: yield a temporary path that is renamed to ``path`` at the end.

    The caller creates the folder at the temporary path. Files and folders of the replaced folder are kept if
    ``is_ours`` is false for their names.
    """
    target = Path(path).resolve()  # a symbolic link to a folder is kept
    with _temporary_sibling(target) as part, _temporary_sibling(target) as previous:
        yield part
        try:
            with raise_output_errors(Path(path)):
                if target.is_dir():
                    for file in target.iterdir():
                        if not is_ours(file.name):
                            _link_or_copy(file, part / file.name)
                    target.rename(previous)
                part.rename(target)
        finally:
            if previous.is_dir() and not target.exists():
                previous.rename(target)


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file or the files of a folder to ``target``, or copy them if links are not supported."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(str(source), str(target))


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of ``folder`` at the end, each atomically."""
    with raise_output_errors(folder), _temporary_sibling(folder / "new") as part:
        part.mkdir()
        yield part
        _apply_umask(part)
        for file in part.iterdir():
            file.replace(folder / file.name)


def _apply_umask(folder: Path) -> None:
    """Set the mode of files to that of the user's umask; some libraries create files readable by the owner only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise an error if the named files and folders of ``folder`` are or contain links, which may lead elsewhere."""
    for path in (folder / name for name in names):
        contents = (Path(root) / entry for root, folders, files in os.walk(path) for entry in folders + files)
        for link in filter(Path.is_symlink, (path, *contents)):
            message = f"{link} is a symbolic link, which is not allowed inside an output folder."
            raise OutputError(message, hint="Replace the link with its target, or choose another folder.")


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Create and lock a folder during the block, and remove it if it is new and empty at the end."""
    from filelock import FileLock, Timeout

    is_new, file = not path.exists(), path / LOCK_FILE
    refuse_links(path, [LOCK_FILE])
    with raise_output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            with suppress(NotImplementedError):  # the file system does not support locks
                lock.acquire(blocking=False)
        except Timeout:
            owner = ""
            with suppress(OSError, ValueError):
                owner = f" ({int(file.read_text(encoding='utf-8'))})"
            hint = "Wait until it has finished, or choose another --output-dir."
            raise OutputError(f"Another process{owner} is using {path}.", hint=hint) from None
    try:
        if lock.is_locked:
            with suppress(OSError):
                file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        if is_new and path.is_dir() and not any(entry.name != LOCK_FILE for entry in path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
        lock.release()
