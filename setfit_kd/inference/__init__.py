"""Classify texts with a trained model or a bundle, and measure its speed."""
