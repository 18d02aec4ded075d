"""Losses that an adversary climbs: pure functions of logits and labels, one value a sample."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import LabelKind

Logits = Float[Tensor, "batch class"]
MultiHot = Float[Tensor, "batch class"]


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


class Loss(NamedTuple):
    """A loss to climb and the kind of labels that it is defined for."""

    value: Callable[[Tensor, Tensor], Tensor]
    label_kind: LabelKind


LOSSES: dict[str, Loss] = {
    "bce": Loss(bce, "multilabel"),
    "ranking": Loss(ranking_margin, "multilabel"),
    "top1": Loss(top1_margin, "multilabel"),
    "ce": Loss(cross_entropy, "multiclass"),
    "margin": Loss(margin, "multiclass"),
}
DEFAULT_LOSS: dict[LabelKind, str] = {"multilabel": "bce", "multiclass": "ce"}
