"""Write docs/cli.md from the help of the commands; with --check, fail if the file is out of date."""

import sys
from pathlib import Path

import click
from click.testing import CliRunner

from setfit_kd.cli import main

TARGET = Path(__file__).parent / "cli.md"


def reference() -> str:
    """Return the help of all commands as Markdown."""
    parts = ["# Command line\n\nGenerated from the help of the commands by `make docs`.\n"]
    commands = ["", *main.list_commands(click.Context(main))]
    for name in commands:
        result = CliRunner().invoke(
            main, [*([name] if name else []), "--help"], prog_name="setfit-kd", terminal_width=100
        )
        title = f"setfit-kd {name}".strip()
        parts.append(f"## {title}\n\n```text\n{result.output.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = reference()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md is out of date: run `make docs`.")
