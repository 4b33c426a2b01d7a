"""Results of stages that are stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import TypeAdapter

from setfit_kd.errors import DataError, first_line
from setfit_kd.utils.atomic_io import atomic_folder
from setfit_kd.utils.files import read_json

if TYPE_CHECKING:
    from typing_extensions import Self


class JsonArtifact:
    """Base class of a dataclass that is stored as a JSON file in a folder of its own."""

    file_name: ClassVar[str]

    def save(self, folder: Path) -> None:
        """Write the fields to a new folder, as `atomic_folder` does."""
        fields: Any = self
        with atomic_folder(folder) as part:
            (part / self.file_name).write_text(json.dumps(asdict(fields)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the fields that `save` wrote; raise a `DataError` if that fails."""
        path = folder / cls.file_name
        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read {path} ({first_line(str(error))}).", hint="Run it again.") from None
