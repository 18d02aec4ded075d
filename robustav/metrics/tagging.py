"""How well scores find labels: average precision, area under the ROC curve, d', best-class hits, ranks, and what an
attack hid."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped
from scipy.special import ndtri
from sklearn.metrics import average_precision_score, roc_auc_score

Number = int | float | np.number


def random_average_precision(positives: int, samples: int) -> float:
    """Average precision to expect of scores that are drawn at random, without ties [Bestgen, 2015, doi:10.1016/j.dsp.2015.08.011].

    Above the share of positives, which is what equal scores have, and the further the fewer samples there are.

    >>> random_average_precision(1, 2), random_average_precision(5, 5)
    (0.75, 1.0)
    """
    if not 1 <= positives <= samples:
        raise ValueError(f"`positives` must be between 1 and the {samples} samples, got {positives}")
    harmonic = float((1 / np.arange(1, samples + 1)).sum())
    if samples == 1:
        return 1.0
    return (harmonic + (positives - 1) / (samples - 1) * (samples - harmonic)) / samples


class MacroMean(NamedTuple):
    """An unweighted mean over classes, and over how many; print `dropped` beside `value` whenever it is not 0."""

    value: float  # nan where every class was dropped
    classes: int  # that entered the mean
    dropped: int  # classes whose score does not exist on these samples


class HideRate(NamedTuple):
    """A share of detections and what it is a share of."""

    value: float  # hidden / detected; nan where nothing was detected
    hidden: int  # (sample, label) pairs that were detected on the clean input and are no longer
    detected: int  # (sample, label) pairs that were detected on the clean input


def check_scored(scores: Shaped[np.ndarray, "..."], labels: Shaped[np.ndarray, "..."]) -> None:
    """Raise `ValueError` unless these are finite scores and 0/1 labels of one shape [sample, class]."""
    check_scores(scores)
    if labels.shape != scores.shape:
        raise ValueError(
            f"`labels` must have the shape of `scores`, {list(scores.shape)}, got {list(labels.shape)}: "
            "give one row per sample and one 0/1 column per class"
        )
    foreign = ~((labels == 0) | (labels == 1))
    if foreign.any():
        row, column = np.argwhere(foreign)[0]
        raise ValueError(f"`labels` must be 0 or 1, got {labels[row, column]} at sample {row}, class {column}")


def check_scores(scores: Shaped[np.ndarray, "..."]) -> None:
    """Raise `ValueError` unless `scores` is [sample, class], not empty and finite."""
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"`scores` must be [sample, class] with at least one of each, got {list(scores.shape)}")
    broken = ~np.isfinite(scores)
    if broken.any():
        row, column = np.argwhere(broken)[0]
        raise ValueError(
            f"`scores` must be finite, got {scores[row, column]} first at sample {row}, class {column} "
            f"({broken.any(axis=1).sum()} of {len(scores)} samples concerned): look at what the model gives there"
        )


def check_weights(weights: Shaped[np.ndarray, "..."], samples: int) -> None:
    """Raise `ValueError` unless the last axis of `weights` gives each sample a finite weight of at least 0."""
    if weights.shape[-1:] != (samples,):
        raise ValueError(f"`weights` must give one weight to each of {samples} samples, got {list(weights.shape)}")
    if weights.size and not (weights.min() >= 0 and weights.max() < np.inf):  # also catches NaN
        raise ValueError(f"`weights` must be finite and at least 0, got from {weights.min()} to {weights.max()}")


def average_precision(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, " sample"] | None = None,
) -> Float[np.ndarray, " class"]:
    """Mean precision over the positives of each class, as scikit-learn has it; nan for a class without positives.

    The step-wise sum over thresholds, (recall - previous recall) * precision, never interpolated. Samples of one score
    enter together, so that their order cannot matter. In [0, 1]; a constant score gets the share of positives, which
    differs between classes: compare classes by ROC AUC. A sample of weight 2 counts as two samples, one of weight 0 as
    none.

    >>> scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    >>> average_precision(scores, np.array([[1, 0], [0, 0], [1, 0]])).round(4)
    array([0.8333,    nan])
    """
    check_scored(scores, labels)
    weights = _weights_or_ones(weights, len(scores))
    values = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(weights @ (labels == 1) > 0):
        values[column] = average_precision_score(labels[:, column] == 1, scores[:, column], sample_weight=weights)
    return np.minimum(values, 1)  # the sum of rounded shares can exceed 1 by a last bit


def roc_auc(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, " sample"] | None = None,
) -> Float[np.ndarray, " class"]:
    """Chance that a positive outscores a negative of its class, ties counting half; nan without both kinds.

    In [0, 1]; 0.5 for a constant score, whatever the share of positives. Scores rounded to half precision tie near 0
    and lower it: give full-precision scores, or logits. Weights are as in `average_precision`.

    >>> scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.3]])
    >>> roc_auc(scores, np.array([[1, 1], [0, 1], [1, 1]]))
    array([0.75,  nan])
    """
    check_scored(scores, labels)
    weights = _weights_or_ones(weights, len(scores))
    values = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero((weights @ (labels == 1) > 0) & (weights @ (labels == 0) > 0)):
        values[column] = roc_auc_score(labels[:, column] == 1, scores[:, column], sample_weight=weights)
    return np.minimum(values, 1)  # as above; `d_prime` would refuse the excess


def d_prime(auc: Float[np.ndarray, "*any"] | Number) -> Float[np.ndarray, "*any"] | Number:
    """Distance of two unit normal distributions whose ROC curve has this area: sqrt(2) * inverse normal CDF of `auc`.

    0 at chance (0.5), negative below it. As published on AudioSet, the d' of a model is that of its macro AUC, not a
    mean of the classes' d'. An AUC of 0 or 1 gives -inf or inf, unclamped: no finite distance separates perfectly. nan
    stays nan.

    >>> round(float(d_prime(0.975)), 3)
    2.772
    """
    if np.any((np.asarray(auc) < 0) | (np.asarray(auc) > 1)):
        raise ValueError(f"`auc` must lie in [0, 1], got values from {np.nanmin(auc):g} to {np.nanmax(auc):g}")
    return np.sqrt(2) * ndtri(auc)


def macro_mean(per_class: Float[np.ndarray, " class"]) -> MacroMean:
    """Unweighted mean over the classes that have a score, and how many have none (nan).

    >>> macro_mean(np.array([0.25, np.nan, 0.75]))
    MacroMean(value=0.5, classes=2, dropped=1)
    """
    present = per_class[~np.isnan(per_class)]
    return MacroMean(float(present.mean()) if len(present) else np.nan, len(present), len(per_class) - len(present))


def mean_average_precision(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, " sample"] | None = None,
) -> float:
    """Macro mean of `average_precision`, dropping classes without positives; `macro_mean` says how many those are.

    >>> mean_average_precision(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1, 1], [0, 0]]))
    0.75
    """
    return macro_mean(average_precision(scores, labels, weights)).value


def mean_roc_auc(
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    weights: Real[np.ndarray, " sample"] | None = None,
) -> float:
    """Macro mean of `roc_auc`, dropping classes of one kind only; the AUC from which a model's `d_prime` follows.

    >>> mean_roc_auc(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1, 1], [0, 0]]))
    0.5
    """
    return macro_mean(roc_auc(scores, labels, weights)).value


def top1_hit(
    scores: Real[np.ndarray, "sample class"], labels: Shaped[np.ndarray, "sample class"]
) -> Bool[np.ndarray, " sample"]:
    """Whether the class of the highest score is among the sample's labels; the first class where several tie.

    A sample without labels cannot be hit and is False: for a rate over labelled samples, divide by
    `labels.any(axis=1)`.

    >>> top1_hit(np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]), np.array([[1, 1], [0, 1], [0, 0]]))
    array([ True, False, False])
    """
    check_scored(scores, labels)
    return labels[np.arange(len(scores)), scores.argmax(axis=1)] == 1


def label_ranking_average_precision(
    scores: Real[np.ndarray, "sample class"], labels: Shaped[np.ndarray, "sample class"]
) -> Float[np.ndarray, " sample"]:
    """Mean, over a sample's labels, of the share of labels among the classes that score at least as high.

    In (0, 1]; 1 where every label outscores every other class. Its mean over samples is LRAP as scikit-learn has it,
    except that a sample without labels is nan here and counts as 1 there. It ranks classes within a sample, where
    `average_precision` ranks samples within a class: scores that are calibrated differently by class hurt it.

    >>> scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4], [0.1, 0.2, 0.3]])
    >>> label_ranking_average_precision(scores, np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0]])).round(4)
    array([0.8333, 1.    ,    nan])
    """
    check_scored(scores, labels)
    values = np.full(len(scores), np.nan)
    for row in np.flatnonzero((labels == 1).any(axis=1)):
        positive = labels[row] == 1
        above = scores[row] >= scores[row, positive][:, None]
        values[row] = (above[:, positive].sum(axis=1) / above.sum(axis=1)).mean()
    return values


def f1_thresholds(
    scores: Real[np.ndarray, "sample class"], labels: Shaped[np.ndarray, "sample class"]
) -> Float[np.ndarray, " class"]:
    """For each class the score from which on to call it detected, so that F1 on these samples is largest.

    Halfway between the lowest score that counts and the next below it, so that rounding decides nothing; of several
    best thresholds the highest. Infinite, hence nothing detected, for a class without positives. Take it from clean
    scores, and not from those of an attack: a threshold that follows the attack undoes part of it.

    >>> scores = np.array([[0.9, 0.1], [0.5, 0.2], [0.4, 0.3], [0.1, 0.4]])
    >>> f1_thresholds(scores, np.array([[1, 0], [1, 0], [0, 0], [0, 0]]))
    array([0.45,  inf])
    """
    check_scored(scores, labels)
    thresholds = np.full(scores.shape[1], np.inf)
    for column in np.flatnonzero((labels == 1).any(axis=0)):
        order = np.argsort(-scores[:, column], kind="stable")
        level, positive = scores[order, column].astype(np.float64), labels[order, column] == 1
        f1 = 2 * positive.cumsum() / (np.arange(1, len(level) + 1) + positive.sum())
        below = np.append(level[1:], level[-1])
        last = np.append(level[:-1] > level[1:], True)  # samples of one score are detected together
        best = np.flatnonzero(last)[f1[last].argmax()]
        halfway = (level[best] + below[best]) / 2
        thresholds[column] = halfway if halfway > below[best] else level[best]
    return thresholds


def hide_rate(
    clean_scores: Real[np.ndarray, "sample class"],
    scores: Real[np.ndarray, "sample class"],
    labels: Shaped[np.ndarray, "sample class"],
    thresholds: Float[np.ndarray, " class"],
) -> HideRate:
    """Share of labels detected on the clean input (score at or above the class's threshold) that no longer are.

    What mAP is blind to: labels that all sink together keep their ranks, and a detector no longer fires. 0 where the
    attack hid nothing; labels missed on the clean input count neither way.

    >>> clean, now = np.array([[0.9, 0.8], [0.7, 0.1]]), np.array([[0.4, 0.8], [0.6, 0.1]])
    >>> hide_rate(clean, now, np.array([[1, 1], [1, 1]]), np.array([0.5, 0.5]))
    HideRate(value=0.3333333333333333, hidden=1, detected=3)
    """
    check_scored(clean_scores, labels)
    check_scored(scores, labels)
    if thresholds.shape != scores.shape[1:] or np.isnan(thresholds).any():
        raise ValueError(
            f"`thresholds` must give a number to each of {scores.shape[1]} classes, got {list(thresholds.shape)} with "
            f"{np.isnan(thresholds).sum()} nan: see `f1_thresholds`"
        )
    detected = (labels == 1) & (clean_scores >= thresholds)
    hidden, count = int((detected & (scores < thresholds)).sum()), int(detected.sum())
    return HideRate(hidden / count if count else np.nan, hidden, count)


def _weights_or_ones(weights: Real[np.ndarray, " sample"] | None, samples: int) -> Float[np.ndarray, " sample"]:
    """One weight per sample, 1 unless told."""
    if weights is None:
        return np.ones(samples)
    check_weights(weights, samples)
    return weights.astype(np.float64)
