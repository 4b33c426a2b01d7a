"""Comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from setfit_kd.data.labeled_set import LabeledSet
from setfit_kd.errors import DataError
from setfit_kd.evaluation.intervals import Interval, bootstrap_quality
from setfit_kd.evaluation.measure import Evaluation, read_texts
from setfit_kd.report.summary import read_summary
from setfit_kd.run_folder.names import EVALUATION


class ComparedModel(NamedTuple):
    """A model of one of the compared runs.

    ``difference`` is the difference in accuracy to the first student of the first run, with its 95% interval; None for
    that student itself, and if the two were evaluated on different texts.
    """

    run: Path
    name: str
    evaluation: Evaluation
    difference: Interval | None


def compare(runs: Sequence[str | Path]) -> list[ComparedModel]:
    """Compare the teachers, baselines and students of several runs, in the order of ``runs``.

    Raises:
        DataError: If one of the runs is not finished or was not evaluated.
    """
    compared: list[ComparedModel] = []
    reference: tuple[Evaluation, LabeledSet] | None = None
    for summary in map(read_summary, runs):
        if not summary.students:
            raise DataError(
                f"The run in {summary.folder} was not evaluated.", hint="Compare runs with an evaluation set (--eval)."
            )
        data = read_texts(summary.folder / EVALUATION)
        reference = reference or (summary.students[0].evaluation, data)
        for name, evaluation in summary.evaluations.items():
            difference = None if evaluation is reference[0] else _difference(evaluation, data, *reference)
            compared.append(ComparedModel(summary.folder, name, evaluation, difference))
    return compared


def _difference(evaluation: Evaluation, data: LabeledSet, first: Evaluation, first_data: LabeledSet) -> Interval | None:
    """Return the difference in accuracy to ``first``; None if the texts, classes or gold labels differ."""
    names, first_names = data.label_names, first_data.label_names
    if data.texts != first_data.texts or sorted(names) != sorted(first_names):
        return None
    index = np.array([first_names.index(name) for name in names])
    if not np.array_equal(index[data.labels], first.gold):
        return None
    predicted = index[evaluation.predicted]
    return bootstrap_quality(first.gold, predicted, n_classes=len(names), other=first.predicted)["accuracy"]
