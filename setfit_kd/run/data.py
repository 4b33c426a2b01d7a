"""Load the data of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from setfit_kd.config.stages import DataConfig
from setfit_kd.data.labeled_set import LabeledSet, check_classes, encode_labels
from setfit_kd.data.sources import Source, read, stream_texts
from setfit_kd.data.splits import DataSplits, split_data
from setfit_kd.errors import ConfigError
from setfit_kd.signals.files import read_signals
from setfit_kd.signals.signals import TeacherSignals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData(DataSplits):
    """Data of a run.

    If signals come from a file, their texts are the pool, and labeled texts are optional.
    """

    signals: TeacherSignals | None = None


def load_run_data(
    config: DataConfig,
    *,
    labeled: Source | None = None,
    unlabeled: Source | None = None,
    eval: Source | None = None,  # noqa: A002 - the setting's name everywhere
) -> RunData:
    """Read the data of a run and split it with `split_data`.

    Args:
        config: The settings; they name the sources that are not passed as objects.
        labeled: Labeled texts.
        unlabeled: The pool.
        eval: The evaluation set.

    Raises:
        ConfigError: If there are no labeled texts and no signals.
        DataError: If a source cannot be used.
        UnavailableError: If a hub data set cannot be reached.
    """
    labeled = config.labeled if labeled is None else labeled
    unlabeled = config.unlabeled if unlabeled is None else unlabeled
    evaluation = config.eval if eval is None else eval
    if config.signals is not None and unlabeled is not None:
        raise ConfigError("Signals contain their own pool texts.", hint="Remove --unlabeled or --signals.")
    if labeled is None and config.signals is None:
        raise ConfigError("Labeled texts are required.", hint="Pass --labeled or choose a --preset.")
    if isinstance(labeled, str) and isinstance(evaluation, str) and labeled == evaluation and Path(labeled).is_file():
        raise ConfigError(
            f"{evaluation} cannot be both the labeled texts and the evaluation set.",
            hint="Pass other texts with --eval, or leave it out.",
        )
    columns = config.text_column
    signals = None if config.signals is None else read_signals(config.signals)
    names = None if signals is None else signals.label_names
    if labeled is None:
        rows = LabeledSet([], np.empty(0, np.int64), names or ())
    else:
        rows = encode_labels(read(labeled, text_column=columns, label_column=config.label_column), names)
    if signals is None:
        check_classes(rows)
    held_out = None
    if evaluation is not None:
        held_out = encode_labels(
            read(evaluation, text_column=columns, label_column=config.label_column, role="test"), rows.label_names
        )
    if signals is not None:
        return _split_signals(rows, signals, held_out, config)
    if unlabeled is None:
        logger.warning("There are no unlabeled texts: the student is trained on the labeled texts only.")
    pool = None if unlabeled is None else stream_texts(unlabeled, text_column=columns)
    return RunData(**vars(split_data(rows, pool, held_out, config)))


def _split_signals(
    labeled: LabeledSet, signals: TeacherSignals, evaluation: LabeledSet | None, config: DataConfig
) -> RunData:
    """Split the data with the texts of the signals as the pool; labeled texts stay in it, since they have signals."""
    data = split_data(labeled, signals.texts, evaluation, config, disjoint=False)
    if len(data.labeled):
        check_classes(data.labeled)
    first_row = {text: row for row, text in reversed(list(enumerate(signals.texts)))}
    return RunData(**vars(data), signals=signals.take(np.array([first_row[text] for text in data.pool], np.int64)))
