"""Clip scores pooled from the frames' as probabilities, computed as logits: no probability saturates, no gradient dies."""

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import LabelKind

FLOOR = 1e-7  # what float32 can tell from 0 beside 1; the official codes clamp there
TINY = 1e-30  # float32 divides by it without overflow


def mixture(
    logits: Float[Tensor, "batch part class"], log_weights: Float[Tensor, "batch part class"]
) -> Float[Tensor, "batch class"]:
    """The logit of `sum_part weight * sigmoid(logit)`, for weights that sum to 1.

    The official codes compute the probability, between frame probabilities clamped to [1e-7, 1 - 1e-7]: beyond a logit
    of 16 they differ from this by that much, and have no gradient.
    """
    yes = torch.logsumexp(log_weights + F.logsigmoid(logits), dim=1)
    no = torch.logsumexp(log_weights + F.logsigmoid(-logits), dim=1)
    return yes - no


def shares(log_values: Float[Tensor, "batch part class"]) -> Float[Tensor, "batch part class"]:
    """The logarithm of each part's share of their sum."""
    return F.log_softmax(log_values, dim=1)


def mean_logit(logits: Float[Tensor, "batch part class"]) -> Float[Tensor, "batch class"]:
    """The logit of the mean probability: scores averaged over frames or over models."""
    return mixture(logits, torch.full_like(logits, -math.log(logits.shape[1])))


def averaged(logits: Float[Tensor, "batch part class"], label_kind: LabelKind) -> Float[Tensor, "batch class"]:
    """Logits of the mean probability of several frames or models, sigmoid or softmax; a single one's as they are."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    if label_kind == "multilabel":
        return mean_logit(logits)
    return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])


def floored(log_values: Float[Tensor, "batch part class"]) -> Float[Tensor, "batch part class"]:
    """The logarithm of the larger of `value` and 1e-7, with the gradient of `log(value + 1e-7)`, which never is zero."""
    low = math.log(FLOOR)
    smooth = torch.logaddexp(log_values, torch.full_like(log_values, low))
    return smooth + (log_values.clamp(min=low) - smooth).detach()


def weighted(
    logits: Float[Tensor, "batch part class"], weights: Float[Tensor, " part"]
) -> Float[Tensor, "batch class"]:
    """A logit of `yes = sum_part weight * sigmoid(logit)`, for weights that need not sum to 1 or be positive.

    `log(yes / no)` with `no = 1 - yes`, while both are positive. Where one is not, its logarithm levels out (`above`) and
    the other's goes on: strictly increasing and smooth over all sums, so that this ranks as the official scores do, but
    for rounding, and an attack finds its way back.
    """
    weights = weights.to(logits.dtype)[:, None]
    rest, negative = 1 - weights.sum(), -weights.clamp(max=0).sum()
    yes = (weights * torch.sigmoid(logits)).sum(1)
    no = rest + (weights * torch.sigmoid(-logits)).sum(1)
    # What cancels in a sum leaves its rounding there: no logarithm of that.
    return above(yes, FLOOR * negative).log() - above(no, FLOOR * (rest.abs() + negative)).log()


def above(x: Float[Tensor, "..."], floor: Float[Tensor, ""]) -> Float[Tensor, "..."]:
    """`x` to within 1.7 times `floor` (1e-30 at least) where it is positive; falls smoothly to `floor` where it is not."""
    floor = floor.detach().clamp(min=TINY)
    return floor * (1 + F.softplus(x / floor))
