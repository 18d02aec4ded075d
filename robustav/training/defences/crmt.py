"""Two-step training for the margin of each modality, and a bound of what it withstands [Yang Z. et al., 2024,
arXiv:2402.06244]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.attacks import Attack
from robustav.classifier import Classifier, Inputs, LabelKind, Trace
from robustav.goals import Goal
from robustav.norms import TINY
from robustav.threat import ThreatModel
from robustav.training.defences.adaptive import Way, Ways
from robustav.training.defences.defended import Defended, defended, freeze_unread, parts, side_by_side, widths
from robustav.training.method import Batch, Method, Work

NAME = "crmt"
SLOPES = "crmt/slopes"  # in memory: the estimate that step two works with


def orthonormal(weight: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
    """Rows made orthonormal, each within the span of those before it: Gram and Schmidt by a Cholesky factor.

    The paper's symmetric square root reaches the same matrices; this one has a gradient wherever rows are independent.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        return torch.linalg.solve_triangular(torch.linalg.cholesky(weight @ weight.T), weight, upper=False)


class Slopes(NamedTuple):
    """How fast scores can move with the inputs, at most, in joint l2: of all modalities side by side."""

    pair: Float[Tensor, "class class"]  # one class's score against another's
    alone: Float[Tensor, " class"]  # a score against the threshold


def slopes_of_classes(scales: Float[Tensor, "modality class"], lipschitz: Float[Tensor, "modality class"]) -> Slopes:
    """Given a Lipschitz constant of every uni-modal score: the paper's denominator, of absolute values of the scales,
    without which it bounds nothing once one of them is negative."""
    each = scales.abs() * lipschitz
    return Slopes((each[:, :, None] + each[:, None, :]).square().sum(0).sqrt(), each.square().sum(0).sqrt())


def slopes_of_encoders(scales: Float[Tensor, "modality class"], lipschitz: Float[Tensor, " modality"]) -> Slopes:
    """Given a Lipschitz constant of every encoder: rows are orthonormal, so a difference of two scores has the length
    `sqrt(a_y^2 + a_j^2)`, not their sum; never looser than `slopes_of_classes` for the same constants."""
    each = scales.square() * lipschitz.square()[:, None]
    return Slopes((each[:, :, None] + each[:, None, :]).sum(0).sqrt(), each.sum(0).sqrt())


def radius(
    logits: Float[Tensor, "batch class"], targets: Float[Tensor, "batch class"], slopes: Slopes, label_kind: LabelKind
) -> Float[Tensor, " batch"]:
    """How far in joint l2 all inputs must move together before the prediction is wrong: a lower bound GIVEN the Lipschitz
    constants in `slopes`, and an estimate where those are estimates. Negative where it is wrong already.

    Multi-class: the smallest margin over its slope [Yang Z. et al., 2024, arXiv:2402.06244]. Multi-label: the same
    of every class's score against its threshold (probability 0.5), so that no label is lost and none is added.
    """
    if label_kind == "multilabel":
        return ((2 * targets - 1) * logits / slopes.alone.clamp(min=TINY)).amin(1)
    label = targets.argmax(1, keepdim=True)
    gaps = (logits.gather(1, label) - logits) / slopes.pair[label.squeeze(1)].clamp(min=TINY)
    return gaps.scatter(1, label, float("inf")).amin(1)


def margin_losses(
    scores: Float[Tensor, "batch modality class"], targets: Float[Tensor, "batch class"], label_kind: LabelKind
) -> Float[Tensor, " batch"]:
    """`log sum_m sum_{k != y} exp(h_k - h_y)` of uni-modal scores: large where any modality's margin is small.

    Multi-label: `log sum_m sum_k exp(-+h_k)`, each class's score against its threshold, with the sign of its label.
    """
    if label_kind == "multilabel":
        return ((1 - 2 * targets)[:, None] * scores).flatten(1).logsumexp(1)
    label = targets.argmax(1)[:, None, None].expand(-1, scores.shape[1], 1)
    gaps = (scores - scores.gather(2, label)).scatter(2, label, float("-inf"))
    return gaps.flatten(1).logsumexp(1)


class MarginFusion(Defended):
    """Joint scores `sum_m a_k^m w_k^m . f^m + b_k`: features f of each modality, rows w orthonormal, scales a.

    The latent is the features side by side.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__(model)
        self.sizes, classes = widths(model, NAME), len(self.classes)
        check_rows(self.sizes, classes)
        self.weights = nn.ParameterDict(
            {m: nn.init.orthogonal_(torch.empty(classes, n)) for m, n in self.sizes.items()}
        )
        self.scales = nn.Parameter(torch.ones(len(self.sizes), classes))
        self.bias = nn.Parameter(torch.zeros(classes))
        freeze_unread(model)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return side_by_side(features)

    def classify(self, latent: Tensor) -> Tensor:
        return self.joined(self.scores(latent))

    def scores(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch modality class"]:
        """Each modality's scores, before they are scaled."""
        found = parts(latent, self.sizes)
        return torch.stack([F.linear(found[m], orthonormal(self.weights[m])) for m in self.sizes], dim=1)

    def joined(self, scores: Float[Tensor, "batch modality class"]) -> Float[Tensor, "batch class"]:
        """The joint scores of uni-modal ones."""
        return (self.scales * scores).sum(1) + self.bias

    def adaptive_attacks(self) -> Mapping[str, Attack]:
        return {"each-margin": EachMargin(widths=tuple(self.sizes.items()))}


def check_rows(sizes: Mapping[str, int], classes: int) -> None:
    """Raise `ValueError` unless every modality's features have room for a row for each class."""
    for m, size in sizes.items():
        if size < classes:
            raise ValueError(
                f"{NAME} needs orthonormal rows, at least as many features as classes, but `model` has {size} {m} features "
                f"for {classes} classes: choose a wider encoder"
            )


def bound(
    model: MarginFusion, inputs: Inputs, targets: Float[Tensor, "batch class"], lipschitz: Mapping[str, float]
) -> Float[Tensor, " batch"]:
    """`radius` of some clips GIVEN Lipschitz constants of the encoders, from raw input to features: a certificate if they
    are upper bounds (`robustav.training.defences.lipschitz.lipschitz_bounds`), whatever l2 adversary, also where the
    valid range stops it. In eval mode only. To weigh modalities, as in a ball of `|d_m| / e_m`, multiply the constants by e_m.
    """
    if missing := [m for m in model.sizes if m not in lipschitz]:
        raise ValueError(f"`lipschitz` must have a constant for each of {list(model.sizes)}, got none for {missing}")
    if model.training:
        raise ValueError("`model` must be in eval mode for a bound, got it in train mode: call `model.eval()`")
    constants = torch.tensor([lipschitz[m] for m in model.sizes]).to(model.scales)
    with torch.no_grad():
        slopes = slopes_of_encoders(model.scales, constants)
        return radius(model(inputs), targets, slopes, model.label_kind)


def estimated_slopes(model: MarginFusion, inputs: Inputs) -> Float[Tensor, "modality class"]:
    """Largest gradient of every uni-modal score over some clips, in l2: an estimate from below, no Lipschitz constant.

    One forward pass, and a backward pass for each class.
    """
    leaves = {m: inputs[m].detach().requires_grad_() for m in model.modalities}
    with torch.enable_grad():
        scores = model.scores(model.trace(leaves).latent)
        found = [torch.autograd.grad(one.sum(), list(leaves.values()), retain_graph=True) for one in scores.unbind(2)]
    lengths = [[gradient.flatten(1).norm(dim=1).amax() for gradient in each] for each in found]
    return torch.stack([torch.stack(each) for each in lengths], dim=1)


@dataclass(frozen=True)
class EachMargin(Ways):
    """Climb the joint loss together with the loss of one attacked modality's scores alone, one modality after another.

    `widths` has the length of each modality's part of the latent, in its order.
    """

    widths: tuple[tuple[str, int], ...] = ()

    def ways(self, model: Classifier, threat: ThreatModel) -> Sequence[Way]:
        return [partial(self._alone, model, m) for m, _ in self.widths if m in threat.budgets]

    def _alone(self, model: Classifier, modality: str, trace: Trace, labels: Tensor, goal: Goal) -> Tensor:
        features = parts(trace.latent, dict(self.widths))
        kept = {m: x if m == modality else torch.zeros_like(x) for m, x in features.items()}
        alone = trace._replace(logits=model.classify(side_by_side(kept)))
        return goal.loss(trace, labels) + goal.loss(alone, labels)


@dataclass(frozen=True)
class CRMT(Method):
    """First the margins of all modalities, then the weight of each [Yang Z. et al., 2024, arXiv:2402.06244].

    Step one adds `margin_losses` to the plain loss. Step two, the last `second` of the epochs, freezes everything but the
    scales (batch norms too) and makes `radius` large, with slopes estimated once on `probe` clips as the largest
    gradients: training steers by an estimate, and only `bound` says what holds. Costs a pass of either kind a clip (in
    step two the backward pass ends at the scales and is counted whole), and once `probe` forward and `probe` x classes
    backward passes.
    """

    weight: float = 2.0  # of the margins' loss
    second: float = 0.25  # of the epochs; published: 46 of 186
    probe: int = 64

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at or above 0, got {self.weight}")
        if not 0 <= self.second < 1:
            raise ValueError(f"`second` must be at or above 0 and below 1, got {self.second}")
        if self.probe < 1:
            raise ValueError(f"`probe` must be at least 1, got {self.probe}")

    def check(self, model: Classifier) -> None:
        check_rows(widths(model, NAME), len(model.classes))

    def check_plan(self, epochs: int, balanced: bool) -> None:
        if self.second and epochs < 2:
            raise ValueError(f"`epochs` must be at least 2, one for each step of {NAME}, got {epochs}: or set second=0")

    def wrapped(self, model: Classifier) -> Classifier:
        return MarginFusion(model)

    def begin(self, work: Work) -> None:
        defended(work.model, MarginFusion, NAME)

    def begin_epoch(self, work: Work) -> None:
        if not self._in_second(work) or SLOPES in work.memory:
            return
        model = defended(work.model, MarginFusion, NAME)
        rows = torch.randperm(len(work.data.targets), generator=work.generator)[: self.probe]
        inputs = {m: x.to(model.bias.device) for m, x in work.data.inputs(rows).items()}
        with work.crafting():
            work.memory[SLOPES] = estimated_slopes(model, inputs)
        work.cost.forwards += len(rows)
        work.cost.backwards += len(rows) * len(model.classes)

    def settled(self, work: Work) -> bool:
        return work.epoch > self._first(work.epochs) or not self.second

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        model = defended(work.model, MarginFusion, NAME)
        if not self._in_second(work):
            trace = work.trace(batch.inputs)
            margins = margin_losses(model.scores(trace.latent), batch.targets, model.label_kind)
            return work.loss(trace.logits, batch.targets) + self.weight * margins
        with work.crafting(), torch.no_grad():
            scores = model.scores(work.trace(batch.inputs).latent)
        # Everything but the scales stays, so the bias too.
        logits = (model.scales * scores).sum(1) + model.bias.detach()
        slopes = slopes_of_classes(model.scales, work.memory[SLOPES].to(model.scales))
        return -radius(logits, batch.targets, slopes, model.label_kind)

    def _in_second(self, work: Work) -> bool:
        return work.epoch >= self._first(work.epochs)

    def _first(self, epochs: int) -> int:
        """The epoch, counted from 0, with which step two begins."""
        return max(1, epochs - max(1, round(self.second * epochs))) if self.second else epochs


METHODS: dict[str, type[Method]] = {NAME: CRMT}
