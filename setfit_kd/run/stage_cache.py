"""Cache of stage results: run a stage, or load its result from the run folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from setfit_kd.errors import InputError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.log import RunLog
from setfit_kd.run_folder.names import CHECKPOINTS, STAGE_KINDS

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact(Generic[T]):
    """How the result of a stage is stored.

    Attributes:
        save: Function that writes the result atomically to a folder that does not exist yet.
        load: Function that reads the result; it equals the saved one.
    """

    save: Callable[[T, Path], None]
    load: Callable[[Path], T]


class StageCache:
    """Cache of stage results in a run folder.

    Args:
        folder: The run folder; without one, every stage runs and nothing is saved.
        log: Log that the names of the stages are added to.

    Attributes:
        records: ``inputs`` (their fingerprint), ``seconds``, ``out_of_memory`` and ``losses`` of each stage.
    """

    def __init__(self, folder: RunFolder | None, log: RunLog | None = None) -> None:
        self.folder, self._log = folder, log or RunLog()
        self.records: dict[str, dict[str, Any]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by kind of stage, summed over all students, baselines or evaluations."""
        seconds: dict[str, float] = {}
        for name, record in self.records.items():
            group = name.partition("/")[0]
            kind = STAGE_KINDS.get(group, group)
            seconds[kind] = round(seconds.get(kind, 0) + record["seconds"], 2)
        return seconds

    @property
    def out_of_memory(self) -> list[dict[str, Any]]:
        """All OOM backoff events, in the order of the stages."""
        return [event for record in self.records.values() for event in record["out_of_memory"]]

    def key(self, name: str) -> str:
        """Fingerprint of the inputs of a stage that was run or loaded."""
        return str(self.records[name]["inputs"])

    def checkpoint_folder(self, name: str, key: str) -> Path | None:
        """Return the folder for the checkpoints of a stage; it depends on the fingerprint of the inputs."""
        return None if self.folder is None else self.folder.path / CHECKPOINTS / f"{name.replace('/', '-')}-{key}"

    def run_or_load(self, name: str, key: str, artifact: Artifact[T], run: Callable[[], T]) -> T:
        """Run a stage, or load its result if it was run before on the same inputs.

        Args:
            name: Name of the stage and of its folder in the run folder.
            key: Fingerprint of the inputs.
            artifact: How the result is stored.
            run: Function that computes the result.

        Raises:
            SetFitKDError: As ``run`` and ``artifact.save``. If a result cannot be loaded, the stage runs again.
        """
        folder = self.folder
        with self._log.in_stage(name):
            record = folder.cached_stage(name, key) if folder else None
            if folder and record:
                try:
                    result = artifact.load(folder.path / name)
                except InputError as error:
                    logger.warning("Running stage %s again: %s", name, error.message)
                else:
                    logger.info("Stage %s: loaded from %s.", name, folder.path / name)
                    self.records[name] = record
                    return result
            if folder:
                folder.discard_stage(name)
            started = time.perf_counter()
            with shared_backoff() as events:
                n_before = len(events)
                result = run()
            seconds = round(time.perf_counter() - started, 2)
            losses = getattr(result, "loss_curve_", [])
            record = {"inputs": key, "seconds": seconds, "out_of_memory": events[n_before:], "losses": losses}
            logger.debug("Stage %s took %.1f s.", name, seconds)
            self.records[name] = record
            if folder:
                artifact.save(result, folder.path / name)
                folder.update_manifest(stages={**folder.manifest["stages"], name: record})
                if checkpoints := self.checkpoint_folder(name, key):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            return result

    def discard_unused(self) -> None:
        """Remove the results of stages that are no longer part of the run."""
        if self.folder is not None:
            for name in set(self.folder.manifest["stages"]) - set(self.records):
                self.folder.discard_stage(name)
