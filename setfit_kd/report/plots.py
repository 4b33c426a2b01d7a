"""SVG plots that use the CSS colors of the page, so that they work in light mode, dark mode and print."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from setfit_kd.evaluation.measure import Evaluation

N_COLORS = 10
_MAX_POINTS, _MIN_COVERAGE = 500, 0.02
"""Maximum number of points per curve; minimum coverage to plot, because the accuracy of few answers is mostly noise."""
_MAX_TICKS = 6
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#0300{number:02x}" for number in range(1, N_COLORS + 1)]
_PAGE_COLORS = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(_SERIES, 1)},
}
"""CSS variable of the page for each color used in the plots."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Plot:
    """A plot as SVG, with its legend as pairs of CSS color and label."""

    svg: str
    legend: Sequence[tuple[str, str]]


def speed(evaluations: Mapping[str, Evaluation]) -> Plot:
    """Plot accuracy with its interval against speed, one dot per model; its area shows the size on disk."""
    with _figure("Accuracy against speed") as (figure, axes):
        max_megabytes = max(1e-9, *(evaluation.cost.megabytes for evaluation in evaluations.values()))
        legend = []
        for name, evaluation in evaluations.items():
            color, accuracy = _color(name, list(evaluations)), evaluation.intervals["accuracy"]
            texts_per_second = max(evaluation.cost.texts_per_second, 0.1)
            axes.vlines(texts_per_second, 100 * accuracy.low, 100 * accuracy.high, color=color, linewidth=1.2)
            area = 25 + 400 * evaluation.cost.megabytes / max_megabytes
            axes.scatter(texts_per_second, 100 * accuracy.value, s=area, color=color, alpha=0.75, linewidth=0)
            legend.append((color, f"{name}, {evaluation.cost.megabytes:.0f} MB"))
        ticks = _round_ticks(axes.dataLim.x0, axes.dataLim.x1)
        axes.set_xscale("log")
        axes.margins(y=0.15)
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="texts per second", ylabel="accuracy, %")
        return _to_plot(figure, legend)


def reliability(evaluations: Mapping[str, Evaluation], names: Sequence[str]) -> Plot:
    """Plot accuracy against confidence, one line per model; a calibrated model lies on the diagonal."""
    with _figure("Reliability") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--")
        legend = []
        for name, evaluation in evaluations.items():
            calibration = evaluation.calibration
            # The accuracy of a bin with few texts is mostly noise.
            bins = [b for b in calibration.reliability if b.texts >= max(5, len(evaluation.gold) / 200)]
            axes.plot(
                [b.confidence for b in bins],
                [b.accuracy for b in bins],
                color=_color(name, names),
                marker="o",
                markersize=4,
            )
            legend.append((_color(name, names), f"{name}, calibration error {calibration.ece:.1%}"))
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        return _to_plot(figure, legend)


def coverage(curves: Mapping[str, npt.NDArray[np.floating]], names: Sequence[str]) -> Plot:
    """Plot the accuracy of the answers against coverage, from the (k, 3) `coverage_curve` of each model."""
    with _figure("Accuracy of the answers") as (figure, axes):
        for name, curve in curves.items():
            shown = curve[curve[:, 1] >= _MIN_COVERAGE]
            shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _MAX_POINTS)).astype(int)]
            axes.plot(100 * shown[:, 1], 100 * shown[:, 2], color=_color(name, names))
        axes.set(xlabel="coverage (texts answered), %", ylabel="accuracy of the answers, %", xlim=(0, 101))
        return _to_plot(figure, [(_color(name, names), name) for name in curves])


def training(losses: Mapping[str, Sequence[float]], names: Sequence[str]) -> Plot:
    """Plot the training loss by step."""
    with _figure("Training") as (figure, axes):
        for name, curve in losses.items():
            steps = np.linspace(1, len(curve), min(len(curve), _MAX_POINTS)).astype(int)
            axes.plot(steps, np.array(_smooth(curve))[steps - 1], color=_color(name, names))
        axes.set(xlabel="step", ylabel="loss")
        return _to_plot(figure, [(_color(name, names), name) for name in losses])


def _round_ticks(low: float, high: float) -> list[float]:
    """Choose round ticks around a range above 0 for a logarithmic axis: 1, 2, 5, 10, or 1, 10, 100."""
    for multiples in ((1, 2, 5), (1,)):
        steps = [multiple * 10.0**power for power in range(-3, 12) for multiple in multiples]
        first = max(number for number in steps if number <= low * 1.001)
        last = min(number for number in steps if number >= high / 1.001)
        ticks = [number for number in steps if first <= number <= last]
        if len(ticks) <= _MAX_TICKS:
            break
    return ticks


def _color(name: str, names: Sequence[str]) -> str:
    """Color of a model, the same in all plots with the same ``names``."""
    return _SERIES[names.index(name) % N_COLORS]


def _smooth(curve: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Compute the bias-corrected exponential moving average; short curves are not smoothed."""
    if len(curve) < 50:
        return list(curve)
    mean, smoothed = 0.0, []
    for step, loss in enumerate(curve, 1):
        mean = weight * mean + (1 - weight) * loss
        smoothed.append(mean / (1 - weight**step))
    return smoothed


@contextmanager
def _figure(title: str) -> Iterator[tuple[Figure, Axes]]:
    """Context manager that creates a figure and its axes without registering them in pyplot."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # ignore the user's own style
        # The salt makes ids unique across the plots of a page, and the SVG reproducible.
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": title})
        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        yield figure, figure.subplots()


def _to_plot(figure: Figure, legend: Sequence[tuple[str, str]]) -> Plot:
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    referenced = set(re.findall(r'"#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", svg)
    for color, variable in _PAGE_COLORS.items():
        svg = svg.replace(color, variable)
    return Plot(svg, [(_PAGE_COLORS[color], label) for color, label in legend])
