"""Convexity without a network: whether shortest paths through neighbouring samples stay within a class."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from robustav.metrics.convexity import Terms
from robustav.metrics.latents import checked
from robustav.metrics.neighbours import nearest_within
from robustav.metrics.pairs import Pairs, draw_pairs

CHUNK_BYTES = 2**26  # of distances and predecessors, 12 bytes for each source and sample


class GraphPaths(NamedTuple):
    """Pairs of samples of one class, and what the shortest path between them adds to that class's score."""

    pairs: Pairs
    terms: Terms


def graph_convexity(
    latents: Float[Tensor, "sample dim"],
    labels: Bool[Tensor, "sample class"],
    k: int = 10,
    count: int = 5000,
    *,
    generator: torch.Generator,
    members: int | None = None,
) -> GraphPaths:
    """Share of a shortest path's inner samples that carry its ends' class [Tětková et al., 2025, arXiv:2305.17154].

    Paths run between `count` uniform pairs of each class, through a graph that joins each sample to its `k` nearest, in
    either direction, by Euclidean length. In [0, 1]; 1 for neighbours, who have nobody between them, and 0 where there
    is no path. A common class scores high by being everywhere: with `members`, each class gets a graph of its own, of
    that many of its samples and as many others, and classes too small for that get no pairs. Otherwise one graph holds
    all samples. Hubs, samples that are near to many, shorten all paths and blur classes.

    >>> latents = torch.tensor([[0.0], [1.0], [2.0], [3.5]])
    >>> labels = torch.tensor([[True], [False], [True], [True]])
    >>> found = graph_convexity(latents, labels, k=1, count=50, generator=torch.Generator().manual_seed(0))
    >>> found.terms.numerator[(found.pairs.first == 0) & (found.pairs.second == 3)].unique()
    tensor([0.5000], dtype=torch.float64)
    """
    if len(latents) != len(labels):
        raise ValueError(f"`labels` must have a row for each of the {len(latents)} latents, got {len(labels)}")
    latents = checked(latents)
    if not (latents != latents[:1]).any():
        raise ValueError("`latents` must differ between samples, got the same for all")
    smallest = len(latents) if members is None else 2 * members
    if not 0 < k < smallest:
        raise ValueError(f"`k` must lie between 1 and {smallest - 1}, one less than the samples of a graph, got {k}")
    if members is None:
        pairs = draw_pairs(labels, count, generator)
        return GraphPaths(pairs, _terms(latents, labels, pairs, k))
    found = [GraphPaths(draw_pairs(labels[:0], count, generator), Terms(*torch.zeros(2, 0, dtype=torch.float64)))]
    for cls, column in enumerate(labels.T):
        sides = [side.nonzero().squeeze(1) for side in (column, ~column)]
        if min(map(len, sides)) >= members:
            rows = torch.cat([side[_some(len(side), members, generator).to(side.device)] for side in sides])
            pairs = draw_pairs(column[rows, None], count, generator)
            terms = _terms(latents[rows], column[rows, None], pairs, k)
            named = Pairs(rows[pairs.first], rows[pairs.second], torch.full_like(pairs.cls, cls))
            found.append(GraphPaths(named, terms))
    all_pairs, all_terms = zip(*found, strict=True)
    return GraphPaths(
        Pairs(*map(torch.cat, zip(*all_pairs, strict=True))), Terms(*map(torch.cat, zip(*all_terms, strict=True)))
    )


def _some(among: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """`count` different numbers below `among`."""
    return torch.randperm(among, generator=generator, device=generator.device)[:count]


def _terms(latents: Tensor, labels: Tensor, pairs: Pairs, k: int) -> Terms:
    """What the shortest path of each pair adds, all samples in one graph."""
    samples = len(latents)
    distances, indices = (field.cpu().numpy() for field in nearest_within(latents, k))
    here, there = np.repeat(np.arange(samples), k), indices.ravel()
    both_ways = np.concatenate([here * samples + there, there * samples + here])
    edges, kept = np.unique(both_ways, return_index=True)
    lengths = np.tile(distances.ravel().astype(np.float64), 2)[kept]
    places = (edges // samples).astype(np.int32), (edges % samples).astype(np.int32)
    graph = coo_array((lengths, places), shape=(samples, samples)).tocsr()
    carried = labels.cpu().numpy()
    first, second, cls = (field.cpu().numpy() for field in pairs)
    shares, by_source = np.zeros(len(first)), np.argsort(first, kind="stable")
    sources = np.unique(first)
    step = max(1, CHUNK_BYTES // (12 * samples))
    for start in range(0, len(sources), step):
        chunk = sources[start : start + step]
        _, before = dijkstra(graph, indices=chunk, return_predecessors=True)
        low, high = np.searchsorted(first[by_source], chunk[[0, -1]] + [0, 1])
        rows = by_source[low:high]
        shares[rows] = _inner_shares(
            before, np.searchsorted(chunk, first[rows]), first[rows], second[rows], cls[rows], carried
        )
    shares[np.isin(first * samples + second, edges)] = 1  # neighbours, also where a detour is no longer
    numerator = torch.from_numpy(shares).to(latents.device)
    return Terms(numerator, torch.ones_like(numerator))


def _inner_shares(
    before: np.ndarray, tree: np.ndarray, first: np.ndarray, second: np.ndarray, cls: np.ndarray, carried: np.ndarray
) -> np.ndarray:
    """Walk all paths back from their second ends at once; `before[tree, node]` comes before, negative for none."""
    node = before[tree, second]
    inner, own = np.zeros(len(first)), np.zeros(len(first))
    walking = np.flatnonzero((node >= 0) & (node != first))
    while len(walking):
        inner[walking] += 1
        own[walking] += carried[node[walking], cls[walking]]
        node[walking] = before[tree[walking], node[walking]]
        walking = walking[node[walking] != first[walking]]
    return own / np.maximum(inner, 1)
