"""Where other clips lie among the surveyed ones: adversarial versions of them, or another split."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Bool
from torch import Tensor

from robustav.geometry.cuts import Cut
from robustav.geometry.density import Terms, Weights, score_of, vectors_of
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure, Score, gather
from robustav.metrics.neighbourhood import density_and_coverage
from robustav.metrics.spaces import SPACES
from robustav.randomness import draw_for

COVERAGE_K = 5  # as its authors use


class Pairing(NamedTuple):
    """For each class, rows that make the balls and rows that lie in them or not."""

    balls: Bool[Tensor, "real class"]
    points: Bool[Tensor, "other class"]
    words: str


def adversarial_measures(
    latents: Latents, others: Latents, cuts: Sequence[Cut], weights: Weights, spaces: Sequence[str], seed: int
) -> list[Measure]:
    """D6 of adversarial versions of clips in the clean versions of the same clips: of their own class, and of the class
    that they are now taken for (their highest-scoring one).
    """
    index = {name: i for i, name in enumerate(latents.ids)}
    if missing := [name for name in others.ids if name not in index]:
        raise ValueError(f"clip {missing[0]!r} is not among the surveyed clips: survey the clips of the run")
    owner = torch.tensor([index[name] for name in others.ids])
    # The clean clips' labels: where nobody labelled a clip, the others' are what they are taken for now.
    labels = latents.labels[owner]
    taken_for = F.one_hot(others.logits.argmax(1), len(latents.classes)).bool()
    pairings = [
        Pairing(labels, labels, "adversarial in clean of its class"),
        Pairing(labels, taken_for, "adversarial in clean of the class it is taken for"),
    ]

    def compare(z: Tensor, y: Tensor, at: dict[str, str]) -> list[Measure]:
        return [
            measure
            for pairing in pairings
            for measure in _drift(latents, z[owner], y, owner, owner, pairing, weights, seed, at)
        ]

    return _everywhere(latents, others, cuts, weights, spaces, compare)


def against_measures(
    latents: Latents, others: Latents, cuts: Sequence[Cut], weights: Weights, spaces: Sequence[str], seed: int
) -> list[Measure]:
    """D6 of the surveyed clips in others, class by class: how far test clips lie where training clips do."""
    everyone, nobody = torch.arange(len(latents)), torch.full((len(others),), -1)
    pairing = Pairing(others.labels, latents.labels, "surveyed in the other clips")

    def compare(z: Tensor, y: Tensor, at: dict[str, str]) -> list[Measure]:
        return _drift(latents, y, z, nobody, everyone, pairing, weights, seed, at)

    return _everywhere(latents, others, cuts, weights, spaces, compare)


def _everywhere(
    latents: Latents,
    others: Latents,
    cuts: Sequence[Cut],
    weights: Weights,
    spaces: Sequence[str],
    compare: Callable[[Tensor, Tensor, dict[str, str]], list[Measure]],
) -> list[Measure]:
    """Both sets compared at every part in every space, on the axes of the surveyed clips; or why they cannot be there."""
    measures = []
    for where, beside in vectors_of(latents, cuts, others):
        assert beside is not None
        for space in spaces:
            at = {"layer": where.layer, "part": where.part, "space": space}
            transform = SPACES[space].transform
            try:
                both = transform(where.vectors), transform(beside, where.vectors)
            except ValueError as error:  # silence has no direction, and equal clips no axes
                reasons = [str(error)] * len(latents.classes)
                measures.append(gather(latents.classes, reasons, len(weights), metric="density in", **at))
                continue
            measures += compare(*both, at)
    return measures


def _drift(
    latents: Latents,
    real: Tensor,
    other: Tensor,
    real_owners: Tensor,
    other_owners: Tensor,
    pairing: Pairing,
    weights: Weights,
    seed: int,
    at: dict[str, str],
) -> list[Measure]:
    """Density and coverage of every class, on as many clips of both sets: more clips would cover more."""
    densities: list[Score | str] = []
    coverages: list[Score | str] = []
    for c in range(len(latents.classes)):
        balls, points = (mask[:, c].nonzero().flatten() for mask in (pairing.balls, pairing.points))
        size = min(len(balls), len(points))
        if size <= COVERAGE_K:
            densities.append(reason := f"{len(balls)} and {len(points)} clips: too few")
            coverages.append(reason)
            continue
        balls, points = (_some(rows, size, draw_for(seed, "drift", str(c))) for rows in (balls, points))
        terms = density_and_coverage(real[balls], other[points], COVERAGE_K)
        densities.append(_owned(terms.density, other_owners[points], weights))
        coverages.append(_owned(terms.covered.double(), real_owners[balls], weights))
    setting = f"k={COVERAGE_K}, {pairing.words}"
    return [
        gather(latents.classes, found, len(weights), metric=metric, setting=setting, **at)
        for metric, found in (("density in", densities), ("coverage of", coverages))
    ]


def _some(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return rows if len(rows) == size else rows[torch.randperm(len(rows), generator=generator)[:size]].sort().values


def _owned(values: Tensor, owners: Tensor, weights: Weights) -> Score:
    """A mean over clips; without an interval where the clips are not those that are resampled."""
    if (owners < 0).any():
        return Score(float(values.mean()), np.full(len(weights), np.nan), len(values), len(values))
    return score_of(Terms(values, owners), weights)
