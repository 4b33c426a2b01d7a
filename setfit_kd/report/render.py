"""A run's account as HTML, as Markdown and as a model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd import hub
from setfit_kd.report import plots
from setfit_kd.report.environment import template_environment
from setfit_kd.report.summary import ExamplePrediction, RunSummary, StudentSummary, curves
from setfit_kd.run_folder import BASELINE, TEACHER, Manifest
from setfit_kd.utils.escape import class_name, truncate

if TYPE_CHECKING:
    from setfit_kd.evaluation import Evaluation, Interval, OverSeeds, Spread

SPREAD_HEADINGS = ("accuracy", "macro F1", "as teacher", "calibration error", "minus teacher", "minus baseline")
_SETFIT = "config_setfit.json"
MAX_CLASSES = 20
"""Above so many, confusions are listed in place of a matrix."""


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells; none is longer than is read there."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [[truncate(str(cell)) for cell in row] for row in self.rows])


def html(account: RunSummary) -> str:
    """The report as one page that needs nothing else."""
    drawings = {}
    names = list(dict.fromkeys([*account.evaluations, *account.losses]))
    if account.evaluations:
        drawings = {
            "pareto": plots.pareto(account.evaluations),
            "reliability": plots.reliability(account.compared, names),
            "abstaining": plots.coverage(curves(account), names),
        }
    if account.losses:
        drawings["training"] = plots.training(account.losses, names)
    return template_environment().get_template("report.html").render(**_template_values(account), plots=drawings)


def markdown(account: RunSummary) -> str:
    """The report as Markdown, without its plots."""
    return template_environment().get_template("report.md").render(**_template_values(account))


def card(account: RunSummary, source: str) -> str:
    """A model card for one student, by the name that the settings give it."""
    student = next((one for one in account.students if one.source == source), None)
    is_setfit = (account.folder / account.about.students[source] / _SETFIT).is_file()
    over = f" over the classes {', '.join(map(class_name, account.labels))}" if account.labels else ""
    told: dict[str, Any] = {
        "is_setfit": is_setfit,
        "title": "Distilled text classifier",
        "about": f"A {'SetFit model' if is_setfit else 'transformer'}{over}, distilled by setfit-kd from "
        f"{_source_of(account)}.",
        "base_model": hub.split_revision(source)[0] if source in account.about.revisions else None,
        "dataset": _public(account.config.eval or "the evaluation set", account),
    }
    if student is not None:
        quality = student.evaluation.quality
        told["metrics"] = {"accuracy": round(quality.accuracy, 4), "macro_f1": round(quality.macro_f1, 4)}
        told["comparison"] = _comparison(account)
        told["comparison_note"] = _comparison_note(account)
    return template_environment().get_template("card.md").render(**told)


def _source_of(account: RunSummary) -> str:
    """What a model card says that a student was distilled from."""
    config, data = account.config, account.about.data
    if config.signals is not None:
        return f"the probabilities of {_public(config.signals, account)} for {data.get('pool', 0):,} texts"
    teachers = " and ".join(_public(name, account) for name in config.teacher)
    if not account.labels:
        return teachers
    which = "which was" if len(config.teacher) == 1 else "which were"
    trained = f"{teachers}, {which} fine-tuned on {data.get('labeled', 0):,} labeled texts"
    return f"{trained} and labeled {data['pool']:,} more" if data.get("pool") else trained


def _public(source: str, account: RunSummary) -> str:
    """What a model card calls a data set or a model: what came from the hub in full, of a path its last part."""
    from_hub = (name.removeprefix("datasets/") for name in account.about.revisions)
    source = source.removeprefix("transformer:")
    if source.startswith(("bundled:", "demo:")) or any(
        re.match(rf"{re.escape(name)}($|[:[])", source) for name in from_hub
    ):
        return source
    return PureWindowsPath(source).name  # which takes slashes of both kinds


def _template_values(account: RunSummary) -> dict[str, Any]:
    """What the templates tell, as plain values."""
    config, about = account.config, account.about
    told: dict[str, Any] = {
        "title": f"Distilled: {truncate(account.folder.absolute().name)}",
        "subtitle": f"{_taught_by(account)}; {'student' if len(config.student) == 1 else 'students'} "
        f"{', '.join(config.student)}. setfit-kd {about.versions.get('setfit-kd', '')}, seed {config.seed}.",
        "has_teacher": account.teacher is not None,
        "verdict": verdict(account),
        "out_of_memory": _out_of_memory(about),
        "usage": [_usage(account, place) for place in about.students.values()],
        "data": _data(about),
        "settings": config.to_yaml().strip(),
        "versions": Table(("", "version"), [*about.versions.items(), *about.revisions.items()]),
    }
    if account.evaluations:
        alone = len(account.students) == 1
        told |= {
            "comparison": _comparison(account),
            "comparison_note": _comparison_note(account),
            "over_seeds": _over_seeds(account),
            "calibration": _calibration(account),
            "students": [_student(student, alone=alone) for student in account.students],
            "matrices": [_matrix(name, of, account.labels) for name, of in account.evaluations.items()],
        }
    return told


def _taught_by(account: RunSummary) -> str:
    config, shares = account.config, account.about.teacher_shares
    if config.signals is not None:
        return f"Signals {config.signals}"
    if len(config.teacher) == 1:
        return f"Teacher {config.teacher[0]}"
    return (
        f"Teachers {', '.join(f'{name} ({shares[name]:.1%})' if name in shares else name for name in config.teacher)}"
    )


def verdict(account: RunSummary) -> str:
    """What is lost and what is gained, in a sentence or two."""
    if not account.students:
        return "Nothing was measured: there was no evaluation set."
    best = max(account.students, key=lambda student: _accuracy(account, student))
    teacher = account.teacher
    of = best.evaluation
    name = "The student" if len(account.students) == 1 else f"The best student, {best.name},"
    sentence = f"{name} is right on {of.quality.accuracy:.1%} of the texts"
    if teacher is None:
        sentence += "."
    else:
        whose = "its teacher" if len(account.config.teacher) == 1 else "the average of its teachers"
        faster = of.cost.texts_per_second / max(teacher.cost.texts_per_second, 0.1)
        smaller = max(teacher.cost.megabytes, 0.1) / max(of.cost.megabytes, 0.1)
        sentence += (
            f", {_compared(best.against['teacher'], whose)}, at {faster:,.1f} times the speed and "
            f"{_times(smaller)} the size."
        )
    if "baseline" in best.against:
        sentence += f" It is {_compared(best.against['baseline'], 'the same body trained on the labels alone')}."
    if account.over_seeds:
        found = [account.over_seeds[name].figures["accuracy"] for name in (best.name, TEACHER)
                 if name in account.over_seeds]  # fmt: skip
        sentence += f" Over {len(account.about.seeds)} seeds it has {_spread(found[0])} %"
        sentence += f", and its teacher {_spread(found[1])} %." if found[1:] else "."
    return sentence


def _accuracy(account: RunSummary, student: StudentSummary) -> float:
    """A student's accuracy; over several seeds, its mean."""
    spread = account.over_seeds.get(student.name)
    return spread.figures["accuracy"].mean if spread else student.evaluation.quality.accuracy


def _times(smaller: float) -> str:
    return f"1/{smaller:,.1f} of" if smaller >= 1 else f"{1 / smaller:,.1f} times"


def _compared(against: dict[str, Any], other: str) -> str:
    found = against["accuracy"]
    points = 100 * found.value
    if abs(points) < 0.05:
        return f"as {other} is"
    word = "above" if points > 0 else "below"
    chance = "" if found.low > 0 or found.high < 0 else ", within chance"
    interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{abs(points):.1f} points {word} {other} (95 % interval {interval}{chance})"


def _comparison(account: RunSummary) -> Table:
    teacher = account.teacher
    headings = ("", "accuracy", "95 %", "macro F1", "as teacher", "parameters", "MB", "texts/s", "to teacher")
    rows = []
    for name, of in account.evaluations.items():
        accuracy = of.intervals["accuracy"]
        rows.append(
            (
                name,
                f"{of.quality.accuracy:.1%}",
                f"{accuracy.low:.1%} to {accuracy.high:.1%}",
                f"{of.quality.macro_f1:.1%}",
                "" if of.quality.agreement is None else f"{of.quality.agreement:.1%}",
                f"{of.cost.parameters / 1e6:.1f} M",
                f"{of.cost.megabytes:.1f}",
                f"{of.cost.texts_per_second:,.0f}",
                "" if teacher is None else f"{of.cost.texts_per_second / max(teacher.cost.texts_per_second, 0.1):.1f}",
            )
        )
    # Without a teacher, nothing is compared with it.
    kept = [column for column, heading in enumerate(headings) if teacher is not None or "teacher" not in heading]
    return Table([headings[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _comparison_note(account: RunSummary) -> str:
    first = next(iter(account.evaluations.values()))
    notes = [f"{len(first.gold):,} texts, on {first.cost.device}."]
    if any(BASELINE in student.against for student in account.students):
        notes.append("The baseline is the student's body trained on the labels alone.")
    if account.teacher is not None:
        notes.append("As teacher: texts with the teacher's label.")
    if len(account.config.teacher) > 1 and account.teacher is not None:
        notes.append("Teacher: all of them, averaged.")
    notes.append("Intervals are of a bootstrap over the texts.")
    return " ".join(notes)


def _over_seeds(account: RunSummary) -> dict[str, Any] | None:
    if not account.over_seeds:
        return None
    seeds = account.about.seeds
    by_seed = [
        (name, *(f"{value:.1%}" for value in of.figures["accuracy"].values)) for name, of in account.over_seeds.items()
    ]
    return {
        "title": f"Over {len(seeds)} seeds",
        "table": Table(("", *SPREAD_HEADINGS), [(name, *spread_cells(of)) for name, of in account.over_seeds.items()]),
        "note": f"Mean ± standard deviation over the seeds {seeds[0]} to {seeds[-1]}, in percent; labels and "
        "pool are drawn anew where any are drawn, and all is trained anew. The other sections are of the first.",
        "by_seed": Table(("accuracy with seed", *map(str, seeds)), by_seed),
    }


def spread_cells(of: OverSeeds) -> tuple[str, ...]:
    """One model's figures over the seeds, as mean ± standard deviation in percent, under `SPREAD_HEADINGS`."""
    return (
        *(_spread(of.figures.get(figure)) for figure in ("accuracy", "macro_f1", "agreement", "ece")),
        *(_spread(of.against.get(other, {}).get("accuracy"), "+") for other in (TEACHER, BASELINE)),
    )


def _spread(of: Spread | None, sign: str = "") -> str:
    return "" if of is None else f"{100 * of.mean:{sign}.1f} ± {100 * of.std:.1f}"


def _calibration(account: RunSummary) -> Table:
    headings = ("", "calibration error", "95 %", "Brier score", "mean confidence", "accuracy")
    rows = [
        (
            name,
            f"{of.calibration.ece:.1%}",
            f"{of.calibration_intervals['ece'].low:.1%} to {of.calibration_intervals['ece'].high:.1%}",
            f"{of.calibration.brier:.3f}",
            f"{of.probabilities.max(axis=1).mean():.1%}",
            f"{of.quality.accuracy:.1%}",
        )
        for name, of in account.evaluations.items()
    ]
    return Table(headings, rows)


def _student(student: StudentSummary, *, alone: bool) -> dict[str, Any]:
    named = "" if alone else f" ({student.name})"
    classes = [
        (class_name(name), f"{of.precision:.1%}", f"{of.recall:.1%}", f"{of.f1:.1%}", f"{of.support:,}")
        for name, of in student.evaluation.quality.classes.items()
    ]
    thresholds = [
        (f"{target:.1%}", f"{found.threshold:.9g}", f"{found.coverage:.1%}", f"{found.low:.1%} to {found.high:.1%}")
        if found
        else (f"{target:.1%}", "none reaches it", "", "")
        for target, found in student.thresholds.items()
    ]
    return {
        "name": student.name,
        "differences": [
            f"{student.name if not alone else 'Student'} and {other}: "
            f"{_signed(of['accuracy'])} points of accuracy, {_signed(of['macro_f1'])} of macro F1."
            for other, of in student.against.items()
        ],
        "classes": Table(("class", "precision", "recall", "F1", "texts"), classes),
        "thresholds_title": f"Answering only when sure{named}",
        "thresholds": Table(("accuracy wanted", "threshold", "texts answered", "95 % of the accuracy"), thresholds),
        "disagreements_title": f"Where student and teacher disagree most{named}",
        "disagreements": [_shown_text(one) for one in student.disagreements],
        "errors_title": f"The most confident errors{named}",
        "errors": [_shown_text(one) for one in student.errors],
    }


def _signed(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def _shown_text(told: ExamplePrediction) -> dict[str, Any]:
    return {
        "text": truncate(told.text),
        "gold": class_name(told.gold),
        "student": class_name(told.student),
        "student_confidence": f"{told.confidence:.0%}",
        "teacher": class_name(told.teacher),
        "teacher_confidence": f"{told.teacher_confidence:.0%}" if told.teacher else "",
    }


def _matrix(name: str, of: Evaluation, labels: Sequence[str]) -> dict[str, Any]:
    labels = [class_name(name) for name in labels]
    counts = np.array(of.quality.confusion)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    places = [divmod(int(place), len(labels)) for place in np.argsort(-off, axis=None, kind="stable")[:MAX_CLASSES]]
    confusions = Table(
        ("gold", "predicted", "texts"), [(labels[g], labels[p], int(off[g, p])) for g, p in places if off[g, p]]
    )
    if len(labels) > MAX_CLASSES:
        return {"name": name, "rows": None, "confusions": confusions, "plain": confusions}
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = [
        {
            "label": label,
            "cells": [(f"{counts[g, p]:,}", f"{0.75 * share[g, p]:.2f}") for p in range(len(labels))],
        }
        for g, label in enumerate(labels)
    ]
    plain = Table(("gold \\ predicted", *labels), [(label, *counts[g].tolist()) for g, label in enumerate(labels)])
    return {"name": name, "labels": labels, "rows": rows, "plain": plain}


def _out_of_memory(about: Manifest) -> Table | None:
    rows = [
        (event.phase, "" if event.step is None else event.step, str(event.before), str(event.after))
        for event in about.out_of_memory
    ]
    return Table(("phase", "step", "failed with", "went on with"), rows) if rows else None


def _data(about: Manifest) -> Table:
    rows = [(f"{name.replace('_', ' ')} texts", f"{count:,}") for name, count in about.data.items()]
    rows += [(f"{stage}, seconds", f"{seconds:,.1f}") for stage, seconds in about.seconds.items()]
    rows += [("device", about.device), ("precision", about.precision.name)]
    return Table(("", ""), rows)


def _usage(account: RunSummary, student: str) -> str:
    # A run of one student is called by its own name.
    place = f"{account.folder}/{student}" if "/" in student else str(account.folder)
    quoted = shlex.quote(place)
    return (
        f'setfit-kd predict {quoted} "..."\n'
        f"setfit-kd export {quoted} --output-dir bundle\n\n"
        "from setfit_kd import load\n"
        f'load({place!r}).predict(["..."])'
    )
