"""Adversarial training: one class a method, which crafts a batch by an ascent and learns from it.

Modalities with a budget in `work.budgets` are attacked, all at once; the others are left as they are: training against
one modality or against all is a matter of budgets. Points are crafted in eval mode and learnt from in train mode, so
that batch norm learns its running statistics from what the update sees; the exceptions are `Free` and `Remembered`, one
pass of which serves both. Losses of multi-label clips are sums over classes, divergences too, so that `beta` and
`weight` mean the same whatever the number of classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Inputs
from robustav.training.ascent import Objective, ascend, attacked, within
from robustav.training.divergence import divergence, mart_losses
from robustav.training.method import Batch, Method, Work
from robustav.training.mixing import draw_ratios, mixed_at, permuted
from robustav.training.overfitting_watch import STOPPED, WATCHES, choose, look
from robustav.training.settings import positive
from robustav.training.weight_perturbation import buffers_kept, matrices, perturb

STILL = 0.03  # epsilons: the noise from which TRADES and MART start, 0.001 at their epsilon of 0.031


@dataclass(frozen=True)
class AdversarialTraining(Method, ABC):
    """Craft points in eval mode, then learn from them in one update."""

    budgeted: ClassVar[bool] = True
    passes: ClassVar[int] = 1  # forward passes a clip of `losses_at`, each of which is gone back through

    @abstractmethod
    def craft(self, work: Work, batch: Batch) -> Inputs:
        """The points to learn from."""

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        """What the update minimises the mean of; the plain loss at the points unless told."""
        return work.loss(work.trace(points).logits, batch.targets)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        return self.losses_at(work, batch, self.craft(work, batch))

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        loss = self.losses(work, batch).mean()
        work.update(loss, self.passes * len(batch.rows))
        return loss.detach()


@dataclass(frozen=True)
class PGDTraining(AdversarialTraining):
    """Learn at the points that projected gradient ascent finds [Madry et al., 2018, arXiv:1706.06083].

    Costs `steps + 1` passes of either kind a clip.
    """

    steps: int = 7
    reach: float = 2.5  # epsilons that all steps make together

    def __post_init__(self) -> None:
        positive(self, "steps", "reach")

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return ascend(work, batch.inputs, batch.targets, steps=self.steps, step_size=self.reach / self.steps)


@dataclass(frozen=True)
class FGSMRS(AdversarialTraining):
    """One step from a random start, clipped to the budget [Wong et al., 2020, arXiv:2001.03994].

    May overfit to its own step all at once: PGD then breaks what it cannot. `watch` looks for that on `watch_clips`
    training clips each epoch: "warn" says so, "stop" goes back to the last sound weights and trains no further (as the
    paper does), "restore" goes back and trains on, "off" does not look; nor does anyone while the budget still grows,
    since clips fall for a larger one anyway. A look costs about 13 forward and 11 backward
    passes for each of its clips; a step without it, 2 of either for each clip.
    """

    step_size: float = 1.25  # epsilons
    watch: str = "stop"
    watch_clips: int = 64
    watch_fall: float = 0.2  # of the top-1 hit rate

    def __post_init__(self) -> None:
        positive(self, "step_size", "watch_clips")
        if self.watch not in WATCHES:
            raise ValueError(f"`watch` must be one of {list(WATCHES)}, got {self.watch!r}")
        usual = FGSMRS.watch_clips, FGSMRS.watch_fall
        if self.watch == "off" and (self.watch_clips, self.watch_fall) != usual:
            raise ValueError("`watch_clips` and `watch_fall` go with a `watch`, which is off: leave them out")
        if not 0 < self.watch_fall < 1:
            raise ValueError(f"`watch_fall` must be between 0 and 1, both excluded, got {self.watch_fall}")

    def begin(self, work: Work) -> None:
        if self.watch != "off":
            choose(work, self.watch_clips)

    def finished(self, work: Work) -> bool:
        return bool(work.memory.get(STOPPED, False))

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return ascend(work, batch.inputs, batch.targets, steps=1, step_size=self.step_size)

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        loss = super().train_step(work, batch)
        if self.watch != "off" and work.whole and (work.step + 1) % (work.steps // work.epochs) == 0:
            look(work, self.craft, PGDTraining(10).craft, fall=self.watch_fall, watch=self.watch)
        return loss


@dataclass(frozen=True)
class NFGSM(AdversarialTraining):
    """One step from strong noise, not clipped to the budget [de Jorge et al., 2022, arXiv:2202.01181].

    Points lie up to `noise + step_size` epsilons away, by design; the valid range still holds. Costs 2 passes of either
    kind a clip.
    """

    noise: float = 2.0  # epsilons
    step_size: float = 1.0  # epsilons

    def __post_init__(self) -> None:
        positive(self, "noise", "step_size")

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return ascend(
            work,
            batch.inputs,
            batch.targets,
            steps=1,
            step_size=self.step_size,
            start_size=self.noise,
            clip=False,
        )


@dataclass(frozen=True)
class Free(Method):
    """Each batch several times over, every pass a step of weights and of perturbation [Shafahi et al., 2019,
    arXiv:1904.12843].

    The perturbation lives on from batch to batch, whatever the clips. `replays` updates a batch: train for 1 / `replays`
    of the epochs to compare at equal cost; a learning-rate schedule should count batches. Gradients are those of train
    mode, since one pass serves both ends.
    """

    budgeted: ClassVar[bool] = True

    replays: int = 4
    step_size: float = 1.0  # epsilons

    def __post_init__(self) -> None:
        positive(self, "replays", "step_size")

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        budgets, count = attacked(work), len(batch.rows)
        deltas = {m: self._delta(work, m, batch.inputs[m]) for m in budgets}
        losses = []
        for _ in range(self.replays):
            points = {
                m: within(budget, batch.inputs[m], batch.inputs[m] + deltas[m]).detach().requires_grad_()
                for m, budget in budgets.items()
            }
            loss = work.loss(work.trace({**batch.inputs, **points}).logits, batch.targets).mean()
            work.update(loss, count)
            losses.append(loss.detach())
            for m, budget in budgets.items():
                clean, gradient = batch.inputs[m], points[m].grad
                if gradient is not None:
                    moved = budget.step(clean, points[m].detach(), gradient, self.step_size)
                    deltas[m] = within(budget, clean, moved) - clean
        for m, delta in deltas.items():
            kept = work.memory.get(f"free/{m}", delta).to(delta)
            work.memory[f"free/{m}"] = torch.cat([delta, kept[count:]])
        return torch.stack(losses).mean()

    def _delta(self, work: Work, modality: str, x: Tensor) -> Tensor:
        """What earlier batches left, clip by place in the batch; zeros for places that are new."""
        kept = work.memory.get(f"free/{modality}", x[:0]).to(x)[: len(x)]
        return torch.cat([kept, torch.zeros_like(x[len(kept) :])])


def from_nearby(method: "TRADES | MART", work: Work, batch: Batch, loss: Objective | None = None) -> Inputs:
    """Where an ascent leads that begins beside the clean point, at which a divergence from it is flat."""
    return ascend(
        work,
        batch.inputs,
        batch.targets,
        steps=method.steps,
        step_size=method.reach / method.steps,
        start="gaussian",
        start_size=STILL,
        loss=loss,
    )


@dataclass(frozen=True)
class TRADES(AdversarialTraining):
    """Be right on clean inputs and stand still under attack [Zhang et al., 2019, arXiv:1901.08573].

    `loss(x) + beta KL(p(x) || p(x'))`, where x' climbs that divergence. Clean and attacked clips pass through batch norm
    one after the other, in train mode. Costs `steps + 3` forward and `steps + 2` backward passes a clip.
    """

    beta: float = 6.0
    steps: int = 10
    reach: float = 2.5  # epsilons that all steps make together
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        positive(self, "beta", "steps", "reach")

    def craft(self, work: Work, batch: Batch) -> Inputs:
        with work.crafting():
            clean = work.trace(batch.inputs).logits
        return from_nearby(self, work, batch, lambda logits, _: divergence(clean, logits, work.model.label_kind))

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        clean, moved = work.trace(batch.inputs).logits, work.trace(points).logits
        return work.loss(clean, batch.targets) + self.beta * divergence(clean, moved, work.model.label_kind)


@dataclass(frozen=True)
class MART(AdversarialTraining):
    """Learn most from clips that are wrong even when clean [Wang et al., 2020, ICLR]; see `mart_losses`.

    Costs `steps + 2` passes of either kind a clip.
    """

    weight: float = 5.0  # of the divergence
    steps: int = 10
    reach: float = 2.5  # epsilons that all steps make together
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        positive(self, "weight", "steps", "reach")

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return from_nearby(self, work, batch)

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        moved, clean = work.trace(points).logits, work.trace(batch.inputs).logits
        return mart_losses(clean, moved, batch.targets, self.weight, work.model.label_kind)


BASES: dict[str, type[PGDTraining] | type[TRADES]] = {"pgd-at": PGDTraining, "trades": TRADES}


@dataclass(frozen=True)
class AWP(AdversarialTraining):
    """Adversarial training at the worst weights nearby as well [Wu et al., 2020, arXiv:2004.05884].

    Once the points are crafted, one step of ascent in the weights; the update's gradients are taken there and applied to
    the weights as they were. Costs what `base` costs, and its update's passes once more.
    """

    base: str = "pgd-at"
    gamma: float = 5e-3  # of each weight's length
    steps: int = 0  # in the inputs; as many as `base` takes by itself unless told

    def __post_init__(self) -> None:
        positive(self, "gamma")
        if self.base not in BASES:
            raise ValueError(f"`base` must be one of {sorted(BASES)}, got {self.base!r}")
        if self.steps < 0:
            raise ValueError(f"`steps` must be at least 1, or 0 for those of `base`, got {self.steps}")

    @property
    def method(self) -> PGDTraining | TRADES:
        """What is done at the perturbed weights."""
        base = BASES[self.base]()
        return replace(base, steps=self.steps or base.steps)

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return self.method.craft(work, batch)

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        return self.method.losses_at(work, batch, points)

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        points, backwards = self.craft(work, batch), self.method.passes * len(batch.rows)
        weights = matrices(work.model)
        with buffers_kept(work.model):
            loss = self.losses_at(work, batch, points).mean()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        work.cost.backwards += backwards
        restore = perturb(weights, gradients, self.gamma)
        loss = self.losses_at(work, batch, points).mean()
        work.update(loss, backwards, restore)
        return loss.detach()


@dataclass(frozen=True)
class InterpolatedTraining(AdversarialTraining):
    """Half mixup of clean clips, half mixup of their PGD points [Lamb et al., 2019, arXiv:1906.06784].

    Costs `steps + 2` passes of either kind a clip.
    """

    alpha: float = 1.0  # of the Beta distribution of mixing ratios
    steps: int = 7
    reach: float = 2.5  # epsilons that all steps make together
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        positive(self, "alpha", "steps", "reach")

    def craft(self, work: Work, batch: Batch) -> Inputs:
        return ascend(work, batch.inputs, batch.targets, steps=self.steps, step_size=self.reach / self.steps)

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        return (self._mixed(work, batch) + self._mixed(work, batch._replace(inputs=points))) / 2

    def _mixed(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        count = len(batch.rows)
        partner, ratio = permuted(count, work.generator), draw_ratios(self.alpha, count, work.generator, per_clip=True)
        mixed = mixed_at(work, batch, "input", partner, ratio)
        return work.loss(work.trace(mixed.parts).logits, mixed.targets)


METHODS: dict[str, type[Method]] = {
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "free": Free,
    "pgd-at": PGDTraining,
    "trades": TRADES,
    "mart": MART,
    "awp": AWP,
    "iat": InterpolatedTraining,
}
