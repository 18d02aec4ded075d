"""Rank correlation of two series of values, alone and beyond what control variables explain; vectorised."""

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped
from scipy.stats import kendalltau

ROUNDING = 1e-9  # of a vector's length; what is left of it after a fit is no information below this


def spearman(x: Real[np.ndarray, "*any pair"], y: Real[np.ndarray, "*any pair"]) -> Float[np.ndarray, "*any"]:
    """Pearson correlation of average ranks [Spearman, 1904, doi:10.2307/1412159], along the last axis.

    In [-1, 1]; 1 when y rises wherever x does, whatever the shape of the curve. A pair with a nan is left out, before
    ranking; infinities are ranked. nan for fewer than 3 pairs, or where either side is constant.

    >>> spearman(np.array([[1, 2, 3, 4], [1, 1, 1, 1]]), np.array([[1, 4, 9, 8], [1, 2, 3, 4]]))
    array([0.8, nan])
    """
    return partial_spearman(x, y, np.empty((*np.shape(x), 0)))


def kendall(x: Real[np.ndarray, "*any pair"], y: Real[np.ndarray, "*any pair"]) -> Float[np.ndarray, "*any"]:
    """Tau-b: share of concordant less discordant pairs of pairs, corrected for ties [Kendall, 1945].

    doi:10.1093/biomet/33.3.239. In [-1, 1], and usually nearer to 0 than `spearman`, to which it must not be compared.
    nan is treated and given as there.

    >>> round(float(kendall(np.array([1, 2, 3, 4]), np.array([1, 4, 9, 8]))), 4)
    0.6667
    """
    check_pairs(x, y)
    values = np.full(x.shape[:-1], np.nan)
    for place in np.ndindex(values.shape):
        present = ~(np.isnan(x[place]) | np.isnan(y[place]))
        if present.sum() >= 3:
            # Of ranks, as older SciPy takes the nan of inf - inf for a missing value.
            first, second = ranks(x[place][present]), ranks(y[place][present])
            values[place] = kendalltau(first, second, method="asymptotic").statistic
    return values


def partial_spearman(
    x: Real[np.ndarray, "*any pair"], y: Real[np.ndarray, "*any pair"], controls: Real[np.ndarray, "*any pair control"]
) -> Float[np.ndarray, "*any"]:
    """`spearman` beyond the controls: correlation of what linear fits on the controls' ranks leave of both ranks.

    In [-1, 1]; near 0 when x and y hang together through the controls alone. Only near: what ranks owe to ranks is not
    quite a straight line, nor linear in several. Of normal values, one control leaves about 0.01, but three independent
    ones that explain a half (three quarters) of the variance of both leave 0.04 (0.12), which enough pairs tell from 0.
    Of a control measured with error, a part stays in as well.

    Controls may repeat each other. A pair with a nan anywhere is left out. nan for fewer than 3 pairs more than
    controls, or where the controls explain either side entirely.

    >>> frequency = np.array([1, 2, 3, 4, 5, 6])
    >>> metric, target = np.array([2, 1, 4, 3, 6, 5]), np.array([1, 3, 2, 5, 4, 6])
    >>> float(spearman(metric, target).round(4)), float(partial_spearman(metric, target, frequency[:, None]).round(4))
    (0.4857, -0.9548)
    """
    check_pairs(x, y, controls)
    present = present_pairs(x, y, controls)
    first = rank_residuals(x, controls, present)
    second = rank_residuals(y, controls, present)
    enough = present.sum(axis=-1) >= controls.shape[-1] + 3
    return np.where(enough, cosine(first, second), np.nan)


def check_pairs(
    x: Shaped[np.ndarray, "..."],
    y: Shaped[np.ndarray, "..."],
    controls: Shaped[np.ndarray, "..."] | None = None,
    names: tuple[str, str] = ("x", "y"),
) -> None:
    """Raise `ValueError` unless shapes are [..., pair] for x and for y, and [..., pair, control] for controls."""
    if not x.ndim:
        raise ValueError(f"`{names[0]}` must have an axis of pairs, got a single number")
    if y.shape != x.shape:
        raise ValueError(f"`{names[1]}` must have the shape of `{names[0]}`, {list(x.shape)}, got {list(y.shape)}")
    if controls is not None and (controls.ndim != x.ndim + 1 or controls.shape[:-1] != x.shape):
        raise ValueError(
            f"`controls` must have the shape of `{names[0]}`, {list(x.shape)}, and a last axis of controls, "
            f"got {list(controls.shape)}: a single control takes a last axis of length 1"
        )


def present_pairs(
    x: Real[np.ndarray, "*any pair"], y: Real[np.ndarray, "*any pair"], controls: Real[np.ndarray, "*any pair control"]
) -> Bool[np.ndarray, "*any pair"]:
    """Where none of them is nan."""
    return ~(np.isnan(x) | np.isnan(y) | np.isnan(controls).any(axis=-1))


def ranks(values: Real[np.ndarray, "*any pair"]) -> Float[np.ndarray, "*any pair"]:
    """1 for the smallest along the last axis; equal values share the mean of their ranks; nan stays nan.

    >>> ranks(np.array([0.5, np.nan, 0.1, 0.5]))
    array([2.5, nan, 1. , 2.5])
    """
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values, axis=-1)  # nan last
    ordered = np.take_along_axis(values, order, axis=-1)
    place = np.arange(values.shape[-1])
    starts, ends = np.ones(values.shape, dtype=bool), np.ones(values.shape, dtype=bool)
    starts[..., 1:] = ends[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
    last = np.minimum.accumulate(np.where(ends, place, place.size)[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty(values.shape)
    np.put_along_axis(result, order, (first + last) / 2 + 1, axis=-1)
    return np.where(np.isnan(values), np.nan, result)


def centred_ranks(
    values: Real[np.ndarray, "*any pair"], present: Bool[np.ndarray, "*any pair"]
) -> Float[np.ndarray, "*any pair"]:
    """Ranks among the present values, less their mean; 0 where absent, so that sums pass over those."""
    middle = (present.sum(axis=-1, keepdims=True) + 1) / 2
    return np.where(present, ranks(np.where(present, values, np.nan)) - middle, 0)


def rank_residuals(
    values: Real[np.ndarray, "*any pair"],
    controls: Real[np.ndarray, "*any pair control"],
    present: Bool[np.ndarray, "*any pair"],
) -> Float[np.ndarray, "*any pair"]:
    """Centred ranks of the present values, less what a linear fit on the ranks of the controls says of them."""
    return residuals(centred_ranks(values, present)[..., None, :], control_ranks(controls, present))[..., 0, :]


def control_ranks(
    controls: Real[np.ndarray, "*any pair control"], present: Bool[np.ndarray, "*any pair"]
) -> Float[np.ndarray, "*any control pair"]:
    """Centred ranks of each control among the present values."""
    rows = np.moveaxis(controls, -1, -2)
    return centred_ranks(rows, np.broadcast_to(present[..., None, :], rows.shape))


def residuals(
    rows: Float[np.ndarray, "*any row pair"], controls: Float[np.ndarray, "*any control pair"]
) -> Float[np.ndarray, "*any row pair"]:
    """What least squares on the controls leave of each row; exactly 0 where that is rounding."""
    left = rows - (rows @ np.linalg.pinv(controls, ROUNDING)) @ controls
    return np.where(length(left) > ROUNDING * length(rows), left, 0)


def length(vectors: Float[np.ndarray, "*any pair"]) -> Float[np.ndarray, "*any 1"]:
    """Euclidean length along the last axis, which is kept."""
    return np.linalg.norm(vectors, axis=-1, keepdims=True)


def cosine(
    first: Float[np.ndarray, "*#any pair"], second: Float[np.ndarray, "*#any pair"]
) -> Float[np.ndarray, "*#any"]:
    """Cosine of the angle between them along the last axis; nan where either is 0."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        values = (first * second).sum(axis=-1) / (length(first) * length(second))[..., 0]
    return np.asarray(np.clip(values, -1, 1))


def mean_of_models(coefficients: Float[np.ndarray, "model *any"]) -> Float[np.ndarray, "*any"]:
    """Mean over the models that have a coefficient; nan where none has."""
    present = ~np.isnan(coefficients)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.asarray(np.where(present, coefficients, 0).sum(axis=0) / present.sum(axis=0))
