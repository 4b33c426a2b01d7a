"""Helpers shared by several test modules."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from setfit_kd.cli import main


def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
    """Run ``setfit-kd`` with these arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of a folder by relative path; None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(result: Result, *fragments: str) -> None:
    """Check that a command failed with exit code 2 and printed a message with a hint that contains the fragments."""
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.stderr}"
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    message, _, hint = result.stderr[result.stderr.index("Error: ") :].partition("\n")
    is_usage = result.stderr.startswith("Usage: ")
    assert hint.strip() or is_usage, f"no hint: {message}"
    missing = [fragment for fragment in fragments if fragment not in result.stderr]
    assert not missing, f"{missing} not in {result.stderr!r}"


def truncate_file(path: Path) -> None:
    """Cut a file to half its size."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def corrupt_file(path: Path) -> None:
    """Overwrite the first 64 bytes of a file."""
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
