"""General helpers for files, hashes, arrays and console output."""
