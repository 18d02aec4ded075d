"""Who a sample's neighbours are: purity of labels, hubs, and how one set of latents covers another."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustav.metrics.latents import blocks, check_k, checked
from robustav.metrics.neighbours import nearest_within

EDGE = 1e-6  # share of a radius; what two roundings of one distance can differ by, and far more


class ClassPurity(NamedTuple):
    """Share of neighbours with the class, for samples that have it (nan elsewhere), and what chance would give."""

    shares: Float[Tensor, "sample class"]
    base_rates: Float[Tensor, " class"]


class DensityAndCoverage(NamedTuple):
    """Terms whose means are the density and the coverage of one set in another."""

    density: Float[Tensor, " other"]
    covered: Bool[Tensor, " real"]


def jaccard_purity(labels: Bool[Tensor, "sample class"], indices: Int[Tensor, "sample k"]) -> Float[Tensor, " sample"]:
    """Mean overlap of a sample's labels with those of its neighbours, shared labels over labels of either.

    In [0, 1]; with one label each, the share of neighbours of the same class. `indices` are those of `nearest_within`.
    nan for a sample without labels; a neighbour without labels overlaps by 0. Close to the accuracy of the model, so it
    ceases to tell good models apart; with strong hubs (see `hubness`) few samples decide it.

    >>> labels = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    >>> jaccard_purity(labels, torch.tensor([[1, 2], [0, 2], [0, 1]]))
    tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    _check_indices(indices, len(labels))
    total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    for neighbour in indices.T:
        theirs = labels[neighbour]
        total += (labels & theirs).sum(dim=1) / (labels | theirs).sum(dim=1).clamp(min=1).double()
    return (total / indices.shape[1]).where(labels.any(dim=1), torch.nan)


def class_purity(labels: Bool[Tensor, "sample class"], indices: Int[Tensor, "sample k"]) -> ClassPurity:
    """Share of each sample's neighbours that carry its class, and the share among all others to subtract from it.

    The share is in [0, 1] and, where latents ignore the class, equals its base rate on average. The base rate is nan
    for a class without samples.

    >>> labels = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    >>> purity = class_purity(labels, torch.tensor([[1], [0], [0]]))
    >>> purity.shares
    tensor([[1., 0.],
            [1., nan],
            [nan, 1.]], dtype=torch.float64)
    >>> purity.base_rates
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    _check_indices(indices, len(labels))
    total = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    for neighbour in indices.T:
        total += labels[neighbour]
    members = labels.sum(dim=0).double()
    base_rates = ((members - 1) / (len(labels) - 1)).where(members > 0, torch.nan)
    return ClassPurity((total / indices.shape[1]).where(labels, torch.nan), base_rates)


def hubness(indices: Int[Tensor, "sample k"], samples: int) -> Float[Tensor, ""]:
    """Skewness of how often each of `samples` is among another's neighbours [Radovanović et al., 2010, JMLR 11].

    0 when all occur equally often; above 1 or so a few hubs stand in many neighbourhoods, as happens in high dimension,
    and every metric of neighbours rests on them.

    >>> f"{hubness(torch.tensor([[1], [0], [0], [0]]), 4).item():.2f}"
    '0.82'
    """
    _check_indices(indices, samples)
    occurrences = torch.bincount(indices.flatten(), minlength=samples).double()
    deviations = occurrences - occurrences.mean()
    variance = deviations.square().mean()
    return (deviations.pow(3).mean() / variance.pow(1.5)).where(variance > 0, 0)


def density_and_coverage(
    real: Float[Tensor, "real dim"], other: Float[Tensor, "other dim"], k: int = 5
) -> DensityAndCoverage:
    """How thickly `other` lies in the balls of `real`, and how many it reaches [Naeem et al., 2020, arXiv:2002.09797].

    The ball of a real row ends short of its k-th nearest real row. Density is the number of balls around an other row,
    over `k`: at least 0, about 1 on average where both sets come from one distribution, above 1 where `other` keeps to
    the thick of `real`. Coverage is whether an other row is in the ball of a real one: true for 1 - 2^-k of them with
    two such sets of one size. More other rows cover more, so compare sets of one size. Both sets must live in one
    space, scaled alike. Real rows with `k` exact copies have an empty ball.

    >>> terms = density_and_coverage(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0]]), k=1)
    >>> terms.density, terms.covered
    (tensor([2., 0.], dtype=torch.float64), tensor([ True,  True, False]))
    """
    real, other = checked(real, "real"), checked(other, "other")
    check_k(k, len(real) - 1, "other rows of `real`")
    other = other.to(real.dtype)
    # Two rows at one distance are found by two routes: without a margin, rounding would decide which of them is inside.
    radii = nearest_within(real, k).distances[:, -1] * (1 - EDGE)
    density = torch.empty(len(other), dtype=torch.float64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in blocks(len(other), 2 * real.element_size() * len(real)):
        inside = torch.cdist(other[rows], real, compute_mode="donot_use_mm_for_euclid_dist") < radii
        density[rows] = inside.sum(dim=1).double() / k
        covered |= inside.any(dim=0)
    return DensityAndCoverage(density, covered)


def _check_indices(indices: Int[Tensor, "sample k"], samples: int) -> None:
    if not indices.numel():
        raise ValueError(f"`indices` must be [sample, k] with at least one of each, got {list(indices.shape)}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= samples:
        raise ValueError(f"`indices` must lie in [0, {samples}), the rows of {samples} samples, got {low} to {high}")
