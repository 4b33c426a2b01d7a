"""SVG plots that use the CSS colors of the page, so that they work in light mode, dark mode and print."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from setfit_kd.evaluation.metrics import coverage_curve, main_metric
from setfit_kd.run_folder.names import TEACHER
from setfit_kd.tasks.classification import SINGLE_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from setfit_kd.evaluation.measure import Evaluation
    from setfit_kd.report.summary import RunSummary

N_COLORS = 10
_MAX_POINTS, _MIN_COVERAGE = 500, 0.02  # per curve; below this coverage, accuracy is mostly noise
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#0300{number:02x}" for number in range(1, N_COLORS + 1)]
_PAGE_COLORS = {color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)}
_PAGE_COLORS |= {_INK: "var(--ink)", _FAINT: "var(--line)"}
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _FAINT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
}
_STYLE |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
_STYLE |= {"grid.linewidth": 0.6, "lines.linewidth": 1.8}


def draw_plots(summary: RunSummary) -> dict[str, Any]:
    """Draw the plots of a report by name, each with its SVG and legend; a model has the same color in all of them."""
    names = dict.fromkeys([*summary.evaluations, *summary.losses])
    colors = {name: _SERIES[index % N_COLORS] for index, name in enumerate(names)}
    compared = {TEACHER, *(student.name for student in summary.students)}
    models = {name: evaluation for name, evaluation in summary.evaluations.items() if name in compared}
    plots: dict[str, Any] = {"reliability": (_reliability, models)}
    plots["coverage"] = _coverage, models if summary.task is SINGLE_LABEL else {}
    plots |= {"speed": (_speed, summary.evaluations), "training": (_training, summary.losses)}
    return {name: _draw(name, function, data, colors) for name, (function, data) in plots.items() if data}


def _speed(axes: Axes, evaluations: Mapping[str, Evaluation], colors: Mapping[str, str]) -> list[str]:
    """Plot the main metric with its interval against speed, one dot per model; its area shows the size on disk."""
    metric, metric_name = main_metric(next(iter(evaluations.values())).task)
    max_megabytes = max(1e-9, *(evaluation.cost.megabytes for evaluation in evaluations.values()))
    for name, evaluation in evaluations.items():
        quality, speed = evaluation.intervals[metric], max(evaluation.cost.texts_per_second, 0.1)
        axes.vlines(speed, 100 * quality.low, 100 * quality.high, color=colors[name], linewidth=1.2)
        area = 25 + 400 * evaluation.cost.megabytes / max_megabytes
        axes.scatter(speed, 100 * quality.value, s=area, color=colors[name], alpha=0.75, linewidth=0)
    ticks = _round_ticks(axes.dataLim.x0, axes.dataLim.x1)
    axes.set_xscale("log")
    axes.margins(y=0.15)
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="texts per second", ylabel=f"{metric_name}, %")
    return [f"{name}, {evaluation.cost.megabytes:.0f} MB" for name, evaluation in evaluations.items()]


def _reliability(axes: Axes, evaluations: Mapping[str, Evaluation], colors: Mapping[str, str]) -> list[str]:
    """Plot accuracy against confidence, one line per model; a calibrated model lies on the diagonal."""
    axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--")
    for name, evaluation in evaluations.items():
        # The accuracy of a bin with few texts is mostly noise.
        bins = [b for b in evaluation.calibration.reliability if b.texts >= max(5, len(evaluation.gold) / 200)]
        points = [b.confidence for b in bins], [b.accuracy for b in bins]
        axes.plot(*points, color=colors[name], marker="o", markersize=4)
    is_single = next(iter(evaluations.values())).task is SINGLE_LABEL
    xlabel, ylabel = ("confidence", "accuracy") if is_single else ("probability", "share of correct labels")
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1.02), ylim=(0, 1.02))
    return [f"{name}, calibration error {e.calibration.ece:.1%}" for name, e in evaluations.items()]


def _coverage(axes: Axes, evaluations: Mapping[str, Evaluation], colors: Mapping[str, str]) -> list[str]:
    """Plot the accuracy of the answers against coverage."""
    for name, evaluation in evaluations.items():
        curve = coverage_curve(evaluation.probabilities, evaluation.gold)
        curve = curve[curve[:, 1] >= _MIN_COVERAGE]
        curve = curve[np.linspace(0, len(curve) - 1, min(len(curve), _MAX_POINTS)).astype(int)]
        axes.plot(100 * curve[:, 1], 100 * curve[:, 2], color=colors[name])
    axes.set(xlabel="coverage (texts answered), %", ylabel="accuracy of the answers, %", xlim=(0, 101))
    return list(evaluations)


def _training(axes: Axes, losses: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> list[str]:
    """Plot the training loss by step; a bias-corrected moving average smooths curves of at least 50 steps."""
    from scipy.signal import lfilter

    for name, losses_by_step in losses.items():
        curve = np.array(losses_by_step)
        if len(curve) >= 50:
            curve = lfilter([0.1], [1, -0.9], curve) / (1 - 0.9 ** np.arange(1, len(curve) + 1))
        steps = np.linspace(1, len(curve), min(len(curve), _MAX_POINTS)).astype(int)
        axes.plot(steps, curve[steps - 1], color=colors[name])
    axes.set(xlabel="step", ylabel="loss")
    return list(losses)


def _round_ticks(low: float, high: float) -> list[float]:
    """Choose round ticks around a range above 0 for a logarithmic axis: 1, 2, 5, 10, or 1, 10, 100."""
    for multiples in ((1, 2, 5), (1,)):
        steps = np.outer(10.0 ** np.arange(-3, 12), multiples).ravel()
        first, last = np.searchsorted(steps, low * 1.001, side="right") - 1, np.searchsorted(steps, high / 1.001)
        if last - first < 6:
            break
    return list(map(float, steps[first : last + 1]))


def _draw(name: str, function: Callable[..., list[str]], data: Mapping[str, Any], colors: Mapping[str, str]) -> Any:
    """Draw a plot with a function that returns the legend's label of each model; return its SVG and its legend."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # ignore the user's own style
        # The salt makes ids unique across the plots of a page, and the SVG reproducible.
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure, file = Figure(figsize=(5.0, 3.6), layout="constrained"), StringIO()  # not registered in pyplot
        labels = function(figure.subplots(), data, colors)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    referenced = set(re.findall(r'"#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", svg)
    for color, variable in _PAGE_COLORS.items():
        svg = svg.replace(color, variable)
    legend = [(_PAGE_COLORS[colors[name]], label) for name, label in zip(data, labels, strict=True)]
    return {"svg": svg, "legend": legend}
