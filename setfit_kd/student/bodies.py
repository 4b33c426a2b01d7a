"""The bodies a student may have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd.errors import ConfigError
from setfit_kd.models import cut_layers, load_body, locate

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CUT = "layers:"


def locate_student(name: str) -> Path | tuple[int, ...]:
    """Where a student's body comes from: a folder, or the layers to cut out of the teacher's.

    Raises:
        ConfigError: Layers are written wrongly.
        ModelError: The folder holds no model.
        UnavailableError: The hub cannot be reached.
    """
    return parse_layers(name) if name.startswith(_CUT) else locate(name)


def parse_layers(name: str) -> tuple[int, ...]:
    """``layers:0,2,5`` to (0, 2, 5).

    Raises:
        ConfigError: It is written otherwise.
    """
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", name.removeprefix(_CUT)):
        raise ConfigError(f"{name!r} does not name layers.", hint="Write them as in layers:0,2,5.")
    return tuple(int(part) for part in name.removeprefix(_CUT).split(","))


def student_body(located: Path | tuple[int, ...], *, teacher: SentenceTransformer) -> SentenceTransformer:
    """Load a student's body, or cut it out of the teacher's; on the CPU, or where the teacher is.

    Args:
        located: What `locate_student` says.
        teacher: The teacher's body, not fine-tuned yet, for cutting.

    Raises:
        ModelError: There are no such layers, or the body does not load.
    """
    return load_body(located) if isinstance(located, Path) else cut_layers(teacher, located)
