"""How convex the region is in which a network accepts a class, from margins along segments between its clips.

Each definition gives a numerator and a denominator for every pair of clips, and `class_scores` adds them up. `ends` are
margins of a pair's two samples, `inside` those of points between them: see `segments`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Bool, Float, Real
from torch import Tensor

from robustav.metrics.latents import checked
from robustav.metrics.neighbours import nearest_within
from robustav.metrics.pairs import Pairs
from robustav.metrics.shortcuts import Parts

BLOCK = 2**24  # values of differences worked on at once
SIGMAS = (0.5, 1.0, 2.0, 4.0)  # noise of `hardened`, in typical distances


class Terms(NamedTuple):
    """What each pair adds to a score, which is the sum of the numerators over that of the denominators."""

    numerator: Float[Tensor, " pair"]
    denominator: Float[Tensor, " pair"]


def interior(count: int = 10) -> Float[Tensor, " point"]:
    """Weights of `count` evenly spaced points of a segment, its ends left out.

    >>> interior(3)
    tensor([0.2500, 0.5000, 0.7500])
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1 point, got {count}")
    return torch.linspace(0, 1, count + 2)[1:-1]


def li2022(points: Float[Tensor, "pair point"]) -> Terms:
    """Share of points between clips of a class that score at least tau [code released with arXiv:2203.12122].

    `points` are margins at threshold 0.1 and weights uniform in [0, 1], one a pair. Multilabel; for probabilities of a
    softmax, give `log_odds` of the logits to the engine as if they were multilabel. In [0, 1]. Where what follows the
    cut is linear, it lies between the share of pairs with both ends accepted and one minus that with both rejected:
    it then measures recall at tau, and tracks how common a class is (of a softmax only the first bound holds). Print
    `both_accepted` with it.

    >>> li2022(torch.tensor([[0.5], [-0.1]])).numerator
    tensor([1., 0.])
    """
    return _share(points, torch.ones(len(points), dtype=torch.bool, device=points.device))


def both_accepted(ends: Float[Tensor, "pair 2"]) -> Terms:
    """Share of pairs whose two clips are accepted, the least that `li2022` can be after a linear layer.

    >>> both_accepted(torch.tensor([[1.0, 2.0], [1.0, -2.0]])).numerator
    tensor([1., 0.])
    """
    return _share(ends.amin(1, keepdim=True), torch.ones(len(ends), dtype=torch.bool, device=ends.device))


def both_rejected(ends: Float[Tensor, "pair 2"]) -> Terms:
    """Share of pairs neither of whose clips is accepted; one minus it is the most that `li2022` can be, likewise.

    >>> both_rejected(torch.tensor([[-1.0, -2.0], [1.0, -2.0]])).numerator
    tensor([1., 0.])
    """
    accepted = both_accepted(ends.amax(1, keepdim=True).expand(-1, 2))
    return Terms(1 - accepted.numerator, accepted.denominator)


def conditional(ends: Float[Tensor, "pair 2"], inside: Float[Tensor, "pair point"]) -> Terms:
    """Share of points between accepted clips that are accepted [after Tětková et al., 2025, arXiv:2305.17154].

    Theirs does not ask for accepted ends. In [0, 1]; exactly 1 wherever what follows the cut is linear with a threshold
    or an arg-max on top, so cut below a non-linearity. Saturates at 1 for compact classes in many dimensions.
    With the margins of `swapped_margins` as the one point inside: how often mismatched parts are still accepted.

    >>> conditional(torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    Terms(numerator=tensor([0.5000, 0.0000]), denominator=tensor([1., 0.]))
    """
    return _share(inside, (ends >= 0).all(1))


def soft(ends: Float[Tensor, "pair 2"], inside: Float[Tensor, "pair point"]) -> Terms:
    """Smallest margin on a segment, ends included, over the larger of its ends'; mean over pairs of accepted clips.

    At most 1; negative where segments leave the region. Does not saturate as `conditional` does, and is below 1 for a
    linear head too, whose margins differ. A pair whose better end is barely accepted can outweigh all others: see
    `defect`. Pairs with both margins exactly 0 do not count.

    >>> soft(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]]))
    Terms(numerator=tensor([0.2500]), denominator=tensor([1.]))
    """
    best = ends.amax(1)
    counted = (ends >= 0).all(1) & (best > 0)
    lowest = torch.minimum(ends.amin(1), inside.amin(1))
    return Terms(torch.where(counted, lowest / torch.where(counted, best, 1), 0), counted.to(ends.dtype))


def defect(ends: Float[Tensor, "pair 2"], inside: Float[Tensor, "pair point"]) -> Terms:
    """How far margins on a segment fall below both of its ends', over the ends' mean margin; pairs of accepted clips.

    From 0, where the margin never dips between two clips, as a linear head's never does; unbounded above.

    >>> defect(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]]))
    Terms(numerator=tensor([0.5000]), denominator=tensor([1.5000]))
    """
    accepted = (ends >= 0).all(1)
    fall = (ends.amin(1) - inside.amin(1)).clamp(min=0)
    return Terms(torch.where(accepted, fall, 0), torch.where(accepted, ends.mean(1), 0))


def hardened(noisy: Float[Tensor, "pair point"], ends: Float[Tensor, "pair 2"] | None = None) -> Terms:
    """Share of noisy midpoints that are accepted: whether the region is convex, and thick.

    `noisy` are margins at weight 1/2 with `Noise` of scale sigma * `typical_distance` of each part, for one sigma of
    `SIGMAS`. Give the same seed for every sigma. In [0, 1]; falls with sigma, and below 1 also for a linear head. With
    `ends`, only over pairs of accepted clips; without, a class of low recall scores low however convex its region.

    >>> hardened(torch.tensor([[0.5], [-0.5]])).numerator
    tensor([1., 0.])
    """
    return li2022(noisy) if ends is None else conditional(ends, noisy)


def area(terms: Sequence[Terms], sigmas: Sequence[float] = SIGMAS) -> Terms:
    """Area under `hardened` as a function of sigma, over the range of sigma: its mean height, in [0, 1].

    Straight lines between the given sigmas (trapezoids), nothing beyond them; so it depends on the grid.

    >>> area([Terms(torch.tensor([share]), torch.ones(1)) for share in (1.0, 0.5, 0.0)], (1, 2, 4)).numerator
    tensor([0.4167])
    """
    steps = torch.tensor(sigmas, dtype=torch.float64).diff()
    if len(terms) != len(sigmas) or not len(steps) or not (steps > 0).all():
        raise ValueError(f"`sigmas` must rise, one for each of the {len(terms)} terms and two at least, got {sigmas}")
    if any(not torch.equal(each.denominator, terms[0].denominator) for each in terms):
        raise ValueError("`terms` must come from the same pairs at every sigma, got different denominators")
    widths = (F.pad(steps, (0, 1)) + F.pad(steps, (1, 0))) / (2 * steps.sum())
    numerators = torch.stack([each.numerator for each in terms])
    return Terms(widths.to(numerators) @ numerators, terms[0].denominator)


def flip_distances(
    margins: Float[Tensor, "pair point"], steps: Float[Tensor, " point"], lengths: Float[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """How far one can go from a clip of a class towards one outside it until the class is first rejected.

    `margins` at `steps` from 0, the clip itself, to 1, the other one; that is at weights 1 - `steps` of the pairs of
    `draw_flip_pairs`. `lengths` of the segments give the unit, see `segment_lengths`. Margins are taken to be straight
    between steps, and what happens within one is missed. inf where the whole segment is accepted, which says that the
    distance is larger than that segment alone; nan where not even the clip itself is accepted.

    >>> flip_distances(torch.tensor([[1.0, -1.0], [1.0, 2.0], [-1.0, -1.0]]), torch.tensor([0.0, 1.0]), torch.ones(3))
    tensor([0.5000,    inf,    nan])
    """
    if len(steps) != margins.shape[1] or not (steps.diff() > 0).all() or steps[0] != 0:
        raise ValueError(f"`steps` must rise from 0, one for each of {margins.shape[1]} points, got {steps.tolist()}")
    rejected = margins < 0
    flips = rejected.any(1)
    after = torch.where(flips, rejected.int().argmax(1), 1).clamp(min=1)[:, None]
    inner, outer = margins.gather(1, after - 1).squeeze(1), margins.gather(1, after).squeeze(1)
    near, far = steps.to(margins)[after.squeeze(1) - 1], steps.to(margins)[after.squeeze(1)]
    distances = torch.where(flips, (near + (far - near) * inner / (inner - outer)) * lengths, torch.inf)
    return torch.where(rejected[:, 0], torch.nan, distances)


def flipped(distances: Float[Tensor, " pair"]) -> Terms:
    """Share of the segments from accepted clips on which the class is rejected somewhere, from `flip_distances`.

    >>> flipped(torch.tensor([0.5, torch.inf, torch.nan]))
    Terms(numerator=tensor([1., 0., 0.]), denominator=tensor([1., 1., 0.]))
    """
    return Terms(distances.isfinite().to(distances.dtype), (~distances.isnan()).to(distances.dtype))


def mean_flip(distances: Float[Tensor, " pair"], lengths: Float[Tensor, " pair"]) -> Terms:
    """Distance that one goes per flip: the mean of `flip_distances` where all segments flip.

    A segment that never flips adds its length and no flip, as a lifetime that outlasts a study does: right if flips are
    as likely anywhere, and in any case no distance is lost. Read it with the share `flipped`; nan or inf without flips.

    >>> mean_flip(torch.tensor([0.5, torch.inf, torch.nan]), torch.tensor([1.0, 2.0, 3.0]))
    Terms(numerator=tensor([0.5000, 2.0000, 0.0000]), denominator=tensor([1., 0., 0.]))
    """
    gone = torch.where(distances.isinf(), lengths, distances)
    return Terms(torch.where(distances.isnan(), 0, gone), flipped(distances).numerator)


def class_scores(
    terms: Terms, pairs: Pairs, classes: int, clip_weights: Real[Tensor, " sample"] | None = None
) -> Float[Tensor, " class"]:
    """Each class's score over its pairs; nan where none counts.

    `clip_weights` say how often a resample holds each clip; a pair then counts as often as the resample could give it,
    the product of its clips' weights. Resample clips, not pairs, since pairs share clips.

    >>> pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1, 1]))
    >>> class_scores(Terms(torch.tensor([1.0, 0.0]), torch.ones(2)), pairs, 2)
    tensor([   nan, 0.5000], dtype=torch.float64)
    """
    weights = _pair_weights(pairs, clip_weights)
    empty = torch.zeros(classes, dtype=torch.float64, device=weights.device)
    numerator, denominator = (empty.index_add(0, pairs.cls, weights * term) for term in terms)
    return numerator / denominator


def typical_distance(part: Float[Tensor, "sample *feature"]) -> float:
    """Median distance of a sample to the nearest other one, the unit of noise and of flip distances.

    >>> typical_distance(torch.tensor([[0.0], [1.0], [5.0]]))
    1.0
    """
    rows = checked(part.flatten(1), "part")
    if len(rows) < 2:
        raise ValueError(f"`part` must have at least two samples, got {len(rows)}")
    distance = float(nearest_within(rows, 1).distances.double().quantile(0.5))
    if not distance > 0:
        raise ValueError("`part` must differ between samples, got half of them or more with a copy: drop duplicates")
    return distance


def segment_lengths(parts: Parts, pairs: Pairs, units: dict[str, float]) -> Float[Tensor, " pair"]:
    """Distance between the two samples of each pair, each of the parts in `units` measured in its own unit.

    >>> pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    >>> segment_lengths({"audio": torch.tensor([[0.0], [3.0]]), "visual": torch.eye(2)}, pairs, {"audio": 1.5})
    tensor([2.])
    """
    if not units or not units.keys() <= parts.keys():
        raise ValueError(f"`units` must name parts among {sorted(parts)}, at least one, got {sorted(units)}")
    largest = max(parts[name][0].numel() for name in units)
    lengths = []
    for rows in torch.arange(len(pairs.first), device=pairs.first.device).split(max(1, BLOCK // max(1, largest))):
        first, second = pairs.first[rows], pairs.second[rows]
        squares = [
            ((parts[name][first] - parts[name][second]).flatten(1) / unit).square().sum(1)
            for name, unit in units.items()
        ]
        lengths.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(lengths)


def log_odds(logits: Float[Tensor, "point class"]) -> Float[Tensor, "point class"]:
    """Logits of the softmax's probabilities, each class against all others together.

    >>> log_odds(torch.tensor([[0.0, 0.0]]))
    tensor([[0., 0.]])
    """
    logs = logits.log_softmax(1)
    return logs - torch.log(-torch.expm1(logs))


def f1_thresholds(
    logits: Float[Tensor, "sample class"], labels: Bool[Tensor, "sample class"]
) -> Float[Tensor, " class"]:
    """Of each class, the probability from which accepting gives the highest F1, the operating threshold of tagging.

    Midway in logits between the two scores that it separates; the highest of several as good; nan without positives.
    Fit it on other clips than those measured. Logits beyond 36 are not told apart.

    >>> f1_thresholds(torch.tensor([[2.0], [1.0], [-1.0]]), torch.tensor([[True], [True], [False]]))
    tensor([0.5000], dtype=torch.float64)
    """
    if logits.shape != labels.shape or not len(logits):
        raise ValueError(f"`labels` must be {list(logits.shape)} like `logits`, not empty, got {list(labels.shape)}")
    if logits.isnan().any():
        raise ValueError(f"`logits` must be numbers, got nan in {logits.isnan().sum()} places")
    cuts = [_f1_cut(scores, positive) for scores, positive in zip(logits.double().T, labels.T, strict=True)]
    almost_one = 1 - torch.finfo(torch.float64).eps / 2
    return torch.stack(cuts).sigmoid().clamp(max=almost_one)


def _f1_cut(scores: Tensor, positive: Tensor) -> Tensor:
    """One class's threshold as a logit."""
    ordered, order = scores.sort(descending=True)
    hits = positive[order].cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(scores) + 1, device=scores.device) + hits[-1])
    below = torch.cat([ordered[1:], ordered[-1:] - 2])
    f1[ordered == below] = -1  # a threshold cannot part equal scores
    best = f1.argmax()
    return ((ordered + below) / 2)[best] if hits[-1] else scores.new_tensor(torch.nan)


def _share(points: Tensor, counted: Tensor) -> Terms:
    """Share of accepted points, of the pairs that count."""
    accepted = (points >= 0).to(points.dtype).mean(1)
    return Terms(torch.where(counted, accepted, 0), counted.to(points.dtype))


def _pair_weights(pairs: Pairs, clip_weights: Tensor | None) -> Tensor:
    if clip_weights is None:
        return torch.ones(len(pairs.cls), dtype=torch.float64, device=pairs.cls.device)
    return (clip_weights[pairs.first] * clip_weights[pairs.second]).double()
