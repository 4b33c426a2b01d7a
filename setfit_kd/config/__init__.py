"""Configuration: one frozen config per stage, `RunConfig` with all settings of a run, and the presets.

A setting has the same name everywhere: as a config field, as a keyword argument, as a key in a YAML file and, with
dashes, as a flag on the command line.
"""

from setfit_kd.config.base import Family, StageConfig, resolved
from setfit_kd.config.presets import DEFAULT_PRESET, OFFLINE_COMMAND, PRESETS, preset, read_config
from setfit_kd.config.run import FinetuneRunConfig, RunConfig
from setfit_kd.config.stages import (
    AugmentConfig,
    DataConfig,
    FinetuneConfig,
    SignalsConfig,
    StudentConfig,
    TeacherConfig,
)
from setfit_kd.config.values import BUNDLE_FORMATS, CROSS_VALIDATED, parse_objectives, parse_weights

__all__ = [
    "BUNDLE_FORMATS",
    "CROSS_VALIDATED",
    "DEFAULT_PRESET",
    "OFFLINE_COMMAND",
    "PRESETS",
    "AugmentConfig",
    "DataConfig",
    "Family",
    "FinetuneConfig",
    "FinetuneRunConfig",
    "RunConfig",
    "SignalsConfig",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "parse_objectives",
    "parse_weights",
    "preset",
    "read_config",
    "resolved",
]
