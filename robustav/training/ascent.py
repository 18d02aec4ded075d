"""The inner ascent of adversarial training: starts, steps and projections of every attacked modality at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Inputs
from robustav.norms import TINY, per_sample
from robustav.threat import Budget
from robustav.training.method import Work

Objective = Callable[[Tensor, Tensor], Tensor]  # logits and targets -> [batch]
Start = Callable[[Tensor, str, torch.Generator], Tensor]


def attacked(work: Work) -> dict[str, Budget]:
    """Budgets by modality, in the order of their names."""
    return {m: work.budgets[m] for m in sorted(work.budgets)}


def uniform(like: Float[Tensor, " batch *shape"], norm: str, generator: torch.Generator) -> Tensor:
    """Uniform in the unit ball of a norm, one draw for the whole batch (on the CPU, whatever the device)."""
    if norm == "linf":
        return (2 * torch.rand(like.shape, generator=generator) - 1).to(like)
    size = like[0].numel()
    if norm == "l2":
        direction = F.normalize(torch.randn(len(like), size, generator=generator), dim=1, eps=TINY)
        point = direction * torch.rand(len(like), 1, generator=generator) ** (1 / size)
    else:
        # The first d of d + 1 exponentials over their sum are uniform in the simplex.
        exponentials = torch.empty(len(like), size + 1).exponential_(generator=generator)
        signs = 2 * torch.randint(0, 2, (len(like), size), generator=generator) - 1
        point = exponentials[:, :-1] / exponentials.sum(1, keepdim=True) * signs
    return point.reshape(like.shape).to(like)


def gaussian(like: Float[Tensor, " batch *shape"], norm: str, generator: torch.Generator) -> Tensor:
    """Gaussian noise of deviation 1 in linf, and about as long as the unit ball's radius in l2 and l1."""
    spread = like[0].numel() ** -{"linf": 0.0, "l2": 0.5, "l1": 1.0}[norm]
    return (spread * torch.randn(like.shape, generator=generator)).to(like)


STARTS: dict[str, Start] = {
    "none": lambda like, norm, generator: torch.zeros_like(like),
    "uniform": uniform,
    "gaussian": gaussian,
}


def within(budget: Budget, clean: Tensor, x: Tensor, clip: bool = True) -> Tensor:
    """`x` moved back into the ball around `clean` (unless not to be clipped) and into the valid range."""
    delta = x - clean
    if budget.writable is not None:
        delta = torch.where(budget.writable, delta, 0)
    if clip:
        delta = budget.rules.shorten(delta, budget.radius(clean))
    return (clean + delta).clamp(budget.low, budget.high)


def ascend(
    work: Work,
    inputs: Inputs,
    targets: Float[Tensor, "batch class"],
    *,
    steps: int,
    step_size: float,
    start: str = "uniform",
    start_size: float = 1.0,
    clip: bool = True,
    loss: Objective | None = None,
) -> Inputs:
    """Climb a loss (of plain training unless told) in all attacked modalities at once, for training.

    `step_size` and `start_size` are in epsilons; without `clip` only the valid range bounds a point. The last point is
    returned, in contrast to an evaluation's best one. Costs `steps` forward and backward passes a clip.
    """
    budgets, climbed = attacked(work), loss or work.loss
    points = {}
    for m, budget in budgets.items():
        noise = STARTS[start](inputs[m], budget.norm, work.generator)
        scale = per_sample(budget.radius(inputs[m]), inputs[m])
        points[m] = within(budget, inputs[m], inputs[m] + start_size * scale * noise, clip).detach()
    with work.crafting():
        for _ in range(steps):
            points = {m: x.detach().requires_grad_() for m, x in points.items()}
            gradients = work.gradients(climbed(work.trace({**inputs, **points}).logits, targets).sum(), points)
            for m, budget in budgets.items():
                moved = budget.step(inputs[m], points[m].detach(), gradients[m], step_size)
                points[m] = within(budget, inputs[m], moved, clip)
    return {**inputs, **points}
