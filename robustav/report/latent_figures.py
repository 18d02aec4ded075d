"""Figures of latents: metric by layer, convexity under noise, a map of latents, and metric against attack success."""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from robustav.geometry.cuts import Cut
from robustav.geometry.latents import Latents
from robustav.geometry.measure import MACRO, where_of
from robustav.metrics.spaces import principal
from robustav.report.figures import THEME, save_figure

MOST_COLOURS = 10  # classes told apart in a map; the most frequent ones
SCATTERED = (
    "relative density",
    "purity gain",
    "soft convexity",
    "hardened convexity, area",
    "first-order margin",
    "logit margin",
)


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG under its name; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def by_layer(rows: pd.DataFrame, metric: str = "relative density") -> Figure | None:
    """A metric at every layer and part: the macro mean with its interval, and each class as a dot."""
    here = rows[(rows["metric"] == metric) & (rows["space"] == "raw")] if len(rows) else rows
    if here.empty:
        return None
    here = here[here["setting"] == here["setting"].iloc[0]]
    here = here.assign(place=[where_of(layer, part) for layer, part in zip(here["layer"], here["part"], strict=True)])
    places = list(dict.fromkeys(here["place"]))
    with _theme():
        figure = Figure(figsize=(1.3 * len(places) + 1.6, 3.4), layout="constrained")
        axis = figure.subplots()
        colour, dots = sns.color_palette(THEME["palette"], 2)
        for x, place in enumerate(places):
            classes = here[(here["place"] == place) & (here["class"] != MACRO)]
            axis.plot(np.full(len(classes), x - 0.12), classes["value"], "o", color=dots, ms=4, alpha=0.6)
            for _, macro in here[(here["place"] == place) & (here["class"] == MACRO)].iterrows():
                axis.plot([x + 0.12] * 2, [macro["low"], macro["high"]], color=colour, lw=2.5)
                axis.plot(x + 0.12, macro["value"], "o", color=colour, ms=7)
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(xticks=range(len(places)), xticklabels=[p.replace(" ", "\n", 1) for p in places], ylabel=metric)
        axis.set_xlim(-0.5, len(places) - 0.5)
        axis.set_title(f"{here['model'].iloc[0]}: classes, and their mean with its 95 % interval", fontsize="medium")
    return figure


def hardened_curves(rows: pd.DataFrame) -> Figure | None:
    """Hardened convexity against noise, a line a class, a panel a layer; the area under each line is the class's score."""
    here = rows[rows["metric"] == "hardened convexity"] if len(rows) else rows
    here = here[~here["setting"].str.contains("F1")] if len(here) else here
    if here.empty:
        return None
    here = here.assign(
        sigma=here["setting"].str.extract(r"sigma=([\d.e+-]+)")[0].astype(float),
        place=[where_of(layer, part) for layer, part in zip(here["layer"], here["part"], strict=True)],
    )
    places = list(dict.fromkeys(here["place"]))
    classes = [name for name in dict.fromkeys(here["class"]) if name != MACRO]
    named = len(classes) <= MOST_COLOURS
    with _theme():
        figure = Figure(figsize=(2.7 * len(places) + (1.2 if named else 0.4), 3.1), layout="constrained")
        axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(places), sharey=True)))
        colours = sns.color_palette(THEME["palette"], len(classes)) if named else [(0.6, 0.6, 0.6)] * len(classes)
        for axis, place in zip(axes, places, strict=True):
            for name, colour in zip(classes, colours, strict=True):
                line = here[(here["place"] == place) & (here["class"] == name)].sort_values("sigma")
                label = name if named and axis is axes[0] else None
                axis.plot(line["sigma"], line["value"], color=colour, lw=1, alpha=0.9 if named else 0.3, label=label)
            mean = here[(here["place"] == place) & (here["class"] == MACRO)].sort_values("sigma")
            axis.plot(mean["sigma"], mean["value"], color="black", lw=2, label=MACRO if axis is axes[0] else None)
            axis.fill_between(
                mean["sigma"], mean["low"].astype(float), mean["high"].astype(float), color="black", alpha=0.12
            )
            axis.set(title=place, xlabel="noise, typical distances", ylim=(-0.02, 1.02), xlim=(0, None))
        axes[0].set_ylabel("midpoints accepted")
        figure.legend(loc="outside right center", fontsize="small", frameon=False)
    return figure


def latent_views(latents: Latents, adversarial: Latents | None, cuts: Sequence[Cut]) -> dict[str, Figure | None]:
    """For every layer and part: two principal axes of the clean latents, and the adversarial ones on the same axes."""
    figures: dict[str, Figure | None] = {}
    for cut in cuts:
        for part in cut.mixable:
            layer, x = cut.name, latents.parts[cut.name][part]
            if layer not in ("input", "front end"):
                beside = adversarial.parts[layer][part] if adversarial is not None else None
                name = f"map-{where_of(layer, part)}".replace(" ", "-")
                figures[name] = latent_view(
                    cut.pool(x),
                    None if beside is None else cut.pool(beside),
                    latents,
                    adversarial,
                    where_of(layer, part),
                )
    return figures


def latent_view(
    clean: Tensor, beside: Tensor | None, latents: Latents, adversarial: Latents | None, place: str
) -> Figure | None:
    """Clips in the plane of the two largest principal axes of the clean ones, coloured by what the model takes them for."""
    if len(clean) < 3 or clean.shape[1] < 2 or bool((clean == clean[0]).all()):
        return None
    panels = [("clean", principal(clean, 2), latents.logits)]
    if beside is not None and adversarial is not None:
        panels.append(("adversarial", principal(beside, 2, clean), adversarial.logits))
    common = latents.labels.sum(0).argsort(descending=True, stable=True)[:MOST_COLOURS].tolist()
    with _theme():
        figure = Figure(figsize=(3.9 * len(panels) + 1.2, 3.6), layout="constrained")
        axes: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(panels), sharex=True, sharey=True)))
        colours = dict(zip(common, sns.color_palette("tab10", len(common)), strict=True))
        for axis, (name, points, logits) in zip(axes, panels, strict=True):
            taken_for = logits.argmax(1)
            other = ~torch.isin(taken_for, torch.tensor(common))
            axis.plot(*points[other].T.numpy(), ".", color="0.8", ms=4)
            for c, colour in colours.items():
                axis.plot(
                    *points[taken_for == c].T.numpy(), ".", color=colour, ms=5, alpha=0.7,
                    label=latents.classes[c] if axis is axes[0] else None,
                )  # fmt: skip
            axis.set(title=f"{name}, {len(points)} clips", xticks=[], yticks=[])
        figure.suptitle(
            f"{place}: two principal axes of the clean latents, coloured by the top class", fontsize="medium"
        )
        figure.legend(loc="outside right center", fontsize="small", frameon=False, markerscale=2)
    return figure


def scatters(classes: pd.DataFrame, table: pd.DataFrame) -> dict[str, Figure | None]:
    """Metrics against attack success, a dot a class, for the places where each was most likely to be looked at."""
    figures: dict[str, Figure | None] = {}
    for metric in SCATTERED:
        found = table[(table["metric"] == metric) & table["space"].isin(["", "raw"])]
        found = found[~found["setting"].str.contains("F1")]
        if len(found):
            most = found[found["models"] == found["models"].max()]
            figures["against-" + metric.replace(",", "").replace(" ", "-")] = scatter(classes, most.iloc[-1])
    return figures


def scatter(classes: pd.DataFrame, row: pd.Series) -> Figure:
    """One metric against attack success; a panel a model, classes named, the coefficient within models above."""
    models = [
        model
        for model in dict.fromkeys(classes["model"])
        if classes.loc[classes["model"] == model, row["key"]].notna().any()
    ]
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    with _theme():
        figure = Figure(figsize=(3.3 * columns + 0.3, 2.9 * lines + 0.4), layout="constrained")
        axes: list[Axes] = list(np.ravel(figure.subplots(lines, columns, squeeze=False)))
        for axis, model in zip(axes, models, strict=False):
            here = classes[classes["model"] == model]
            axis.plot(here[row["key"]], here["attack success"], "o", ms=5, color=sns.color_palette(THEME["palette"])[0])
            for _, point in here.iterrows():
                axis.annotate(
                    point["class"], (point[row["key"]], point["attack success"]), fontsize="x-small",
                    xytext=(3, 3), textcoords="offset points",
                )  # fmt: skip
            axis.set(
                title=model, xlabel=f"{row['metric']}, {row['where']}", ylabel="attack success", ylim=(-0.03, 1.08)
            )
            axis.margins(x=0.18)
        for axis in axes[len(models) :]:
            axis.set_visible(False)
        words = f"robustness and this metric: rho {row['rho']:.2f}, partial {row['partial']:.2f}: {row['verdict']}"
        figure.suptitle(textwrap.fill(words, 44 * columns), fontsize="medium")
    return figure


def _theme() -> AbstractContextManager[None]:
    """A figure must not change the reader's own settings of matplotlib."""
    return mpl.rc_context({**sns.axes_style(THEME["style"]), **sns.plotting_context(THEME["context"])})
