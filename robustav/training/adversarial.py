"""Adversarial training: the inner ascent that crafts a batch, the losses that learn from it, one class a method.

Modalities with a budget in `work.budgets` are attacked, all at once; the others are left as they are: training against
one modality or against all is a matter of budgets. Points are crafted in eval mode and learnt from in train mode, so
that batch norm learns its running statistics from what the update sees; `Free`, whose one pass serves both, is the
exception. Losses of multi-label clips are sums over classes, divergences too, so that `beta` and `weight` mean the same
whatever the number of classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Inputs, LabelKind
from robustav.norms import TINY, per_sample
from robustav.threat import Budget
from robustav.training.method import Batch, Method, Work, supervised
from robustav.training.mixing import draw_ratios, mixed_at, permuted
from robustav.training.overfitting_watch import STOPPED, WATCHES, choose, look
from robustav.training.weight_perturbation import buffers_kept, matrices, perturb

Objective = Callable[[Tensor, Tensor], Tensor]  # logits and targets -> [batch]
Start = Callable[[Tensor, str, torch.Generator], Tensor]
STILL = 0.03  # epsilons: the noise from which TRADES and MART start, 0.001 at their epsilon of 0.031


def attacked(work: Work) -> dict[str, Budget]:
    """Budgets by modality, in the order of their names."""
    if not work.budgets:
        raise ValueError(
            "`budgets` must name at least one modality for adversarial training, got none: give eps, such as 0.01"
        )
    if unknown := sorted(work.budgets.keys() - work.model.specs.keys()):
        raise ValueError(f"`budgets` must name modalities among {sorted(work.model.specs)}, got also {unknown}")
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


def divergence(
    clean: Float[Tensor, "batch class"], moved: Float[Tensor, "batch class"], label_kind: LabelKind
) -> Float[Tensor, " batch"]:
    """Kullback-Leibler divergence of the moved prediction from the clean one, both given by logits.

    Multi-label: each class is a Bernoulli of its own, and their divergences are summed.
    """
    clean, moved = _precise(clean), _precise(moved)
    if label_kind == "multiclass":
        return F.kl_div(moved.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
    return _bernoulli(clean, moved).sum(1)


def _precise(logits: Tensor) -> Tensor:
    """At least float32: a divergence is a small difference of terms that nearly cancel."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _bernoulli(clean: Tensor, moved: Tensor) -> Float[Tensor, "batch class"]:
    yes = F.logsigmoid(clean) - F.logsigmoid(moved)
    no = F.logsigmoid(-clean) - F.logsigmoid(-moved)
    return clean.sigmoid() * yes + (-clean).sigmoid() * no


def mart_losses(
    clean: Float[Tensor, "batch class"],
    adversarial: Float[Tensor, "batch class"],
    targets: Float[Tensor, "batch class"],
    weight: float,
    label_kind: LabelKind,
) -> Float[Tensor, " batch"]:
    """Boosted cross-entropy at the adversarial point, and a divergence that counts most where the clean prediction errs
    [Wang et al., 2020, ICLR, eq. 11].

    `-log p_y(x') - log(1 - max_{k != y} p_k(x')) + weight KL(p(x) || p(x')) (1 - p_y(x))`. Multi-label: a class is a
    problem of two classes, present or not, to which the formula applies; the sum over classes.
    """
    clean, adversarial = _precise(clean), _precise(adversarial)
    if label_kind == "multilabel":
        right = clean.sigmoid() * targets + (-clean).sigmoid() * (1 - targets)
        return 2 * supervised(adversarial, targets, label_kind) + weight * (
            _bernoulli(clean, adversarial) * (1 - right)
        ).sum(1)
    label = F.one_hot(targets.argmax(1), targets.shape[1]).bool()
    rival = adversarial.masked_fill(label, float("-inf")).argmax(1, keepdim=True)
    others = adversarial.scatter(1, rival, float("-inf")).logsumexp(1) - adversarial.logsumexp(1)
    right = (clean.softmax(1) * targets).sum(1)
    boosted = supervised(adversarial, targets, label_kind) - others
    return boosted + weight * divergence(clean, adversarial, label_kind) * (1 - right)


def positive(settings: object, *names: str) -> None:
    """Raise `ValueError` unless these settings are above 0."""
    for name in names:
        if not (value := getattr(settings, name)) > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}")


@dataclass(frozen=True)
class AdversarialTraining(Method, ABC):
    """Craft points in eval mode, then learn from them in one update."""

    passes: ClassVar[int] = 1  # forward passes a clip of `losses_at`, each of which is gone back through

    @abstractmethod
    def craft(self, work: Work, batch: Batch) -> Inputs:
        """The points to learn from."""

    def losses_at(self, work: Work, batch: Batch, points: Inputs) -> Float[Tensor, " clip"]:
        """What the update minimises the mean of; the plain loss at the points unless told."""
        return work.loss(work.trace(points).logits, batch.targets)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        return self.losses_at(work, batch, self.craft(work, batch))

    def begin(self, work: Work) -> None:
        attacked(work)

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
        if not 0 < self.watch_fall < 1:
            raise ValueError(f"`watch_fall` must be between 0 and 1, both excluded, got {self.watch_fall}")

    def begin(self, work: Work) -> None:
        super().begin(work)
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

    replays: int = 4
    step_size: float = 1.0  # epsilons

    def __post_init__(self) -> None:
        positive(self, "replays", "step_size")

    def begin(self, work: Work) -> None:
        attacked(work)

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
        return ascend(
            work,
            batch.inputs,
            batch.targets,
            steps=self.steps,
            step_size=self.reach / self.steps,
            start="gaussian",  # at the clean point itself the divergence is flat
            start_size=STILL,
            loss=lambda logits, _: divergence(clean, logits, work.model.label_kind),
        )

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
        return ascend(
            work,
            batch.inputs,
            batch.targets,
            steps=self.steps,
            step_size=self.reach / self.steps,
            start="gaussian",
            start_size=STILL,
        )

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
