"""Rendering of a run summary as HTML page, Markdown report and model cards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd import hub
from setfit_kd.report import plots
from setfit_kd.report.environment import template_environment
from setfit_kd.report.summary import ExamplePrediction, RunSummary, StudentSummary, coverage_curves
from setfit_kd.run_folder.manifest import Manifest
from setfit_kd.run_folder.names import BASELINE, TEACHER
from setfit_kd.utils.escape import short_class_name, truncate

if TYPE_CHECKING:
    from setfit_kd.evaluation.intervals import Interval
    from setfit_kd.evaluation.measure import Evaluation
    from setfit_kd.evaluation.seeds import SeedSummary, Spread

SEED_HEADINGS = ("accuracy", "macro-F1", "agreement", "calibration error", "minus teacher", "minus baseline")
_SETFIT = "config_setfit.json"
_REMOVED = {
    "labeled_duplicates": "labeled texts removed (duplicates)",
    "labeled_conflicts": "labeled texts removed (conflicting labels)",
    "labeled_leaks": "labeled texts removed (in the evaluation set)",
    "pool_duplicates": "pool texts removed (duplicates)",
    "pool_labeled": "pool texts removed (in the labeled texts)",
    "pool_leaks": "pool texts removed (in the evaluation set)",
}
MAX_CLASSES = 20
"""Maximum size of a confusion matrix; with more classes, the most frequent confusions are listed."""


@dataclass(frozen=True)
class Table:
    """A table with one heading per column; long cells are truncated."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", [[truncate(str(cell)) for cell in row] for row in self.rows])


def render_html(summary: RunSummary) -> str:
    """Render the report as a self-contained HTML page."""
    plots_by_name = {}
    names = list(dict.fromkeys([*summary.evaluations, *summary.losses]))
    if summary.evaluations:
        plots_by_name = {
            "speed": plots.speed(summary.evaluations),
            "reliability": plots.reliability(summary.without_baselines, names),
            "coverage": plots.coverage(coverage_curves(summary), names),
        }
    if summary.losses:
        plots_by_name["training"] = plots.training(summary.losses, names)
    return template_environment().get_template("report.html").render(**_template_values(summary), plots=plots_by_name)


def render_markdown(summary: RunSummary) -> str:
    """Render the report as Markdown, without plots."""
    return template_environment().get_template("report.md").render(**_template_values(summary))


def render_card(summary: RunSummary, source: str) -> str:
    """Render the model card of a student, selected by its name in the config."""
    student = next((student for student in summary.students if student.source == source), None)
    is_setfit = (summary.folder / summary.manifest.students[source] / _SETFIT).is_file()
    classes = f" for the classes {', '.join(map(short_class_name, summary.label_names))}" if summary.label_names else ""
    values: dict[str, Any] = {
        "is_setfit": is_setfit,
        "title": "Distilled text classifier",
        "about": f"A {'SetFit model' if is_setfit else 'transformer'}{classes}, distilled by setfit-kd from "
        f"{_source_of(summary)}.",
        "base_model": hub.split_revision(source)[0] if source in summary.manifest.revisions else None,
        "dataset": _public(summary.config.eval or "the evaluation set", summary),
    }
    if student is not None:
        quality = student.evaluation.quality
        values["metrics"] = {"accuracy": round(quality.accuracy, 4), "macro_f1": round(quality.macro_f1, 4)}
        values["comparison"] = _comparison(summary)
        values["comparison_note"] = _comparison_note(summary)
    return template_environment().get_template("card.md").render(**values)


def _source_of(summary: RunSummary) -> str:
    """Describe the teachers or signals from which the students were distilled."""
    config, data = summary.config, summary.manifest.data
    if config.signals is not None:
        return f"the probabilities of {_public(config.signals, summary)} for {data.get('pool', 0):,} texts"
    teachers = " and ".join(_public(name, summary) for name in config.teacher)
    if not summary.label_names:
        return teachers
    which = "which was" if len(config.teacher) == 1 else "which were"
    description = f"{teachers}, {which} fine-tuned on {data.get('labeled', 0):,} labeled texts"
    return f"{description} and labeled {data['pool']:,} more texts" if data.get("pool") else description


def _public(source: str, summary: RunSummary) -> str:
    """Name of a data set or model in a model card: the full name on the hub, but only the last part of a path."""
    from_hub = (name.removeprefix("datasets/") for name in summary.manifest.revisions)
    source = source.removeprefix("transformer:")
    if source.startswith(("bundled:", "demo:")) or any(
        re.match(rf"{re.escape(name)}($|[:[])", source) for name in from_hub
    ):
        return source
    return PureWindowsPath(source).name  # accepts slashes and backslashes


def _template_values(summary: RunSummary) -> dict[str, Any]:
    """Return the values for the report templates."""
    config, manifest = summary.config, summary.manifest
    values: dict[str, Any] = {
        "title": f"Distillation report: {truncate(summary.folder.absolute().name)}",
        "subtitle": f"{_teachers_of(summary)}; {'student' if len(config.student) == 1 else 'students'} "
        f"{', '.join(config.student)}. setfit-kd {manifest.versions.get('setfit-kd', '')}, seed {config.seed}.",
        "has_teacher": summary.teacher is not None,
        "verdict": verdict(summary),
        "out_of_memory": _out_of_memory(manifest),
        "usage": [_usage(summary, path) for path in manifest.students.values()],
        "data": _data(manifest),
        "settings": config.to_yaml().strip(),
        "versions": Table(("", "version"), [*manifest.versions.items(), *manifest.revisions.items()]),
    }
    if summary.evaluations:
        is_only = len(summary.students) == 1
        values |= {
            "comparison": _comparison(summary),
            "comparison_note": _comparison_note(summary),
            "seeds": _seeds(summary),
            "calibration": _calibration(summary),
            "students": [_student_values(student, is_only=is_only) for student in summary.students],
            "confusions_title": (
                "Confusion matrix" if len(summary.label_names) <= MAX_CLASSES else "Most frequent confusions"
            ),
            "matrices": [_confusion_matrix(name, e, summary.label_names) for name, e in summary.evaluations.items()],
        }
    return values


def _teachers_of(summary: RunSummary) -> str:
    config, shares = summary.config, summary.manifest.teacher_shares
    if config.signals is not None:
        return f"Signals {config.signals}"
    if len(config.teacher) == 1:
        return f"Teacher {config.teacher[0]}"
    return (
        f"Teachers {', '.join(f'{name} ({shares[name]:.1%})' if name in shares else name for name in config.teacher)}"
    )


def verdict(summary: RunSummary) -> str:
    """Compare the best student with the teacher and the baseline, in one to three sentences."""
    if not summary.students:
        return "No results: the run has no evaluation set."
    best = max(summary.students, key=lambda student: _accuracy(summary, student))
    teacher, evaluation = summary.teacher, best.evaluation
    name = "The student" if len(summary.students) == 1 else f"The best student, {best.name},"
    text = f"{name} has an accuracy of {evaluation.quality.accuracy:.1%}"
    if teacher is None:
        text += "."
    else:
        teacher_name = "its teacher" if len(summary.config.teacher) == 1 else "the average of its teachers"
        speedup = evaluation.cost.texts_per_second / max(teacher.cost.texts_per_second, 0.1)
        size = max(evaluation.cost.megabytes, 0.1) / max(teacher.cost.megabytes, 0.1)
        text += (
            f", {_difference_to(teacher_name, best.differences[TEACHER])}, at {speedup:,.1f} times the speed and "
            f"{size:.{0 if size >= 0.01 else 2}%} of the size."
        )
    if BASELINE in best.differences:
        baseline = "the baseline trained on the labels only"
        text += f" Its accuracy is {_difference_to(baseline, best.differences[BASELINE])}."
    if summary.seed_summaries:
        names = [name for name in (best.name, TEACHER) if name in summary.seed_summaries]
        student, *teachers = (_spread(summary.seed_summaries[name].figures["accuracy"]) for name in names)
        text += f" Over {len(summary.manifest.seeds)} seeds, the accuracy of the student is {student}%"
        text += f" and that of its teacher {teachers[0]}%." if teachers else "."
    return text


def _accuracy(summary: RunSummary, student: StudentSummary) -> float:
    """Accuracy of a student; its mean in a run with several seeds."""
    seeds = summary.seed_summaries.get(student.name)
    return seeds.figures["accuracy"].mean if seeds else student.evaluation.quality.accuracy


def _difference_to(reference: str, difference: Mapping[str, Interval]) -> str:
    accuracy = difference["accuracy"]
    points = 100 * accuracy.value
    if abs(points) < 0.05:
        return f"the same as that of {reference}"
    side = "above" if points > 0 else "below"
    significance = "" if accuracy.low > 0 or accuracy.high < 0 else ", not significant"
    return f"{abs(points):.1f} points {side} {reference} (95% interval {_range(accuracy)}{significance})"


def _comparison(summary: RunSummary) -> Table:
    teacher = summary.teacher
    headings = ["", "accuracy", "95% CI", "macro-F1", "agreement", "parameters", "MB", "texts/s", "speedup"]
    rows = []
    for name, evaluation in summary.evaluations.items():
        quality, cost, accuracy = evaluation.quality, evaluation.cost, evaluation.intervals["accuracy"]
        speedup = "" if teacher is None else f"{cost.texts_per_second / max(teacher.cost.texts_per_second, 0.1):.1f}"
        rows.append(
            (
                name,
                f"{quality.accuracy:.1%}",
                f"{accuracy.low:.1%} to {accuracy.high:.1%}",
                f"{quality.macro_f1:.1%}",
                "" if quality.agreement is None else f"{quality.agreement:.1%}",
                f"{cost.parameters / 1e6:.1f} M",
                f"{cost.megabytes:.1f}",
                f"{cost.texts_per_second:,.0f}",
                speedup,
            )
        )
    needs_teacher = ("agreement", "speedup")
    columns = [i for i, heading in enumerate(headings) if teacher is not None or heading not in needs_teacher]
    return Table([headings[i] for i in columns], [[row[i] for i in columns] for row in rows])


def _comparison_note(summary: RunSummary) -> str:
    first = next(iter(summary.evaluations.values()))
    notes = [f"Evaluated on {len(first.gold):,} texts; speed measured on {first.cost.device}."]
    if any(BASELINE in student.differences for student in summary.students):
        notes.append("Baseline: the same student trained on the labels only, without distillation.")
    if summary.teacher is not None:
        notes.append("Agreement: share of texts with the same label as the teacher's.")
        notes.append("Speedup: texts per second relative to the teacher.")
    if len(summary.config.teacher) > 1 and summary.teacher is not None:
        notes.append("Teacher: the average of all teachers.")
    notes.append("95% CI: bootstrap over the texts.")
    return " ".join(notes)


def _seeds(summary: RunSummary) -> dict[str, Any] | None:
    if not summary.seed_summaries:
        return None
    seeds = summary.manifest.seeds
    summaries = summary.seed_summaries.items()
    by_seed = [(name, *(f"{value:.1%}" for value in model.figures["accuracy"].values)) for name, model in summaries]
    return {
        "title": f"Results over {len(seeds)} seeds",
        "table": Table(("", *SEED_HEADINGS), [(name, *seed_cells(model)) for name, model in summaries]),
        "note": f"Mean ± standard deviation over the seeds {seeds[0]} to {seeds[-1]}, in percent. Differences are in "
        "accuracy. For each seed, labels and pool are sampled again (if the run samples them), and all models are "
        "trained again. The other sections show the first seed.",
        "by_seed": Table(("accuracy by seed", *map(str, seeds)), by_seed),
    }


def seed_cells(model: SeedSummary) -> tuple[str, ...]:
    """Format the metrics of one model as mean ± standard deviation in percent, in the order of `SEED_HEADINGS`."""
    return (
        *(_spread(model.figures.get(metric)) for metric in ("accuracy", "macro_f1", "agreement", "ece")),
        *(_spread(model.against.get(reference, {}).get("accuracy"), "+") for reference in (TEACHER, BASELINE)),
    )


def _spread(spread: Spread | None, sign: str = "") -> str:
    return "" if spread is None else f"{100 * spread.mean:{sign}.1f} ± {100 * spread.std:.1f}"


def _calibration(summary: RunSummary) -> Table:
    headings = ("", "calibration error", "95% CI", "Brier score", "mean confidence", "accuracy")
    rows = [
        (
            name,
            f"{e.calibration.ece:.1%}",
            f"{e.calibration_intervals['ece'].low:.1%} to {e.calibration_intervals['ece'].high:.1%}",
            f"{e.calibration.brier:.3f}",
            f"{e.probabilities.max(axis=1).mean():.1%}",
            f"{e.quality.accuracy:.1%}",
        )
        for name, e in summary.evaluations.items()
    ]
    return Table(headings, rows)


def _student_values(student: StudentSummary, *, is_only: bool) -> dict[str, Any]:
    suffix = "" if is_only else f" ({student.name})"
    classes = [
        (short_class_name(name), f"{q.precision:.1%}", f"{q.recall:.1%}", f"{q.f1:.1%}", f"{q.support:,}")
        for name, q in student.evaluation.quality.classes.items()
    ]
    thresholds = [
        (f"{target:.1%}", f"{point.threshold:.9g}", f"{point.coverage:.1%}", f"{point.low:.1%} to {point.high:.1%}")
        if point
        else (f"{target:.1%}", "not reached", "", "")
        for target, point in student.thresholds.items()
    ]
    return {
        "name": student.name,
        "differences": [
            f"{'Student' if is_only else student.name} minus {reference}: "
            f"accuracy {_points(difference['accuracy'])}, macro-F1 {_points(difference['macro_f1'])}."
            for reference, difference in student.differences.items()
        ],
        "classes": Table(("class", "precision", "recall", "F1", "texts"), classes),
        "thresholds_title": f"Confidence thresholds{suffix}",
        "thresholds": Table(("target accuracy", "threshold", "coverage", "95% CI of the accuracy"), thresholds),
        "disagreements_title": f"Largest disagreements with the teacher{suffix}",
        "disagreements": [_example_values(example) for example in student.disagreements],
        "errors_title": f"Errors with the highest confidence{suffix}",
        "errors": [_example_values(example) for example in student.errors],
    }


def _points(interval: Interval) -> str:
    return f"{100 * interval.value:+.1f} points (95% interval {_range(interval)})"


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _example_values(example: ExamplePrediction) -> dict[str, Any]:
    return {
        "text": truncate(example.text),
        "gold": short_class_name(example.gold),
        "student": short_class_name(example.student),
        "student_confidence": f"{example.confidence:.0%}",
        "teacher": short_class_name(example.teacher),
        "teacher_confidence": f"{example.teacher_confidence:.0%}" if example.teacher else "",
    }


def _confusion_matrix(name: str, evaluation: Evaluation, label_names: Sequence[str]) -> dict[str, Any]:
    labels = [short_class_name(label) for label in label_names]
    counts = np.array(evaluation.quality.confusion)
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    most_frequent = np.argsort(-errors, axis=None, kind="stable")[:MAX_CLASSES]
    pairs = [divmod(int(index), len(labels)) for index in most_frequent]  # (gold, predicted)
    confusions = Table(
        ("gold", "predicted", "texts"), [(labels[g], labels[p], int(errors[g, p])) for g, p in pairs if errors[g, p]]
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


def _out_of_memory(manifest: Manifest) -> Table | None:
    rows = [
        (event.phase, "" if event.step is None else event.step, str(event.before), str(event.after))
        for event in manifest.out_of_memory
    ]
    return Table(("phase", "step", "failed with", "retried with"), rows) if rows else None


def _data(manifest: Manifest) -> Table:
    rows = [(_REMOVED.get(name, f"{name} texts"), f"{count:,}") for name, count in manifest.data.items()]
    rows += [(f"{stage}, seconds", f"{seconds:,.1f}") for stage, seconds in manifest.seconds.items()]
    rows += [("device", manifest.device), ("precision", manifest.precision.name)]
    return Table(("", ""), rows)


def _usage(summary: RunSummary, student: str) -> str:
    # With a single student, the run folder itself can be loaded.
    path = f"{summary.folder}/{student}" if "/" in student else str(summary.folder)
    quoted = shlex.quote(path)
    return (
        f'setfit-kd predict {quoted} "..."\n'
        f"setfit-kd export {quoted} --output-dir bundle\n\n"
        "from setfit_kd import load\n"
        f'load({path!r}).predict(["..."])'
    )
