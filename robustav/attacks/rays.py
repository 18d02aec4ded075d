"""The nearest decision boundary along rays, on labels alone."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.attacks.ascent import Pursuit, look, put
from robustav.attacks.square import check_norms
from robustav.classifier import Classifier, Inputs
from robustav.norms import TINY, Draws, per_sample
from robustav.threat import ThreatModel

FURTHEST = 1e9  # times the budget; where inputs have no valid range, no search goes beyond


@dataclass(frozen=True)
class RayS:
    """Flip ever smaller blocks of a direction of signs, keep what meets the boundary sooner [Chen and Gu, 2020,
    arXiv:2006.12792].

    Sees of the model only whether the goal is reached, so no loss and no gradient can mislead it, and draws nothing. The
    signs of all attacked modalities lie end to end, each modality at the length of its own radius; in l2 the signs are
    scaled to unit length. There is no l1. Each clip costs `queries` passes, the first on the clean input; a clip that
    reaches the goal as it is costs no more.

    How far a better direction can be shortened is searched from its far end in strides that double, not from the middle:
    most gain little, and then this takes 2 passes, not 10. What is gained below `precision`, a share of the distance,
    is not measured, but adds up.
    """

    queries: int = 1000
    precision: float = 0.005

    knowledge: ClassVar[str] = "labels"
    survivors: ClassVar[bool] = True
    roams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.queries < 2:
            raise ValueError(f"`queries` must be at least 2, the clean input and another, got {self.queries}")
        if not 0 < self.precision < 1:
            raise ValueError(f"`precision` must lie between 0 and 1, got {self.precision}")

    def check(self, model: Classifier, threat: ThreatModel) -> None:
        """Raise `ValueError` for a norm in which signs are no good."""
        check_norms(threat)

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        return threat.project(inputs, self.smallest(model, inputs, labels, threat, draws=draws))

    def smallest(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        """The nearest point found that reaches the goal, inside the valid range but maybe outside the budget.

        The clean input where that reaches the goal already, and where no point was found.
        """
        check_norms(threat)
        rows = (~look(model, inputs, labels, threat).reached).nonzero().flatten()
        if not len(rows):
            return inputs
        clips = Pursuit(model, inputs, labels, threat, draws).at(rows)
        search = Search.begin(clips)
        for _ in range(self.queries - 1):
            signs, distance = search.proposal()
            here = look(clips.model, along(clips, signs, distance), clips.labels, clips.threat)
            search = search.told(signs, distance, here.reached, self.precision)
        found = search.found.nonzero().flatten()
        return put(inputs, rows[found], along(clips.at(found), search.signs[found], search.distance[found]))


def along(clips: Pursuit, signs: Float[Tensor, "batch coordinate"], distance: Float[Tensor, " batch"]) -> Inputs:
    """The point so many radii from the clean input in the direction of these signs, cut to the valid range."""
    budgets = clips.threat.budgets
    pieces = signs.split([math.prod(clips.inputs[m].shape[1:]) for m in sorted(budgets)], dim=1)
    points = dict(clips.inputs)
    for m, piece in zip(sorted(budgets), pieces, strict=True):
        clean, budget = clips.inputs[m], budgets[m]
        piece = piece.reshape(clean.shape).to(clean)
        if budget.writable is not None:
            piece = torch.where(budget.writable, piece, 0)
        length = distance * budget.radius(clean) / budget.rules.length(piece).clamp(min=TINY)
        points[m] = (clean + piece * per_sample(length, clean)).clamp(budget.low, budget.high)
    return points


def furthest(clips: Pursuit) -> Float[Tensor, " batch"]:
    """A distance, in radii, at which every coordinate is at the end of its valid range."""
    found = []
    for m, budget in clips.threat.budgets.items():
        clean = clips.inputs[m]
        across = budget.rules.length(torch.ones_like(clean)) * (budget.high - budget.low)
        found.append(across / budget.radius(clean))
    return torch.stack(found).amax(0).clamp(max=FURTHEST)


class Search(NamedTuple):
    """Where each clip's search stands; `proposal` is its next point, to which it is `told` the answer."""

    signs: Float[Tensor, "batch coordinate"]  # the best direction so far
    distance: Float[Tensor, " batch"]  # along it, where the goal is reached
    found: Bool[Tensor, " batch"]  # whether it has ever been reached; before that, `distance` is the furthest
    shortening: Bool[Tensor, " batch"]  # whether that distance is being shortened, or a block tried
    near: Float[Tensor, " batch"]  # where the goal is not reached
    stride: Float[Tensor, " batch"]
    level: Tensor  # blocks are 1 / 2^level of all coordinates
    block: Tensor  # which of them is tried; -1 before the first, to try no flip at all

    @classmethod
    def begin(cls, clips: Pursuit) -> "Search":
        """All signs positive, as far as it goes."""
        distance = furthest(clips)
        no, zero = torch.zeros_like(distance, dtype=torch.bool), torch.zeros_like(distance)
        whole = torch.zeros_like(distance, dtype=torch.int64)
        size = sum(math.prod(clips.inputs[m].shape[1:]) for m in clips.threat.budgets)
        signs = distance.new_ones(len(distance), size)
        return cls(signs, distance, no, no, zero, zero, whole, whole - 1)

    def proposal(self) -> tuple[Tensor, Tensor]:
        """Signs and distance of the next point: a stride nearer, or at the same distance with a block flipped."""
        size = self.signs.shape[1]
        count = (2**self.level).clamp(max=size)
        first, last = (-(-at * size // count) for at in (self.block, self.block + 1))
        place = torch.arange(size, device=self.signs.device)
        inside = (place >= first[:, None]) & (place < last[:, None]) & ~self.shortening[:, None]
        nearer = torch.maximum(self.distance - self.stride, (self.near + self.distance) / 2)
        return torch.where(inside, -self.signs, self.signs), torch.where(self.shortening, nearer, self.distance)

    def told(self, signs: Tensor, distance: Tensor, reached: Tensor, precision: float) -> "Search":
        """The search after its proposal."""
        begun = reached & ~self.shortening
        near = torch.where(begun, 0, torch.where(reached, self.near, distance))
        stride = torch.where(begun, precision * distance, 2 * self.stride)
        distance = torch.where(reached, distance, self.distance)
        shortening = (self.shortening | begun) & (distance - near > precision * distance)
        block = torch.where(shortening, self.block, self.block + 1)
        size = self.signs.shape[1]
        over = block >= (2**self.level).clamp(max=size)
        level = (self.level + over) % (math.ceil(math.log2(size)) + 1)
        signs = torch.where(reached[:, None], signs, self.signs)
        return Search(
            signs, distance, self.found | reached, shortening, near, stride, level, torch.where(over, 0, block)
        )
