"""Comparison of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from setfit_kd.errors import DataError
from setfit_kd.evaluation.intervals import Interval
from setfit_kd.evaluation.measure import Evaluation
from setfit_kd.evaluation.texts import read_texts
from setfit_kd.report.summary import read_summary
from setfit_kd.run_folder.names import EVALUATION


@dataclass(frozen=True)
class ComparedModel:
    """The teacher or a student of one of the compared runs.

    Attributes:
        run: The run folder.
        name: Name of the model in the report of the run.
        evaluation: Its evaluation.
        difference: Difference in accuracy to the first student of the first run, with its 95% interval; None for that
            student itself, and if the two were evaluated on different texts.
    """

    run: Path
    name: str
    evaluation: Evaluation
    difference: Interval | None


def compare(runs: Sequence[str | Path]) -> list[ComparedModel]:
    """Compare the teachers and students of several runs, in the order of ``runs``.

    Raises:
        DataError: If one of the runs is not finished or was not evaluated.
    """
    compared: list[ComparedModel] = []
    reference: tuple[Evaluation, list[str]] | None = None
    for summary in map(read_summary, runs):
        if not summary.students:
            raise DataError(
                f"The run in {summary.folder} was not evaluated.", hint="Compare runs with an evaluation set (--eval)."
            )
        texts = read_texts(summary.folder / EVALUATION).texts
        if reference is None:
            reference = summary.students[0].evaluation, texts
        first, first_texts = reference
        for name, evaluation in summary.without_baselines.items():
            aligned = _align_classes(evaluation, first) if texts == first_texts else None
            difference = None
            if aligned is not None and evaluation is not first and np.array_equal(aligned.gold, first.gold):
                difference = aligned.difference_to(first)["accuracy"]
            compared.append(ComparedModel(summary.folder, name, evaluation, difference))
    return compared


def _align_classes(evaluation: Evaluation, reference: Evaluation) -> Evaluation | None:
    """Reorder the classes of an evaluation to those of ``reference``; None if the two have different classes."""
    names, reference_names = list(evaluation.quality.classes), list(reference.quality.classes)
    if sorted(names) != sorted(reference_names):
        return None
    columns = [names.index(name) for name in reference_names]
    new_index = np.argsort(columns)
    return replace(evaluation, probabilities=evaluation.probabilities[:, columns], gold=new_index[evaluation.gold])
