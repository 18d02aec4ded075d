"""What is left of the best of many variants of a metric where it was not chosen."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real, Shaped

from robustav.metrics.correlation import mean_of_models, spearman
from robustav.metrics.intervals import Interval, percentile_interval

SPLITS = 200
MODELS_TO_HALVE = 4


class HeldOut(NamedTuple):
    """The coefficient of the variant chosen on one half, measured on the other; by how much `in_sample` flatters it."""

    mean: float  # of `values`; above 0 when the relation that made the choice is there on the other half as well
    interval: Interval  # percentiles of `values`: their spread. Splits overlap, so this is no confidence interval
    values: Float[np.ndarray, " split"]  # coefficient on the other half times its sign on the choosing half
    chosen: Int[np.ndarray, " variant"]  # in how many splits
    in_sample: float  # largest absolute coefficient on everything: what showing the best variant would claim
    classes: int  # that were compared, in the model with the fewest


def held_out(
    variants: Real[np.ndarray, "*model variant class"],
    target: Real[np.ndarray, "*model class"],
    splits: int = SPLITS,
    *,
    seed: int,
) -> HeldOut:
    """Choose the variant (layer, k, sigma) of the largest absolute `spearman` on a random half; measure on the other.

    With several models the coefficient is its mean over them. From 4 models on the halves are of models, which asks
    whether the choice holds for other models on these same classes; below that they are of classes. Variants are
    compared on the classes that all of them have, so leave out a variant that has few; one without any value in a model
    is passed over there. Every half needs 3 classes for a coefficient; splits without one are nan and left out.

    >>> metric = np.arange(20.0)
    >>> result = held_out(np.stack([-metric, metric % 3]), metric, splits=10, seed=0)
    >>> result.mean, result.chosen
    (1.0, array([10,  0]))
    """
    _check_variants(variants, target, splits)
    variants, target = _on_shared_classes(variants, target)
    per_model = spearman(variants, target)
    by_model = len(variants) >= MODELS_TO_HALVE
    units = np.arange(len(variants)) if by_model else np.flatnonzero(~np.isnan(target[:, 0]).all(axis=0))

    def coefficients(half: Int[np.ndarray, " unit"]) -> Float[np.ndarray, " variant"]:
        return mean_of_models(per_model[half] if by_model else spearman(variants[..., half], target[..., half]))

    generator = np.random.Generator(np.random.Philox(seed))
    values, chosen = np.full(splits, np.nan), np.zeros(variants.shape[1], dtype=np.int64)
    for split in range(splits):
        order = generator.permutation(units)
        seen, unseen = coefficients(order[: len(units) // 2]), coefficients(order[len(units) // 2 :])
        if not np.isnan(seen).all():
            best = np.nanargmax(abs(seen))
            chosen[best] += 1
            values[split] = np.sign(seen[best]) * unseen[best]
    in_sample = np.fmax.reduce(abs(mean_of_models(per_model)))
    classes = (~np.isnan(target[:, 0])).sum(axis=1).min()
    mean = float(mean_of_models(values))
    return HeldOut(mean, percentile_interval(values), values, chosen, float(in_sample), int(classes))


def _check_variants(variants: Shaped[np.ndarray, "..."], target: Shaped[np.ndarray, "..."], splits: int) -> None:
    """Raise `ValueError` unless shapes are [*model, variant, class] and [*model, class], and there is a split."""
    if variants.ndim < 2 or 0 in variants.shape:
        raise ValueError(f"`variants` must be [*model, variant, class] and not empty, got {list(variants.shape)}")
    if target.shape != (*variants.shape[:-2], variants.shape[-1]):
        raise ValueError(
            f"`target` must be [*model, class] as in `variants`, {[*variants.shape[:-2], variants.shape[-1]]}, "
            f"got {list(target.shape)}"
        )
    if splits < 1:
        raise ValueError(f"`splits` must be at least 1, got {splits}")


def _on_shared_classes(
    variants: Real[np.ndarray, "*model variant class"], target: Real[np.ndarray, "*model class"]
) -> tuple[Real[np.ndarray, "models variant class"], Float[np.ndarray, "models variant class"]]:
    """Both with one axis of models, the target repeated for each variant and nan where any variant lacks the class."""
    variants = variants.reshape(-1, *variants.shape[-2:])
    target = target.reshape(len(variants), 1, -1)
    empty = np.isnan(variants).all(axis=-1, keepdims=True)
    lacking = (np.isnan(variants) & ~empty).any(axis=1, keepdims=True)
    return variants, np.broadcast_to(np.where(lacking, np.nan, target), variants.shape)
