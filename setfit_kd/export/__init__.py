"""Export a classifier as a bundle that runs without torch, or publish it on the hub."""
