"""Cache of stage results: run a stage, or load its result from the run folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from setfit_kd.errors import InputError
from setfit_kd.memory.backoff import shared_backoff
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.log import stage_in_log
from setfit_kd.run_folder.names import (
    BASELINE,
    BASELINES,
    CHECKPOINTS,
    SIGNALS,
    STUDENT,
    STUDENTS,
    TEACHER,
    TEACHER_ACCURACIES,
    TEACHER_SIGNALS,
    TEACHERS,
)
from setfit_kd.training.loop import record_losses

T = TypeVar("T")

logger = logging.getLogger(__name__)

_STAGE_GROUPS = {
    TEACHERS: TEACHER,
    TEACHER_ACCURACIES: TEACHER,
    TEACHER_SIGNALS: SIGNALS,
    STUDENTS: STUDENT,
    BASELINES: BASELINE,
}


class StageCache:
    """Cache of stage results in a run folder.

    Args:
        folder: The run folder; without one, every stage runs and nothing is saved.

    Attributes:
        records: ``seconds``, ``out_of_memory`` and ``losses`` of each stage.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by kind of stage, summed over all students, baselines or evaluations."""
        seconds: dict[str, float] = {}
        for name, record in self.records.items():
            group = name.partition("/")[0]
            kind = _STAGE_GROUPS.get(group, group)
            seconds[kind] = round(seconds.get(kind, 0) + record["seconds"], 2)
        return seconds

    @property
    def out_of_memory(self) -> list[dict[str, Any]]:
        """All OOM backoff events, in the order of the stages."""
        return [event for record in self.records.values() for event in record["out_of_memory"]]

    def checkpoint_folder(self, name: str, fingerprint: str) -> Path | None:
        """Return the folder for the checkpoints of a stage; it depends on the fingerprint of the inputs."""
        if self.folder is None:
            return None
        return self.folder.path / CHECKPOINTS / f"{name.replace('/', '-')}-{fingerprint}"

    def run_or_load(
        self,
        name: str,
        fingerprint: str,
        *,
        run: Callable[[], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """Run a stage, or load its result if it was run before on the same inputs.

        Args:
            name: Name of the stage and of its folder in the run folder.
            fingerprint: Fingerprint of the inputs.
            run: Function that computes the result.
            save: Function that writes the result atomically to a folder that does not exist yet.
            load: Function that reads the result; it equals the saved one.

        Returns:
            The result.

        Raises:
            SetFitKDError: As ``run`` and ``save``. If ``load`` fails on a damaged result, the stage runs again.
        """
        with stage_in_log(name):
            cached = self._load_cached(name, fingerprint, load)
            if cached is not None:
                return cached
            if self.folder is not None:
                self.folder.discard_stage(name)
            started = time.perf_counter()
            with shared_backoff() as events, record_losses() as losses:
                n_before = len(events)
                result = run()
            record: dict[str, Any] = {
                "inputs": fingerprint,
                "seconds": round(time.perf_counter() - started, 2),
                "out_of_memory": [event.as_dict() for event in events[n_before:]],
                "losses": losses,
            }
            logger.debug("Stage %s took %.1f s.", name, record["seconds"])
            self.records[name] = record
            if self.folder is not None:
                save(result, self.folder.path / name)
                self.folder.update_manifest(stages={**self.folder.manifest["stages"], name: record})
                checkpoints = self.checkpoint_folder(name, fingerprint)
                if checkpoints is not None:
                    shutil.rmtree(checkpoints, ignore_errors=True)
            return result

    def discard_unused(self) -> None:
        """Remove the results of stages that are no longer part of the run."""
        if self.folder is not None:
            for name in set(self.folder.manifest["stages"]) - set(self.records):
                self.folder.discard_stage(name)

    def _load_cached(self, name: str, fingerprint: str, load: Callable[[Path], T]) -> T | None:
        record = self.folder.cached_stage(name, fingerprint) if self.folder else None
        if self.folder is None or record is None:
            return None
        folder = self.folder.path / name
        try:
            result = load(folder)
        except InputError as error:
            logger.warning("Running stage %s again: %s", name, error.message)
            return None
        logger.info("Stage %s: loaded from %s.", name, folder)
        self.records[name] = record
        return result
