"""Losses of rank: out of the top k of a clip, down the ranking of a whole corpus, and out of sight; pure functions."""

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.losses import Logits, MultiHot

HIGH = 0.99  # quantile of clean negatives below which a positive is out of reach of most rankings
DEPTH = 1.0  # logits below the threshold at which a hidden class is left alone


def top_k_margin(logits: Logits, labels: MultiHot, k: int) -> Float[Tensor, " batch"]:
    """The k-th highest of the classes that are no labels, minus the best label [Hu et al., 2021, arXiv:2108.00146].

    Positive exactly when no label is among the k highest scores; a label that ties with the last of them counts as
    among them. With k = 1 this is `top1_margin`. Without labels, the k-th highest score; with fewer than k classes that
    are no labels, minus the best label.
    """
    wrong, right = _contest(logits, labels, k)
    return torch.where(wrong.isinf(), 0, wrong) - torch.where(right.isinf(), 0, right)


def top_k_lost(logits: Logits, labels: MultiHot, k: int) -> Bool[Tensor, " batch"]:
    """Whether k classes that are no labels outscore every label; always so without labels, if there are k classes."""
    wrong, right = _contest(logits, labels, k)
    return wrong > right


def top_k_average(logits: Logits, labels: MultiHot, k: int) -> Float[Tensor, " batch"]:
    """Minus the mean of softplus(best label - s_j) over the k highest s_j that are no labels; at most 0.

    A smooth form of `top_k_margin` that lifts all k rivals at once instead of the k-th alone, and the more a rival the
    further it lags; the mean over the top k is the sum-of-top-k form of Hu et al. [2021, arXiv:2108.00146]. Without
    labels the rivals lift themselves above 0; where fewer than k classes are no labels, those there are.
    """
    positive = labels > 0.5
    rivals = logits.masked_fill(positive, float("-inf")).topk(min(k, logits.shape[1]), dim=1).values
    right = logits.masked_fill(~positive, float("-inf")).amax(1, keepdim=True)
    right = torch.where(right.isinf(), 0, right)
    there = ~rivals.isinf()
    gaps = F.softplus(right - torch.where(there, rivals, 0))
    return -(gaps * there).sum(1) / there.sum(1).clamp(min=1)


def _contest(logits: Logits, labels: MultiHot, k: int) -> tuple[Tensor, Tensor]:
    """The k-th highest score of no label and the highest of a label, minus infinity where there is none."""
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"`k` must lie in 1..{logits.shape[1]}, the number of classes, got {k}")
    positive = labels > 0.5
    wrong = logits.masked_fill(positive, float("-inf")).topk(k, dim=1).values[:, -1]
    return wrong, logits.masked_fill(~positive, float("-inf")).amax(1)


def class_quantiles(logits: Logits, labels: MultiHot) -> Float[Tensor, "2 class"]:
    """Of a corpus' clean scores, class by class: the `HIGH` quantile of the negatives, the median of the positives.

    Minus infinity for a class without negatives and infinity for one without positives, which takes the class out of
    `corpus_ap`: it has no average precision to lose.
    """
    positive = labels > 0.5
    scores = logits.detach().double()
    high = scores.masked_fill(positive, torch.nan).nanquantile(HIGH, dim=0)
    middle = scores.masked_fill(~positive, torch.nan).nanquantile(0.5, dim=0)
    return torch.stack([high.nan_to_num(-torch.inf), middle.nan_to_num(torch.inf)]).to(logits.dtype)


def class_weights(labels: MultiHot) -> Float[Tensor, " class"]:
    """One over each class's number of positives, mean 1 over the classes that have any; 0 for the others.

    What one clip is worth to a class's average precision: of n positives each holds a share 1/n, and a negative that
    overtakes the better half of them takes about ln(2)/n. So the mean over classes hangs on the rare ones.
    """
    count = (labels > 0.5).sum(0)
    share = torch.where(count > 0, 1 / count.clamp(min=1), 0)
    return (share * (count > 0).sum() / share.sum().clamp(min=1e-30)).to(labels)


def corpus_ap(
    logits: Logits,
    labels: MultiHot,
    quantiles: Float[Tensor, "2 class"],
    temperature: float,
    weights: Float[Tensor, " class"] | None = None,
) -> Float[Tensor, " batch"]:
    """How far a clip has moved through the rankings of its corpus, the quantity of which mAP is made.

    Each label's score is pushed below `quantiles[0]` of its class and each other score above `quantiles[1]`, as
    `class_quantiles` has them from the clean clips; each is a sigmoid of width `temperature` (logits), so that what has
    arrived weighs no more, and what is out of reach does not yet. `weights` are those of `class_weights`, 1 unless told.
    """
    positive = labels > 0.5
    fallen = torch.sigmoid((quantiles[0] - logits) / temperature)
    risen = torch.sigmoid((logits - quantiles[1]) / temperature)
    moved = torch.where(positive, fallen, risen)
    return (moved if weights is None else moved * weights).sum(1)


def stealth(
    logits: Logits, clean: Logits, chosen: Bool[Tensor, "batch class"], cut: float, weight: float
) -> Float[Tensor, " batch"]:
    """Sink the chosen scores below `cut` and hold the others where `clean` has them [after Sun et al., 2023,
    arXiv:2309.00007].

    Minus the hinges `[s - cut + DEPTH]_+` of the chosen, minus `weight` times the mean square of how far the others
    moved. At most 0, and 0 where all is done: a class that is deep enough leaves the whole step to the others.
    """
    sunk = (logits - cut + DEPTH).clamp(min=0).masked_fill(~chosen, 0).sum(1)
    moved = (logits - clean).square().masked_fill(chosen, 0).sum(1) / (~chosen).sum(1).clamp(min=1)
    return -sunk - weight * moved
