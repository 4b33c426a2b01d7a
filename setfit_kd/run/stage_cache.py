"""What a run has gone through: a stage is gone through once, and taken from the run's folder after that."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from setfit_kd.errors import InputError
from setfit_kd.memory import shared_backoff
from setfit_kd.run_folder import (
    BASELINE,
    BASELINES,
    CHECKPOINTS,
    SCORED,
    SIGNALS,
    STUDENT,
    STUDENTS,
    TEACHER,
    TEACHERS,
    WEIGHED,
    RunFolder,
    log_stage,
)
from setfit_kd.training.loop import record_losses

T = TypeVar("T")

logger = logging.getLogger(__name__)

_STAGE_GROUPS = {TEACHERS: TEACHER, WEIGHED: TEACHER, SCORED: SIGNALS, STUDENTS: STUDENT, BASELINES: BASELINE}


class StageCache:
    """Goes through stages, in a run's folder or without one.

    Args:
        folder: Where what they make is kept, and what is taken from.

    Attributes:
        told: What there is to tell of each stage: ``seconds``, ``out_of_memory``, ``losses``.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by kind of stage: those of several students, baselines and evaluations are added up."""
        found: dict[str, float] = {}
        for name, told in self.records.items():
            kind = _STAGE_GROUPS.get(name.partition("/")[0], name.partition("/")[0])
            found[kind] = round(found.get(kind, 0) + told["seconds"], 2)
        return found

    @property
    def out_of_memory(self) -> list[dict[str, Any]]:
        """Every step down the backoff, in the order of the stages."""
        return [event for told in self.records.values() for event in told["out_of_memory"]]

    def checkpoints(self, name: str, inputs: str) -> Path | None:
        """Where the training of a stage may keep its state; another folder for other inputs."""
        return None if self.folder is None else self.folder.path / CHECKPOINTS / f"{name.replace('/', '-')}-{inputs}"

    def run_or_load(
        self,
        name: str,
        inputs: str,
        *,
        make: Callable[[], T],
        save: Callable[[T, Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """What a stage makes.

        Args:
            name: The stage, and the folder within the run's that it is kept in.
            inputs: Fingerprint of what it is made from.
            make: Makes it.
            save: Writes it to a folder that is not there yet, whole or not at all.
            load: Reads it back; what comes out is equal to what was written.

        Raises:
            SetFitKDError: As ``make``, ``save`` and ``load``; what can be made and no longer loaded is made again.
        """
        with log_stage(name):
            before = self._before(name, inputs, load)
            if before is not None:
                return before
            if self.folder is not None:
                self.folder.discard(name)
            started = time.perf_counter()
            with shared_backoff() as events, record_losses() as losses:
                n_before = len(events)
                made = make()
            told: dict[str, Any] = {
                "inputs": inputs,
                "seconds": round(time.perf_counter() - started, 2),
                "out_of_memory": [event.as_dict() for event in events[n_before:]],
                "losses": losses,
            }
            logger.debug("Stage %s took %.1f s.", name, told["seconds"])
            self.records[name] = told
            if self.folder is not None:
                save(made, self.folder.path / name)
                self.folder.update_manifest(stages={**self.folder.about["stages"], name: told})
                checkpoints = self.checkpoints(name, inputs)
                if checkpoints is not None:
                    shutil.rmtree(checkpoints, ignore_errors=True)
            return made

    def discard_unused(self) -> None:
        """Take out of the folder what stages have made that are no part of this run any more."""
        if self.folder is not None:
            for name in set(self.folder.about["stages"]) - set(self.records):
                self.folder.discard(name)

    def _before(self, name: str, inputs: str, load: Callable[[Path], T]) -> T | None:
        told = self.folder.stage(name, inputs) if self.folder else None
        if self.folder is None or told is None:
            return None
        try:
            found = load(self.folder.path / name)
        except InputError as error:
            logger.warning("Stage %s is gone through again: %s", name, error.message)
            return None
        logger.info("Stage %s: taken from %s.", name, self.folder.path / name)
        self.records[name] = told
        return found
