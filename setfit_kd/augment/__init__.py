"""Augment the pool with edited copies of the pool texts and labeled texts."""
