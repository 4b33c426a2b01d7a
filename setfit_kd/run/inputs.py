"""Check and load everything that a run needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from setfit_kd import hub
from setfit_kd.augment.fill_mask import load_fill_mask
from setfit_kd.config.run import RunConfig
from setfit_kd.data.sources import Source
from setfit_kd.errors import ConfigError
from setfit_kd.memory.devices import check_device, resolve_device
from setfit_kd.models.bodies import locate_body, locate_model
from setfit_kd.run.data import RunData, load_run_data
from setfit_kd.run.teacher_stages import PreparedTeacher
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.student.checks import check_pool
from setfit_kd.student.kinds import PreparedStudent, locate_student
from setfit_kd.training.precision import check_precision

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run: cleaned data, models before training, and the revisions of everything from the hub.

    If signals come from a file, there are no teachers.
    """

    data: RunData
    teachers: list[PreparedTeacher]
    students: list[PreparedStudent]
    revisions: dict[str, str]
    fill_mask: Path | None = None


def prepare_run(
    config: RunConfig,
    *,
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002
    resume: bool = False,
) -> RunInputs:
    """Find, check and load all inputs of a run before it writes or trains anything.

    Raises:
        SetFitKDError: If an input is missing or cannot be used.
    """
    check_device(config.device)
    if config.output_dir:
        RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=resume)
    with hub.record_revisions() as revisions:
        teachers = {} if config.signals else {name: locate_body(name) for name in config.teacher}
        fill_mask = None if config.augment_model is None else locate_model(config.augment_model)
        if fill_mask:
            load_fill_mask(fill_mask, device=resolve_device("cpu"))  # only to check that it loads
        sources = [locate_student(name) for name in config.student]
        data = load_run_data(config, labeled=labeled, unlabeled=unlabeled, eval=eval)
    check_pool(len(data.pool) + (0 if data.signals else len(data.labeled) + (config.augment or 0)), config)
    if data.evaluation is None:
        if config.seeds > 1:
            raise ConfigError(
                f"Running {config.seeds} seeds requires an evaluation set to measure how the metrics vary.",
                hint="Pass --eval.",
            )
        logger.warning("There is no evaluation set: the models are not evaluated. Pass --eval to evaluate them.")
    check_precision(config.precision, resolve_device(config.device))
    names, seed = data.labeled.label_names, config.seed
    prepared = [PreparedTeacher(name, source, names, seed) for name, source in teachers.items()]
    first_body: SentenceTransformer | None = None
    for teacher in reversed(prepared):  # check that all of them load, with one at a time in memory
        first_body = teacher.load()
    if prepared:
        prepared[0].body = first_body
    students = [source.prepare(first_body, names, seed=seed) for source in sources]
    return RunInputs(data, prepared, students, revisions, fill_mask)
