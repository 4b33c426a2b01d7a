"""Devices, recognition of out-of-memory errors, and OOM backoff."""
