"""Scores of one method over seeds and resamples of the clips, and what can be told from several: gaps, shares, tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from robustav.metrics.intervals import Interval, bootstrap_weights, centred_interval, percentile_interval

RESAMPLES = 1000
NOTHING = Interval(np.nan, np.nan)


@dataclass(frozen=True)
class Sampled:
    """A score for each training seed, on the clips and on every resample of them.

    All scores of an experiment are on the same resamples, and seeds are drawn again alike, so that sums and differences
    of scores are paired in both. With few seeds their own part of an interval is too narrow (three seeds: by a fifth).
    """

    seeds: tuple[int, ...]
    points: Float[np.ndarray, " seed"]
    resampled: Float[np.ndarray, "seed resample"]
    rate: bool = False  # a share of clips, whose resamples lie around it; those of mAP lie above

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(self.points.mean())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; nan of one."""
        return float(self.points.std(ddof=1)) if len(self.seeds) > 1 else np.nan

    @property
    def drawn(self) -> Float[np.ndarray, " resample"]:
        """The mean on every resample of clips and seeds."""
        copies = bootstrap_weights(len(self.seeds), self.resampled.shape[1], seed=1).T
        return (copies * self.resampled).sum(0) / len(self.seeds)

    @property
    def interval(self) -> Interval:
        """95 %, of the mean."""
        return percentile_interval(self.drawn) if self.rate else centred_interval(self.mean, self.drawn)

    def at(self, seeds: Sequence[int]) -> "Sampled":
        """The same on some of the seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=tuple(seeds), points=self.points[rows], resampled=self.resampled[rows])

    def minus(self, other: "Sampled") -> "Sampled":
        """The difference, on the seeds that both have; raises `ValueError` if that is none."""
        if not (pair := shared(self, other)):
            raise ValueError(f"the scores share no seed: {self.seeds} and {other.seeds}")
        here, there = pair
        return replace(here, points=here.points - there.points, resampled=here.resampled - there.resampled)


def shared(*scores: Sampled | None) -> tuple[Sampled, ...]:
    """Scores on the seeds that all of them have; empty if that is none, or one of them is not there."""
    there = [score for score in scores if score is not None]
    seeds = [seed for seed in there[0].seeds if all(seed in other.seeds for other in there)] if there else []
    return tuple(one.at(seeds) for one in there) if seeds and len(there) == len(scores) else ()


def gap_closed(score: Sampled, baseline: Sampled, reference: Sampled) -> tuple[float, Interval]:
    """(score - baseline) / (reference - baseline) of the means over seeds, and its interval.

    0: no better than the baseline; 1: as good as the reference. nan where the reference is not shown to be better than
    the baseline, since then there is no gap to speak of. All three must be of the same seeds (`shared`).
    """
    gained, gap = score.minus(baseline), reference.minus(baseline)
    if not gap.interval.low > 0:
        return np.nan, NOTHING
    return ratio(gained.mean, gap.mean, gained.drawn, gap.drawn)


def ratio(
    top: float, bottom: float, tops: Float[np.ndarray, " resample"], bottoms: Float[np.ndarray, " resample"]
) -> tuple[float, Interval]:
    """A ratio and its interval; nan below a denominator that is not positive."""
    if not bottom > 0:
        return np.nan, NOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        return top / bottom, centred_interval(top / bottom, np.where(bottoms > 0, tops / bottoms, np.nan))


def budget_of_drop(drops: Mapping[float, float], drop: float) -> float:
    """The budget at which a curve of drops, which begins at (0, 0) and is made to rise, first reaches `drop`; nan if never."""
    budgets = np.array([0.0, *sorted(drops)])
    curve = np.maximum.accumulate([0.0, *(drops[b] for b in sorted(drops))])
    if drop > curve[-1]:
        return np.nan
    i = int(np.argmax(curve >= drop))
    if i == 0:
        return 0.0
    return float(budgets[i - 1] + (budgets[i] - budgets[i - 1]) * (drop - curve[i - 1]) / (curve[i] - curve[i - 1]))


class Matched(NamedTuple):
    """A modality's share of two single drops, and the budgets at which both were taken."""

    share: float
    budgets: tuple[float, ...]


def matched_share(
    alone: Sequence[Mapping[float, float]], own: Sequence[Mapping[float, float]], at: Sequence[float]
) -> Matched:
    """The first modality's share of a fused model's single drops, at budgets that cost single models the same.

    Curves are budget -> drop, one for each modality: of the model of that modality `alone`, and of the fused model's
    `own`. Of the models alone, the one that loses more at its budget `at` has it lowered until it loses as little as the
    other. nan where one loses nothing, or the fused model does not.

    >>> matched_share([{1.0: 0.5}, {1.0: 0.25}], [{1.0: 0.75}, {1.0: 0.125}], [1.0, 1.0])
    Matched(share=0.75, budgets=(0.5, 1.0))
    """
    matched = min(curve[budget] for curve, budget in zip(alone, at, strict=True))
    if not matched > 0:
        return Matched(np.nan, ())
    budgets = tuple(
        budget if curve[budget] == matched else budget_of_drop(curve, matched)
        for curve, budget in zip(alone, at, strict=True)
    )
    first, second = (
        float(np.interp(budget, [0.0, *sorted(curve)], [0.0, *(curve[b] for b in sorted(curve))]))
        for curve, budget in zip(own, budgets, strict=True)
    )
    return Matched(first / (first + second) if first + second > 0 else np.nan, budgets)


def flip_test(differences: Int[np.ndarray, " clip"]) -> float:
    """Exact two-sided p that differences are as likely to be positive as negative [Fisher, 1935, The Design of Experiments].

    Every sign is flipped in every way: the share of sums at least as far from 0 as the one seen. Of differences in -1,
    0, 1 that is the exact McNemar test; whole numbers let the hits of several seeds be added up, clip by clip.

    >>> flip_test(np.array([1, 1, 1, 1, 1, 1, 0]))
    0.03125
    """
    sizes = np.abs(differences[differences != 0])
    chances = np.ones(1)  # of the sums -n, ..., n
    for size in sizes:
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(min(chances[np.abs(sums) >= abs(differences.sum())].sum(), 1))
