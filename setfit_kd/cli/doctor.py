"""``setfit-kd doctor``."""

from __future__ import annotations

import os
from contextlib import suppress

import click

from setfit_kd.config.presets import PRESETS
from setfit_kd.errors import SetFitKDError
from setfit_kd.utils.console import printable


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
    click.echo(f"Device\n  --device auto uses    {resolve_device('auto')}")
    for index in range(torch.cuda.device_count()):
        click.echo(f"  cuda:{index:<17}{torch.cuda.get_device_name(index)}{_free(f'cuda:{index}')}")
    if torch.backends.mps.is_available():
        click.echo(f"  mps                   Apple GPU{_free('mps')}")
    threads = f"{os.cpu_count()} cores, threads of torch: {torch.get_num_threads()}"
    click.echo(f"  cpu                   {threads}{_free('cpu')}")
    reachable = False
    with suppress(Exception):
        reachable = get_session().head(hub.display_endpoint(), timeout=3.0) is not None
    reason = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    state = "reachable" if reachable else "not reachable"
    click.echo(f"Hub\n  {printable(hub.display_endpoint()):<21} {state}{reason}")
    folder, size = cache_folder(), cache_bytes()
    cache = f"{folder}  {size / 2**20:,.0f} MiB of embeddings" if folder else "none: no home folder"
    click.echo(f"Cache\n  {printable(cache)}\nPresets")
    for name in PRESETS:
        problem = _problem(name, reachable)
        click.echo(f"  {name:<22}{'can run' if problem is None else f'cannot run: {problem}'}")


def _free(device: str) -> str:
    import torch

    from setfit_kd.errors import first_line
    from setfit_kd.memory.devices import free_memory

    try:
        free, total = free_memory(torch.device(device))
    except RuntimeError as error:
        return f", not available: {first_line(str(error))}"
    return f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _problem(name: str, reachable: bool) -> str | None:
    """Return why a preset cannot run here, or None if it can. Downloads nothing."""
    from setfit_kd.hub import client as hub
    from setfit_kd.models.demo import DEMO_MODELS

    settings = PRESETS[name]
    for role in ("teacher", "student", "labeled"):
        value = settings.get(role, "").rpartition("@")[2]
        if value.startswith(("layers:", "bundled:")) or not value:
            continue
        try:
            if value in DEMO_MODELS:
                DEMO_MODELS[value].find()
            elif not reachable and hub.cached_snapshot(value, "dataset" if role == "labeled" else "model") is None:
                return f"{value} is not in the local cache, and the hub is not reachable"
        except SetFitKDError as error:
            return printable(error.message)
    return None
