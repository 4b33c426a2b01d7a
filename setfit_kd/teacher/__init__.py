"""Train a teacher on a few labels and score a pool with it."""
