"""How far an attacked prediction is from the clean one, for labels of either kind."""

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import LabelKind
from robustav.training.method import supervised


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
