"""Losses that an adversary climbs: pure functions of logits and labels, one value a sample."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor

from robustav.classifier import LabelKind

Logits = Float[Tensor, "batch class"]
MultiHot = Float[Tensor, "batch class"]
HINGE = 1.0  # logits: how far a wrong class must stand above a right one before the sum of hinges lets go of the pair
FLAT = 1e-12  # keeps tied scores from dividing by zero [Croce and Hein, 2020, arXiv:2003.01690]


def multi_hot(labels: Tensor, logits: Logits) -> MultiHot:
    """Labels of either kind as zeros and ones, [batch, class]."""
    return F.one_hot(labels, logits.shape[1]).to(logits) if labels.ndim == 1 else labels.to(logits)


def bce(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """Binary cross-entropy summed over classes.

    Summed, not averaged: a mean divides every gradient by the number of classes, which sign steps hide and l2 steps
    on a noisy loss do not.
    """
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(1)


def ranking_margin(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """Best wrong class minus worst right class, `max_{j not in Y} s_j - min_{i in Y} s_i` [Song et al., 2018,
    arXiv:1901.00546].

    Positive when some label is ranked below a class that is no label: to lose a top-1 hit, climb `top1_margin`. Without labels, the best score; with all
    classes as labels, minus the worst.
    """
    positive = labels > 0.5
    wrong = logits.masked_fill(positive, float("-inf")).amax(1)
    right = logits.masked_fill(~positive, float("inf")).amin(1)
    return torch.where(wrong.isinf(), 0, wrong) - torch.where(right.isinf(), 0, right)


def top1_margin(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """Best wrong class minus best right class; positive exactly when the top-1 hit is lost.

    Without labels, the best score; with all classes as labels, minus the best.
    """
    positive = labels > 0.5
    wrong = logits.masked_fill(positive, float("-inf")).amax(1)
    right = logits.masked_fill(~positive, float("-inf")).amax(1)
    return torch.where(wrong.isinf(), 0, wrong) - torch.where(right.isinf(), 0, right)


def cross_entropy(logits: Logits, labels: Tensor) -> Float[Tensor, " batch"]:
    """Cross-entropy of the softmax, one class index a sample."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Logits, labels: Tensor) -> Float[Tensor, " batch"]:
    """Best other class minus the true one; positive when misclassified [Carlini and Wagner, 2017, arXiv:1608.04644]."""
    return ranking_margin(logits, multi_hot(labels, logits))


def dlr(logits: Logits, labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Difference of logits ratio, `(max_{j != y} s_j - s_y) / (s_(1) - s_(3))` [Croce and Hein, 2020, arXiv:2003.01690].

    Unlike cross-entropy it does not care in which unit logits are, so that a model sure of itself hides no gradient.
    Positive when misclassified, and flat at 1 while the label ranks third. With fewer than three classes, where it would
    be constant, the plain margin.
    """
    value = margin(logits, labels)
    return value if logits.shape[1] < 3 else value / _spread(logits, torch.full_like(labels, 3))


def targeted_dlr(logits: Logits, labels: Int[Tensor, " batch"], aim: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """DLR towards one class, `(s_t - s_y) / (s_(1) - (s_(3) + s_(4)) / 2)` [Croce and Hein, 2020, arXiv:2003.01690].

    With fewer than four classes the plain difference.
    """
    value = (logits.gather(1, aim[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < 4:
        return value
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return value / (first - (third + fourth) / 2 + FLAT)


def hinges(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """How far all pairs of a label i and another class j are from the wrong order, `-sum_ij [HINGE + s_i - s_j]_+`.

    At most 0, which is reached where every other class stands `HINGE` above every label; no pair that still holds loses
    its gradient, however sure the model is. Without labels, or with all classes as labels, a score of 0 stands in for
    the side that is missing. Takes the memory of a sort, not of all pairs.
    """
    positive = labels > 0.5
    label = torch.cat([positive, ~positive.any(1, keepdim=True)], dim=1)
    other = torch.cat([~positive, positive.all(1, keepdim=True)], dim=1)
    score = F.pad(logits, (0, 1)) + HINGE * label
    score, order = score.sort(dim=1, descending=True)
    above = label.gather(1, order).cumsum(1)[:, :-1]  # labels above each gap between neighbours
    below = other.gather(1, order).flip(1).cumsum(1).flip(1)[:, 1:]  # other classes below it
    return -((score[:, :-1] - score[:, 1:]) * (above * below)).sum(1)  # a pair is apart by all the gaps between them


def ml_dlr(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """Ranking margin in units of the scores' own spread, `s_(1) - s_(|Y| + 2)`: DLR where a clip has a set Y of labels.

    Does not care in which unit logits are. With fewer than three classes the plain margin.
    """
    return _per_spread(ranking_margin(logits, labels), logits, labels)


def top1_dlr(logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """`top1_margin` in the units of `ml_dlr`: positive exactly when the top-1 hit is lost, in whichever unit logits are."""
    return _per_spread(top1_margin(logits, labels), logits, labels)


def aimed_margin(logits: Logits, labels: MultiHot, aim: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Score of one class outside the labels minus the best label's, over the best score less the mean of those that rank
    second and third after as many as there are labels.

    Of two ranks, as in `targeted_dlr`: over the spread to one, the loss would be flat where the aim has that rank. Where
    there are not as many classes, over the spread to the worst, taken as a constant. Without labels, the score aimed at. Where the aim is a label, as it must be if all classes are, minus the best label's.
    """
    positive = labels > 0.5
    wrong = logits.masked_fill(positive, 0).gather(1, aim[:, None]).squeeze(1)
    right = logits.masked_fill(~positive, float("-inf")).amax(1)
    value, rank = wrong - torch.where(right.isinf(), 0, right), positive.sum(1) + 2
    spread = (_spread(logits, rank) + _spread(logits, rank + 1)) / 2
    return torch.where(rank < logits.shape[1], value / spread, value / spread.detach())


def _per_spread(value: Tensor, logits: Logits, labels: MultiHot) -> Float[Tensor, " batch"]:
    """A margin over the spread of as many scores as there are labels, and two more."""
    return value if logits.shape[1] < 3 else value / _spread(logits, (labels > 0.5).sum(1) + 2)


def _spread(logits: Logits, rank: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Best score minus that of `rank` (1 is the best), or minus the worst if there are fewer."""
    ordered = logits.sort(dim=1, descending=True).values
    last = (rank - 1).clamp(max=logits.shape[1] - 1)
    return ordered[:, 0] - ordered.gather(1, last[:, None]).squeeze(1) + FLAT


class Loss(NamedTuple):
    """A loss to climb and the kind of labels that it is defined for."""

    value: Callable[[Tensor, Tensor], Tensor]
    label_kind: LabelKind


LOSSES: dict[str, Loss] = {
    "bce": Loss(bce, "multilabel"),
    "ranking": Loss(ranking_margin, "multilabel"),
    "top1": Loss(top1_margin, "multilabel"),
    "hinges": Loss(hinges, "multilabel"),
    "ml-dlr": Loss(ml_dlr, "multilabel"),
    "top1-dlr": Loss(top1_dlr, "multilabel"),
    "ce": Loss(cross_entropy, "multiclass"),
    "margin": Loss(margin, "multiclass"),
    "dlr": Loss(dlr, "multiclass"),
}
DEFAULT_LOSS: dict[LabelKind, str] = {"multilabel": "bce", "multiclass": "ce"}
