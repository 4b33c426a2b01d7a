"""The report of a run: an HTML page, and the model card of each student."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.evaluation.estimates import estimate_table
from setfit_kd.evaluation.measure import Evaluation, class_table, evaluation_table
from setfit_kd.evaluation.metrics import METRICS, main_metric
from setfit_kd.report.plots import draw_plots
from setfit_kd.report.summary import RunSummary, StudentSummary, read_summary
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.manifest import DIVERGED
from setfit_kd.run_folder.names import BASELINE, REPORT_HTML, TEACHER
from setfit_kd.tasks.classification import MULTI_LABEL, Task
from setfit_kd.utils.atomic_io import write_text
from setfit_kd.utils.console import escape_markdown, short_class_name, truncate

if TYPE_CHECKING:
    from jinja2 import Template

    from setfit_kd.evaluation.measure import SeedSummary, Spread
    from setfit_kd.evaluation.metrics import Interval


def seed_headings(task: Task) -> tuple[str, ...]:
    """Return the headings of a table of `seed_cells`."""
    return (*METRICS[task].values(), "agreement", "calibration error", "minus teacher", "minus baseline")


MAX_MATRIX_CLASSES, N_WORST, MAX_CONFUSIONS = 12, 10, 100
"""With more classes than a matrix has, the worst classes and most frequent confusions are shown, the rest folded."""


def write_report(folder: str | Path) -> RunSummary:
    """Write ``report.html`` and the model card of each student from the results in a run folder.

    Raises as `read_summary`, and an `OutputError` if a file cannot be written or the folder contains links.
    """
    summary = read_summary(folder)
    RunFolder.refuse_links(summary.folder)
    files = {REPORT_HTML: _render_html(summary)}
    files |= {f"{path}/README.md": render_card(summary, name) for name, path in summary.manifest.students.items()}
    for name, content in files.items():
        write_text(summary.folder / name, content, alternative="copy the run to a writable folder")
    return summary


def _render_html(summary: RunSummary) -> str:
    # With a single student, the run folder itself can be loaded.
    students = summary.manifest.students.values()
    paths = [str(summary.folder / path if len(students) > 1 else summary.folder) for path in students]
    title = f"Distillation report: {truncate(summary.folder.absolute().name)}"
    values: dict[str, Any] = {"title": title, "verdict": verdict(summary), "paths": paths, "plots": draw_plots(summary)}
    values |= {"with_matrix": len(summary.label_names) <= MAX_MATRIX_CLASSES, "n_worst": N_WORST}
    values |= {"is_multi": summary.task is MULTI_LABEL, "metrics": METRICS[summary.task]}
    values |= {"seed_headings": seed_headings(summary.task), "seed_cells": seed_cells, "confusions": _confusions}
    return load_template("report.html").render(summary=summary, **values)


def load_template(name: str) -> Template:
    """Return a template; in HTML, all values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    options: Any = dict.fromkeys(("trim_blocks", "lstrip_blocks", "keep_trailing_newline"), True)
    options |= {"autoescape": select_autoescape(), "undefined": StrictUndefined}
    environment = Environment(loader=PackageLoader("setfit_kd.report"), **options)
    environment.filters |= {"label": short_class_name, "markdown": escape_markdown, "quote": shlex.quote, "repr": repr}
    environment.filters |= {
        "cell": lambda value: truncate(str(value)),
        "percent": "{:.1%}".format,
        "interval": lambda interval: f"{interval.low:.1%} to {interval.high:.1%}",
        "points": lambda interval: f"{100 * interval.value:+.1f} points (95% interval {_range(interval)})",
    }
    environment.globals |= {"comparison": _comparison, "note": _comparison_note, "estimate_table": estimate_table}
    environment.globals |= {"search_tables": _search_tables, "class_table": class_table}
    return environment.get_template(name)


def verdict(summary: RunSummary) -> str:
    """Compare the best student with the teacher and the baseline, in one to three sentences."""
    metric, metric_name = main_metric(summary.task)
    if summary.estimates:
        students = {name: e.accuracy for name, e in summary.estimates.items() if name != TEACHER}
        best_name = max(students, key=lambda name: students[name].value)
        name = "the student" if len(students) == 1 else f"the best student, {best_name},"
        estimate = f"{students[best_name].value:.1%} (95% interval {students[best_name].low:.1%} to "
        estimate += f"{students[best_name].high:.1%})"
        accuracy_name = METRICS[summary.task]["accuracy"]
        return f"The estimated {accuracy_name} of {name} is {estimate}. The run has no evaluation set to measure it on."
    if not summary.students:
        return "No results: the run has no evaluation set."

    def quality(student: StudentSummary) -> float:  # the mean in a run with several seeds
        seeds = summary.seed_summaries.get(student.name)
        return seeds.figures[metric].mean if seeds else student.evaluation.intervals[metric].value

    best = max(summary.students, key=quality)
    teacher, evaluation = summary.teacher, best.evaluation
    name = "The student" if len(summary.students) == 1 else f"The best student, {best.name},"
    article = "an" if metric_name == "accuracy" else "a"
    text = f"{name} has {article} {metric_name} of {evaluation.intervals[metric].value:.1%}"
    if teacher is not None:
        teacher_name = "its teacher" if len(summary.config.teacher) == 1 else "the average of its teachers"
        speedup = evaluation.cost.texts_per_second / max(teacher.cost.texts_per_second, 0.1)
        size = max(evaluation.cost.megabytes, 0.1) / max(teacher.cost.megabytes, 0.1)
        compared = _difference_to(teacher_name, best.differences[TEACHER][metric])
        text += f", {compared}, at {speedup:,.1f} times the speed and {size:.{0 if size >= 0.01 else 2}%} of the size"
    text += "."
    if BASELINE in best.differences:
        baseline = "the baseline trained on the labels only"
        text += f" Its {metric_name} is {_difference_to(baseline, best.differences[BASELINE][metric])}."
    if summary.seed_summaries:
        names = [name for name in (best.name, TEACHER) if name in summary.seed_summaries]
        student, *teachers = (_spread(summary.seed_summaries[name].figures[metric]) for name in names)
        text += f" Over {len(summary.manifest.seeds)} seeds, the {metric_name} of the student is {student}%"
        text += f" and that of its teacher {teachers[0]}%." if teachers else "."
    return text


def _difference_to(reference: str, difference: Interval) -> str:
    points = 100 * difference.value
    if abs(points) < 0.05:
        return f"the same as that of {reference}"
    side = "above" if points > 0 else "below"
    significance = "" if difference.low > 0 or difference.high < 0 else ", not significant"
    return f"{abs(points):.1f} points {side} {reference} (95% interval {_range(difference)}{significance})"


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _comparison(evaluations: Mapping[str, Evaluation]) -> list[list[str]]:
    """Return a table of all models; its first row contains the headings."""
    headings, rows = evaluation_table(evaluations)
    if TEACHER in evaluations:
        speed = max(evaluations[TEACHER].cost.texts_per_second, 0.1)
        headings.append("speedup")
        for row, evaluation in zip(rows, evaluations.values(), strict=True):
            row.append(f"{evaluation.cost.texts_per_second / speed:.1f}")
    return [headings, *rows]


def _search_tables(summary: RunSummary) -> list[tuple[list[str], list[list[str]]]]:
    """Return headings and rows of a table of the trials of each search."""
    tables = []
    for stage, trials in summary.manifest.search.items():
        settings, best = list(trials[0].settings), min(trials, key=lambda trial: trial.loss)
        rows = []
        for number, trial in enumerate(trials):
            values = [str(value) if isinstance(value, int) else f"{value:.3g}" for value in trial.settings.values()]
            loss = "diverged" if trial.loss == DIVERGED else f"{trial.loss:.3f}"
            rows.append([str(number), *values, loss, "chosen" if trial is best else ""])
        tables.append(([f"{stage}, trial", *settings, "log loss" if stage == TEACHER else "disagreement", ""], rows))
    return tables


def _comparison_note(summary: RunSummary) -> str:
    first, has_teacher = next(iter(summary.evaluations.values())), summary.teacher is not None
    has_baseline = any(BASELINE in student.differences for student in summary.students)
    labels = "labels" if summary.task is MULTI_LABEL else "label"
    notes = {
        f"Evaluated on {len(first.gold):,} texts; speed measured on {first.cost.device}.": True,
        "Baseline: the same student trained on the labels only, without distillation.": has_baseline,
        "Exact match: share of texts whose labels are all correct.": summary.task is MULTI_LABEL,
        f"Agreement: share of texts with the same {labels} as the teacher's.": has_teacher,
        "Speedup: texts per second relative to the teacher.": has_teacher,
        "Teacher: the average of all teachers.": has_teacher and len(summary.config.teacher) > 1,
        "95% CI: bootstrap over the texts.": True,
    }
    return " ".join(note for note, applies in notes.items() if applies)


def seed_cells(model: SeedSummary) -> tuple[str, ...]:
    """Format the metrics of one model as mean ± standard deviation in percent, in the order of `seed_headings`."""
    figures = (_spread(model.figures.get(metric)) for metric in (*METRICS[model.task], "agreement", "ece"))
    metric, _ = main_metric(model.task)
    return (*figures, *(_spread(model.against.get(role, {}).get(metric), "+") for role in (TEACHER, BASELINE)))


def _spread(spread: Spread | None, sign: str = "") -> str:
    return "" if spread is None else f"{100 * spread.mean:{sign}.1f} ± {100 * spread.std:.1f}"


def _confusions(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Return the most frequent confusions: gold and predicted class, texts, and their share of the gold class."""
    labels, counts = list(map(short_class_name, evaluation.quality.classes)), np.array(evaluation.quality.confusion)
    support = [quality.support for quality in evaluation.quality.classes.values()]
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_CONFUSIONS]
    pairs = [(g, p) for g, p in zip(*np.unravel_index(order, errors.shape), strict=True) if errors[g, p]]
    return [(labels[g], labels[p], f"{(n := errors[g, p]):,}", f"{n / support[g]:.1%}") for g, p in pairs]


def render_card(summary: RunSummary, source: str) -> str:
    """Render the model card of a student, selected by its name in the config."""
    from huggingface_hub import EvalResult, ModelCardData

    is_setfit = (summary.folder / summary.manifest.students[source] / "config_setfit.json").is_file()
    library, kind = ("setfit", "SetFit model") if is_setfit else ("transformers", "transformer")
    is_multi, names = summary.task is MULTI_LABEL, ", ".join(map(short_class_name, summary.label_names))
    classes = f" for {'any of the labels' if is_multi else 'the classes'} {names}" if names else ""
    title, metadata = "Distilled text classifier", dict[str, Any]()
    evaluation = next((student.evaluation for student in summary.students if student.source == source), None)
    if evaluation is not None:
        metrics = ((key, name if name != key else None) for key, name in METRICS[summary.task].items())
        shown = [(key, round(getattr(evaluation.quality, key), 4), name) for key, name in metrics]
        dataset = _public([*(summary.config.eval or ()), "the evaluation set"][0], summary)
        results = [
            EvalResult("text-classification", dataset, dataset, key.split("_")[-1], value, metric_name=name)
            for key, value, name in shown
        ]
        metadata = {"metrics": ["accuracy", "f1"], "model_name": title, "eval_results": results}
    tags = [*(["setfit", "sentence-transformers"] * is_setfit), "text-classification", "knowledge-distillation"]
    base_model = source.partition("@")[0] if source in summary.manifest.revisions else None
    metadata |= {"library_name": library, "pipeline_tag": "text-classification", "tags": tags, "base_model": base_model}
    about = f"A {kind}{classes}, distilled by setfit-kd from {_source_of(summary)}."
    values: dict[str, Any] = {"metadata": ModelCardData(**metadata).to_yaml(), "title": title, "about": about}
    label_table = class_table(evaluation) if is_multi and evaluation else None
    values |= {"library": library, "is_multi": is_multi, "label_table": label_table}
    return load_template("card.md").render(summary=summary, **values)


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
    names = "|".join(re.escape(name.removeprefix("datasets/")) for name in summary.manifest.revisions)
    source = source.removeprefix("transformer:")
    if source.startswith(("bundled:", "demo:")) or (names and re.match(rf"({names})($|[:[])", source)):
        return source
    return PureWindowsPath(source).name  # accepts slashes and backslashes
