"""Fast minimum-norm attack: a ball that shrinks on success and grows on failure."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustav.attacks.ascent import Pursuit, climb, look
from robustav.attacks.minimum import FURTHEST, Crossing, MinimumNorm, Nearest, shortest
from robustav.attacks.pgd import check_steps

LAST_SHRINKAGE = 1e-3  # share by which the ball changes at the last step
LAST_STEP = 0.01  # of the first step


@dataclass(frozen=True)
class FMN(MinimumNorm):
    """FMN: steps inside a ball of gauge t, with t brought ever closer to the boundary [Pintor et al., 2021,
    arXiv:2102.12827, algorithm 1].

    `relative_step`, in radii of the ball of that moment, and the share `gamma` by which the ball changes fall along a
    cosine. Every modality steps along its own norm's steepest ascent, and the first ball is where a linear loss would
    cross. Costs `steps` gradients and `steps` + 1 forward passes.
    """

    steps: int = 100
    relative_step: float = 1.0
    gamma: float = 0.05
    stop: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.relative_step > 0:
            raise ValueError(f"`relative_step` must be above 0, got {self.relative_step}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"`gamma` must lie between 0 and 1, got {self.gamma}")

    def pursue(self, chase: Pursuit, towards: Crossing, enough: float) -> Nearest:
        part, x, nearest = chase, chase.inputs, Nearest.none(chase.inputs)
        rows = torch.arange(len(nearest.gauge), device=nearest.gauge.device)
        t, limit = torch.zeros_like(nearest.gauge), farthest(chase)
        for step in range(self.steps):
            alpha = annealed(self.relative_step, LAST_STEP * self.relative_step, step / self.steps)
            gamma = annealed(self.gamma, min(LAST_SHRINKAGE, self.gamma), step / self.steps)
            here, gradients = climb(part.model, x, part.labels, part.threat)
            gauge = part.threat.gauge(part.inputs, x)
            nearest = nearest.or_nearer(rows, here, gauge)
            best = nearest.gauge[rows]
            # Beyond the estimate by gamma: a ball that ends at the crossing itself is left to rounding. And never back:
            # where the valid range cuts steps short, the estimate alone would have the ball stand still.
            missing = shortest(part, x, gradients, -here.loss.double())[1] if best.isinf().any() else 0.0
            larger = torch.where(best.isinf(), torch.maximum(gauge + missing, t), t) * (1 + gamma)
            t = torch.where(here.reached, torch.minimum(t * (1 - gamma), best), larger).clamp(min=0).minimum(limit)
            ball = part.threat.scaled(t)
            x = ball.project(part.inputs, ball.step(part.inputs, x, gradients, alpha))
            if (best <= enough).any():
                going = (best > enough).nonzero().flatten()
                part, rows, t, limit = part.at(going), rows[going], t[going], limit[going]
                x = {m: values[going] for m, values in x.items()}
                if not len(rows):
                    return nearest
        last = look(part.model, x, part.labels, part.threat)
        return nearest.or_nearer(rows, last, part.threat.gauge(part.inputs, x))


def annealed(first: float, last: float, share: float) -> float:
    """Along half a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def farthest(chase: Pursuit) -> Tensor:
    """The gauge of the farthest corner of the valid range: no ball need be larger."""
    corner = {
        m: torch.where(b.high - chase.inputs[m] > chase.inputs[m] - b.low, b.high, b.low).to(chase.inputs[m])
        for m, b in chase.threat.budgets.items()
    }
    return chase.threat.gauge(chase.inputs, corner).clamp(max=FURTHEST)
