"""What latent metrics say of a training set to mix-up: which clips to draw, whom to pair them with, how far to mix.

Pure functions. A membership is a clip with one of its labels; a clip with three labels has three. Clips without a label
make up a class of their own, one past the last, so that they are drawn too.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustav.classifier import LabelKind
from robustav.metrics.convexity import class_scores, hardened, interior, soft, typical_distance
from robustav.metrics.neighbours import nearest
from robustav.metrics.pairs import draw_pairs
from robustav.metrics.relative_density import balanced, relative_density
from robustav.metrics.segments import Noise, end_margins, margins_along, sample_logits
from robustav.metrics.shortcuts import Finish

CEILING = 10.0  # times the median, beyond which no clip of a class is likelier to be drawn
NEAREST = 5  # clips outside the class among which a partner is drawn
NONE = -1  # where no neighbour was measured
POINTS = 5  # of a segment, ends left out
LATENT = "latent"


class Members(NamedTuple):
    """All memberships in order of class, then of clip."""

    clips: Int[Tensor, " member"]
    classes: Int[Tensor, " member"]
    first: Int[Tensor, " end"]  # where each class begins, and at last where all end


def with_none(targets: Float[Tensor, "sample class"]) -> Bool[Tensor, "sample label"]:
    """Labels, and one more for clips that have none.

    >>> with_none(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor([[ True, False, False],
            [False, False,  True]])
    """
    labels = targets > 0.5
    return torch.cat([labels, ~labels.any(1, keepdim=True)], dim=1)


def members_of(labels: Bool[Tensor, "sample label"]) -> Members:
    """Every clip with each of its labels.

    >>> members_of(torch.tensor([[True, False], [True, True]]))
    Members(clips=tensor([0, 1, 1]), classes=tensor([0, 0, 1]), first=tensor([0, 2, 3]))
    """
    classes, clips = labels.T.nonzero().unbind(1)
    return Members(clips, classes, torch.cat([clips.new_zeros(1), labels.sum(0).cumsum(0)]))


class Around(NamedTuple):
    """Of each membership, how it lies: relative density (nan: not measured), and clips outside the class (`NONE`)."""

    density: Float[Tensor, " member"]
    outside: Int[Tensor, "member near"]


def around(
    latents: Float[Tensor, "measured dim"],
    rows: Int[Tensor, " measured"],
    labels: Bool[Tensor, "sample label"],
    k: int,
    generator: torch.Generator,
) -> Around:
    """Relative density of each membership, and the clips outside its class that are nearest; of the measured `rows`.

    Density is `relative_density` among as many others as members, so of a class of more than half the clips some have
    none. Nor has a class of fewer than k + 1 measured clips. Outside is whoever lacks this label, even if they share
    another.
    """
    members = members_of(labels)
    density = torch.full((len(members.clips),), torch.nan)
    outside = torch.full((len(members.clips), NEAREST), NONE)
    measured = labels[rows]
    for label in range(labels.shape[1]):
        inside = measured[:, label]
        own, others = rows[inside], rows[~inside]
        if not len(own) or not len(others):
            continue
        start, end = members.first[label], members.first[label + 1]
        position = start + torch.searchsorted(members.clips[start:end], own)
        near = nearest(latents[inside], latents[~inside], min(NEAREST, len(others))).indices
        outside[position, : near.shape[1]] = others[near]
        chosen = balanced(inside, generator)
        if len(chosen.members) > k and len(chosen.others) >= k:
            found = relative_density(latents[chosen.members], latents[chosen.others], k).float()
            place = start + torch.searchsorted(members.clips[start:end], rows[chosen.members])
            density[place] = found
    return Around(density, outside)


def convexity(
    latents: Float[Tensor, "measured dim"],
    labels: Bool[Tensor, "measured class"],
    finish: Finish,
    label_kind: LabelKind,
    *,
    kind: str,
    pairs: int,
    generator: torch.Generator,
) -> Float[Tensor, " class"]:
    """How far each class's clips can be mixed, in [0, 1]: "soft" or "hardened" at one typical distance of noise.

    A class of which no pair counts has 0: what the network does not recognise leaves no room to mix.
    """
    parts, drawn = {LATENT: latents}, draw_pairs(labels, pairs, generator)
    if not len(drawn.cls):
        return torch.zeros(labels.shape[1])
    if kind == "soft":
        weights = interior(POINTS).expand(len(drawn.cls), -1)
        inside = margins_along(finish, parts, drawn, weights, label_kind=label_kind)
        terms = soft(end_margins(sample_logits(finish, parts), drawn, label_kind=label_kind), inside)
    else:
        noise = Noise({LATENT: typical_distance(latents)}, generator)
        middle = torch.full((len(drawn.cls), 1), 0.5)
        terms = hardened(margins_along(finish, parts, drawn, middle, label_kind=label_kind, noise=noise))
    return class_scores(terms, drawn, labels.shape[1]).nan_to_num(0).clamp(0, 1).float()


def class_weights(
    sizes: Int[Tensor, " label"], convexity: Float[Tensor, " label"], power: float, floor: float
) -> Float[Tensor, " label"]:
    """How likely each class is, `n^power (1 - convexity + floor)`, to a sum of 1: large ones and those far from convex.

    >>> class_weights(torch.tensor([100, 100, 0]), torch.tensor([0.1, 0.6, 0.0]), 0.5, 0.1)
    tensor([0.6667, 0.3333, 0.0000])
    """
    weights = torch.where(sizes > 0, sizes.float() ** power * (1 - convexity + floor), 0)
    return weights / weights.sum()


def clip_weights(density: Float[Tensor, " member"]) -> Float[Tensor, " member"]:
    """How likely each clip of a class is, `exp(-density / spread)`, to a sum of 1: those between classes first.

    The spread is the interquartile range; no clip has more than `CEILING` times the median weight, and one whose density
    is not known has the median weight.

    >>> 5 * clip_weights(torch.tensor([-9.0, 1.0, 2.0, 3.0, torch.nan]))
    tensor([3.6528, 0.4174, 0.3197, 0.2449, 0.3653])
    """
    known = density[~density.isnan()]
    if not len(known):
        return torch.full_like(density, 1 / max(1, len(density)))
    low, median, high = known.quantile(torch.tensor([0.25, 0.5, 0.75]).to(known))
    spread = high - low
    steps = (median - density) / spread if spread > 0 else torch.zeros_like(density)
    weights = steps.nan_to_num(0).exp().clamp(max=CEILING)
    return weights / weights.sum()


def member_weights(
    members: Members, density: Float[Tensor, " member"], convexity: Float[Tensor, " label"], power: float, floor: float
) -> Float[Tensor, " member"]:
    """How likely each membership is to be drawn, to a sum of 1: a class by `class_weights`, then a clip of it."""
    classes = class_weights(members.first.diff(), convexity, power, floor)
    ends = members.first.tolist()
    inside = [clip_weights(density[start:end]) for start, end in pairwise(ends)]
    return torch.cat(inside) * classes[members.classes]


def pick(weights: Float[Tensor, " member"], uniform: Float[Tensor, " draw"]) -> Int[Tensor, " draw"]:
    """Draw by weight, from numbers uniform in [0, 1).

    >>> pick(torch.tensor([0.25, 0.0, 0.75]), torch.tensor([0.1, 0.3, 0.9]))
    tensor([0, 2, 2])
    """
    ends = weights.double().cumsum(0)
    found = torch.searchsorted(ends, uniform.double() * ends[-1], right=True)
    return found.clamp(max=len(weights) - 1)


def memberships_at(
    members: Members, labels: Bool[Tensor, "draw label"], rows: Int[Tensor, " draw"], uniform: Float[Tensor, " draw"]
) -> Int[Tensor, " draw"]:
    """Of given clips, the membership in one of their labels, all as likely."""
    nth = (uniform * labels.sum(1)).long() + 1
    label = (labels.cumsum(1) >= nth[:, None]).int().argmax(1)
    return torch.stack(
        [
            start + torch.searchsorted(members.clips[start:end], row)
            for start, end, row in zip(members.first[label], members.first[label + 1], rows, strict=True)
        ]
    )


def mates(members: Members, chosen: Int[Tensor, " draw"], uniform: Float[Tensor, " draw"]) -> Int[Tensor, " draw"]:
    """Another clip of the same class, all as likely; the clip itself where it is alone.

    >>> members = members_of(torch.tensor([[True], [True], [True]]))
    >>> mates(members, torch.tensor([1, 1]), torch.tensor([0.2, 0.7]))
    tensor([0, 2])
    """
    start = members.first[members.classes[chosen]]
    size = members.first[members.classes[chosen] + 1] - start
    nth = (uniform * (size - 1)).long()
    nth = torch.where((nth >= chosen - start) & (size > 1), nth + 1, nth)
    return members.clips[start + nth]


def outsiders(
    members: Members,
    outside: Int[Tensor, "member near"],
    chosen: Int[Tensor, " draw"],
    uniform: Float[Tensor, " draw"],
) -> Int[Tensor, " draw"]:
    """One of the nearest clips outside the class, all as likely; `NONE` where none was measured."""
    near = outside[chosen]
    known = (near != NONE).sum(1)
    nth = (uniform * known).long()
    return torch.where(known > 0, near.gather(1, nth[:, None]).squeeze(1), NONE)


def anyone(clips: int, uniform: Float[Tensor, " draw"]) -> Int[Tensor, " draw"]:
    """Any clip of the set, all as likely.

    >>> anyone(10, torch.tensor([0.0, 0.55]))
    tensor([0, 5])
    """
    return (uniform * clips).long().clamp(max=clips - 1)
