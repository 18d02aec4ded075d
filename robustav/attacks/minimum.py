"""Attacks that look for the smallest perturbation: how far each goal is from being reached, and what they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.attacks.ascent import Point, Pursuit, climb, look, put
from robustav.classifier import Classifier, Inputs
from robustav.goals import OWN, Goal, Hide, Inject, Targeted, label_set
from robustav.losses import Logits, margin, multi_hot, top1_margin
from robustav.norms import Draws, per_sample
from robustav.threat import ThreatModel

FURTHEST = 1e9  # times the budget; where inputs have no valid range, no search goes beyond
ENOUGH = 0.999  # gauge at which `stop` is content: what the last projection takes back then decides nothing
HAIR = 1e-4  # share by which the way back stops short of the estimated crossing: more than float32 loses in logits
SECANTS = 30  # evaluations of a projection at most; few ranges take more than ten
EXACT = 1e-9  # share of the wanted gain that a projection may miss
LAST_PROJECTIONS = 2  # of the clean input, each a gradient and a look
WAY_BACK = 3  # passes on the way from what was found to the clean input


class Crossing(NamedTuple):
    """How far each clip is from a goal, in logits: above 0 where the goal is reached, below where it is not."""

    labels: Tensor  # what the margins are taken against: the labels, or what the model said of the clean input
    margin: Callable[[Tensor, Tensor], Tensor]  # logits, labels -> [batch]: the largest of the ways
    ways: Callable[[Tensor, Tensor], Tensor]  # -> [batch, way]: each alone would do; minus infinity where there is none


def crossing(goal: Goal, labels: Tensor) -> Crossing:
    """The margins of a goal. Raises `ValueError` where it is not decided by where logits stand to each other or to a
    threshold."""
    if "success" in goal.__dataclass_fields__:
        return _of_success(goal, labels)
    if type(goal) not in CROSSINGS:
        raise unknown_margin(goal)
    if isinstance(goal, Hide) and goal.chosen == OWN:
        level = _logit(goal.threshold)

        def hidden(logits: Tensor, of: Tensor) -> Tensor:
            return level - logits.masked_fill(of <= 0.5, -math.inf).amax(1)

        return Crossing(labels, hidden, lambda logits, of: hidden(logits, of)[:, None])
    return _one_way(labels, CROSSINGS[type(goal)](goal))


def unknown_margin(goal: Goal) -> ValueError:
    """The error for a goal without a margin."""
    known = sorted(kind.__name__ for kind in CROSSINGS)
    return ValueError(
        f"a minimum-norm attack needs a margin that crosses zero where the goal is reached: known for goals with a "
        f"`success` rule and for {known}, got {type(goal).__name__}: use an attack on the goal's own loss"
    )


def _of_success(goal: Any, labels: Tensor) -> Crossing:
    """An untargeted mistake. A label set differs where any one class of it does, so the clean set takes the labels'
    place."""
    if goal.success == "label-set":
        if goal.clean is None:
            raise ValueError(
                "success 'label-set' compares with the clean prediction: call `threat.given(clean=trace)` first"
            )
        said = goal.clean.logits
        one = goal.label_kind == "multiclass"
        labels = said.argmax(1) if one else label_set(said, goal.threshold, goal.label_kind).to(said)
    if goal.label_kind == "multiclass" or goal.success == "top1":
        return Crossing(labels, lambda logits, of: top1_margin(logits, multi_hot(of, logits)), rivals)
    level = _logit(goal.threshold)
    return Crossing(
        labels, lambda logits, of: flips(logits, of, level).amax(1), lambda logits, of: flips(logits, of, level)
    )


def rivals(logits: Logits, labels: Tensor) -> Float[Tensor, "batch class"]:
    """For each class that is no label, its lead over the best label; without labels, its score."""
    positive = multi_hot(labels, logits) > 0.5
    right = logits.masked_fill(~positive, -math.inf).amax(1, keepdim=True)
    return logits.masked_fill(positive, -math.inf) - torch.where(right.isinf(), 0, right)


def flips(logits: Logits, labels: Tensor, level: float) -> Float[Tensor, "batch class"]:
    """For each class, how far its logit is on the wrong side of `level`."""
    return (logits - level) * (1 - 2 * labels.to(logits))


def _logit(threshold: float) -> float:
    return math.log(threshold / (1 - threshold))


def _one_way(labels: Tensor, value: Callable[[Tensor], Tensor]) -> Crossing:
    return Crossing(labels, lambda logits, _: value(logits), lambda logits, _: value(logits)[:, None])


def _targeted(goal: Targeted) -> Callable[[Tensor], Tensor]:
    return lambda logits: -margin(logits, torch.full_like(logits[:, 0], goal.target, dtype=torch.int64))


def _hide(goal: Hide) -> Callable[[Tensor], Tensor]:
    """All of the chosen must fall: the highest decides."""
    return lambda logits: _logit(goal.threshold) - logits[:, list(goal.chosen)].amax(1)


def _inject(goal: Inject) -> Callable[[Tensor], Tensor]:
    """All of the chosen must rise: the lowest decides."""
    return lambda logits: logits[:, list(goal.chosen)].amin(1) - _logit(goal.threshold)


CROSSINGS: dict[type[Goal], Callable[[Any], Callable[[Tensor], Tensor]]] = {
    Targeted: _targeted,
    Hide: _hide,
    Inject: _inject,
}


class Nearest(NamedTuple):
    """The best that was found: of points that reach the goal the smallest, before there is one the one with the largest
    margin."""

    inputs: Inputs
    margin: Tensor  # [batch]
    gauge: Tensor  # [batch], float64; infinite before the goal was reached

    @classmethod
    def none(cls, inputs: Inputs) -> "Nearest":
        """Before the first look."""
        x = next(iter(inputs.values()))
        return cls(inputs, x.new_full((len(x),), -math.inf), x.new_full((len(x),), math.inf, dtype=torch.float64))

    def or_nearer(self, rows: Tensor, point: Point, gauge: Tensor) -> "Nearest":
        """The best when the clips `rows` have also been at `point`."""
        before = self.gauge[rows]
        higher = before.isinf() & (point.reached | (point.loss > self.margin[rows]))
        better = higher | point.reached & (gauge < before)
        chosen = rows[better]
        gauge = torch.where(point.reached, gauge, math.inf)
        return Nearest(
            put(self.inputs, chosen, {m: x[better] for m, x in point.inputs.items()}),
            self.margin.index_copy(0, chosen, point.loss[better].to(self.margin)),
            self.gauge.index_copy(0, chosen, gauge[better]),
        )


class MinimumNorm(ABC):
    """An attack that looks for the point of smallest gauge that reaches the goal, wherever the budget ends.

    The gauge is the largest length over radius of the attacked modalities: the radii only say how modalities compare,
    and one run of `smallest` is the whole curve of robustness over epsilon. Called, the attack offers that point where
    it lies in the budget, and otherwise the point nearest to it that does; with `stop` it leaves a clip alone once it has
    one in the budget. On top of what `pursue` spends come a forward pass on the clean inputs and, where something was
    found, `LAST_PROJECTIONS` gradients with two passes each and `WAY_BACK` passes.
    """

    roams: ClassVar[bool] = True
    survivors: ClassVar[bool] = True
    stop: bool

    def check(self, model: Classifier, threat: ThreatModel) -> None:
        """Raise `ValueError` for a goal that no margin decides."""
        if "success" not in threat.goal.__dataclass_fields__ and type(threat.goal) not in CROSSINGS:
            raise unknown_margin(threat.goal)

    @abstractmethod
    def pursue(self, chase: Pursuit, towards: Crossing, enough: float) -> Nearest:
        """Look at ever smaller points for clips that do not reach the goal as they are, until a gauge of `enough`.

        The loss of `chase` is the margin of `towards`, and its labels are those of `towards`.
        """

    def smallest(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        """The smallest point found that reaches the goal, inside the valid range but maybe outside the budget.

        The clean input where that reaches the goal already, and where no point was found.
        """
        nearest = self._nearest(Pursuit(model, inputs, labels, threat, draws), 0.0)
        lost = nearest.gauge.isinf().nonzero().flatten()
        return put(nearest.inputs, lost, {m: x[lost] for m, x in inputs.items()})

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        nearest = self._nearest(Pursuit(model, inputs, labels, threat, draws), ENOUGH if self.stop else 0.0)
        return threat.project(inputs, nearest.inputs)

    def _nearest(self, chase: Pursuit, enough: float) -> Nearest:
        towards = crossing(chase.threat.goal, chase.labels)
        chase = chase._replace(labels=towards.labels, threat=chase.threat.steered(towards.margin))
        clean = look(chase.model, chase.inputs, chase.labels, chase.threat)
        nearest = Nearest.none(chase.inputs).or_nearer(
            torch.arange(len(clean.reached), device=clean.reached.device), clean, torch.zeros_like(clean.loss).double()
        )
        rows = (~clean.reached).nonzero().flatten()
        if not len(rows):
            return nearest
        part = chase.at(rows)
        found = self.pursue(part, towards._replace(labels=part.labels), enough)
        found = walk_back(part, clean.loss[rows], straighten(part, found, enough), enough)
        return Nearest(
            put(nearest.inputs, rows, found.inputs),
            nearest.margin.index_copy(0, rows, found.margin),
            nearest.gauge.index_copy(0, rows, found.gauge),
        )


def straighten(chase: Pursuit, found: Nearest, enough: float) -> Nearest:
    """Once more from the clean input to the boundary, by the shortest way if it is flat around what was found."""
    rows = (found.gauge.isfinite() & (found.gauge > enough)).nonzero().flatten()
    part, far = chase.at(rows), {m: x[rows] for m, x in found.inputs.items()}
    for _ in range(LAST_PROJECTIONS if len(rows) else 0):
        there, slopes = climb(part.model, far, part.labels, part.threat)
        missing = gain(slopes, {m: far[m].double() - part.inputs[m].double() for m in slopes}) - there.loss
        step, _ = shortest(part, part.inputs, slopes, missing * (1 + HAIR))
        far = within(part, {m: x + step[m].to(x) if m in step else x for m, x in part.inputs.items()})
        here = look(part.model, far, part.labels, part.threat)
        found = found.or_nearer(rows, here, part.threat.gauge(part.inputs, far))
    return found


def walk_back(chase: Pursuit, margin: Tensor, found: Nearest, enough: float) -> Nearest:
    """From what was found straight towards the clean input, whose margin is given, to just before the crossing.

    Regula falsi; a hair short of the crossing, so that no rounding decides the verdict.
    """
    rows = (found.gauge.isfinite() & (found.gauge > enough)).nonzero().flatten()
    part = chase.at(rows)
    low, below = torch.zeros_like(found.gauge[rows]), margin[rows].double()
    high, above = torch.ones_like(low), found.margin[rows].double()
    far = {m: x[rows] for m, x in found.inputs.items()}
    for _ in range(WAY_BACK if len(rows) else 0):
        root = (low - (high - low) * below / (above - below)) * (1 + HAIR)
        share = root.nan_to_num(1.0).clamp(low, high)
        x = within(part, {m: x + (far[m] - x) * per_sample(share, x) for m, x in part.inputs.items()})
        here = look(part.model, x, part.labels, part.threat)
        found = found.or_nearer(rows, here, part.threat.gauge(part.inputs, x))
        low, below = torch.where(here.reached, low, share), torch.where(here.reached, below, here.loss.double())
        high, above = torch.where(here.reached, share, high), torch.where(here.reached, here.loss.double(), above)
    return found


def within(chase: Pursuit, x: Inputs) -> Inputs:
    """Cut to the valid range."""
    return {**chase.inputs, **{m: x[m].clamp(b.low, b.high) for m, b in chase.threat.budgets.items()}}


def shortest(chase: Pursuit, x: Inputs, slopes: Inputs, wanted: Tensor) -> tuple[Inputs, Tensor]:
    """The step of smallest gauge from `x` by which a loss with these slopes gains `wanted` (negative: loses as much), and
    its gauge; as far as it goes, where the valid range does not let it gain that much.

    The gain is a concave function of the gauge. So the secant through two points left of the solution ends left of it,
    closer each time, and the first guess is the solution itself where the valid range does not bind.
    """
    slopes = {m: slope.double() * per_sample(wanted.sign(), slope.double()) for m, slope in slopes.items()}
    wanted, room = wanted.abs(), rooms(chase, x)
    gauge = wanted / dual(chase, slopes)
    gauge = torch.where(gauge.isfinite(), gauge, 0.0)
    gauge_before, gained_before = torch.zeros_like(gauge), torch.zeros_like(gauge)
    for _ in range(SECANTS):
        step = moves(chase, slopes, room, gauge)
        gained = gain(slopes, step)
        rate = (gained - gained_before) / (gauge - gauge_before)
        further = (wanted - gained > EXACT * wanted) & (rate > 0)
        if not further.any():
            break
        gauge_before = torch.where(further, gauge, gauge_before)
        gained_before = torch.where(further, gained, gained_before)
        gauge = torch.where(further, gauge + (wanted - gained) / rate, gauge)
    return step, gauge


def rooms(chase: Pursuit, x: Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """How far each coordinate of `x` may go down and up: to the end of the valid range, and nowhere in padding."""
    found = {}
    for m, budget in chase.threat.budgets.items():
        down, up = x[m].double() - budget.low, budget.high - x[m].double()
        if budget.writable is not None:
            down, up = torch.where(budget.writable, down, 0), torch.where(budget.writable, up, 0)
        found[m] = (down, up)
    return found


def dual(chase: Pursuit, slopes: Inputs) -> Float[Tensor, " batch"]:
    """The dual norm of the gauge: what a linear loss with these slopes gains at gauge 1, were there no valid range."""
    room = {m: torch.full_like(slopes[m], math.inf) for m in chase.threat.budgets}
    return gain(slopes, moves(chase, slopes, {m: (r, r) for m, r in room.items()}, 1.0))


def moves(chase: Pursuit, slopes: Inputs, rooms: Mapping[str, tuple[Tensor, Tensor]], gauge: float | Tensor) -> Inputs:
    """The step of a gauge that these slopes reward most, each coordinate with so much room down and up."""
    return {
        m: budget.rules.furthest(slopes[m], gauge * budget.radius(chase.inputs[m]), *rooms[m])
        for m, budget in chase.threat.budgets.items()
    }


def gain(slopes: Inputs, steps: Inputs) -> Float[Tensor, " batch"]:
    """What the steps are worth to a linear loss, in float64."""
    return torch.stack([(slopes[m].double() * step.double()).flatten(1).sum(1) for m, step in steps.items()]).sum(0)
