"""``setfit-kd push``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.utils.console import printable


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_MODEL")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private/--public", default=None,
              help="Visibility of a new repository. [default: the owner's setting on the hub]")  # fmt: skip
@click.option("--message", metavar="TEXT", default="Upload by setfit-kd", help="Commit message.")
@click.option("--dry-run", is_flag=True, help="List the files to upload, without contacting the hub.")
def push(model: Path, name: str, private: bool | None, message: str, dry_run: bool) -> None:
    """Upload a student and its model card to the hub.

    All files are uploaded in a single commit. This needs a token with write access: log in with `hf auth login`, or
    set HF_TOKEN.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.export.publication import collect_files
    from setfit_kd.hub.client import display_endpoint, upload

    files, skipped = collect_files(model, name)
    for file in skipped:
        click.echo(printable(f"Skipped, not part of a model: {file}"), err=True)
    url = f"{display_endpoint()}/{name}"
    sizes = {file: len(part) if isinstance(part, bytes) else part.stat().st_size for file, part in files.items()}
    if dry_run:
        show_table(("file", "bytes"), [*sizes.items(), ("total", sum(sizes.values()))])
        echo(f"Dry run: nothing was uploaded to {url}.")
        return
    click.echo(printable(f"Uploading {sum(sizes.values()) / 1e6:.1f} MB to {url} ..."), err=True)
    upload(name, files, message=message, private=private)
    echo(url)
