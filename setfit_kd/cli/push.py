"""``setfit-kd push``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.utils.escape import printable


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_MODEL")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private/--public", default=None,
              help="Visibility of a new repository. [default: the owner's setting on the hub]")  # fmt: skip
@click.option("--message", metavar="TEXT", default=None, help="Commit message.")
@click.option("--dry-run", is_flag=True, help="List the files to upload, without contacting the hub.")
def push(model: Path, name: str, private: bool | None, message: str | None, dry_run: bool) -> None:
    """Upload a student and its model card to the hub.

    All files are uploaded in a single commit. This needs a token with write access: log in with `hf auth login`, or
    set HF_TOKEN.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.export.publication import prepare_publication, publish

    publication = prepare_publication(model, name)
    sizes = publication.sizes
    for path in publication.skipped:
        click.echo(printable(f"Skipped, not part of a model: {path}"), err=True)
    if dry_run:
        show_table(("file", "bytes"), [*sizes.items(), ("total", sum(sizes.values()))])
        echo(f"Dry run: nothing was uploaded to {publication.url}.")
        return
    click.echo(printable(f"Uploading {sum(sizes.values()) / 1e6:.1f} MB to {publication.url} ..."), err=True)
    echo(publish(publication, message=message, private=private))
