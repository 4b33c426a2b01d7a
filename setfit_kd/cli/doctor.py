"""``setfit-kd doctor``."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from setfit_kd.config.presets import PRESETS
from setfit_kd.errors import SetFitKDError
from setfit_kd.utils.escape import printable

if TYPE_CHECKING:
    import torch


@click.command()
def doctor() -> None:
    """Show versions, devices, whether the hub is reachable, and which presets can run here."""
    import torch
    from huggingface_hub import constants, get_session

    from setfit_kd.hub import client as hub
    from setfit_kd.memory.devices import resolve_device
    from setfit_kd.run_folder.manifest import versions
    from setfit_kd.signals.embedding_cache import cache_bytes
    from setfit_kd.utils.files import cache_folder

    click.echo("Versions")
    for package, version in versions().items():
        click.echo(f"  {package:<22}{version}")
    device = resolve_device("auto")
    click.echo("Device")
    click.echo(f"  --device auto uses    {device}")
    for index in range(torch.cuda.device_count()):
        click.echo(f"  cuda:{index:<17}{torch.cuda.get_device_name(index)}{_free(torch.device('cuda', index))}")
    if torch.backends.mps.is_available():
        click.echo(f"  mps                   Apple GPU{_free(torch.device('mps'))}")
    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    click.echo(f"  cpu                   {threads}{_free(torch.device('cpu'))}")
    reachable = False
    with suppress(Exception):
        reachable = get_session().head(hub.display_endpoint(), timeout=3.0) is not None
    reason = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    click.echo("Hub")
    click.echo(f"  {printable(hub.display_endpoint()):<21} {'reachable' if reachable else 'not reachable'}{reason}")
    folder, size = cache_folder(), cache_bytes()
    click.echo("Cache")
    cache = f"{folder}  {size / 2**20:,.0f} MiB of embeddings" if folder else "none: no home folder"
    click.echo(f"  {printable(cache)}")
    click.echo("Presets")
    for name in PRESETS:
        problem = _problem(name, reachable)
        click.echo(f"  {name:<22}{'can run' if problem is None else f'cannot run: {problem}'}")


def _free(device: torch.device) -> str:
    from setfit_kd.memory.devices import free_memory
    from setfit_kd.memory.oom_errors import first_line

    try:
        free, total = free_memory(device)
    except RuntimeError as error:
        return f", not available: {first_line(str(error))}"
    return f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _problem(name: str, reachable: bool) -> str | None:
    """Return why a preset cannot run here, or None if it can. Downloads nothing."""
    from setfit_kd.hub import client as hub
    from setfit_kd.models.bodies import locate_model

    settings = PRESETS[name]
    for role in ("teacher", "student", "labeled"):
        value = settings[role]
        if value.startswith(("layers:", "bundled:")):
            continue
        try:
            if value.startswith("demo:"):
                locate_model(value)
            elif not reachable and hub.cached_snapshot(value, "dataset" if role == "labeled" else "model") is None:
                return f"{value} is not in the local cache, and the hub is not reachable"
        except SetFitKDError as error:
            return printable(error.message)
    return None
