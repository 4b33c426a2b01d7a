"""Teacher signals: all that a student learns from, and how they are stored."""

from setfit_kd.signals.embedding_cache import cache_bytes, cached_embed
from setfit_kd.signals.files import read_signals
from setfit_kd.signals.signals import TeacherSignals

__all__ = [
    "TeacherSignals",
    "cache_bytes",
    "cached_embed",
    "read_signals",
]
