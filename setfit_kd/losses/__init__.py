"""Training losses for the trainer of sentence-transformers, one per module."""
