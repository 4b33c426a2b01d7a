"""Client of the model hub."""

from setfit_kd.hub.client import (
    address,
    cached_snapshot,
    is_name,
    is_offline,
    is_reachable,
    revisions,
    snapshot,
    split_revision,
    upload,
)

__all__ = [
    "address",
    "cached_snapshot",
    "is_name",
    "is_offline",
    "is_reachable",
    "revisions",
    "snapshot",
    "split_revision",
    "upload",
]
