"""What all trainers share: the training loop, callbacks, checkpoints and precision."""
