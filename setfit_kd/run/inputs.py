"""Check and load everything that a run needs, before it writes or trains anything."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from setfit_kd.augment.fill_mask import FillMask
from setfit_kd.config.run import RunConfig
from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, evaluation_sources, read, stream_texts
from setfit_kd.data.splits import DataSplits, split_data
from setfit_kd.errors import ConfigError
from setfit_kd.memory.devices import resolve_device
from setfit_kd.models.bodies import PAIRS_HINT, BodySource, locate_body, locate_model
from setfit_kd.run.search import check_search
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.signals.files import read_signals
from setfit_kd.signals.signals import TeacherSignals
from setfit_kd.student.distil import check_pool
from setfit_kd.student.kinds import PreparedStudent, locate_student
from setfit_kd.tasks.classification import MULTI_LABEL
from setfit_kd.training.precision import check_precision

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData(DataSplits):
    """Data of a run. If signals come from a file, their texts are the pool, and labeled texts are optional."""

    signals: TeacherSignals | None = None


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run.

    Attributes:
        data: The data, without duplicates and leaks.
        teachers: Source of the body of each teacher by its name in the settings; none if signals come from a file.
        bodies: Bodies that are already loaded, by the name of the teacher; a stage that uses one removes it.
        students: The students before training.
        revisions: Revision of everything from the hub.
        fill_mask: Folder of the masked language model for augmentation.
    """

    data: RunData
    teachers: dict[str, BodySource]
    bodies: dict[str, SentenceTransformer]
    students: list[PreparedStudent]
    revisions: dict[str, str]
    fill_mask: Path | None = None

    def load_body(self, teacher: str, seed: int) -> SentenceTransformer:
        """Load the pretrained body of a teacher; the seed determines the weights that a transformer lacks."""
        return self.teachers[teacher].load(self.data.labeled.label_names, seed=seed)


def prepare_run(config: RunConfig, *, resume: bool = False, **sources: Source | None) -> RunInputs:
    """Find, check and load all inputs of a run. Checks that need no model come first.

    Raises:
        SetFitKDError: If an input is missing or cannot be used.
    """
    if config.output_dir:
        RunFolder.check(config.output_dir, overwrite=config.overwrite, resume=resume)
    if config.device not in ("auto", "cpu"):
        resolve_device(config.device)  # imports torch, hence not for the others
    if config.search:
        check_search()
    data = load_run_data(config, **sources)
    # Uncertain texts are dropped, so those that are augmented by default may not fill a batch.
    check_pool(len(data.pool) + (0 if data.signals else len(data.labeled) + (config.augment or 0)), config)
    if data.evaluation is None and config.seeds > 1:
        raise ConfigError(
            f"Running {config.seeds} seeds requires an evaluation set to measure how the metrics vary.",
            hint="Pass --eval.",
        )
    if config.target_accuracy and data.labeled.task is MULTI_LABEL:
        message = "A target accuracy requires one label per text, but the labeled texts have several."
        raise ConfigError(message, hint="Remove --target-accuracy.")
    check_precision(config.precision, resolve_device(config.device))
    teachers = {} if config.signals else {name: locate_body(name) for name in config.teacher}
    if config.pair_column is not None and any(source.family != "transformer" for source in teachers.values()):
        raise ConfigError("Pairs of texts can only be classified by transformers.", hint=PAIRS_HINT)
    fill_mask = None if config.augment_model is None else locate_model(config.augment_model)
    student_sources = [locate_student(name) for name in config.student]
    from setfit_kd.hub.client import cached_revisions  # imports huggingface_hub

    models = [*teachers, config.augment_model, *config.student]
    named = [getattr(config, name) for name in ("labeled", "unlabeled") if sources.get(name) is None]
    named += () if sources.get("eval") is not None else config.eval or ()
    revisions = cached_revisions(models, named)
    if data.evaluation is None:
        logger.warning("There is no evaluation set: quality can only be estimated. Pass --eval to measure it.")
    if fill_mask:
        FillMask(fill_mask, device=resolve_device("cpu"))  # only to check that it loads
    names, bodies = data.labeled.label_names, {}
    for name in reversed(teachers):  # check that all of them load, with one at a time in memory
        bodies = {name: teachers[name].load(names, seed=config.seed)}
    first_body = next(iter(bodies.values()), None)
    students = [source.prepare(first_body, names, seed=config.seed) for source in student_sources]
    if config.pair_column is not None and any(student.family != "transformer" for student in students):
        raise ConfigError("Pairs of texts can only be classified by transformers.", hint=PAIRS_HINT)
    return RunInputs(data, teachers, bodies, students, revisions, fill_mask)


def load_run_data(config: DataConfig, **sources: Source | None) -> RunData:
    """Read the data of a run and split it with `split_data`.

    Args:
        config: The settings.
        sources: ``labeled``, ``unlabeled`` and ``eval``: data to use instead of the sources named in the settings.

    Raises:
        ConfigError: If there are no labeled texts and no signals.
        DataError: If a source cannot be used.
        UnavailableError: If a hub data set cannot be reached.
    """
    labeled, unlabeled, evaluation = (
        getattr(config, name) if sources.get(name) is None else sources[name]
        for name in ("labeled", "unlabeled", "eval")
    )
    if config.signals is not None and unlabeled is not None:
        raise ConfigError("Signals contain their own pool texts.", hint="Remove --unlabeled or --signals.")
    if labeled is None and config.signals is None:
        raise ConfigError("Labeled texts are required.", hint="Pass --labeled, or choose a --preset with data.")
    evaluations = evaluation_sources(evaluation)
    files = {source for source in evaluations.values() if isinstance(source, str)}
    if isinstance(labeled, str) and labeled in files and Path(labeled).is_file():
        raise ConfigError(
            f"{labeled} cannot be both the labeled texts and the evaluation set.",
            hint="Pass other texts with --eval, or leave it out.",
        )

    signals = None if config.signals is None else read_signals(config.signals)
    if signals is not None:  # without labeled texts
        rows = LabeledSet([], signals.task.decide(signals.probabilities[:0], None), signals.label_names)
    if labeled is not None:
        classes = () if signals is None else (signals.label_names, signals.task)
        rows = encode_labels(read(labeled, **config.columns), *classes)
    if signals is None:
        check_classes(rows)
    held_out = {
        name: encode_labels(read(source, **config.columns, role="test"), rows.label_names, rows.task)
        for name, source in evaluations.items()
    }
    if signals is None:
        if unlabeled is None:
            logger.warning("There are no unlabeled texts: the student can only learn from the labeled texts.")
        stream = partial(stream_texts, text_column=config.text_column, pair_column=config.pair_column)
        pool = None if unlabeled is None else stream(unlabeled)
        return RunData(**vars(split_data(rows, pool, held_out, config)))
    # Labeled texts stay in the pool, since they have signals.
    data = split_data(rows, signals.texts, held_out, config, disjoint=False)
    if len(data.labeled):
        check_classes(data.labeled)
    first_row = {text: row for row, text in reversed(list(enumerate(signals.texts)))}
    return RunData(**vars(data), signals=signals.take(np.array([first_row[text] for text in data.pool], np.int64)))
