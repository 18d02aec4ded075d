"""Figures of an experiment: protection over price, scores by attack mode, and curves over epsilon; a panel a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from robustav.experiment.fused import number_of
from robustav.experiment.results import UNTOUCHED, Results, Where
from robustav.experiment.tables import Tables, called
from robustav.metrics.intervals import FEW_CLIPS, Interval
from robustav.report.figures import THEME

MARKERS = "osD^vP*X<>hp"
ALIKE, BESIDE = 1.04, 0.05  # prices that are drawn side by side, and how far
CHANCE: dict[str, Any] = {"color": "0.3", "lw": 1, "ls": ":", "label": "chance"}
MODES = {"": "0.55", "audio": "C0", "visual": "C2", "audio+visual": "C3"}


class Look(NamedTuple):
    """How a method is drawn; those beyond the tenth have the colours of the first ten, dashed and hollow."""

    colour: str
    marker: str
    line: str
    fill: str


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG; returns the files."""
    tables = Tables(results, results.scores[results.experiment.evaluations[0].name])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figures = {"protection-by-cost": by_cost, "by-attack-mode": by_mode, "by-epsilon": by_epsilon}
    style = {**sns.axes_style(THEME["style"]), **sns.plotting_context(THEME["context"]), "svg.hashsalt": "robustav"}
    with mpl.rc_context(style):
        for name, make in figures.items():
            figure = make(tables)
            for ending, about in (("png", {}), ("svg", {"Date": None})):
                written.append(folder / f"{name}.{ending}")
                figure.savefig(written[-1], dpi=150, metadata=about)
    return written


def by_cost(tables: Tables) -> Figure:
    """Robust score over what the training cost, a point a method."""
    results, looks = tables.results, _looks(tables.results)
    figure, axes, models = _panels(results, width=3.2, height=3.0)
    for axis, model in zip(axes, models, strict=True):
        plain = results.costs.get((model, results.experiment.baseline))
        methods = _methods(results, model) if plain else []
        places = apart({m: results.costs[model, m].passes / plain.passes for m in methods}) if plain else {}
        for method in methods:
            score = tables.scores.get(model, method, tables.all_of(model))
            if score is None:
                continue
            _point(axis, tables, places[method], score.mean, score.interval, looks[method], method)
        axis.set(title=model, xscale="log", xlabel=f"passes, times {results.experiment.baseline}'s")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axhline(tables.scores.chance, **CHANCE)
    prices = [
        cost.passes / plain.passes
        for (model, _), cost in results.costs.items()
        if (plain := results.costs.get((model, results.experiment.baseline))) is not None
    ]
    low, high = min(prices, default=1) / 1.3, max(prices, default=1) * 1.3
    for axis in axes:
        axis.set_xlim(low, high)
        axis.set_xticks([tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if low <= tick <= high])
    axes[0].set_ylim(bottom=0)  # of all panels, once everything is drawn
    return _finished(figure, axes, tables.scores.headline, f"all modalities attacked at epsilon {tables.epsilon}")


def by_mode(tables: Tables) -> Figure:
    """Clean and under each attack mode, a line a method."""
    results = tables.results
    methods = [m for m in results.experiment.methods if any(method == m for _, method in results.costs)]
    figure, axes, models = _panels(results, width=2.7, height=0.26 * len(methods) + 1.0, lines=1)
    for axis, model in zip(axes, models, strict=True):
        sets = ["", *dict.fromkeys(w.attacked for w in tables.scores.places(model) if w.epsilon == tables.epsilon)]
        for offset, attacked in zip(np.linspace(-0.24, 0.24, len(sets)), sets, strict=True):
            colour, where = MODES.get(attacked, "C4"), Where(attacked, tables.epsilon) if attacked else UNTOUCHED
            for y, method in enumerate(methods):
                score = tables.scores.get(model, method, where)
                if score is not None:
                    look = Look(colour, "o", "-", colour)
                    _point(axis, tables, score.mean, y + offset, score.interval, look, called(attacked), flat=True)
        axis.set(
            title=model, xlim=(0, 1), yticks=range(len(methods)), yticklabels=methods, xlabel=tables.scores.headline
        )
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.axvline(tables.scores.chance, **CHANCE)
    return _finished(figure, axes, "", f"clean and under attack at epsilon {tables.epsilon}")


def by_epsilon(tables: Tables) -> Figure:
    """Over epsilon with all modalities attacked, a line a method."""
    results, looks = tables.results, _looks(tables.results)
    figure, axes, models = _panels(results, width=3.2, height=3.0)
    for axis, model in zip(axes, models, strict=True):
        wide = tables.all_of(model).attacked
        places = [UNTOUCHED, *(where for where in tables.scores.places(model) if where.attacked == wide)]
        for method in _methods(results, model):
            found = [(i, s) for i, w in enumerate(places) if (s := tables.scores.get(model, method, w)) is not None]
            look = looks[method]
            x, y = [i for i, _ in found], [score.mean for _, score in found]
            axis.plot(x, y, look.line, marker=look.marker, color=look.colour, mfc=look.fill, ms=4, lw=1.2, label=method)
        axis.axhline(tables.scores.chance, **CHANCE)
        parts = sorted(results.experiment.models[model])
        ticks = ["0", *(_numbers(where.epsilon, parts) for where in places[1:])]
        several = any("\n" in tick for tick in ticks)
        label = f"epsilon: {', then '.join(parts)}" if several else "epsilon"
        axis.set(title=model, xlabel=label, ylim=(0, 1), xticks=range(len(places)), xticklabels=ticks)
    return _finished(figure, axes, tables.scores.headline, "all modalities attacked")


def _numbers(epsilon: str, parts: Sequence[str]) -> str:
    """An epsilon for a tick: its number, a line a modality where they differ; as it is where it is no number."""
    numbers = [number_of(epsilon, part) for part in parts]
    if np.isnan(numbers).any():
        return epsilon
    return "\n".join(dict.fromkeys(f"{number:g}" for number in numbers))


def _panels(
    results: Results, width: float, height: float, lines: int | None = None
) -> tuple[Figure, list[Axes], list[str]]:
    """A panel for each model of which something is there."""
    models = list(dict.fromkeys(model for model, _ in results.trainings()))
    lines = lines or -(-len(models) // 3)
    columns = -(-len(models) // lines)
    figure = Figure(figsize=(width * columns + 1.6, height * lines + 0.5), layout="constrained")
    axes: list[Axes] = list(np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False)))
    for axis in axes[len(models) :]:
        axis.set_visible(False)
    return figure, axes[: len(models)], models


def _methods(results: Results, model: str) -> list[str]:
    return [method for other, method in results.trainings() if other == model]


def apart(prices: Mapping[str, float]) -> dict[str, float]:
    """Prices, those that hardly differ moved side by side so that none hides another; on a logarithmic axis.

    >>> apart({"a": 1.0, "b": 4.0, "c": 1.0})
    {'a': 0.975, 'b': 4.0, 'c': 1.025}
    """
    groups: list[list[str]] = []
    for method in sorted(prices, key=lambda m: prices[m]):
        if groups and prices[method] < ALIKE * prices[groups[-1][0]]:
            groups[-1].append(method)
        else:
            groups.append([method])
    return {
        method: round(prices[method] * (1 + BESIDE * (group.index(method) - (len(group) - 1) / 2)), 6)
        for method in prices
        for group in groups
        if method in group
    }


def _looks(results: Results) -> Mapping[str, Look]:
    """A look for each method."""
    found = {}
    for i, method in enumerate(results.experiment.methods):
        colour, full = f"C{i % 10}", i < 10
        found[method] = Look(colour, MARKERS[i % len(MARKERS)], "-" if full else "--", colour if full else "white")
    return found


def _point(
    axis: Axes,
    tables: Tables,
    x: float,
    y: float,
    ends: Interval,
    look: Look,
    label: str,
    flat: bool = False,
) -> None:
    """A score with its interval, upright unless it lies `flat`."""
    if tables.scores.clips >= FEW_CLIPS:
        axis.plot(*((ends, [y, y]) if flat else ([x, x], ends)), color=look.colour, lw=1.6, alpha=0.45)
    axis.plot(x, y, look.marker, color=look.colour, mfc=look.fill, ms=5.5, label=label)


def _finished(figure: Figure, axes: Sequence[Axes], label: str, title: str = "") -> Figure:
    """One legend for all panels, each entry once."""
    axes[0].set_ylabel(label)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles[CHANCE["label"]] = handles.pop(CHANCE["label"])  # last
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small", frameon=False)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure
