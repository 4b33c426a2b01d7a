"""Access to the model hub."""

from setfit_kd.hub.client import (
    cached_snapshot,
    display_endpoint,
    is_offline,
    is_reachable,
    is_repo_id,
    record_revisions,
    snapshot,
    split_revision,
    upload,
)

__all__ = [
    "cached_snapshot",
    "display_endpoint",
    "is_offline",
    "is_reachable",
    "is_repo_id",
    "record_revisions",
    "snapshot",
    "split_revision",
    "upload",
]
