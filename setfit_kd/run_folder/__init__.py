"""The folder of a run: names of its files, `run.json`, the log."""
