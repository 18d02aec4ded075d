"""A measure: one metric of every class at one place, with its resamples over clips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray

from robustav.metrics.intervals import FEW_CLIPS, Interval, percentile_interval

CHUNK = 2**22  # entries of [resample, unit] worked on at once
MACRO = "macro mean"
NO_INTERVAL = Interval(np.nan, np.nan)
MOST_LACKING = 0.1  # share of resamples without a value that an interval may have


class Score(NamedTuple):
    """A score that is a ratio of sums over units, and the same on every resample of the clips."""

    value: float
    resampled: Float[np.ndarray, " resample"]
    clips: int
    units: int


@dataclass(frozen=True)
class Measure:
    """One metric at one layer, part, space and setting: a value a class, nan where the class was skipped.

    `names` are the classes, or a single word for what is measured of the whole set. `resampled` are the values on
    every resample of the clips, all measures of a survey by the same resamples, so that they can be compared.
    """

    metric: str
    layer: str
    part: str
    space: str
    setting: str
    names: tuple[str, ...]
    values: Float[np.ndarray, " class"]
    resampled: Float[np.ndarray, "resample class"]
    clips: Int[np.ndarray, " class"]
    units: Int[np.ndarray, " class"]
    skipped: Mapping[str, str] = field(default_factory=dict)  # class -> why

    @property
    def where(self) -> str:
        """Layer and part, as in "audio features"; where there is one part only, the layer."""
        return where_of(self.layer, self.part)

    @property
    def key(self) -> str:
        """The measure in words that no other one has."""
        details = ", ".join(text for text in (self.space, self.setting) if text)
        return f"{self.metric} at {self.where}" + (f" ({details})" if details else "")

    @property
    def macro(self) -> float:
        """Unweighted mean over the classes that were not skipped."""
        return float(self._mean(self.values[None])[0])

    @property
    def macro_resampled(self) -> Float[np.ndarray, " resample"]:
        """The macro mean on every resample; a class that a resample lacks keeps its value there."""
        never = np.isnan(self.resampled).all(axis=0)  # what is not drawn again has no resamples
        return self._mean(np.where(np.isnan(self.resampled) & ~never, self.values, self.resampled))

    def interval(self, i: int) -> Interval:
        """95 % interval of class `i`; (nan, nan) where it rests on fewer than `FEW_CLIPS` clips."""
        return _interval(self.resampled[:, i]) if self.clips[i] >= FEW_CLIPS else NO_INTERVAL

    @property
    def macro_interval(self) -> Interval:
        """Likewise of the macro mean."""
        return _interval(self.macro_resampled) if self.clips.max() >= FEW_CLIPS else NO_INTERVAL

    def _mean(self, values: Float[np.ndarray, "row class"]) -> Float[np.ndarray, " row"]:
        """Over the classes that have a value on the clips themselves."""
        here = values[:, ~np.isnan(self.values)]
        return here.mean(1) if here.shape[1] else np.full(len(values), np.nan)

    def rows(self) -> pd.DataFrame:
        """A row a class, and one for the macro mean where there are several."""
        where = {name: getattr(self, name) for name in ("metric", "layer", "part", "space", "setting")}
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.names):
            ends = self.interval(i)
            found = {"class": name, "value": self.values[i], "low": ends.low, "high": ends.high}
            rows.append({**where, **found, "clips": self.clips[i], "units": self.units[i]})
            rows[-1]["skipped"] = self.skipped.get(name, "")
        if len(self.names) > 1:
            ends = self.macro_interval
            found = {"class": MACRO, "value": self.macro, "low": ends.low, "high": ends.high}
            counts = {"units": int(self.units.sum())}
            left_out = f"{len(self.skipped)} of {len(self.names)} classes skipped" if self.skipped else ""
            rows.append({**where, **found, **counts, "skipped": left_out})
        return pd.DataFrame(rows)


def where_of(layer: str, part: str) -> str:
    """Layer and part in words."""
    return layer if part in ("", layer, "fused") else f"{part} {layer}"


def _interval(resampled: Float[np.ndarray, " resample"]) -> Interval:
    """None where more than a tenth of the resamples have no value: the others are a selection."""
    return percentile_interval(resampled) if np.isnan(resampled).mean() <= MOST_LACKING else NO_INTERVAL


def score(
    numerator: Float[np.ndarray, " unit"],
    denominator: Float[np.ndarray, " unit"],
    clips: Int[np.ndarray, "unit owner"],
    weights: Int[np.ndarray, "resample sample"],
) -> Score:
    """`sum(numerator) / sum(denominator)`, and the same with each unit weighted by the product of its clips' weights.

    A unit is a clip (one owner) or a pair (two): drawing clips again and rebuilding the pairs gives each pair that
    many copies, and is put right where pairs are so few that their own variation counts. Units whose numerator or
    denominator is nan, or that do not count (both 0), are left out; nan where the denominators sum to 0.
    """
    usable = np.isfinite(numerator) & np.isfinite(denominator) & ((numerator != 0) | (denominator != 0))
    top, bottom, owners = numerator[usable], denominator[usable], clips[usable]
    resampled = np.empty((2, len(weights)))
    step = max(CHUNK // max(len(top), 1), 1)
    for start in range(0, len(weights), step):
        rows = weights[start : start + step].astype(np.float64)
        copies = rows[:, owners[:, 0]]
        for column in range(1, owners.shape[1]):
            copies *= rows[:, owners[:, column]]
        resampled[:, start : start + step] = (copies @ np.stack([top, bottom], axis=1)).T
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.divide(top.sum(), bottom.sum())
        ratio = np.divide(*resampled)
    finite = np.where(np.isfinite(ratio), ratio, np.nan)
    if owners.shape[1] > 1 and np.isfinite(value):
        finite = value + (finite - value) * _shrinkage(top, bottom, float(value), finite)
    return Score(float(value) if np.isfinite(value) else float("nan"), finite, len(np.unique(owners)), len(top))


def _shrinkage(top: np.ndarray, bottom: np.ndarray, value: float, resampled: np.ndarray) -> float:
    """By how much resamples of pairs spread too far.

    A product of two weights has a variance of 3 where a pair drawn anew has one of 1, so what pairs vary by on their
    own counts three times; it is taken out twice. With many pairs a clip this is next to nothing.
    """
    spread = float(np.nanvar(resampled)) if np.isfinite(resampled).any() else 0.0
    alone = float(np.square((top - value * bottom) / bottom.mean()).mean() / len(top))
    return math.sqrt(min(1.0, max(1 - 2 * alone / spread, 1 / 3))) if spread > 0 else 1.0


def gather(names: Sequence[str], scores: Sequence[Score | str], resamples: int, **where: str) -> Measure:
    """A measure from a score a class, or the reason why the class was skipped."""
    size = len(names)
    values, units, clips = np.full(size, np.nan), np.zeros(size, dtype=int), np.zeros(size, dtype=int)
    resampled: NDArray[np.float64] = np.full((resamples, size), np.nan)
    skipped: dict[str, str] = {}
    for i, (name, found) in enumerate(zip(names, scores, strict=True)):
        if isinstance(found, str):
            skipped[name] = found
            continue
        values[i], resampled[:, i], clips[i], units[i] = found.value, found.resampled, found.clips, found.units
        if np.isnan(found.value):
            skipped[name] = "nothing to measure: no pair or clip counts"
    return Measure(
        where["metric"],
        where["layer"],
        where["part"],
        where.get("space", ""),
        where.get("setting", ""),
        tuple(names),
        values,
        resampled,
        clips,
        units,
        skipped,
    )
