"""Attacks that know a defence: ascents by way of what the defence looks at, the best of them kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustav.attacks import APGD, Attack, trait
from robustav.attacks.ascent import Pursuit, look, merged
from robustav.classifier import Classifier, Inputs, Trace
from robustav.goals import Around, Goal
from robustav.norms import Draws
from robustav.threat import ThreatModel

Way = Callable[[Trace, Tensor, Goal], Tensor]  # what a pass left, labels and the goal -> [batch]


def own_loss(trace: Trace, labels: Tensor, goal: Goal) -> Tensor:
    """No detour."""
    return goal.loss(trace, labels)


@dataclass(frozen=True)
class Detour(Around):
    """A goal pursued by way of a loss of the whole trace."""

    way: Way = own_loss

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return self.way(trace, labels, self.goal)


@dataclass(frozen=True)
class Ways(ABC):
    """Climb with `attack` the goal's own loss, then along one way after another; what is returned is the best end, by the
    goal's own loss: never less than `attack` alone finds.

    A way reads the defence from `Trace.latent`, where it lays open what it decides by. Parts of a model that a way
    evaluates on their own (a head) are not counted as passes. Where `attack` stops at a success, so does this.
    """

    attack: Attack = field(default_factory=APGD)

    def __post_init__(self) -> None:
        if loss := trait(self.attack, "loss", ""):
            raise ValueError(f"`attack` is given its loss by the defence, got loss={loss!r}: leave it out")

    @abstractmethod
    def ways(self, model: Classifier, threat: ThreatModel) -> Sequence[Way]:
        """What to climb after the goal's own loss, one after the other, on a view of the model."""

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        clips, best = Pursuit(model, inputs, labels, threat, draws), None
        rows = torch.arange(len(labels), device=labels.device)
        for way in [own_loss, *self.ways(model, threat)]:
            if best is not None and trait(self.attack, "stop", False):
                rows = (~best.reached).nonzero().flatten()
                if not len(rows):
                    break
            part = clips.at(rows)
            goal = part.threat.goal
            detour = Detour(goal.label_kind, goal.threshold, None, goal, way)
            tried = self.attack(
                part.model, part.inputs, part.labels, replace(part.threat, goal=detour), draws=part.draws
            )
            here = look(part.model, tried, part.labels, part.threat)
            best = here if best is None else merged(best, rows, here)
        assert best is not None
        return best.inputs
