"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from setfit_kd.errors import DataError
from setfit_kd.evaluation import Evaluation, Interval, read_texts
from setfit_kd.report.summary import read_summary
from setfit_kd.run_folder import EVALUATION


@dataclass(frozen=True)
class ComparedModel:
    """A teacher or a student of one of the runs.

    Attributes:
        run: The run's folder.
        name: What the model is called there.
        evaluation: How good it is.
        difference: Accuracy less that of the first run's first student, with its 95 % interval; None for that student
            itself, and where the two were evaluated on other texts.
    """

    run: Path
    name: str
    evaluation: Evaluation
    difference: Interval | None


def compare(runs: Sequence[str | Path]) -> list[ComparedModel]:
    """The teachers and students of several runs, in the order given.

    Raises:
        DataError: One of them is no finished run, or was not evaluated.
    """
    compared: list[ComparedModel] = []
    reference: tuple[Evaluation, list[str]] | None = None
    for account in map(read_summary, runs):
        if not account.students:
            raise DataError(
                f"The run in {account.folder} was not evaluated.", hint="Compare runs that were given --eval."
            )
        texts = read_texts(account.folder / EVALUATION).texts
        if reference is None:
            reference = account.students[0].evaluation, texts
        for name, of in account.compared.items():
            alike = _in_order_of(reference[0], of) if texts == reference[1] else None
            same = alike is not None and np.array_equal(alike.gold, reference[0].gold) and of is not reference[0]
            difference = alike.against(reference[0])["accuracy"] if same and alike is not None else None
            compared.append(ComparedModel(account.folder, name, of, difference))
    return compared


def _in_order_of(reference: Evaluation, of: Evaluation) -> Evaluation | None:
    """An evaluation with its classes in another's order; None where they are not the same."""
    names, wanted = list(of.quality.classes), list(reference.quality.classes)
    if sorted(names) != sorted(wanted):
        return None
    columns = [names.index(name) for name in wanted]
    places = np.argsort(columns)
    return replace(of, probabilities=of.probabilities[:, columns], gold=places[of.gold])
