"""Every convexity metric of every class and layer, and of every set of modalities that can be mixed there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from robustav.data.samples import Progress
from robustav.geometry.cuts import Cut, Parts
from robustav.geometry.density import vectors_of
from robustav.geometry.measure import Measure, Score, gather, score
from robustav.geometry.survey import View
from robustav.metrics.convexity import (
    SIGMAS,
    Terms,
    area,
    both_accepted,
    both_rejected,
    conditional,
    defect,
    f1_thresholds,
    flip_distances,
    flipped,
    hardened,
    interior,
    li2022,
    log_odds,
    mean_flip,
    segment_lengths,
    soft,
    typical_distance,
)
from robustav.metrics.graph import graph_convexity
from robustav.metrics.pairs import Pairs, draw_flip_pairs, draw_pairs
from robustav.metrics.segments import Noise, at_thresholds, end_margins, margins_along, swapped_margins
from robustav.metrics.spaces import SPACES
from robustav.randomness import draw_for

PAIRS: Mapping[str, int] = {"latent": 5000, "features": 200}  # a class
PAIRS_ELSEWHERE = 50  # where a point is a pass of most of the network
GRAPH_PAIRS = 1000
POINTS = 10  # of a segment, ends left out
TAU = 0.1  # threshold of the published measurement
F1 = "F1-optimal"
ARG_MAX = "arg max"


@dataclass(frozen=True)
class Segments:
    """How segments are sampled: pairs a class (None: by layer), noise, seed, and neighbours of the graph."""

    pairs: int | None = None
    sigmas: Sequence[float] = SIGMAS
    k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"`pairs` must be at least 1, got {self.pairs}")
        if len(self.sigmas) < 2 or any(b <= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"`sigmas` must be at least two rising numbers, got {list(self.sigmas)}")
        if self.k < 1:
            raise ValueError(f"`k` must be at least 1, got {self.k}")
        if self.sigmas[0] < 0:
            raise ValueError(f"`sigmas` must not be negative, got {self.sigmas[0]:g}")

    def count(self, cut: Cut) -> int:
        """Pairs a class at a cut."""
        return self.pairs or PAIRS.get(cut.name, PAIRS_ELSEWHERE)


def convexity_measures(view: View, how: Segments, progress: Progress = lambda what, done, total: None) -> list[Measure]:
    """C0 to C6 for every class, at every cut; where several modalities can be mixed, each alone and all together.

    Mixing one modality leaves the others at the first clip of the pair, and so does the end that must be accepted. Noise and flips are measured with everything
    mixed.
    """
    measures: list[Measure] = []
    jobs = [(cut, mixed) for cut in view.cuts for mixed in _mixes(cut)]
    for done, (cut, mixed) in enumerate(jobs):
        progress(f"convexity: {cut.name}", done, len(jobs))
        at = _At(view, cut, mixed, how)
        measures += at.between()
        if len(mixed) == len(cut.mixable):
            measures += [*at.under_noise(), *at.flips()]
        elif mixed == cut.mixable[:1]:
            measures += at.mismatched()
    progress("convexity: graphs", len(jobs), len(jobs))
    return measures + _graphs(view, how)


def _mixes(cut: Cut) -> list[tuple[str, ...]]:
    """Every set of parts, all of them last."""
    return [chosen for size in range(1, len(cut.mixable) + 1) for chosen in combinations(cut.mixable, size)]


class _At:
    """One cut with one set of parts mixed: pairs, margins at their ends, and scores of terms."""

    def __init__(self, view: View, cut: Cut, mixed: tuple[str, ...], how: Segments) -> None:
        self.view, self.cut, self.mixed, self.how = view, cut, mixed, how
        self.latents, self.device = view.latents, view.reader.device
        self.parts: Parts = {name: x.to(self.device) for name, x in view.latents.parts[cut.name].items()}
        labels = self.latents.labels
        self.pairs = draw_pairs(labels, how.count(cut), draw_for(how.seed, "pairs"))
        self.typical: dict[str, float] = {}
        self.kind = self.latents.label_kind
        # Elsewhere a point runs through most of the network, which is fastest at the batch size of any other pass.
        self.chunk = None if cut.name in PAIRS else view.reader.batch_size
        self.where = {"layer": cut.name, "part": "+".join(mixed)}
        operating = view.survey.threshold
        self.thresholds: dict[str, Tensor | float] = {ARG_MAX: operating}  # which then decides nothing
        if self.kind == "multilabel":
            self.thresholds = {f"t={operating:g}": operating}
            # Classes without a positive have no pairs either; any number does.
            self.thresholds[f"t={F1}"] = f1_thresholds(self.latents.logits, labels).nan_to_num(0.5)

    def units(self) -> dict[str, float]:
        """The typical distance of each mixed part, worked out once."""
        if not self.typical:
            self.typical = {name: typical_distance(self.parts[name]) for name in self.mixed}
        return self.typical

    def margins(self, pairs: Pairs, weights: Tensor, noise: Noise | None = None, *, odds: bool = False) -> Tensor:
        """Margins at threshold 0.5 (multilabel) along the segments; of each class's own odds where `odds` is set."""

        def of_odds(parts: Parts) -> Tensor:
            return log_odds(self.cut.finish(parts))

        found = margins_along(
            of_odds if odds else self.cut.finish,
            self.parts,
            pairs,
            weights,
            label_kind="multilabel" if odds else self.kind,
            mixed=self.mixed,
            noise=noise,
            module=self.view.model,
            chunk=self.chunk,
        )
        return found.cpu()

    def ends(self, pairs: Pairs, *, far: Tensor | None = None, odds: bool = False) -> Tensor:
        """Margins of both clips of each pair, or of the first and, where there are any, those `far` at weight 0."""
        logits = log_odds(self.latents.logits) if odds else self.latents.logits
        clips = end_margins(logits, pairs, label_kind="multilabel" if odds else self.kind)
        return clips if far is None or not far.shape[1] else torch.cat([clips[:, :1], far.to(clips)], dim=1)

    def at(self, margins: Tensor, pairs: Pairs, threshold: Tensor | float) -> Tensor:
        """The same margins at another threshold; those of an arg max have none."""
        return at_thresholds(margins, pairs, threshold) if self.kind == "multilabel" else margins

    def between(self) -> list[Measure]:
        """C0 at one random point of each segment, C1 and C2 on a grid of it."""
        count = len(self.pairs.cls)
        if not count:
            return []
        random = torch.rand(count, 1, generator=draw_for(self.how.seed, "points"))
        grid = interior(POINTS).expand(count, -1)
        # Where some parts stay at the first clip, a segment ends at no clip: the first with the second's mixed parts.
        far = torch.zeros(count, 0 if len(self.mixed) == len(self.cut.mixable) else 1)
        if self.kind == "multilabel":
            margins = self.margins(self.pairs, torch.cat([random, grid, far], dim=1))
            published, inside, beyond = margins.split([1, POINTS, far.shape[1]], dim=1)
            ends = published_ends = self.ends(self.pairs, far=beyond)
        else:
            margins = self.margins(self.pairs, torch.cat([random, far], dim=1), odds=True)
            published, published_ends = margins[:, :1], self.ends(self.pairs, far=margins[:, 1:], odds=True)
            margins = self.margins(self.pairs, torch.cat([grid, far], dim=1))
            inside, ends = margins[:, :POINTS], self.ends(self.pairs, far=margins[:, POINTS:])
        published = at_thresholds(published, self.pairs, TAU)
        published_ends = at_thresholds(published_ends, self.pairs, TAU)
        tau = f"tau={TAU:g}"
        measures = [
            self.measure("published convexity", tau, li2022(published)),
            self.measure("both ends accepted", tau, both_accepted(published_ends)),
        ]
        if self.kind == "multilabel":  # a softmax can accept a class between clips that it rejects
            measures.append(self.measure("both ends rejected", tau, both_rejected(published_ends)))
        for setting, threshold in self.thresholds.items():
            here, there = self.at(ends, self.pairs, threshold), self.at(inside, self.pairs, threshold)
            measures += [
                self.measure("conditional convexity", setting, conditional(here, there)),
                self.measure("soft convexity", setting, soft(here, there)),
                self.measure("convexity defect", setting, defect(here, there)),
            ]
        return measures

    def under_noise(self) -> list[Measure]:
        """C3 at the middle of each segment, for every sigma."""
        if not len(self.pairs.cls):
            return []
        try:
            scales = self.units()
        except ValueError as error:  # mostly copies: there is no unit to measure noise in
            return [self.unmeasured("hardened convexity, area", str(error))]
        middle = torch.full((len(self.pairs.cls), 1), 0.5)
        ends = self.ends(self.pairs)
        found = []
        for sigma in self.how.sigmas:
            noise = Noise({m: sigma * s for m, s in scales.items()}, draw_for(self.how.seed, "noise in latents"))
            found.append(self.margins(self.pairs, middle, noise))
        measures = []
        for setting, threshold in self.thresholds.items():
            here = self.at(ends, self.pairs, threshold)
            noisy = [self.at(margins, self.pairs, threshold) for margins in found]
            plain, given = [hardened(x) for x in noisy], [hardened(x, here) for x in noisy]
            measures += [
                self.measure("hardened convexity", f"{setting}, sigma={sigma:g}", terms)
                for sigma, terms in zip(self.how.sigmas, plain, strict=True)
            ]
            measures += [
                self.measure("hardened convexity, area", setting, area(plain, self.how.sigmas)),
                self.measure("hardened convexity given accepted, area", setting, area(given, self.how.sigmas)),
            ]
        return measures

    def flips(self) -> list[Measure]:
        """C6 towards clips without the class: the distance gone for each rejection, and how often there is one."""
        pairs = draw_flip_pairs(self.latents.labels, self.how.count(self.cut), draw_for(self.how.seed, "flips"))
        if not len(pairs.cls):
            return []
        try:
            units = self.units()
        except ValueError as error:
            return [self.unmeasured("flip distance", str(error))]
        steps = torch.cat([torch.zeros(1), interior(POINTS), torch.ones(1)])
        here = Pairs(*(x.to(self.device) for x in pairs))
        lengths = segment_lengths(self.parts, here, units).cpu()
        margins = self.margins(pairs, (1 - steps).expand(len(pairs.cls), -1))
        setting, threshold = next(iter(self.thresholds.items()))
        distances = flip_distances(self.at(margins, pairs, threshold), steps, lengths)
        return [
            self.measure("flip distance", setting, mean_flip(distances, lengths), pairs),
            self.measure("flipped segments", setting, flipped(distances), pairs),
        ]

    def mismatched(self) -> list[Measure]:
        """C5: one clip's first modality beside another's rest, both of one class, both accepted on their own."""
        if not len(self.pairs.cls):
            return []
        rest = [name for name in self.cut.mixable if name not in self.mixed]
        margins = swapped_margins(
            self.cut.finish, self.parts, self.pairs, rest, label_kind=self.kind, chunk=self.chunk
        ).cpu()[:, None]
        ends = self.ends(self.pairs)
        found = []
        for setting, threshold in self.thresholds.items():
            terms = conditional(self.at(ends, self.pairs, threshold), self.at(margins, self.pairs, threshold))
            found.append(self.measure("mismatch consistency", setting, terms, part="+".join(self.cut.mixable)))
        return found

    def measure(self, metric: str, setting: str, terms: Terms, pairs: Pairs | None = None, **other: Any) -> Measure:
        """Sums of terms, class by class."""
        pairs = pairs or self.pairs
        owners = torch.stack([pairs.first, pairs.second], dim=1).numpy()
        return self.gathered(
            metric, setting, _scores(self.latents.classes, pairs, terms, owners, self.view.weights), **other
        )

    def unmeasured(self, metric: str, reason: str) -> Measure:
        """A metric that no class has."""
        return self.gathered(metric, next(iter(self.thresholds)), [reason] * len(self.latents.classes))

    def gathered(self, metric: str, setting: str, scores: Sequence[Score | str], **other: Any) -> Measure:
        where = self.where | other
        return gather(self.latents.classes, scores, len(self.view.weights), metric=metric, setting=setting, **where)


def _scores(
    classes: Sequence[str],
    pairs: Pairs,
    terms: Terms,
    owners: Int[np.ndarray, "pair 2"],
    weights: np.ndarray,
    lacking: str = "no pair of clips: the class has fewer than 2, or what is needed beside it is not there",
) -> list[Score | str]:
    numerator, denominator = (x.double().cpu().numpy() for x in terms)
    scores: list[Score | str] = []
    for c in range(len(classes)):
        rows = (pairs.cls == c).cpu().numpy()
        scores.append(score(numerator[rows], denominator[rows], owners[rows], weights) if rows.any() else lacking)
    return scores


def _graphs(view: View, how: Segments) -> list[Measure]:
    """C4 on one vector a clip; every class in a graph of its own, of as many clips as the smallest that is large enough."""
    latents, measures = view.latents, []
    counts = latents.labels.sum(0)
    fits = (counts >= 5 * how.k) & (len(latents) - counts >= 5 * how.k)
    if not fits.any():
        return []
    members = int(torch.minimum(counts, len(latents) - counts)[fits].min())
    for where, _ in vectors_of(latents, view.cuts):
        try:
            found = graph_convexity(
                SPACES["raw"].transform(where.vectors),
                latents.labels,
                how.k,
                how.pairs or GRAPH_PAIRS,
                generator=draw_for(how.seed, "graph"),
                members=members,
            )
        except ValueError:  # the same vector for every clip: no graph
            continue
        owners = torch.stack([found.pairs.first, found.pairs.second], dim=1).numpy()
        few = f"fewer than {5 * how.k} clips with it or without it"
        scores = _scores(latents.classes, found.pairs, found.terms, owners, view.weights, few)
        measures.append(
            gather(
                latents.classes,
                scores,
                len(view.weights),
                metric="graph convexity",
                layer=where.layer,
                part=where.part,
                setting=f"k={how.k}",
            )
        )
    return measures
