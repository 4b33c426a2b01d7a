"""Presets and configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from setfit_kd.errors import ConfigError
from setfit_kd.utils.files import check_regular_file

PRESETS: dict[str, dict[str, Any]] = {
    "ag_news": {
        "labeled": "ag_news",
        "unlabeled": "ag_news",
        "eval": "ag_news",
        "teacher": "sentence-transformers/paraphrase-mpnet-base-v2",
        "student": "sentence-transformers/paraphrase-MiniLM-L3-v2",
        "shots": 16,
        "pool_size": 1000,
    },
    "reference-offline": {
        "teacher": "demo:all-mpnet-base-v2",
        "student": "layers:0,2,5@demo:all-MiniLM-L6-v2",
        "shots": 16,
        "pool_size": 1000,
    },
    "newswire": {
        "labeled": "bundled:newswire",
        "unlabeled": "bundled:newswire",
        "eval": "bundled:newswire",
        "teacher": "demo:all-MiniLM-L6-v2",
        "student": "layers:0,2,5",
        "shots": 16,
    },
}
DEFAULT_PRESET = "ag_news"
OFFLINE_COMMAND = "setfit-kd run --preset newswire --output-dir runs/newswire"
_MAX_BYTES = 1 << 18


class _NoAliases(yaml.SafeLoader):
    """YAML loader that rejects aliases, because a few lines of nested aliases can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset.

    Raises:
        ConfigError: If the preset is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}.", hint=f"Choose one of: {', '.join(PRESETS)}.")
    return dict(PRESETS[name])


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file, without validating them.

    Raises:
        ConfigError: If the file cannot be read, is not valid YAML, or is not a mapping.
    """
    try:
        content = yaml.load(check_regular_file(path, limit=_MAX_BYTES).read_text(encoding="utf-8"), _NoAliases)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", hint="Check --config.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).", hint="Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"Invalid YAML in {path}{line}.", hint="Write one `name: value` per line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must contain a mapping of settings.", hint="Write one `name: value` per line.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
