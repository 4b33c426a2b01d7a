"""Access to the model hub."""
