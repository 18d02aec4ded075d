"""A measure: one metric of every class at one place, with its resamples over clips."""

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
        return self.layer if self.part in ("", self.layer, "fused") else f"{self.part} {self.layer}"

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
        """The macro mean on every resample."""
        return self._mean(self.resampled)

    def interval(self, i: int) -> Interval:
        """95 % interval of class `i`; (nan, nan) where it rests on fewer than `FEW_CLIPS` clips."""
        return percentile_interval(self.resampled[:, i]) if self.clips[i] >= FEW_CLIPS else NO_INTERVAL

    @property
    def macro_interval(self) -> Interval:
        """Likewise of the macro mean."""
        return percentile_interval(self.macro_resampled) if self.clips.max() >= FEW_CLIPS else NO_INTERVAL

    def _mean(self, values: Float[np.ndarray, "row class"]) -> Float[np.ndarray, " row"]:
        """Over the classes that have a value on the clips themselves: a resample that lacks one has no macro mean."""
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
            counts = {"clips": int(self.clips.max()), "units": int(self.units.sum())}
            left_out = f"{len(self.skipped)} of {len(self.names)} classes skipped" if self.skipped else ""
            rows.append({**where, **found, **counts, "skipped": left_out})
        return pd.DataFrame(rows)


def score(
    numerator: Float[np.ndarray, " unit"],
    denominator: Float[np.ndarray, " unit"],
    clips: Int[np.ndarray, "unit owner"],
    weights: Int[np.ndarray, "resample sample"],
) -> Score:
    """`sum(numerator) / sum(denominator)`, and the same with each unit weighted by the product of its clips' weights.

    A unit is a clip (one owner) or a pair (two): drawing clips again and rebuilding the pairs gives each pair that
    many copies. Units whose numerator or denominator is nan are left out; nan where the denominators sum to 0.
    """
    usable = np.isfinite(numerator) & np.isfinite(denominator)
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
    return Score(float(value) if np.isfinite(value) else float("nan"), finite, len(np.unique(owners)), len(top))


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
