"""Write files and folders atomically, with helpful errors."""

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
LOCK_FILE = ".lock"
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}")
_ERRNO_HINTS = {
    errno.ENOSPC: "The disk is full: free some space, or",
    errno.EDQUOT: "The disk quota is used up: free some space, or",
    errno.EROFS: "The file system is read-only:",
    errno.EACCES: "No permission to write:",
    errno.EPERM: "No permission to write:",
    errno.ENOTDIR: "Part of the path is a file:",
}

_TORCH_WRITE_ERRORS = ("inline_container.cc", "iostream error")
"""Parts of torch's messages for a failed write, which do not include the cause."""


@contextmanager
def raise_output_errors(path: Path, *, alternative: str = "choose another --output-dir") -> Iterator[None]:
    """Context manager that turns failures to write to ``path`` into an `OutputError` with a hint.

    torch and safetensors wrap the system's error in their own types, so the errno is read from the chain of causes or
    from the messages.

    Args:
        path: File or folder that is written.
        alternative: How to choose another path, as an imperative clause for the hint.
    """
    try:
        yield
    except SetFitKDError:
        raise
    except Exception as error:
        code = _find_errno(error)
        if code is None:
            raise
        known = _ERRNO_HINTS.get(code)
        hint = f"{known} {alternative}." if known else f"{alternative[0].upper()}{alternative[1:]}."
        raise OutputError(f"Cannot write {path}: {error} [{errno.errorcode[code]}]", hint=hint) from error


def temporary_path(path: Path) -> Path:
    """Return a new hidden path beside ``path`` that matches `TEMPORARY_NAME`."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


@contextmanager
def _temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; at the end, remove the file or folder at it."""
    part = temporary_path(path)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # it does not exist, or the folder is read-only
            part.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder atomically: yield a temporary folder that is renamed to ``path`` at the end.

    Raises:
        OutputError: If ``path`` exists or cannot be written.
    """
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

    Raises:
        OutputError: If the folder cannot be written.
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
    """Replace files of a folder: yield a temporary folder whose files are moved to ``folder`` at the end.

    Each file is replaced atomically, but not all files together.

    Raises:
        OutputError: If the files cannot be written.
    """
    with raise_output_errors(folder), _temporary_sibling(folder / "new") as part:
        part.mkdir()
        yield part
        _apply_umask(part)
        for file in part.iterdir():
            file.replace(folder / file.name)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise an error if the named files and folders of ``folder`` are or contain symbolic links.

    Writing or deleting through a link would change files outside the folder. Links at or above ``folder`` are allowed.

    Raises:
        OutputError: If there is a link.
    """
    for name in names:
        contents = (Path(root) / entry for root, folders, files in os.walk(folder / name) for entry in folders + files)
        link = next((path for path in (folder / name, *contents) if path.is_symlink()), None)
        if link is not None:
            raise OutputError(
                f"{link} is a symbolic link, which is not allowed inside an output folder.",
                hint="Replace the link with its target, or choose another folder.",
            )


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Create a folder and lock it for the duration of the block; the lock of a dead process is ignored.

    If the folder did not exist before and is empty at the end, it is removed.

    Raises:
        OutputError: If another process holds the lock, or if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    is_new = not path.exists()
    refuse_links(path, [LOCK_FILE])
    with raise_output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(
                f"Another process{_lock_owner(path / LOCK_FILE)} is using {path}.",
                hint="Wait until it has finished, or choose another --output-dir.",
            ) from None
        except NotImplementedError:
            logger.debug("The file system of %s does not support locks.", path)
    try:
        if lock.is_locked:
            with suppress(OSError):
                (path / LOCK_FILE).write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        if is_new and path.is_dir() and not any(file.name != LOCK_FILE for file in path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
        lock.release()


def _lock_owner(lock: Path) -> str:
    try:
        return f" ({int(lock.read_text(encoding='utf-8'))})"
    except (OSError, ValueError):
        return ""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file atomically: yield a temporary file that is renamed to ``path`` at the end.

    Raises:
        OutputError: If the file cannot be written.
    """
    with raise_output_errors(path, alternative="choose another file"), _temporary_sibling(path) as part:
        with part.open("wb") as file:
            yield file
        part.replace(path)


def write_text(path: Path, text: str, *, alternative: str = "choose another --output-dir") -> None:
    """Write or replace a text file atomically; see `raise_output_errors` for ``alternative``.

    Raises:
        OutputError: If the file cannot be written.
    """
    with raise_output_errors(path, alternative=alternative), _temporary_sibling(path) as part:
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _apply_umask(folder: Path) -> None:
    """Set the mode of files to that of the user's umask; some libraries create files readable by the owner only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _find_errno(error: BaseException) -> int | None:
    for cause in error_chain(error):
        if isinstance(cause, OSError) and cause.errno in errno.errorcode:
            return cause.errno
        text = str(cause)
        match = re.search(r"\(os error (\d+)\)", text)  # format of safetensors
        if match and int(match[1]) in errno.errorcode:
            return int(match[1])
        if "No space left on device" in text:
            return errno.ENOSPC
        if "Read-only file system" in text:
            return errno.EROFS
        if any(fragment in text for fragment in _TORCH_WRITE_ERRORS):
            return errno.EIO
    return None
