"""Helpers that know nothing of models or data: files, hashes, arrays, console output."""
