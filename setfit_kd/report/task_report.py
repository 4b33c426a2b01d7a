"""Report of a run that distils question answering or a masked language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setfit_kd.config.task_runs import TASK_RUNS
from setfit_kd.errors import DataError
from setfit_kd.report.render import load_template
from setfit_kd.run_folder.folder import RunFolder
from setfit_kd.run_folder.manifest import Manifest
from setfit_kd.run_folder.names import BASELINE, METRICS_FILE, REPORT_HTML, STUDENT, TEACHER
from setfit_kd.utils.atomic_io import write_text
from setfit_kd.utils.console import truncate
from setfit_kd.utils.files import read_json

_INTERVAL = "_interval"  # ends the names of the intervals of metrics
_MAIN = {"qa": ("f1", "F1", "{:.1%}"), "mlm": ("bits_per_character", "number of bits per character", "{:.3f}")}
"""Metric that is compared for each task, its displayed name, and the format of all metrics."""


def metrics_table(task: str, metrics: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of a table with one row per model; a metric may have an interval."""
    names = [name for name in next(iter(metrics.values()), {}) if not name.endswith(_INTERVAL)]

    def show(name: str, values: Mapping[str, Any]) -> str:
        bounds = values.get(name + _INTERVAL, [])
        interval = " to ".join(map(_MAIN[task][2].format, bounds))
        return _MAIN[task][2].format(values[name]) + (interval and f" (95%: {interval})")

    headings = ["", *(name.replace("_", " ") for name in names)]
    return headings, [[model, *(show(name, values) for name in names)] for model, values in metrics.items()]


def write_task_report(folder: Path) -> str:
    """Write ``report.html`` from the results in a run folder; return its first sentence.

    Raises:
        DataError: If the run is not finished, or its metrics cannot be read.
        OutputError: If the report cannot be written.
    """
    manifest, settings = Manifest.read(folder), RunFolder.read_settings(folder)
    config = TASK_RUNS[settings["task"]].of(**settings)
    try:
        metrics: dict[str, dict[str, Any]] = read_json(folder / METRICS_FILE)
        verdict = _verdict(config.task, metrics)
        tables = [("Evaluation", *metrics_table(config.task, metrics))] if metrics else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"Cannot read {folder / METRICS_FILE} ({error}).", hint="Run it again.") from None
    tables.append(("Data", ["", "number"], [[name.replace("_", " "), f"{n:,}"] for name, n in manifest.data.items()]))
    tables.append(("Time", ["", "seconds"], [[stage, f"{s:.1f}"] for stage, s in manifest.seconds.items()]))
    if manifest.out_of_memory:
        events = [[event.phase, str(event.before), str(event.after)] for event in manifest.out_of_memory]
        tables.append(("Out of memory", ["step", "from", "to"], events))
    values: dict[str, Any] = {"title": f"Distillation report: {truncate(folder.absolute().name)}", "verdict": verdict}
    values |= {"tables": tables, "settings": config.to_yaml()}
    RunFolder.refuse_links(folder)
    page = load_template("task.html").render(**values)
    write_text(folder / REPORT_HTML, page, alternative="copy the run to a writable folder")
    return verdict


def _verdict(task: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Compare the student with the teacher and the baseline."""
    if not metrics:
        return "No results: the run has no evaluation set."
    key, name, shown = _MAIN[task]
    others = [f"{other} {shown.format(metrics[other][key])}" for other in (TEACHER, BASELINE) if other in metrics]
    return f"The {name} of the student is {shown.format(metrics[STUDENT][key])} ({', '.join(others)})."
