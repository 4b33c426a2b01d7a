"""Teacher signals (soft labels and embeddings), their files, and a cache of embeddings."""

from setfit_kd.signals.embedding_cache import cache_bytes, cached_embed
from setfit_kd.signals.files import read_signals
from setfit_kd.signals.signals import TeacherSignals

__all__ = [
    "TeacherSignals",
    "cache_bytes",
    "cached_embed",
    "read_signals",
]
