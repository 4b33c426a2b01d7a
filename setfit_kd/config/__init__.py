"""Configuration: one frozen config per stage, `RunConfig` with all settings of a run, and the presets.

A setting has the same name everywhere: as a config field, as a keyword argument, as a key in a YAML file and, with
dashes, as a flag on the command line.
"""
