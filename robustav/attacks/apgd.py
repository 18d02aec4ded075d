"""Gradient ascent that finds its own step sizes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustav.attacks.ascent import Point, Pursuit, climb, look, put
from robustav.attacks.pgd import check_steps
from robustav.classifier import Classifier, Inputs
from robustav.losses import LOSSES
from robustav.norms import Draws
from robustav.threat import ThreatModel

FIRST_STEP = 2.0  # radii
FIRST_CHECK, SHORTER, SHORTEST = 22, 3, 6  # hundredths of all steps: first interval, how much less each next, least
UPHILL = 0.75  # share of the steps since the last check: with no more than these gaining, steps are too long


@dataclass(frozen=True)
class APGD:
    """Auto-PGD: ascent with momentum whose steps are halved, clip by clip, where they stop gaining [Croce and Hein,
    2020, arXiv:2003.01690].

    Climbs the goal's own loss, or one of `robustav.losses.LOSSES`. One modality is attacked as published: checks and
    restarts are the paper's, and a share of just `UPHILL` halves a step as in the release. The start is a random point
    of the budget, which the release stretches to the budget's edge. Several modalities have a step size and a check
    each: a step counts as a gain of those modalities that the loss owes it to, to first order, and a clip goes back to
    its best point when any of its step sizes is halved. The best of all points is returned.

    In l1 steps are sparse as `robustav.norms` has them: this is not the L1-APGD of Croce and Hein, 2021,
    arXiv:2103.01208. With `stop`, a clip is left alone from its first success on.
    """

    steps: int = 100
    loss: str = ""
    momentum: float = 0.75  # weight of the new step; the rest is the last step's
    random_start: bool = True
    stop: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.loss and self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, or empty for the goal's own, got {self.loss!r}")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"`momentum` must be above 0 and at most 1, got {self.momentum}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        clips = Pursuit(model, inputs, labels, self._steered(threat), draws)
        rows, answer, intervals = torch.arange(len(labels), device=labels.device), inputs, checks(self.steps)
        x = threat.start(inputs, draws) if self.random_start else inputs
        state = None
        for step in range(self.steps):
            here = Ascent(*climb(clips.model, x, clips.labels, clips.threat))
            state = state.after(here) if state else State.begin(here)
            if self.stop and state.found.reached.any():
                answer = put(answer, rows, state.found.inputs)
                going = (~state.found.reached).nonzero().flatten()
                clips, state, rows = clips.at(going), state.at(going), rows[going]
                if not len(rows):
                    return answer
            if step in intervals:
                state = state.checked(intervals[step])
            x = self._move(clips, state)
        assert state is not None
        last = look(clips.model, x, clips.labels, clips.threat)
        return put(answer, rows, state.found.or_better(last).inputs)

    def _move(self, clips: Pursuit, state: "State") -> Inputs:
        """One step from where the clips are, along the gradient and a little along the last step."""
        clean, here, before = clips.inputs, state.here.point.inputs, state.before
        budgets = clips.threat.budgets.items()
        ascended = {
            m: b.scaled(state.paces[m].size).step(clean[m], here[m], state.here.gradients[m], 1.0) for m, b in budgets
        }
        u = clips.threat.project(clean, ascended)
        if before is None:
            return u
        alpha = self.momentum
        moved = {m: here[m].lerp(u[m], alpha).add_(here[m] - before[m], alpha=1 - alpha) for m in ascended}
        return clips.threat.project(clean, moved)

    def _steered(self, threat: ThreatModel) -> ThreatModel:
        """The threat, climbed by way of the loss that was asked for."""
        if not self.loss:
            return threat
        kind = threat.goal.label_kind
        fitting = sorted(name for name, loss in LOSSES.items() if loss.label_kind == kind)
        if self.loss not in fitting:
            raise ValueError(f"`loss` must be one of {fitting} for {kind} labels, got {self.loss!r}")
        return threat.steered(LOSSES[self.loss].value)


def checks(steps: int) -> dict[int, int]:
    """After which steps progress is checked, and the number of steps since the check before.

    >>> checks(100)
    {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    """
    found, before, hundredths, interval = {}, 0, FIRST_CHECK, FIRST_CHECK
    while hundredths < 100:
        step = -(-hundredths * steps // 100)
        if step > before:
            found[step] = step - before
        interval = max(interval - SHORTER, SHORTEST)
        before, hundredths = step, hundredths + interval
    return found


class Ascent(NamedTuple):
    """A point and each clip's gradient there."""

    point: Point
    gradients: Inputs

    def at(self, rows: Tensor) -> "Ascent":
        return Ascent(_rows_of(self.point, rows), _rows(self.gradients, rows))

    def but(self, other: "Ascent", where: Tensor) -> "Ascent":
        """Another point for the clips `where` says so, [batch] bool."""
        point = Point(
            _choose(where, other.point.inputs, self.point.inputs),
            torch.where(where, other.point.loss, self.point.loss),
            torch.where(where, other.point.reached, self.point.reached),
        )
        return Ascent(point, _choose(where, other.gradients, self.gradients))


class Pace(NamedTuple):
    """One modality's step size in radii and how its steps went since the last check, [batch] each."""

    size: Tensor
    gains: Tensor
    halved: Tensor  # at the last check

    def at(self, rows: Tensor) -> "Pace":
        return Pace(self.size[rows], self.gains[rows], self.halved[rows])


class State(NamedTuple):
    """Where an ascent is, clip by clip."""

    found: Point  # the best point to return: one that reaches the goal, and of those the highest
    here: Ascent  # where the next step starts
    before: Inputs | None  # where the last step started
    highest: Ascent
    height: Tensor  # the highest loss at the last check
    paces: dict[str, Pace]

    @classmethod
    def begin(cls, here: Ascent) -> "State":
        loss = here.point.loss
        none = torch.zeros_like(loss, dtype=torch.bool)
        pace = Pace(torch.full_like(loss, FIRST_STEP), torch.zeros_like(loss), none)
        return cls(here.point, here, None, here, loss, dict.fromkeys(here.gradients, pace))

    def at(self, rows: Tensor) -> "State":
        """The same for some clips of the batch (indices)."""
        return State(
            _rows_of(self.found, rows),
            self.here.at(rows),
            None if self.before is None else _rows(self.before, rows),
            self.highest.at(rows),
            self.height[rows],
            {m: pace.at(rows) for m, pace in self.paces.items()},
        )

    def after(self, now: Ascent) -> "State":
        """One step later."""
        gained = gains(self.here, now)
        return self._replace(
            found=self.found.or_better(now.point),
            here=now,
            before=self.here.point.inputs,
            highest=self.highest.but(now, now.point.loss > self.highest.point.loss),
            paces={m: pace._replace(gains=pace.gains + gained[m]) for m, pace in self.paces.items()},
        )

    def checked(self, interval: int) -> "State":
        """Halve the steps that gained too seldom, or under which the best loss stood still at their present length."""
        still = self.highest.point.loss <= self.height
        halve = {m: (p.gains <= UPHILL * interval) | (still & ~p.halved) for m, p in self.paces.items()}
        paces = {
            m: Pace(torch.where(halve[m], p.size / 2, p.size), torch.zeros_like(p.gains), halve[m])
            for m, p in self.paces.items()
        }
        back = torch.stack(list(halve.values())).any(0)
        return self._replace(here=self.here.but(self.highest, back), height=self.highest.point.loss, paces=paces)


def gains(before: Ascent, now: Ascent) -> dict[str, Tensor]:
    """Modality -> whether the loss gained by its part of a step, [batch].

    With several modalities, the mean of both gradients times the part: what it adds to the loss, to second order.
    """
    if len(now.gradients) == 1:
        return dict.fromkeys(now.gradients, now.point.loss > before.point.loss)
    found = {}
    for m, gradient in now.gradients.items():
        step = now.point.inputs[m] - before.point.inputs[m]
        found[m] = ((before.gradients[m] + gradient) * step).flatten(1).sum(1) > 0
    return found


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    return {m: x[rows] for m, x in inputs.items()}


def _rows_of(point: Point, rows: Tensor) -> Point:
    return Point(_rows(point.inputs, rows), point.loss[rows], point.reached[rows])


def _choose(where: Tensor, these: Inputs, those: Inputs) -> Inputs:
    return {m: torch.where(where.reshape(-1, *[1] * (x.ndim - 1)), these[m], x) for m, x in those.items()}
