"""Read labeled sets and pools, clean them, draw samples and guard against leaks."""
