"""Load the data of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from setfit_kd.config import DataConfig
from setfit_kd.data import DataSplits, LabeledSet, Source, check_classes, encode_labels, read, split_data, stream_texts
from setfit_kd.errors import ConfigError
from setfit_kd.signals import TeacherSignals, read_signals

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
    """Read what the config names, or the given objects in its place, and `split_data` it.

    Raises:
        ConfigError: No labeled texts are named.
        DataError: A source cannot be used.
        UnavailableError: A hub data set cannot be reached.
    """
    labeled = config.labeled if labeled is None else labeled
    unlabeled = config.unlabeled if unlabeled is None else unlabeled
    evaluation = config.eval if eval is None else eval
    if config.signals is not None and unlabeled is not None:
        raise ConfigError("Signals bring their own texts.", hint="Drop --unlabeled, or --signals.")
    if labeled is None and config.signals is None:
        raise ConfigError("No labeled texts are given.", hint="Name them by --labeled, or choose a --preset.")
    columns = config.text_column
    given = None if config.signals is None else read_signals(config.signals)
    names = None if given is None else given.label_names
    if labeled is None:
        rows = LabeledSet([], np.empty(0, np.int64), names or ())
    else:
        rows = encode_labels(read(labeled, text_column=columns, label_column=config.label_column), names)
    if given is None:
        check_classes(rows)
    held_out = None
    if evaluation is not None:
        held_out = encode_labels(
            read(evaluation, text_column=columns, label_column=config.label_column, role="test"), rows.label_names
        )
    if given is not None:
        return _prepare_signals(rows, given, held_out, config)
    if unlabeled is None:
        logger.warning("There are no unlabeled texts: the student learns from the labeled ones alone.")
    pool = None if unlabeled is None else stream_texts(unlabeled, text_column=columns)
    return RunData(**vars(split_data(rows, pool, held_out, config)))


def _prepare_signals(
    labeled: LabeledSet, signals: TeacherSignals, evaluation: LabeledSet | None, config: DataConfig
) -> RunData:
    """As `split_data`, with the texts of signals as the pool; labeled texts stay in it, since they have signals."""
    data = split_data(labeled, signals.texts, evaluation, config, apart=False)
    if len(data.labeled):
        check_classes(data.labeled)
    first = {text: row for row, text in reversed(list(enumerate(signals.texts)))}
    return RunData(**vars(data), signals=signals.take(np.array([first[text] for text in data.pool], np.int64)))
