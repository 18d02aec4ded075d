"""Random search over boxes, on scores alone."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.attacks.ascent import Point, Pursuit, look, put
from robustav.classifier import Classifier, Inputs
from robustav.goals import Goal
from robustav.losses import LOSSES, margin, top1_margin
from robustav.norms import TINY, Draws, per_sample
from robustav.threat import Budget, ThreatModel

# Parts of all queries after which the boxes are half as large.
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
LUCK = 8  # draws that a proposal takes, besides one a channel
LEAST = 3  # shortest side of a box in l2


@dataclass(frozen=True)
class Square:
    """Write one box after another, keep what raises the loss [Andriushchenko et al., 2020, arXiv:1912.00049].

    Boxes begin as `share` of the input. In pictures they are squares in one frame (as large as `share` asks, or all of
    it), with a sign a channel; in waveforms intervals of a square wave (l2: a sine) whose period is drawn
    between two samples and twice the interval, for what is constant never passes a front end; in features of two axes
    rectangles. Every modality is written at once. In l2 the mass of two boxes is moved to one. There is no l1.

    Each clip costs `queries` passes, with `stop` until its first success. The loss is the margin that decides a lost hit
    where that is the success, else the goal's own, unless `loss` names one of `robustav.losses.LOSSES`.
    """

    queries: int = 5000
    share: float = 0.8
    loss: str = ""
    stop: bool = True

    knowledge: ClassVar[str] = "scores"
    survivors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"`queries` must be at least 1, got {self.queries}")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must lie above 0 and at most at 1, got {self.share}")
        if self.loss and self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, or empty for a margin, got {self.loss!r}")

    def check(self, model: Classifier, threat: ThreatModel) -> None:
        """Raise `ValueError` for a norm in which signs are no good."""
        check_norms(threat)

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        check_norms(threat)
        clips = Pursuit(model, inputs, labels, self._steered(threat), draws)
        luck = {m: self._drawn(inputs[m], draws) for m in threat.budgets}
        x = {m: stripes(budget, inputs[m], draws) for m, budget in threat.budgets.items()}
        best = look(model, {**inputs, **x}, labels, clips.threat)
        found, rows = best.inputs, torch.arange(len(labels), device=labels.device)
        for query in range(1, self.queries):
            if self.stop and best.reached.any():
                left = (~best.reached).nonzero().flatten()
                found, rows = put(found, rows, best.inputs), rows[left]
                if not len(rows):
                    return found
                best = Point({m: x[left] for m, x in best.inputs.items()}, best.loss[left], best.reached[left])
                clips, luck = clips.at(left), {m: drawn[left] for m, drawn in luck.items()}
            share = self.share / 2 ** sum(query > part * self.queries for part in HALVINGS)
            x = {
                m: PROPOSALS[budget.norm](budget, clips.inputs[m], best.inputs[m], share, luck[m][:, query])
                for m, budget in clips.threat.budgets.items()
            }
            best = best.or_better(look(clips.model, {**best.inputs, **x}, clips.labels, clips.threat))
        return put(found, rows, best.inputs)

    def _drawn(self, x: Tensor, draws: Draws) -> Float[Tensor, "batch query number"]:
        """Uniform numbers for all of a modality's proposals, so that nothing is drawn between queries."""
        numbers = LUCK + Grid.of(x).channel
        return torch.stack([torch.rand(self.queries, numbers, generator=draw) for draw in draws]).to(x)

    def _steered(self, threat: ThreatModel) -> ThreatModel:
        """The threat, climbed by way of the loss that was asked for or that decides."""
        goal = threat.goal
        if not self.loss:
            return threat.steered(DECISIVE[kind]) if (kind := _decided_by(goal)) in DECISIVE else threat
        fitting = sorted(name for name, loss in LOSSES.items() if loss.label_kind == goal.label_kind)
        if self.loss not in fitting:
            raise ValueError(f"`loss` must be one of {fitting} for {goal.label_kind} labels, got {self.loss!r}")
        return threat.steered(LOSSES[self.loss].value)


# Losses above 0 exactly where a goal's success rule holds.
DECISIVE = {
    ("multiclass", "top1"): margin,
    ("multiclass", "misclassified"): margin,
    ("multilabel", "top1"): top1_margin,
}


def _decided_by(goal: Goal) -> tuple[str, str]:
    return goal.label_kind, getattr(goal, "success", "")


def check_norms(threat: ThreatModel) -> None:
    """Raise `ValueError` where signs are no good: in l1 they are the longest perturbation of a size, not the shortest."""
    if odd := sorted(m for m, budget in threat.budgets.items() if budget.norm not in PROPOSALS):
        raise ValueError(
            f"`threat` must use the norms {sorted(PROPOSALS)} for an attack that searches over signs, "
            f"got {threat.budgets[odd[0]].norm!r} for {odd[0]!r}: choose an attack with gradients"
        )


class Grid(NamedTuple):
    """The axes of an input as boxes know them: the last two are height and width, the one before holds channels."""

    frame: int
    channel: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> "Grid":
        """Axes that a batch does not have are 1; all before the channels count as frames."""
        shape = (1,) * (5 - x.ndim) + tuple(x.shape[1:])
        return cls(math.prod(shape[:-3]), *shape[-3:])

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of the axes that boxes cut."""
        return self.frame, self.height, self.width


class Box(NamedTuple):
    """A box for each clip: its first indices along frame, height and width, [batch] each, and its size there."""

    first: tuple[Tensor, ...]
    size: tuple[int, int, int]

    @classmethod
    def drawn(cls, grid: Grid, size: tuple[int, int, int], luck: Float[Tensor, "batch 3"]) -> "Box":
        """Anywhere inside the grid."""
        free = zip(luck.unbind(1), grid.lengths, size, strict=True)
        return cls(tuple((draw * (length - s + 1)).floor() for draw, length, s in free), size)

    def places(self, grid: Grid) -> list[Tensor]:
        """For each axis, where its indices lie in the box: from 0 to 1 inside; they broadcast to [batch, *grid]."""
        found = []
        for axis, length, first, size in zip((1, 3, 4), grid.lengths, self.first, self.size, strict=True):
            at = torch.arange(length, device=first.device) + 0.5
            shape = [len(first), *(length if axis == i else 1 for i in range(1, 5))]
            found.append(((at - first[:, None]) / size).reshape(shape))
        return found

    def inside(self, grid: Grid) -> Bool[Tensor, "batch frame 1 height width"]:
        """Which cells it holds."""
        frame, height, width = ((place > 0) & (place < 1) for place in self.places(grid))
        return frame & height & width


def box_size(grid: Grid, share: float, least: int = 1) -> tuple[int, int, int]:
    """Frames, height and width of boxes that are `share` of the grid, all in one frame if it can hold them, as square
    as the frame allows, no side shorter than `least`."""
    area = share * math.prod(grid.lengths)
    height = _side(max(math.sqrt(area), area / grid.width), least, grid.height)
    return 1, height, _side(area / height, least, grid.width)


def _side(length: float, least: int, most: int) -> int:
    return min(max(round(length), least), most)


def stripes(budget: Budget, clean: Tensor, draws: Draws) -> Tensor:
    """Where the search starts: a sign for each column, channel and frame; in a waveform, a square wave."""
    grid, signs = Grid.of(clean), []
    for draw in draws:
        if grid.height == 1:
            period, phase = torch.rand(2, 1, generator=draw)
            drawn = tone(grid, grid.width, period, phase)[0]
        else:
            drawn = torch.rand(grid.frame, grid.channel, 1, grid.width, generator=draw) - 0.5
        signs.append(_signs(drawn).expand(*grid).reshape(clean.shape[1:]))
    pattern = torch.stack(signs).to(clean)
    unit = pattern / per_sample(budget.rules.length(pattern), pattern)
    return budget.project(clean, clean + unit * per_sample(budget.radius(clean), clean))


def tone(grid: Grid, width: int, period: Tensor, phase: Tensor) -> Float[Tensor, "batch 1 1 1 width"]:
    """A sine whose period lies, log-uniformly for a uniform `period`, between 2 and twice `width`."""
    time = torch.arange(grid.width, device=period.device)
    turns = time / (2 * width**period)[:, None] + phase[:, None]
    return (2 * math.pi * turns).sin()[:, None, None, None]


def _signs(x: Tensor) -> Tensor:
    return 1 - 2 * (x < 0).to(x)


def corner(budget: Budget, clean: Tensor, x: Tensor, share: float, luck: Tensor) -> Tensor:
    """Of an linf ball: every cell of a box at the edge of the budget, in the other direction if it is there already."""
    grid = Grid.of(clean)
    box = Box.drawn(grid, box_size(grid, share), luck[:, 0:3])
    signs = _signs(luck[:, LUCK : LUCK + grid.channel] - 0.5)[:, None, :, None, None]
    if grid.height == 1:
        signs = signs * _signs(tone(grid, box.size[2], luck[:, 6], luck[:, 7]))
    delta, radius, inside = (x - clean).reshape(-1, *grid), budget.radius(clean), box.inside(grid)

    def written(signs: Tensor) -> Tensor:
        moved = torch.where(inside, signs * per_sample(radius, delta), delta)
        return budget.project(clean, clean + moved.reshape(clean.shape))

    here = written(signs)
    idle = (here == x).flatten(1).all(1)
    return torch.where(per_sample(idle, x).bool(), written(-signs), here) if idle.any() else here  # type: ignore[union-attr]


def gathered(budget: Budget, clean: Tensor, x: Tensor, share: float, luck: Tensor) -> Tensor:
    """Of an l2 ball: what two boxes hold, and what the budget has left, all in one of them, with a wave added to it.

    Across a picture's box lie one or two halves of a sine, drawn for each axis.
    """
    grid = Grid.of(clean)
    size = box_size(grid, share, LEAST)
    box, other = (Box.drawn(grid, size, luck[:, i : i + 3]) for i in (0, 3))
    inside, outside = box.inside(grid), other.inside(grid)
    if grid.height == 1:
        wave = tone(grid, size[2], luck[:, 6], luck[:, 7])
    else:
        _, down, right = box.places(grid)
        wave = halves(down, size[1], luck[:, 6]) * halves(right, size[2], luck[:, 7])
    signs = _signs(luck[:, LUCK : LUCK + grid.channel] - 0.5)[:, None, :, None, None]
    delta = (x - clean).reshape(-1, *grid)
    unused = (budget.radius(clean) ** 2 - delta.square().flatten(1).sum(1)).clamp(min=0) / grid.channel
    available = _mass(torch.where(inside | outside, delta, 0)) + per_sample(unused, delta)
    mixed = _unit(signs * _unit(torch.where(inside, wave, 0)) + _unit(torch.where(inside, delta, 0)))
    moved = torch.where(inside, mixed * available.sqrt(), torch.where(outside, 0, delta))
    return budget.project(clean, clean + moved.reshape(clean.shape))


def halves(place: Tensor, length: int, luck: Tensor) -> Tensor:
    """One or two halves of a sine across an axis of a box; one where it is a single cell long."""
    count = 1 + ((luck < 0.5).to(place) if length > 1 else torch.zeros_like(luck))
    return (math.pi * per_sample(count, place) * place).sin()  # type: ignore[no-any-return, operator]


def _mass(delta: Float[Tensor, "batch frame channel height width"]) -> Float[Tensor, "batch 1 channel 1 1"]:
    return delta.square().sum((1, 3, 4), keepdim=True)


def _unit(delta: Tensor) -> Tensor:
    """Each channel at length 1."""
    return delta / _mass(delta).sqrt().clamp(min=TINY)


PROPOSALS = {"linf": corner, "l2": gathered}
