"""Where other clips lie among the surveyed ones: adversarial versions of them, or another split."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from torch import Tensor

from robustav.geometry.cuts import Cut
from robustav.geometry.density import Terms, Weights, score_of, vectors_of
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure, Score, gather
from robustav.metrics.neighbourhood import density_and_coverage
from robustav.metrics.spaces import SPACES

COVERAGE_K = 5  # as its authors use


def drift_measures(
    latents: Latents,
    others: Latents,
    cuts: Sequence[Cut],
    weights: Weights,
    *,
    spaces: Sequence[str],
    adversarial: bool,
) -> list[Measure]:
    """D6 of other clips in the surveyed ones.

    Adversarial versions of the same clips are compared with the clean clips of their own class, and with those of the
    class that they are now taken for (their highest-scoring one). Clips of another split are compared class by class the
    other way round: how far the surveyed clips lie where that split does.
    """
    index = {name: i for i, name in enumerate(latents.ids)}
    if adversarial and (missing := [name for name in others.ids if name not in index]):
        raise ValueError(f"clip {missing[0]!r} is not among the surveyed clips: survey the clips of the run")
    owner = torch.tensor([index.get(name, -1) for name in others.ids])
    taken_for = F.one_hot(others.logits.argmax(1), len(latents.classes)).bool()
    measures = []
    for where, beside in vectors_of(latents, cuts, others):
        assert beside is not None
        for space in spaces:
            at = {"layer": where.layer, "part": where.part, "space": space}
            try:
                z, y = SPACES[space].transform(where.vectors), SPACES[space].transform(beside, where.vectors)
            except ValueError as error:
                reasons = [str(error)] * len(latents.classes)
                measures.append(gather(latents.classes, reasons, len(weights), metric="density in", **at))
                continue
            if adversarial:
                # The clean clips' labels: where nobody labelled a clip, the others' are what they are taken for now.
                settings = {
                    "clean of its class": latents.labels[owner],
                    "clean of the class it is taken for": taken_for,
                }
                for words, groups in settings.items():
                    pairs = [
                        (
                            z[latents.labels[:, c]],
                            y[groups[:, c]],
                            latents.labels[:, c].nonzero().flatten(),
                            owner[groups[:, c]],
                        )
                        for c in range(len(latents.classes))
                    ]
                    measures += _drift(latents, pairs, "adversarial", words, weights, at)
            else:
                nobody = torch.full((len(others),), -1)
                pairs = [
                    (
                        y[others.labels[:, c]],
                        z[latents.labels[:, c]],
                        nobody[others.labels[:, c]],
                        latents.labels[:, c].nonzero().flatten(),
                    )
                    for c in range(len(latents.classes))
                ]
                measures += _drift(latents, pairs, "surveyed", "the other clips", weights, at)
    return measures


def _drift(
    latents: Latents,
    pairs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    who: str,
    where: str,
    weights: Weights,
    at: dict[str, str],
) -> list[Measure]:
    densities: list[Score | str] = []
    coverages: list[Score | str] = []
    for real, other, real_owners, other_owners in pairs:
        if len(real) <= COVERAGE_K or len(other) == 0:
            densities.append(reason := f"{len(real)} and {len(other)} clips: too few")
            coverages.append(reason)
            continue
        terms = density_and_coverage(real, other, COVERAGE_K)
        densities.append(_owned(terms.density, other_owners, weights))
        coverages.append(_owned(terms.covered.double(), real_owners, weights))
    setting = f"k={COVERAGE_K}, {who} in {where}"
    return [
        gather(latents.classes, found, len(weights), metric=metric, setting=setting, **at)
        for metric, found in (("density in", densities), ("coverage of", coverages))
    ]


def _owned(values: Tensor, owners: Tensor, weights: Weights) -> Score:
    """A mean over clips; without an interval where the clips are not those that are resampled."""
    if (owners < 0).any():
        return Score(float(values.mean()), np.full(len(weights), np.nan), len(values), len(values))
    return score_of(Terms(values, owners), weights)
