"""The folder of a run."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setfit_kd.config.presets import read_config
from setfit_kd.errors import ConfigError, DataError, OutputError
from setfit_kd.run_folder.manifest import is_run_folder, read_resumable_manifest
from setfit_kd.run_folder.names import (
    ALL_NAMES,
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    RESULTS,
    RUN_FILE,
    SEEDS,
)
from setfit_kd.utils.atomic_io import (
    LOCK_FILE,
    TEMPORARY_NAME,
    lock_folder,
    raise_output_errors,
    refuse_links,
    temporary_path,
    write_text,
)

if TYPE_CHECKING:
    from setfit_kd.config.run import RunConfig
    from setfit_kd.config.task_runs import TaskRun

logger = logging.getLogger(__name__)


class RunFolder:
    """Folder of a run. Its files and folders are written to temporary paths and then renamed: they are never partial.

    ``run.json`` lists the finished stages with fingerprints of their inputs; other stages count as not run.

    Attributes:
        path: Path of the folder.
        manifest: Content of ``run.json``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any] | None = None) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {"format": 1, "finished": False, "stages": {}} if manifest is None else manifest

    @staticmethod
    def check(path: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Check that a run can be written to a folder, without changing anything.

        Raises:
            OutputError: If the path is a file, the folder is not writable, it is not empty and neither ``overwrite``
                nor ``resume`` is set, or it contains files with the names of run files but no run.
        """
        with raise_output_errors(path):
            existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            has_files = existing == path and path.is_dir() and any(file.name != LOCK_FILE for file in path.iterdir())
            is_foreign = has_files and not resume and not is_run_folder(path)
            hint = "Choose another --output-dir."
            if not existing.is_dir():
                raise OutputError(f"{existing} is a file, not a folder.", hint=hint)
            if has_files and not overwrite and not resume:
                resume_it = "" if is_foreign else f", or resume the run in it with --resume {shlex.quote(str(path))}"
                hint = f"Choose another --output-dir{resume_it}, or pass --overwrite."
                raise OutputError(f"The folder {path} is not empty.", hint=hint)
            if is_foreign and any((path / name).exists() for name in ALL_NAMES):
                message = f"The folder {path} contains files with the names of run files, but no run."
                raise OutputError(message, hint=hint)
            RunFolder.refuse_links(path)
            if not os.access(existing, os.W_OK | os.X_OK):
                hint = "Copy the run to a writable folder." if resume else "Choose a writable --output-dir."
                raise OutputError(f"The folder {existing} is not writable.", hint=hint)

    @staticmethod
    def refuse_links(path: Path) -> None:
        """Raise an error if anything that a run writes or deletes in a folder is a link or is behind one.

        Raises:
            OutputError: If there is such a link.
        """
        temporary = (file.name for file in path.glob(".*") if TEMPORARY_NAME.fullmatch(file.name))
        refuse_links(path, (*ALL_NAMES, LOCK_FILE, *temporary))

    @staticmethod
    def read_settings(path: Path) -> dict[str, Any]:
        """Read the settings of the run in a folder.

        Raises:
            InputError: If the folder contains no run.
        """
        if not all((path / name).is_file() for name in (CONFIG_FILE, RUN_FILE)):
            raise ConfigError(f"Found no run in {path}.", hint="Pass the folder of a run.")
        return read_config(path / CONFIG_FILE)

    @staticmethod
    def contains_interrupted_run(path: Path) -> bool:
        """Return whether a folder contains an unfinished run with a result or checkpoint and no process uses it."""
        try:
            manifest = read_resumable_manifest(path)
            if manifest.get("finished") or not (manifest["stages"] or any((path / CHECKPOINTS).glob("*/*"))):
                return False
            with lock_folder(path):
                return True
        except (DataError, OutputError, OSError):
            return False

    @classmethod
    def create(cls, config: RunConfig | TaskRun, path: Path) -> RunFolder:
        """Create the folder of a new run: remove the files of an earlier run and write the settings.

        Raises:
            OutputError: As `check`, or if the disk is full.
        """
        cls.check(path, overwrite=config.overwrite)
        folder = cls(path)
        for name in ALL_NAMES:
            if name != RUN_FILE:  # it identifies the folder as a run even if the removal is interrupted
                folder._remove(name)
        folder._remove_temporary_files()
        folder.update_manifest()
        write_text(path / CONFIG_FILE, config.to_yaml())
        return folder

    @classmethod
    def reopen(cls, config: RunConfig | TaskRun, path: Path) -> RunFolder:
        """Open the folder of a run to resume it with these settings.

        Raises:
            DataError: If ``run.json`` is not valid.
            OutputError: As `check`, or if the disk is full.
        """
        cls.check(path, resume=True)
        folder = cls(path, read_resumable_manifest(path))
        folder._remove_temporary_files()
        write_text(path / CONFIG_FILE, config.to_yaml())
        return folder

    def _remove_temporary_files(self) -> None:
        """Remove the unfinished files and folders of a killed process."""
        for pattern in (".*", *(f"{name}/{below}" for name in ALL_NAMES for below in (".*", "*/.*"))):
            for path in self.path.glob(pattern):
                if TEMPORARY_NAME.fullmatch(path.name):
                    self._remove(str(path.relative_to(self.path)))

    def cached_stage(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        """Return the manifest entry of a stage if its result exists for inputs with this fingerprint."""
        entry: dict[str, Any] | None = self.manifest["stages"].get(name)
        is_cached = entry is not None and entry.get("inputs") == fingerprint and (self.path / name).is_dir()
        return entry if is_cached else None

    def discard_stage(self, name: str) -> None:
        """Remove the result of a stage, and the metrics and report of the run."""
        self.manifest["stages"].pop(name, None)
        self.update_manifest(finished=False)
        for path in (*RESULTS, name):
            self._remove(path)

    def update_manifest(self, **entries: Any) -> None:
        """Set entries of ``run.json`` and write it.

        Raises:
            OutputError: If it cannot be written.
        """
        self.manifest.update(entries)
        self.write_json(RUN_FILE, self.manifest)

    def prepare_nested_run(self, name: str) -> bool:
        """Return whether a subfolder contains a run that can be resumed; remove the subfolder if it does not."""
        path = self.path / name
        try:
            if is_run_folder(path):
                read_resumable_manifest(path)
                return True
        except DataError as error:
            logger.warning("Starting the run in %s again: %s", path, error.message)
        self._remove(name)
        return False

    def discard_seeds(self, *, keep: Collection[int]) -> None:
        """Remove the runs of all seeds except these."""
        if not keep:
            self._remove(SEEDS)
        for path in (self.path / SEEDS).glob("*"):
            if path.name not in map(str, keep):
                self._remove(f"{SEEDS}/{path.name}")

    def finish(self, metrics: Mapping[str, Any], **entries: Any) -> None:
        """Write the metrics, set entries of ``run.json``, mark the run as finished and remove its checkpoints.

        Raises:
            OutputError: If a file cannot be written.
        """
        self.write_json(METRICS_FILE, metrics)
        self.update_manifest(finished=True, **entries)
        self._remove(CHECKPOINTS)

    def _remove(self, name: str) -> None:
        target = self.path / name
        with raise_output_errors(target):
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            # Renamed first, so that a killed process leaves no folder that seems complete.
            renamed = target if target.name.startswith(".") else temporary_path(target)
            shutil.rmtree(target.rename(renamed))
        if target.parent != self.path:
            with suppress(OSError):  # it is not empty
                target.parent.rmdir()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically.

        Raises:
            OutputError: If it cannot be written.
        """
        write_text(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
