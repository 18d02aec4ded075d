"""How sure a score is: Wilson and bootstrap intervals, paired drops, and tests that compare two classifiers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, Shaped
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from robustav.metrics.tagging import Number, check_scored, check_weights, d_prime

RESAMPLES = 1000
FEW_CLIPS = 20  # below this, resampling clips says nothing of the clips that were not seen
CHUNK_BYTES = 2**26  # of working memory, 64 MiB: bounded for its own sake, and small enough for caches to help
ARRAYS_PER_CHUNK = 10  # of [sample, resample] that are alive at once when every sample is a positive


class Interval(NamedTuple):
    """Both ends of a confidence interval; numbers, or arrays where the input was an array."""

    low: Float[np.ndarray, "*any"] | Number
    high: Float[np.ndarray, "*any"] | Number


class ClassScores(NamedTuple):
    """Scores of every class on every resample; nan where the resample lacks the positives (or negatives) for one."""

    average_precision: Float[np.ndarray, "resample class"]
    roc_auc: Float[np.ndarray, "resample class"]


class MacroScores(NamedTuple):
    """Macro scores on every resample, the raw material of their intervals."""

    map: Float[np.ndarray, " resample"]
    auc: Float[np.ndarray, " resample"]
    d_prime: Float[np.ndarray, " resample"]


class Segments(NamedTuple):
    """One class's samples by the part they play for its distinct positive scores ("levels", highest first).

    Samples `order[starts[3 * k] : starts[3 * k + 1]]` are negatives above level k and below level k - 1, the next
    stretch negatives that tie with level k, the next its positives; what is left scores below every positive.
    """

    order: Int[np.ndarray, " sample"]
    starts: Int[np.ndarray, " boundary"]


def wilson(
    successes: Real[np.ndarray, "*any"] | Number, count: Real[np.ndarray, "*any"] | Number, level: float = 0.95
) -> Interval:
    """Score interval of a share, `successes` out of `count` [Wilson, 1927, doi:10.1080/01621459.1927.10502953].

    Inside [0, 1] and sensible at the ends, unlike mean +- 2 standard errors. A count of 0 tells nothing: (0, 1).

    >>> low, high = wilson(0, 200)
    >>> f"{low:.3f} to {high:.3f}"
    '0.000 to 0.019'
    """
    _check_level(level)
    hits, total = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(count, dtype=np.float64))
    if not np.all((hits >= 0) & (hits <= total)):
        raise ValueError(f"`successes` must lie between 0 and `count`, got {successes} of {count}")
    z = ndtri((1 + level) / 2)
    centre = (hits + z**2 / 2) / (total + z**2)
    half = z / (total + z**2) * np.sqrt(hits * (total - hits) / np.maximum(total, 1) + z**2 / 4)
    # Equal at the ends but for rounding, and a table should not print 1e-17.
    low = np.where(hits == 0, 0.0, centre - half)
    high = np.where(hits == total, 1.0, centre + half)
    return Interval(low[()], high[()])


def bootstrap_weights(samples: int, resamples: int = RESAMPLES, *, seed: int) -> Int[np.ndarray, "resample sample"]:
    """How often each sample occurs in each of `resamples` draws of `samples` with replacement; rows sum to `samples`.

    Draw once for a whole table and give the same array to every row of it: that is what makes drops paired. The first
    rows do not depend on `resamples`. Depends on `seed` only; NumPy's global state is neither read nor moved. Takes
    4 bytes per entry.

    >>> bootstrap_weights(4, 2, seed=0).sum(axis=1)
    array([4, 4])
    """
    if samples < 1 or resamples < 1:
        raise ValueError(f"`samples` and `resamples` must be at least 1, got {samples} and {resamples}")
    generator = np.random.Generator(np.random.Philox(seed))
    weights = np.empty((resamples, samples), dtype=np.int32)
    for row in weights:
        row[:] = np.bincount(generator.integers(samples, size=samples), minlength=samples)
    return weights


def resample_classes(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, "resample sample"],
) -> ClassScores:
    """`average_precision` and `roc_auc` of each class under each row of weights, equal to them up to rounding.

    Cost: one addition per (resample, sample, class), because only the totals between neighbouring positives matter and
    which samples make up such a total does not change from resample to resample. Memory beside inputs and results:
    64 MiB, and 4 bytes per (sample, class).
    """
    check_scored(scores, labels)
    check_weights(weights, len(scores))
    if weights.ndim != 2:
        raise ValueError(f"`weights` must be [resample, sample], got {list(weights.shape)}: see `bootstrap_weights`")
    classes = [_segments(column, positive == 1) for column, positive in zip(scores.T, labels.T, strict=True)]
    shape = (len(weights), scores.shape[1])
    precision, area = np.full(shape, np.nan), np.full(shape, np.nan)
    for rows in _chunks(*weights.shape):
        by_sample = np.ascontiguousarray(weights[rows].T, dtype=np.float64)
        for column, segments in enumerate(classes):
            precision[rows, column], area[rows, column] = _class_scores(segments, by_sample)
    return ClassScores(precision, area)


def bootstrap(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, "resample sample"],
) -> MacroScores:
    """Macro mAP, macro AUC and its d' on every resample of the clips, whose weights come from `bootstrap_weights`.

    Whole clips are drawn, never single labels, because the labels of a clip hang together. A class that has no
    positives (for AUC: not both kinds) in a resample is dropped from the macro mean of that resample alone; nan where
    none is left. Intervals: `centred_interval`, since mAP is higher on resamples than on the clips themselves.

    >>> scores, labels = np.array([[0.9], [0.8], [0.7]]), np.array([[1], [0], [1]])
    >>> bootstrap(scores, labels, np.array([[1, 1, 1], [0, 2, 1]])).map.round(4)
    array([0.8333, 0.3333])
    """
    classes = resample_classes(scores, labels, weights)
    area = _mean_of_present(classes.roc_auc)
    return MacroScores(_mean_of_present(classes.average_precision), area, np.asarray(d_prime(area)))


def paired_drop(clean: MacroScores, attacked: MacroScores) -> MacroScores:
    """`clean` minus `attacked` on each resample: tighter than two intervals apart, as clips vary alike in both.

    Both must come from the same labels and the same weights; then they also lack the same classes. The drop of d' is
    nan or infinite on resamples where an AUC is 0 or 1.
    """
    if len(clean.map) != len(attacked.map):
        raise ValueError(
            f"`clean` and `attacked` must come from the same resamples, got {len(clean.map)} and {len(attacked.map)}"
        )
    with np.errstate(invalid="ignore"):  # inf - inf, see above
        return MacroScores(*(before - after for before, after in zip(clean, attacked, strict=True)))


def percentile_interval(values: Float[np.ndarray, " resample"], level: float = 0.95) -> Interval:
    """Bootstrap percentile interval: the k-th smallest and k-th largest value, k = (resamples + 1) * (1 - level) / 2.

    [Efron and Tibshirani, 1993, An Introduction to the Bootstrap, section 12.5], k rounded down. Always values that
    occurred, so the interval of d' is the d' of the interval of AUC, infinite ends included. nan values are left out;
    with none left the interval is (nan, nan). Too few values for `level`, below 39 at 0.95, give their whole range.
    Sound for AUC and d', whose resamples lie around the point value; for mAP and its drops see `centred_interval`.

    >>> low, high = percentile_interval(np.arange(1000.0))
    >>> float(low), float(high)
    (24.0, 975.0)
    """
    _check_level(level)
    present = np.sort(values[~np.isnan(values)])
    if not len(present):
        return Interval(np.nan, np.nan)
    rank = max(int((len(present) + 1) * (1 - level) / 2 + 1e-9), 1)  # 1e-9: 0.05 is not exact in binary
    return Interval(float(present[rank - 1]), float(present[-rank]))


def centred_interval(point: Number, values: Float[np.ndarray, " resample"], level: float = 0.95) -> Interval:
    """The percentile interval moved so that the median of `values` falls on `point`, the score of the sample itself.

    Average precision rises when there are fewer different positives: mAP is biased upwards on a finite set, and again
    on its resamples. With many rare classes that bias exceeds the spread, and the percentile interval excludes
    the point. This one covers what another set of as many clips would score on average, not the lower mAP of endless
    clips; so compare mAP between sets of one size only. Not moved where `point` or the median is infinite or nan.

    >>> centred_interval(0.5, np.array([0.625, 0.75, 1.0]))
    Interval(low=0.375, high=0.75)
    """
    low, high = percentile_interval(values, level)
    present = values[~np.isnan(values)]
    excess = float(np.median(present)) - float(point) if len(present) else np.nan
    return Interval(low - excess, high - excess) if np.isfinite(excess) else Interval(low, high)


def bca_interval(
    point: Number, values: Float[np.ndarray, " resample"], jackknife: Float[np.ndarray, " unit"], level: float = 0.95
) -> Interval:
    """Bias-corrected and accelerated interval [Efron, 1987, doi:10.1080/01621459.1987.10478410] of bootstrap `values`.

    `percentile_interval` at other shares: bias is read off how many values lie below `point`, ties counting half;
    acceleration off the skewness of `jackknife`, the statistic without each unit in turn, and 0 where that does not
    vary. Unmoved, it is `percentile_interval`. Entries that are nan are left out. (nan, nan) where `point` is not
    within the values, since by how much they are off cannot be told then, and where no jackknife value is finite.

    >>> low, high = bca_interval(499.0, np.arange(999.0), np.array([1.0, 2.0, 3.0]))
    >>> float(low), float(high)
    (24.0, 974.0)
    """
    _check_level(level)
    present = np.sort(values[~np.isnan(values)])
    left_out = jackknife[np.isfinite(jackknife)]
    if not len(left_out) or not len(present) or not present[0] <= point <= present[-1]:
        return Interval(np.nan, np.nan)
    bias = ndtri((np.sum(present < point) + np.sum(present <= point)) / (2 * len(present)))
    distance = left_out.mean() - left_out
    spread = np.linalg.norm(distance)
    varies = spread > 1e-12 * np.abs(left_out).max()  # more than rounding does
    acceleration = np.sum((distance / spread) ** 3) / 6 if varies else 0.0
    moved = bias + np.array([1, -1]) * ndtri((1 - level) / 2)
    # At 0 or below, which takes an extreme level or bias, the share sought is at its limit.
    ends = bias + moved / np.maximum(1 - acceleration * moved, 1e-12)
    tails = ndtr([ends[0], -ends[1]])  # below the low end, above the high end
    ranks = np.clip(((len(present) + 1) * tails + 1e-9).astype(int), 1, len(present))
    return Interval(float(present[ranks[0] - 1]), float(present[-ranks[1]]))


def mcnemar(only_first: int | np.integer, only_second: int | np.integer) -> float:
    """Exact two-sided p that two classifiers are right equally often on the same samples [McNemar, 1947].

    From the number of samples that only the first, and only the second, has right; 1 where they never differ.

    >>> mcnemar(0, 6)
    0.03125
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"`only_first` and `only_second` must be counts, got {only_first} and {only_second}")
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """p-values adjusted for being several, in the given order [Holm, 1979]: those below alpha are significant at alpha.

    >>> holm(np.array([0.02, 0.01, 0.5]))
    array([0.04, 0.03, 0.5 ])
    """
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise ValueError(f"`p_values` must lie in [0, 1], got {p_values}")
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(adjusted, 1)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, such as 0.95, got {level}")


def _chunks(resamples: int, samples: int) -> Iterator[slice]:
    """Consecutive ranges of resamples whose arrays together stay below CHUNK_BYTES."""
    length = max(CHUNK_BYTES // (8 * ARRAYS_PER_CHUNK * samples), 1)
    return (slice(start, start + length) for start in range(0, resamples, length))


def _segments(scores: Real[np.ndarray, " sample"], positive: Shaped[np.ndarray, " sample"]) -> Segments:
    """Which samples lie between, tie with and make up the levels of one class."""
    levels = np.unique(scores[positive])
    above = np.searchsorted(levels, scores)  # the lowest level that is not below the score
    ties = np.append(levels, np.nan)[above] == scores
    kind = np.where(ties, 3 * (len(levels) - 1 - above) + 1 + positive, 3 * (len(levels) - above))
    sizes = np.bincount(kind, minlength=3 * len(levels) + 1)
    order = np.argsort(kind, kind="stable")
    return Segments(order.astype(np.int32), np.append(0, np.cumsum(sizes)).astype(np.int32))


def _class_scores(
    segments: Segments, weights: Float[np.ndarray, "sample resample"]
) -> tuple[Float[np.ndarray, " resample"], Float[np.ndarray, " resample"]]:
    """Average precision and ROC AUC of one class on every resample."""
    if len(segments.starts) == 2:  # no positive at all
        nothing = np.full(weights.shape[1], np.nan)
        return nothing, nothing
    shape = (len(segments.starts) - 1, len(weights))
    totals = csr_array((np.ones(len(weights)), segments.order, segments.starts), shape=shape) @ weights
    between, tied, positives = totals[:-1].reshape(-1, 3, weights.shape[1]).swapaxes(0, 1)
    false = np.cumsum(between + tied, axis=0)
    true = np.cumsum(positives, axis=0)
    positive, negative = true[-1], false[-1] + totals[-1]
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of a class that the resample lacks
        # Nothing above the threshold means no positives at it either, so there any precision will do.
        precision = true / np.where(true + false > 0, true + false, 1)
        average_precision = (positives * precision).sum(axis=0) / positive
        area = (positives * (negative - false + tied / 2)).sum(axis=0) / (positive * negative)
    # Rounded sums of weights that are not whole numbers can exceed 1 by a last bit.
    return np.minimum(average_precision, 1), np.minimum(area, 1)


def _mean_of_present(per_class: Float[np.ndarray, "resample class"]) -> Float[np.ndarray, " resample"]:
    """Mean over the classes that are not nan."""
    present = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as it should be
        return np.where(present, per_class, 0).sum(axis=1) / present.sum(axis=1)
