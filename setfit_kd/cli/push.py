"""``setfit-kd push``."""

from __future__ import annotations

from pathlib import Path

import click

from setfit_kd.utils.escape import printable


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_MODEL")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--private/--public", default=None,
              help="Who may see a repository that is made for it. [the owner's setting on the hub]")  # fmt: skip
@click.option("--message", metavar="TEXT", default=None, help="What the commit is called.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded, and ask nobody.")
def push(model: Path, name: str, private: bool | None, message: str | None, dry_run: bool) -> None:
    """Upload a student and its model card to the hub.

    All files go in one commit, or none. It needs a token that may write: log in by `hf auth login`, or set HF_TOKEN.
    """
    from setfit_kd.cli.output import echo, show_table
    from setfit_kd.export import prepare_publication, publish

    publication = prepare_publication(model, name)
    sizes = publication.sizes
    for place in publication.left_out:
        click.echo(printable(f"Left out, since it is no part of a model: {place}"), err=True)
    if dry_run:
        show_table(("file", "bytes"), [*sizes.items(), ("total", sum(sizes.values()))])
        echo(f"Would go to {publication.address}. Nothing was uploaded.")
        return
    click.echo(printable(f"Uploading {sum(sizes.values()) / 1e6:.1f} MB to {publication.address} ..."), err=True)
    echo(publish(publication, message=message, private=private))
