"""Figures of a report: scores by attack or by epsilon, and an adversarial example beside its clean clip."""

import math
from fractions import Fraction
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from robustav import keep
from robustav.audio import LogMel
from robustav.ledger import Ledger
from robustav.plan import CLEAN, is_attack
from robustav.report.table import Report
from robustav.report.words import WORST

THEME = {"style": "whitegrid", "context": "paper", "palette": "colorblind"}
DECIBELS = (-100.0, 0.0)  # shown range of a spectrogram


def draw(report: Report, ledgers: list[Ledger], folder: Path) -> list[Path]:
    """Write every figure that the runs have data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # A figure must not change the reader's own settings of matplotlib, nor need a display.
    with mpl.rc_context(), sns.axes_style(THEME["style"]), sns.plotting_context(THEME["context"]):
        for score, label in (("mAP", "mAP"), ("top1", "top-1 hit rate")):
            figure = scores(report, score, label)
            if figure is not None:
                written.append(save_figure(figure, folder / f"{score}.png"))
        for ledger in ledgers:
            for key, described in ledger.record()["identity"]["conditions"].items():
                for clip in sorted((ledger.folder / "kept" / key).glob("*")) if is_attack(described) else []:
                    written.append(save_figure(example(ledger, key, clip), folder / f"{key}-{clip.name}.png"))
    return written


def scores(report: Report, score: str, label: str) -> Figure | None:
    """A score with its interval: against epsilon where there are several, else a row a condition."""
    table = report.table
    if table.empty:
        return None
    valid = table[table["violations"] == 0]
    attacked = valid[valid["attacked"] != ""]
    if attacked.empty:
        return None
    if attacked["level"].nunique() > 1:
        return _curves(valid, attacked, score, label)
    return _dots(valid, score, label)


def _dots(valid: pd.DataFrame, score: str, label: str) -> Figure:
    rows = valid.iloc[::-1].reset_index(drop=True)
    models = rows["run"].nunique() > 1
    figure = Figure(figsize=(6.4, 0.28 * len(rows) + 1.1), layout="constrained")
    axis = figure.subplots()
    kinds = ["clean", *dict.fromkeys(valid.loc[valid["attacked"] != "", "attacked"])]
    colours = dict(zip(kinds, sns.color_palette(THEME["palette"], len(kinds)), strict=True))
    for y, row in rows.iterrows():
        colour = colours[row["attacked"] or "clean"]
        axis.plot([row[f"{score}_low"], row[f"{score}_high"]], [y, y], color=colour, lw=2.5, alpha=0.5)
        axis.plot(row[score], y, "o", color=colour, ms=5)
    names = [
        f"{row['run'] + ': ' if models else ''}{row['condition']}{', ' + row['attacked'] if row['attacked'] else ''}"
        for _, row in rows.iterrows()
    ]
    axis.set(yticks=range(len(rows)), yticklabels=names, xlim=(-0.02, 1.02), xlabel=f"{label} (95 % interval)")
    axis.set_ylim(-0.7, len(rows) - 0.3)
    if not models:
        axis.set_title(f"{rows['run'].iloc[0]}, {rows['clips'].iloc[0]} clips", fontsize="medium")
    return figure


def _curves(valid: pd.DataFrame, attacked: pd.DataFrame, score: str, label: str) -> Figure:
    sets = list(dict.fromkeys(attacked["attacked"]))
    models = list(dict.fromkeys(valid["run"]))
    figure = Figure(figsize=(3.1 * len(sets) + 1.6, 2.9 * len(models) + 0.5), layout="constrained")
    axes = figure.subplots(len(models), len(sets), sharey=True, squeeze=False)
    conditions = list(dict.fromkeys(attacked["condition"]))
    colours = dict(zip(conditions, sns.color_palette(THEME["palette"], len(conditions)), strict=True))
    for line, model in zip(axes, models, strict=True):
        clean = valid[(valid["run"] == model) & (valid["attacked"] == "")]
        for axis, chosen in zip(line, sets, strict=True):
            rows = attacked[(attacked["run"] == model) & (attacked["attacked"] == chosen)]
            budgets = rows.drop_duplicates("level").sort_values("level")
            ticks = [_short_budget(text) for text in budgets["budget"]]
            places = dict(zip(budgets["level"], _places(ticks), strict=True))
            for condition, points in rows.groupby("condition", sort=False):
                points = points.assign(place=points["level"].map(places)).sort_values("place")
                x, colour = points["place"], colours[condition]
                worst = condition == WORST  # a broad pale line, so that the attack it follows stays visible
                axis.plot(x, points[score], "-" if worst else "o-", ms=3.5, color=colour, label=condition,
                          lw=5 if worst else 1.5, alpha=0.35 if worst else 1, zorder=1 if worst else 2)  # fmt: skip
                if not worst:
                    axis.fill_between(
                        x, points[f"{score}_low"], points[f"{score}_high"], color=colour, alpha=0.15, lw=0
                    )
            for _, row in clean.iterrows():
                axis.axhline(row[score], color="0.4", ls="--", lw=1, label="clean")
            axis.set(ylim=(0, 1.02), xlabel="epsilon", title=chosen if len(models) == 1 else f"{model}: {chosen}")
            axis.set_xticks(list(places.values()), ticks, rotation=30, ha="right")
            axis.minorticks_off()
        line[0].set_ylabel(f"{label} (95 % interval)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    if len(models) == 1:
        figure.suptitle(f"{models[0]}, {valid['clips'].iloc[0]} clips", fontsize="medium")
    return figure


def _places(ticks: list[str]) -> list[float]:
    """Where epsilons stand on the axis: at their logarithm if they are positive numbers, else one beside the other."""
    try:
        return [math.log10(float(Fraction(tick))) for tick in ticks]
    except ValueError:
        return [float(place) for place in range(len(ticks))]


def _short_budget(text: str) -> str:
    """`audio linf, 0.01 amplitude (-40.0 dBFS)` -> `0.01`; of several modalities, each that differs."""
    values = [part.split(", ", 1)[1].removeprefix("SNR at least ").split(" = ")[0] for part in text.split("; ")]
    return " / ".join(dict.fromkeys(value if value.endswith(" dB") else value.split(" ")[0] for value in values))


def example(ledger: Ledger, condition: str, clip: Path) -> Figure:
    """One kept clip: clean, what was added, and the sum; spectrograms above frames."""
    record = ledger.record()
    adversarial = keep.load(clip)
    clean = keep.load(ledger.folder / "kept" / CLEAN.key / clip.name)
    row = {key: record["identity"]["conditions"][condition][key] for key in ("name", "attacked", "budgets")}
    modalities = sorted(clean)
    rates = {m: record["identity"]["specs"][m]["sample_rate"] for m in modalities}
    heights = [2.6 if rates[m] else 1.1 for m in modalities]  # inches: spectrograms, strips of frames
    figure = Figure(figsize=(9.5, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(modalities), 3, squeeze=False, height_ratios=heights)
    for line, modality in zip(axes, modalities, strict=True):
        before, after = clean[modality].numpy(), adversarial[modality].numpy()
        panels = (before, after - before, after)
        touched = modality in row["attacked"]
        titles = (
            f"{modality}, clean",
            "perturbation" if touched else "not attacked",
            "adversarial" if touched else "as it was",
        )
        for axis, title, values in zip(line, titles, panels, strict=True):
            if rates[modality]:
                image = _spectrogram(axis, values, rates[modality])
                axis.set_title(title)
                if values is after:
                    figure.colorbar(image, ax=axis, label="dB re full scale", shrink=0.9)
            else:
                gain = 0.5 / max(float(np.abs(values).max()), 1e-9)
                changed = values is panels[1]
                axis.imshow(_strip(values * gain + 0.5 if changed else values))
                axis.set_title(f"{title} (x {gain:.3g} around grey)" if changed and touched else title)
                axis.set_axis_off()
    budgets = "; ".join(f"{m} {text}" for m, text in row["budgets"].items())
    figure.suptitle(f"{row['name']} on {'+'.join(row['attacked'])} ({budgets})", fontsize="medium")
    return figure


def _spectrogram(axis: Axes, waveform: NDArray[np.float32], rate: int) -> AxesImage:
    window = 512 if len(waveform) >= 4096 else max(len(waveform) // 16 * 2, 2)
    log_mel = LogMel(window=window, hop=window // 4, sample_rate=rate, high=rate / 2, floor=1e-10, scale=1.0)
    with torch.no_grad():
        power = log_mel(torch.as_tensor(waveform)[None])[0, 0].numpy()
    decibels = (10 / np.log(10)) * power - 20 * np.log10(window / 4)  # a full-scale tone peaks at 0 dB
    seconds = len(waveform) / rate
    image = axis.imshow(
        decibels.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=DECIBELS[0],
        vmax=DECIBELS[1],
        extent=(0, seconds, 0, 64),
    )
    axis.set(xlabel="seconds", ylabel="mel bin")
    axis.grid(visible=False)
    return image


def _strip(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most five frames side by side, as [height, width, 3] in [0, 1]."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(len(frames), 5)).round().astype(int)]
    return np.concatenate(list(chosen.transpose(0, 2, 3, 1)), axis=1).clip(0, 1)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; returns the file."""
    figure.savefig(path, dpi=150)
    return path
