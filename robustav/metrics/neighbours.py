"""Nearest neighbours: exact, in blocks."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Neighbours(NamedTuple):
    """The nearest reference rows of each query, nearest first."""

    distances: Float[Tensor, "query k"]
    indices: Int[Tensor, "query k"]


def nearest(
    queries: Float[Tensor, "query dim"],
    reference: Float[Tensor, "sample dim"],
    k: int,
    *,
    exclude: Int[Tensor, " query"] | None = None,
) -> Neighbours:
    """The `k` reference rows nearest to each query in Euclidean distance; `exclude[i]` is a row that query i skips."""
    distances = torch.cdist(queries, reference, compute_mode="donot_use_mm_for_euclid_dist")
    if exclude is not None:
        distances.scatter_(1, exclude[:, None], float("inf"))
    return Neighbours(*distances.topk(k, largest=False))


def nearest_within(latents: Float[Tensor, "sample dim"], k: int) -> Neighbours:
    """The `k` nearest other rows of each row."""
    return nearest(latents, latents, k, exclude=torch.arange(len(latents), device=latents.device))
