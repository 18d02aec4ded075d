"""Every density metric of every class, layer, part and space of a set of latents."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustav.data.samples import Progress
from robustav.geometry.cuts import Cut
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure, Score, gather, score
from robustav.metrics.density import (
    SharedGaussian,
    harmonic_mean,
    kde_log_density,
    knn_entropy_terms,
    knn_log_density,
    local_dimension,
    negative_log_radius,
)
from robustav.metrics.neighbourhood import class_purity, hubness, jaccard_purity
from robustav.metrics.neighbours import nearest_within
from robustav.metrics.relative_density import balanced, relative_density, relative_density_strict
from robustav.metrics.spaces import SPACES, principal
from robustav.randomness import draw_for

Weights = Int[np.ndarray, "resample sample"]
KDE_DIMS = 20
SET = "all clips"


class Vectors(NamedTuple):
    """One vector a clip, at one layer and part."""

    layer: str
    part: str
    vectors: Float[Tensor, "sample dim"]
    turned: bool = False  # from more values than clips into coordinates, so how many there are means nothing


class Terms(NamedTuple):
    """What the units of one class add up to: a score is the sum of numerators over the sum of denominators."""

    numerator: Tensor
    owners: Tensor  # clip of each unit
    denominator: Tensor | None = None  # None: ones


def vectors_of(
    latents: Latents, cuts: Sequence[Cut], others: Latents | None = None
) -> Iterator[tuple[Vectors, Tensor | None]]:
    """A vector a clip of every part that the cuts mix, and those of other clips beside them.

    Pooled where the cut says so, flattened elsewhere. More values than clips are turned into as many coordinates as
    there are clips, which changes no distance, angle or length: so many points span no more.
    """
    for cut in cuts:
        for part in cut.mixable:
            own = cut.pool(latents.parts[cut.name][part])
            beside = cut.pool(others.parts[cut.name][part]) if others is not None else own[:0]
            both = torch.cat([own, beside])
            turned = both.shape[1] > len(both)
            if turned:
                both = torch.linalg.qr(both.double().T, mode="r").R.T.contiguous()
            yield Vectors(cut.name, part, both[: len(own)], turned), both[len(own) :] if others is not None else None


def density_measures(
    latents: Latents,
    cuts: Sequence[Cut],
    weights: Weights,
    *,
    spaces: Sequence[str],
    ks: Sequence[int],
    seed: int,
    progress: Progress = lambda what, done, total: None,
) -> list[Measure]:
    """D1 to D5 of every class; a class of fewer than 5 k clips is skipped.

    Class and rest are drawn once a seed for all layers, so that layers are compared on the same clips.
    """
    measures: list[Measure] = []
    places = [(where, space) for where, _ in vectors_of(latents, cuts) for space in spaces]
    for done, (where, space) in enumerate(places):
        progress("density", done, len(places))
        try:
            z = SPACES[space].transform(where.vectors)
        except ValueError as error:  # silence has no direction, and equal clips no axes
            measures += [_unmeasured(latents, _at(where, space, k), str(error), weights) for k in ks]
            continue
        for k in ks:
            measures += _of_vectors(latents, where, space, z, k, weights, seed)
    progress("density", len(places), len(places))
    return measures


def _of_vectors(
    latents: Latents, where: Vectors, space: str, z: Tensor, k: int, weights: Weights, seed: int
) -> list[Measure]:
    at = _at(where, space, k)
    if len(z) <= k:
        return [_unmeasured(latents, at, f"{len(z)} clips, fewer than k + 1 = {k + 1}", weights)]
    neighbours = nearest_within(z, k).indices
    purity, overlap = class_purity(latents.labels, neighbours), jaccard_purity(latents.labels, neighbours)
    gaussian = _gaussian(z, latents.labels)
    axes = z[:, :KDE_DIMS]  # whitened axes are principal already, and of one variance: none of them would come first
    if space != "whitened" and z.shape[1] > KDE_DIMS:
        axes = principal(z, min(KDE_DIMS, len(z) - 1))

    def dimension(c: int, members: Tensor) -> Terms:
        return Terms(torch.ones(len(members)), members, 1 / local_dimension(z[members], k))

    def intrinsic(c: int, members: Tensor) -> Terms:
        spread = float(harmonic_mean(local_dimension(z[members], k)))
        return Terms(knn_log_density(z[members], k, dim=spread), members)

    metrics: dict[str, Callable[[int, Tensor], Terms]] = {
        "relative density": lambda c, members: relative_terms(z, latents, c, k, seed),
        "relative density, strict": lambda c, members: Terms(
            relative_density_strict(z, latents.labels, c, k, generator=draw_for(seed, "strict", str(c))), members
        ),
        "log density": intrinsic,
        "-log radius": lambda c, members: Terms(negative_log_radius(z[members], k), members),
        "entropy": lambda c, members: Terms(knn_entropy_terms(z[members], k), members),
        "gaussian density": lambda c, members: Terms(gaussian[members, c], members),
        "kernel density": lambda c, members: Terms(kde_log_density(axes[members], KDE_DIMS), members),
        "local dimension": dimension,
        "purity gain": lambda c, members: Terms(purity.shares[members, c] - purity.base_rates[c], members),
        "label overlap": lambda c, members: Terms(overlap[members], members),
    }
    if where.turned:  # these depend on how many dimensions there are
        del metrics["entropy"], metrics["gaussian density"]
    elif space != "raw":  # the same in every space but for the scale of an axis, or meant for latents as they are
        del metrics["gaussian density"]
    measures = [by_class(latents, metric, measure, 5 * k, weights, at) for metric, measure in metrics.items()]
    hubs = Score(float(hubness(neighbours, len(z))), np.full(len(weights), np.nan), len(z), len(z))
    return [*measures, gather([SET], [hubs], len(weights), metric="hubness", **at)]


def _at(where: Vectors, space: str, k: int) -> dict[str, str]:
    return {"layer": where.layer, "part": where.part, "space": space, "setting": f"k={k}"}


def _unmeasured(latents: Latents, at: dict[str, str], reason: str, weights: Weights) -> Measure:
    reasons = [reason] * len(latents.classes)
    return gather(latents.classes, reasons, len(weights), metric="relative density", **at)


def _gaussian(z: Tensor, labels: Tensor) -> Tensor:
    try:
        return SharedGaussian.fit(z, labels).apply(z)
    except ValueError:  # every class a single point, or too flat a set: a metric without a value
        return torch.full(labels.shape, torch.nan, dtype=torch.float64)


def relative_terms(z: Tensor, latents: Latents, c: int, k: int, seed: int) -> Terms:
    """Relative density of class `c`, on as many of its clips as of others."""
    rows = balanced(latents.labels[:, c], draw_for(seed, "balanced", str(c)))
    if len(rows.others) < k:
        return Terms(torch.empty(0), rows.members[:0])
    return Terms(relative_density(z[rows.members], z[rows.others], k), rows.members)


def by_class(
    latents: Latents,
    metric: str,
    measure: Callable[[int, Tensor], Terms],
    least: int,
    weights: Weights,
    at: dict[str, str],
) -> Measure:
    """One metric of every class with at least `least` clips, and fewer than all."""
    scores: list[Score | str] = []
    for c in range(len(latents.classes)):
        members = latents.labels[:, c].nonzero().flatten()
        if len(members) < least:
            scores.append(f"{len(members)} clips, fewer than {least}")
        elif len(members) == len(latents):
            scores.append("every clip has it: there is no rest to compare with")
        else:
            scores.append(score_of(measure(c, members), weights))
    return gather(latents.classes, scores, len(weights), metric=metric, **at)


def score_of(terms: Terms, weights: Weights) -> Score:
    """The mean that the terms make up, on the clips and on every resample."""
    numerator = terms.numerator.double().cpu().numpy()
    below = np.ones_like(numerator) if terms.denominator is None else terms.denominator.double().cpu().numpy()
    return score(numerator, below, terms.owners.cpu().numpy()[:, None], weights)
