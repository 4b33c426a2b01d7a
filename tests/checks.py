"""Checks that several test modules share."""

from __future__ import annotations

from pathlib import Path

from click.testing import Result


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(result: Result, *says: str) -> None:
    """The run ended by a message on stderr with its hint, holding every fragment, and by exit code 2."""
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.stderr}"
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    message, _, hint = result.stderr[result.stderr.index("Error: ") :].partition("\n")
    is_usage = result.stderr.startswith("Usage: ")
    assert hint.strip() or is_usage, f"no hint: {message}"
    missing = [fragment for fragment in says if fragment not in result.stderr]
    assert not missing, f"{missing} not in {result.stderr!r}"


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
