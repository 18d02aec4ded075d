"""Nearest neighbours: exact by matrix products or a tree, and approximate for millions of rows."""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.neighbors import KDTree
from torch import Tensor

from robustav.metrics.latents import check_k
from robustav.metrics.products import Frame, differences, ordered, search, tile_length

log = logging.getLogger(__name__)

Engine = Literal["auto", "torch", "sklearn"]

TREE_DIM = 6  # up to which a kd-tree is faster on a CPU, see docs/benchmarks.md
LINKS = 32  # of each row in an HNSW graph
CHECKED_ROWS = 1024  # looked at at once


class Neighbours(NamedTuple):
    """The nearest reference rows of each query, nearest first, equally near ones by index."""

    distances: Float[Tensor, "query k"]
    indices: Int[Tensor, "query k"]


class Approximate(NamedTuple):
    """Neighbours of which some are missing, and the share that is not, on a sample of the queries."""

    neighbours: Neighbours
    recall: float


def nearest(
    queries: Float[Tensor, "query dim"],
    reference: Float[Tensor, "sample dim"],
    k: int,
    *,
    exclude: Int[Tensor, " query"] | None = None,
    engine: Engine = "auto",
) -> Neighbours:
    """The `k` reference rows nearest to each query in Euclidean distance, exactly; query i skips row `exclude[i]`.

    `exclude` is -1 where nothing is to be skipped. In float64, distances are right to the last digits. In float32 they
    are to five (relative 1e-5); and to the last where a query has neighbours much nearer than the middle of the
    reference, so near duplicates lose nothing. Equal rows are at exactly 0. Where rounding or a tie leaves open which
    row is the k-th, any may be returned, but always the same. Beside the result it takes less than 256 MB, however
    large the reference.

    `engine`: "torch" multiplies matrices, on CPU or GPU; "sklearn" asks a kd-tree, on the CPU, in float64, which is
    faster in few dimensions and slower in many; "auto" takes the tree on a CPU up to 6 dimensions. They agree up to
    rounding. faiss is none of them: its exact index measured slower than "torch" at every size (docs/benchmarks.md);
    for its approximate one see `approximate`.

    >>> reference = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> nearest(torch.zeros(1, 2), reference, 2, exclude=torch.tensor([0]))
    Neighbours(distances=tensor([[1., 5.]]), indices=tensor([[2, 1]]))
    """
    return _nearest(queries, reference, k, exclude, engine, ("queries", "reference"))


def nearest_within(latents: Float[Tensor, "sample dim"], k: int, *, engine: Engine = "auto") -> Neighbours:
    """The `k` nearest other rows of each row, see `nearest`; a duplicate of a row is another row, at distance 0.

    >>> nearest_within(torch.tensor([[0.0], [1.0], [1.0], [5.0]]), 1).indices.flatten()
    tensor([1, 2, 1, 1])
    """
    others = torch.arange(len(latents), device=latents.device)
    return _nearest(latents, latents, k, others, engine, ("latents", "latents"))


def approximate(
    queries: Float[Tensor, "query dim"],
    reference: Float[Tensor, "sample dim"],
    k: int,
    *,
    exclude: Int[Tensor, " query"] | None = None,
    effort: int = 256,
    sample: int = 256,
) -> Approximate:
    """Most of the `k` nearest rows, by an HNSW graph [Malkov and Yashunin, 2018, arXiv:1603.09320]; needs faiss.

    For millions of queries in millions of rows: building the graph costs as much as many thousand exact queries. More
    `effort` (faiss's efSearch) takes longer and misses less. Recall is measured against `nearest` on `sample` of the
    queries, returned, and logged as a warning; any row as near as the k-th counts as found. The rows that are found
    have their exact distances; places for which none was found have index -1 at distance infinity. Runs on the CPU in
    float32 and takes another copy of the reference and 300 bytes a row. Several threads build a slightly different graph
    in every run, so other rows may be missed.
    """
    if effort < 1 or sample < 1:
        raise ValueError(f"`effort` and `sample` must be at least 1, got {effort} and {sample}")
    try:
        faiss = import_module("faiss")
    except ImportError as error:
        raise ValueError("`approximate` needs faiss: pip install 'robustav[faiss]', or take `nearest`") from error
    scale, exclude = _checked(queries, reference, k, exclude, ("queries", "reference"))
    with torch.no_grad():
        frame, index = Frame.around(reference, scale), faiss.IndexHNSWFlat(reference.shape[1], LINKS)
        length = tile_length(reference, torch.float32)
        for rows in reference.split(length):
            index.add(frame.place(rows, torch.float32).cpu().numpy())
        index.hnsw.efSearch = max(effort, k + 1)
        found = []
        for rows, skipped in zip(queries.split(length), exclude.split(length), strict=True):
            _, labels = index.search(frame.place(rows, torch.float32).cpu().numpy(), k + 1)
            indices = torch.from_numpy(labels).to(queries.device)
            distances = differences(rows, reference, indices.clamp(min=0), scale)
            missing = (indices < 0) | (indices == skipped[:, None])
            distances = distances.masked_fill_(missing, math.inf).mul_(scale).to(queries.dtype)
            found.append(ordered(distances, indices.masked_fill_(missing, -1), k))
        neighbours = Neighbours(*map(torch.cat, zip(*found, strict=True)))
    some = torch.arange(0, len(queries), -(-len(queries) // sample), device=queries.device)
    exact = nearest(queries[some], reference, k, exclude=exclude[some])
    near = neighbours.distances[some] <= exact.distances[:, -1:] * (1 + 1e-5)
    recall = float(near.double().mean())
    log.warning("approximate: %.2f %% of the %d nearest rows found, by %d of the queries", 100 * recall, k, len(some))
    return Approximate(neighbours, recall)


def _nearest(
    queries: Tensor, reference: Tensor, k: int, exclude: Tensor | None, engine: str, names: tuple[str, str]
) -> Neighbours:
    """`nearest`, whose arguments are called by the names that the caller knows."""
    if engine not in ("auto", "torch", "sklearn"):
        raise ValueError(f'`engine` must be "auto", "torch" or "sklearn", got {engine!r}; for faiss see `approximate`')
    scale, exclude = _checked(queries, reference, k, exclude, names)
    tree = queries.device.type == "cpu" and queries.shape[1] <= TREE_DIM if engine == "auto" else engine == "sklearn"
    by = _by_tree if tree else search
    with torch.no_grad():
        return Neighbours(*by(queries, reference, k, exclude, scale))


def _by_tree(queries: Tensor, reference: Tensor, k: int, exclude: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    tree = KDTree((reference.detach().double() / scale).cpu().numpy())
    wanted = min(k + int((exclude >= 0).any()), len(reference))
    parts = (queries.detach().double() / scale).cpu().split(-(-len(queries) // torch.get_num_threads()))
    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(lambda part: tree.query(part.numpy(), wanted), parts))
    distances = torch.cat([torch.from_numpy(x) for x, _ in found]).mul_(scale).to(queries)
    indices = torch.cat([torch.from_numpy(x) for _, x in found]).to(queries.device)
    return ordered(distances.masked_fill_(indices == exclude[:, None], math.inf), indices, k)


def _checked(
    queries: Tensor, reference: Tensor, k: int, exclude: Tensor | None, names: tuple[str, str]
) -> tuple[float, Int[Tensor, " query"]]:
    """A power of two near the largest value, and `exclude` or what stands for none; `ValueError` for what cannot be."""
    given = {names[0]: queries, names[1]: reference}
    for name, rows in given.items():
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"`{name}` must be [sample, dim] with at least one of each, got {list(rows.shape)}")
        if rows.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`{name}` must be float32 or float64, got {rows.dtype}: convert with .float()")
    for what, ours, theirs in (
        ("dim", queries.shape[1], reference.shape[1]),
        ("dtype", queries.dtype, reference.dtype),
        ("device", queries.device, reference.device),
    ):
        if ours != theirs:
            raise ValueError(f"`queries` and `reference` must have the same {what}, got {ours} and {theirs}")
    if exclude is None:
        exclude = torch.full((len(queries),), -1)
    if exclude.shape != (len(queries),):
        raise ValueError(f"`exclude` must be one row for each of {len(queries)} queries, got {list(exclude.shape)}")
    if len(outside := exclude[(exclude < -1) | (exclude >= len(reference))]):
        raise ValueError(
            f"`exclude` must hold rows of `reference`, 0 to {len(reference) - 1}, or -1 for none, got {int(outside[0])}"
        )
    check_k(k, len(reference) - int((exclude >= 0).any()), "reference rows that a query may find")
    largest = max(_largest(rows, name) for name, rows in given.items())
    return 2.0 ** min(max(math.frexp(largest)[1], -120), 1000), exclude.to(queries.device, torch.int64)


def _largest(rows: Float[Tensor, "row dim"], name: str) -> float:
    """The largest absolute value; `ValueError` naming the first row that is not finite."""
    largest = 0.0
    for first in range(0, len(rows), CHECKED_ROWS):
        ends = torch.stack(torch.aminmax(rows[first : first + CHECKED_ROWS].detach()))
        if not bool(ends.isfinite().all()):
            row, column = (~rows[first : first + CHECKED_ROWS].isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"`{name}` must be finite, got {rows[first + row, column].item()} first at row {first + row}, "
                f"dim {column}: look at what the model gives there"
            )
        largest = max(largest, float(ends.abs().max()))
    return largest
