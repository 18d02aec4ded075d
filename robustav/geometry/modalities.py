"""Which modality has its classes closer together, what fusing adds, and whether the two lie alike."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robustav.geometry.cuts import FUSED, Cut
from robustav.geometry.density import SET, Terms, Weights, by_class, relative_terms, score_of, vectors_of
from robustav.geometry.drift import COVERAGE_K
from robustav.geometry.latents import Latents
from robustav.geometry.measure import Measure, gather
from robustav.metrics.neighbourhood import density_and_coverage
from robustav.metrics.spaces import matched, procrustes

MOST_MATCHED = 64  # principal axes on which modalities are compared, if each has as many


def modality_measures(latents: Latents, cuts: Sequence[Cut], weights: Weights, k: int, seed: int) -> list[Measure]:
    """D7: which modality has its classes closer together, and what fusing adds; where there are two modalities.

    All on as many principal axes and at the same mean distance to the nearest row.
    """
    z = _matched(latents, cuts)
    if z is None:
        return []
    if isinstance(z, str):
        reasons, at = [z] * len(latents.classes), {"layer": "features", "part": "", "space": "matched"}
        return [gather(latents.classes, reasons, len(weights), metric="modality gap", setting=f"k={k}", **at)]
    at = {"layer": "features", "space": "matched", "setting": f"k={k}"}
    first, second = sorted(part for part in z if part != FUSED)

    def gap(c: int, members: Tensor) -> Terms:
        one, other = (relative_terms(z[part], latents, c, k, seed) for part in (first, second))
        return Terms(one.numerator - other.numerator, one.owners)

    measures = [by_class(latents, "modality gap", gap, 5 * k, weights, at | {"part": f"{first} - {second}"})]
    if FUSED in z:

        def own(part: str) -> Measure:
            return by_class(
                latents,
                "relative density",
                lambda c, _: relative_terms(z[part], latents, c, k, seed),
                5 * k,
                weights,
                at | {"part": part},
            )

        measures.append(_gain(own(FUSED), [own(first), own(second)]))
    return measures


def overlap_measures(latents: Latents, cuts: Sequence[Cut], weights: Weights) -> list[Measure]:
    """D6 of one modality's features in the other's, matched and turned onto them; where there are two modalities."""
    z = _matched(latents, cuts)
    if z is None or isinstance(z, str) or len(latents) <= COVERAGE_K:
        return []
    first, second = sorted(part for part in z if part != FUSED)
    aligned = procrustes(z[first], z[second])
    terms = density_and_coverage(aligned.target, aligned.source, COVERAGE_K)
    at = {"layer": "features", "part": f"{first} in {second}", "space": "matched"}
    setting, everyone = f"k={COVERAGE_K}, turned onto one another", torch.arange(len(latents))
    return [
        gather([SET], [score_of(Terms(values, everyone), weights)], len(weights), metric=metric, setting=setting, **at)
        for metric, values in (("density in", terms.density), ("coverage of", terms.covered.double()))
    ]


def _matched(latents: Latents, cuts: Sequence[Cut]) -> dict[str, Tensor] | str | None:
    """Both modalities' features and, if it is looked at, the fused latent, made comparable; or why they cannot be.

    None where there are not two modalities to compare, or hardly any clips.
    """
    features = {w.part: w.vectors for w, _ in vectors_of(latents, [c for c in cuts if c.name == "features"])}
    fused = {w.part: w.vectors for w, _ in vectors_of(latents, [c for c in cuts if c.name == "latent"])}
    if len(features) != 2 or len(latents) < 3:
        return None
    parts = features | fused
    dim = min(MOST_MATCHED, len(latents) - 1, *(x.shape[1] for x in parts.values()))
    try:
        return {part: matched(x, dim) for part, x in parts.items()}
    except ValueError as error:  # features that do not vary have no axes
        return str(error)


def _gain(fused: Measure, single: Sequence[Measure]) -> Measure:
    """Fused minus the better single modality; the better one on the clips themselves, so that resamples compare alike."""
    better = np.argmax(np.nan_to_num(np.stack([m.values for m in single]), nan=-np.inf), axis=0)
    columns = np.arange(len(fused.names))
    best = np.stack([m.values for m in single])[better, columns]
    resampled = np.stack([m.resampled for m in single])[better, :, columns].T
    nothing = [name for name, value in zip(fused.names, best, strict=True) if np.isnan(value)]
    return Measure(
        "fusion gain",
        "latent",
        "fused - better modality",
        fused.space,
        fused.setting,
        fused.names,
        fused.values - best,
        fused.resampled - resampled,
        fused.clips,
        fused.units,
        {**dict.fromkeys(nothing, "a modality has no relative density"), **fused.skipped},
    )
