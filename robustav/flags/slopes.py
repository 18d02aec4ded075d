"""Flags of a model's gradients: zero, not finite, shattered, leading nowhere, hidden by the scale of the logits."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from robustav.attacks.ascent import Pursuit, look
from robustav.attacks.noise import Noise
from robustav.attacks.pgd import PGD
from robustav.classifier import Classifier, Inputs, Trace
from robustav.flags.flag import Flag, clips, percent, raised
from robustav.flags.scores import scores
from robustav.goals import Goal, Untargeted
from robustav.losses import multi_hot, top1_margin
from robustav.norms import TINY
from robustav.threat import Budget, ThreatModel

MOVES, MOVED_CLIPS = 100, 8  # random moves, and the clips that make them
MOVE = 0.01  # of the budget: so near, the gradient of an honest model foretells the loss
ROUNDING = 1e-5  # of the loss: errors of the prediction below it may be float32's
SHATTERED = 0.5  # share of the loss's movement that the gradient fails to foretell
FREE = PGD(steps=10, random_start=False)  # a random start in the whole range would be a success of noise
SHORT = PGD(steps=5)
MISSED = 0.05  # share of reachable clips that the attack without a budget may miss
LARGE, USUAL = 30.0, 5.0  # size of logits: float32's sigmoid is exactly 1 from 17 on; what trained models return
HELPED = 0.2  # share of clips by which a mere change of scale may help
SWAPS = 3  # other clips tried in each clip's place
FAR = 1000.0  # times the clip's largest value: "without a budget" where the range has no end


class Slopes(NamedTuple):
    """Loss of each clip and its gradient by every attacked modality."""

    loss: Tensor  # [batch]
    gradients: Inputs

    def at(self, rows: Tensor) -> "Slopes":
        """Of some clips of the batch."""
        return Slopes(self.loss[rows], {m: g[rows] for m, g in self.gradients.items()})

    def finite(self) -> Tensor:
        """Whether all of a clip's gradient is, [batch]."""
        return torch.stack([g.flatten(1).isfinite().all(1) for g in self.gradients.values()]).all(0)


def slopes(subject: Pursuit) -> Slopes:
    """Gradients as they come, finite or not. Raises `RuntimeError` where autograd does."""
    leaves = {m: subject.inputs[m].detach().requires_grad_() for m in subject.threat.budgets}
    with torch.enable_grad():
        trace = subject.model.trace({**subject.inputs, **leaves})
        loss = subject.threat.goal.loss(trace, subject.labels)
        if not loss.requires_grad:
            return Slopes(loss, {m: torch.zeros_like(x) for m, x in leaves.items()})
        found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Slopes(loss.detach(), dict(zip(leaves, found, strict=True)))


def zero(seen: Slopes) -> list[Flag]:
    """ZERO-GRAD at the clean clips, one flag a modality."""
    found = []
    for m, gradient in seen.gradients.items():
        flat = gradient.flatten(1)
        count, total = int((flat == 0).all(1).sum()), len(flat)
        if count:
            found.append(
                raised("ZERO-GRAD", f"The gradient by {m} is exactly zero on {clips(count, total)}, before any step.")
            )
    return found


def bad(seen: Slopes) -> list[Flag]:
    """BAD-GRAD at the clean clips, one flag a modality."""
    found = []
    for m, gradient in seen.gradients.items():
        flat = gradient.flatten(1)
        count = int((~flat.isfinite()).any(1).sum())
        if count:
            kinds = " and ".join(
                kind for kind, there in (("NaN", flat.isnan()), ("infinity", flat.isinf())) if there.any()
            )
            found.append(raised("BAD-GRAD", f"The gradient by {m} holds {kinds} on {clips(count, len(flat))}."))
    return found


def unstable(subject: Pursuit, seen: Slopes) -> list[Flag]:
    """UNSTABLE: moves the clips at random by `MOVE` of the budget and compares the loss with the gradient's word."""
    small = subject.threat.scaled(MOVE)
    moved, missed = [], []
    for _ in range(MOVES):
        x = small.start(subject.inputs, subject.draws)
        change = (look(subject.model, x, subject.labels, small).loss - seen.loss).double()
        foretold = sum(
            (g * (x[m] - subject.inputs[m])).flatten(1).sum(1, dtype=torch.float64) for m, g in seen.gradients.items()
        )
        moved.append(change)
        missed.append(change - foretold)
    size, error = torch.stack(moved).square().mean(0).sqrt(), torch.stack(missed).square().mean(0).sqrt()
    share = error / size.clamp(min=TINY)
    jumps = (share > SHATTERED) & (error > ROUNDING * (1 + seen.loss.abs()))
    if 2 * int(jumps.sum()) <= len(jumps):
        return []
    relative = torch.stack(moved).abs().mean() / seen.loss.double().abs().mean().clamp(min=TINY)
    words = (
        f"{MOVES} random moves of {percent(MOVE)} of the budget change the loss by {relative:.2g} of itself on average, and on "
        f"{clips(int(jumps.sum()), len(jumps))} the gradient does not foretell how."
    )
    return [raised("UNSTABLE", words)]


def without_budget(subject: Pursuit, judge: Classifier, batch_size: int) -> tuple[list[Flag], Tensor]:
    """UNBOUNDED-FAILS, and the logits where the attack ended.

    That the goal can be reached is shown by other clips, put into the place of the attacked modalities. What the goal's
    own loss misses is tried by way of the margin, where any mistake will do: a loss that leads elsewhere is no masking.
    """
    budgets = {m: whole_range(budget, subject.inputs[m]) for m, budget in subject.threat.budgets.items()}
    free = subject._replace(threat=ThreatModel(budgets, subject.threat.goal))
    start, _ = judged(free, subject.inputs, judge, batch_size)
    possible = torch.zeros_like(start)
    for shift in range(1, SWAPS + 1):
        swapped = {**subject.inputs, **{m: subject.inputs[m].roll(shift, 0) for m in budgets}}
        possible |= judged(free, free.threat.project(subject.inputs, swapped), judge, batch_size)[0]
    possible &= ~start
    won, logits = judged(free, attacked(FREE, free, batch_size), judge, batch_size)
    if (possible & ~won).any() and "success" in subject.threat.goal.settings():
        steered = free._replace(threat=free.threat.steered(_margin))
        won |= judged(free, attacked(FREE, steered, batch_size), judge, batch_size)[0]
    missed, total = int((possible & ~won).sum()), int(possible.sum())
    if missed <= max(1, MISSED * total):
        return [], logits
    words = (
        f"{FREE.steps} gradient steps over the whole valid range miss the goal on {clips(missed, total)} that reach it "
        "with another clip's input."
    )
    return [raised("UNBOUNDED-FAILS", words)], logits


def corners(subject: Pursuit) -> Inputs:
    """Each clip with every value of its attacked modalities at a random end of the valid range."""
    budgets = {m: whole_range(budget, subject.inputs[m]) for m, budget in subject.threat.budgets.items()}
    free = ThreatModel(budgets, subject.threat.goal)
    return Noise()(subject.model, subject.inputs, subject.labels, free, draws=subject.draws)


def whole_range(budget: Budget, clean: Tensor) -> Budget:
    """The budget that forbids nothing; where the range has no end, `FAR` times the largest value."""
    span = budget.high - budget.low
    largest = FAR * max(1.0, clean.abs().max().item())
    return replace(budget, norm="linf", epsilon=span if math.isfinite(span) else largest, snr_db=None, factor=1.0)


@dataclass(frozen=True)
class Standardised(Goal):
    """A goal whose loss sees shifted and rescaled logits; success is still the goal's. For LOGIT-SCALE only."""

    goal: Goal = field(default_factory=Untargeted)
    centre: float = 0.0
    size: float = 1.0

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        """The goal's, of other logits."""
        return self.goal.loss(trace._replace(logits=(trace.logits - self.centre) / self.size), labels)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        """As the goal says."""
        return self.goal.reached(trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        """As the goal says."""
        return self.goal.words(classes)

    def at(self, rows: Tensor) -> Goal:
        """For some clips of the batch."""
        return replace(self, goal=self.goal.at(rows))


def logit_scale(subject: Pursuit, judge: Classifier, clean: Tensor, batch_size: int) -> list[Flag]:
    """LOGIT-SCALE: a short attack, and once more on logits of a usual size. `clean` are the clean logits.

    Only for logits that are larger than `LARGE`: the scale of smaller ones shapes a loss, but hides nothing.
    """
    size = clean.double().square().mean().sqrt().item()
    if size <= LARGE:
        return []
    centre, spread = clean.double().mean().item(), max(clean.double().std(correction=0).item(), TINY)
    goal = Standardised(goal=subject.threat.goal, centre=centre, size=spread / USUAL)
    other = subject._replace(threat=ThreatModel(subject.threat.budgets, goal))
    plain, _ = judged(subject, attacked(SHORT, subject, batch_size), judge, batch_size)
    helped, _ = judged(subject, attacked(SHORT, other, batch_size), judge, batch_size)
    gain = int(helped.sum()) - int(plain.sum())
    if gain <= max(1, HELPED * len(plain)):
        return []
    words = (
        f"{SHORT.steps} gradient steps reach the goal on {clips(int(plain.sum()), len(plain))}, and on {int(helped.sum())} "
        f"once the logits, about {size:.2g} in size, are brought to {USUAL:g}."
    )
    return [raised("LOGIT-SCALE", words)]


def attacked(attack: PGD, subject: Pursuit, batch_size: int) -> Inputs:
    """What the attack returns, a batch at a time."""
    parts = [subject.at(rows) for rows in _rows(subject).split(batch_size)]
    found = [attack(p.model, p.inputs, p.labels, p.threat, draws=p.draws) for p in parts]
    return {m: torch.cat([part[m] for part in found]) for m in subject.inputs}


def judged(subject: Pursuit, inputs: Inputs, judge: Classifier, batch_size: int) -> tuple[Tensor, Tensor]:
    """Whether each clip reaches the goal in the judge's eyes, and its logits."""
    trace = scores(judge, inputs, batch_size)
    return subject.threat.goal.reached(trace, subject.labels), trace.logits


def all_slopes(subject: Pursuit, batch_size: int) -> Slopes:
    """`slopes`, a batch at a time."""
    found = [slopes(subject.at(rows)) for rows in _rows(subject).split(batch_size)]
    gradients = {m: torch.cat([part.gradients[m] for part in found]) for m in subject.threat.budgets}
    return Slopes(torch.cat([part.loss for part in found]), gradients)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    return top1_margin(logits, multi_hot(labels, logits))


def _rows(subject: Pursuit) -> Tensor:
    return torch.arange(len(subject.labels), device=subject.labels.device)
