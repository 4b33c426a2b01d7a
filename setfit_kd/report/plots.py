"""Plots as SVG whose colours are the page's own, so that one drawing is right in light, in dark and on paper."""

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

    from setfit_kd.evaluation import Evaluation

N_COLOURS = 10
_MOST_POINTS, _LEAST_SHOWN = 500, 0.02
"""Points of a curve that are drawn; and the share of answers below which their accuracy tells of nothing but chance."""
_MOST_TICKS = 6
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#0300{number:02x}" for number in range(1, N_COLOURS + 1)]
_PAGE_COLOURS = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}
"""Colours that are drawn with, and what the page calls them."""
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
class Drawing:
    """A drawing, and what its colours stand for: the page's name of each with a label."""

    svg: str
    legend: Sequence[tuple[str, str]]


def pareto(evaluations: Mapping[str, Evaluation]) -> Drawing:
    """Accuracy with its interval against texts a second, a dot a model, its area the size on disk."""
    with _figure("Accuracy against speed") as (figure, axes):
        largest = max(1e-9, *(of.cost.megabytes for of in evaluations.values()))
        legend = []
        for name, of in evaluations.items():
            colour, accuracy = _colour(name, list(evaluations)), of.intervals["accuracy"]
            speed = max(of.cost.texts_per_second, 0.1)
            axes.vlines(speed, 100 * accuracy.low, 100 * accuracy.high, color=colour, linewidth=1.2)
            area = 25 + 400 * of.cost.megabytes / largest
            axes.scatter(speed, 100 * accuracy.value, s=area, color=colour, alpha=0.75, linewidth=0)
            legend.append((colour, f"{name}, {of.cost.megabytes:.0f} MB"))
        ticks = _round_numbers(axes.dataLim.x0, axes.dataLim.x1)
        axes.set_xscale("log")
        axes.margins(y=0.15)
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="texts a second", ylabel="accuracy, %")
        return _drawing(figure, legend)


def reliability(evaluations: Mapping[str, Evaluation], names: Sequence[str]) -> Drawing:
    """Accuracy against confidence, a line a model; on the diagonal, probabilities mean what they say."""
    with _figure("Reliability") as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle="--")
        legend = []
        for name, of in evaluations.items():
            # A bin of a few texts tells of nothing but chance.
            bins = [found for found in of.calibration.reliability if found.texts >= max(5, len(of.gold) / 200)]
            axes.plot(
                [found.confidence for found in bins],
                [found.accuracy for found in bins],
                color=_colour(name, names),
                marker="o",
                markersize=4,
            )
            legend.append((_colour(name, names), f"{name}, error {of.calibration.ece:.1%}"))
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        return _drawing(figure, legend)


def coverage(curves: Mapping[str, npt.NDArray[np.floating]], names: Sequence[str]) -> Drawing:
    """Accuracy of the answers against the share of texts that are answered: (k, 3) of each model."""
    with _figure("Accuracy of the answers") as (figure, axes):
        for name, curve in curves.items():
            shown = curve[curve[:, 1] >= _LEAST_SHOWN]
            shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _MOST_POINTS)).astype(int)]
            axes.plot(100 * shown[:, 1], 100 * shown[:, 2], color=_colour(name, names))
        axes.set(xlabel="texts answered, most confident first, %", ylabel="accuracy of the answers, %", xlim=(0, 101))
        return _drawing(figure, [(_colour(name, names), name) for name in curves])


def training(losses: Mapping[str, Sequence[float]], names: Sequence[str]) -> Drawing:
    """Loss by step, each training relative to its first steps."""
    with _figure("Training") as (figure, axes):
        for name, curve in losses.items():
            steps = np.linspace(1, len(curve), min(len(curve), _MOST_POINTS)).astype(int)
            axes.plot(steps, np.array(_smoothed(curve))[steps - 1], color=_colour(name, names))
        axes.set(xlabel="step", ylabel="loss")
        return _drawing(figure, [(_colour(name, names), name) for name in losses])


def _round_numbers(low: float, high: float) -> list[float]:
    """Few round numbers around a range above 0, for an axis of powers: 1, 2, 5, 10, or 1, 10, 100."""
    for multiples in ((1, 2, 5), (1,)):
        steps = [multiple * 10.0**power for power in range(-3, 12) for multiple in multiples]
        first = max(number for number in steps if number <= low * 1.001)
        last = min(number for number in steps if number >= high / 1.001)
        found = [number for number in steps if first <= number <= last]
        if len(found) <= _MOST_TICKS:
            break
    return found


def _colour(name: str, names: Sequence[str]) -> str:
    """A model's colour, the same in every drawing that has been given the same names."""
    return _SERIES[names.index(name) % N_COLOURS]


def _smoothed(curve: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its beginning; short curves are left as they are."""
    if len(curve) < 50:
        return list(curve)
    mean, smooth = 0.0, []
    for step, loss in enumerate(curve, 1):
        mean = weight * mean + (1 - weight) * loss
        smooth.append(mean / (1 - weight**step))
    return smooth


@contextmanager
def _figure(title: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure outside matplotlib's own list of them, and its axes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user draws with elsewhere
        # Salted by the title: no two drawings on a page share an id, and the same data give the same file.
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": title})
        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        yield figure, figure.subplots()


def _drawing(figure: Figure, legend: Sequence[tuple[str, str]]) -> Drawing:
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    referred_to = set(re.findall(r'"#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred_to else "", svg)
    for drawn, named in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, named)
    return Drawing(svg, [(_PAGE_COLOURS[colour], label) for colour, label in legend])
