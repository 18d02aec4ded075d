"""How much closer each sample lies to its own class than to the rest."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustav.metrics.latents import blocks, check_k, checked, negligible
from robustav.metrics.neighbours import nearest, nearest_within


class Balanced(NamedTuple):
    """Rows of a class and of the rest, so many that each member has equally many candidates on both sides."""

    members: Int[Tensor, " member"]
    others: Int[Tensor, " other"]


def balanced(of_class: Bool[Tensor, " sample"], generator: torch.Generator) -> Balanced:
    """Draw rows of a class and of the rest for `relative_density`, in which class frequency then plays no part.

    One member more than others, since a member is no candidate of its own; as many as there are. In ascending order.

    >>> of_class = torch.tensor([True, False, False, True, False])
    >>> [len(rows) for rows in balanced(of_class, torch.Generator().manual_seed(0))]
    [2, 1]
    """
    members, others = of_class.nonzero().flatten(), (~of_class).nonzero().flatten()
    if not len(members) or not len(others):
        raise ValueError(
            f"`of_class` must have samples of the class and others, got {len(members)} and {len(others)}: "
            "leave out such a class"
        )
    count = min(len(members), len(others) + 1)
    return Balanced(_draw(members, count, generator), _draw(others, count - 1, generator))


def relative_density(
    members: Float[Tensor, "member dim"], others: Float[Tensor, "other dim"], k: int = 10
) -> Float[Tensor, " member"]:
    """Log distance to the k-th of the others minus that to the k-th other member.

    After the trust score, a ratio of such distances [Jiang et al., 2018, arXiv:1805.11783]; times the dimension, a log
    likelihood ratio of class to rest. Above 0 where the own class is closer, about 0 where class and rest lie alike,
    unbounded. Shifting, rotating and scaling the latents leaves it, so it compares between layers and models. Choose
    the rows with `balanced`: with many more others than members it is low whatever the latents. nan where either
    distance is 0, at rows with `k` exact copies: count those, or drop copies first. With several labels a sample, the
    rest holds near-copies of the class: see `relative_density_strict`.

    >>> relative_density(torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]]), k=1).exp()
    tensor([10.0000,  9.0000], dtype=torch.float64)
    """
    members, others = checked(members, "members"), checked(others, "others")
    check_k(k, len(members) - 1, "other `members`")
    check_k(k, len(others), "`others`")
    others = others.to(members.dtype)
    return _log_ratio(
        nearest(members, others, k).distances[:, -1],
        nearest_within(members, k).distances[:, -1],
        negligible(members, others),
    )


def relative_density_strict(
    latents: Float[Tensor, "sample dim"],
    labels: Bool[Tensor, "sample class"],
    class_index: int,
    k: int = 10,
    *,
    generator: torch.Generator,
) -> Float[Tensor, " member"]:
    """`relative_density` of each member of a class against samples that share no label with it, in order of the rows.

    Candidates are drawn for each member so that both sides have equally many; all members draw in one random order of
    the samples. nan where a side has fewer than `k`, and where a distance is 0.

    >>> latents, labels = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])
    >>> relative_density_strict(latents, labels.bool(), 0, k=1, generator=torch.Generator().manual_seed(0)).exp()[1]
    tensor(8.0000, dtype=torch.float64)
    """
    latents = checked(latents)
    members = labels[:, class_index].nonzero().flatten()
    check_k(k, len(members) - 1, f"other members of class {class_index}")
    order = _shuffle(len(latents), generator).to(latents.device)
    candidates, candidate_labels = latents[order], labels[order]
    values = latents.new_empty(len(members))
    for rows in blocks(len(members), 40 * len(latents)):
        anchors = members[rows]
        own = candidate_labels[:, class_index] & (order != anchors[:, None])
        apart = labels[anchors].float() @ candidate_labels.T.float() == 0
        count = torch.minimum(own.sum(dim=1), apart.sum(dim=1))
        to_others, to_own = (
            _kth_of_first(latents[anchors], candidates, permitted, count, k) for permitted in (apart, own)
        )
        values[rows] = _log_ratio(to_others, to_own, negligible(latents))
    return values


def _kth_of_first(
    anchors: Float[Tensor, "anchor dim"],
    candidates: Float[Tensor, "sample dim"],
    permitted: Bool[Tensor, "anchor sample"],
    count: Int[Tensor, " anchor"],
    k: int,
) -> Float[Tensor, " anchor"]:
    """Distance to the k-th nearest of the first `count` permitted candidates; infinite where these are too few."""
    chosen = permitted & (permitted.cumsum(dim=1) <= count[:, None])
    used = chosen.any(dim=0)
    distances = torch.cdist(anchors, candidates[used], compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.masked_fill(~chosen[:, used], torch.inf)
    if distances.shape[1] < k:
        return anchors.new_full((len(anchors),), torch.inf)
    return distances.topk(k, largest=False).values[:, -1]


def _log_ratio(
    other: Float[Tensor, " member"], own: Float[Tensor, " member"], rounding: float
) -> Float[Tensor, " member"]:
    """Log of other / own; nan where both are infinite, and where either is rounding."""
    return (other.log() - own.log()).where(torch.minimum(other, own) > rounding, torch.nan)


def _draw(rows: Int[Tensor, " row"], count: int, generator: torch.Generator) -> Int[Tensor, " drawn"]:
    return rows[_shuffle(len(rows), generator)[:count].to(rows.device)].sort().values


def _shuffle(count: int, generator: torch.Generator) -> Int[Tensor, " row"]:
    return torch.randperm(count, generator=generator, device=generator.device)
