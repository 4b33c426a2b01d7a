"""The training loop that all trainers share, with callbacks, checkpoints and precision."""
