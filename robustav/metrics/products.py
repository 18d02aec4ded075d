"""Exact nearest neighbours in bounded memory: products of matrices find candidates, and differences decide."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustav.prepare import quick_products

QUERY_BLOCK = 512  # queries of one product
TILE = 20_480  # reference rows of one product
GROUP = 8  # scores of which at first only the least is looked at
LEVELS = 2  # groups of scores, and groups of groups
SPARE = 8  # candidates beyond `k`, so that rounding cannot lose a neighbour unnoticed
MORE_SPARE = 256  # where those were too few: many rows at nearly the same distance
ON_GPU = 2  # times as many rows in a block
TILE_BYTES = 2**26
STATE_BYTES = 2**25  # of the candidates that are kept, and of those that are looked at, at once
GATHER_BYTES = 2**22  # of the rows that are subtracted at once: more would leave the cache and take twice as long
GATHER_ROWS = 1024
REACH = 10  # times its distance to the k-th row: what is near a query, so that a frame around it serves both
CLOSE = 1 / 8  # squared distance over squared norm below which a float32 product loses more digits than can be spared
SLACK = {torch.float32: 1e-4, torch.float64: 1e-9}  # of a squared distance: nearer to each other, any row will do


class Frame(NamedTuple):
    """Where products are taken: the middle of the reference at the origin, all divided by a power of two."""

    centre: Float[Tensor, " dim"]  # divided already
    scale: float

    @classmethod
    def around(cls, reference: Float[Tensor, "sample dim"], scale: float) -> "Frame":
        """The frame of a reference; any point near the middle will do, so a thousand rows are asked for it."""
        some = reference[:: -(-len(reference) // 1024)]
        return cls((some.double() / scale).mean(dim=0), scale)

    def place(
        self, rows: Float[Tensor, "row dim"], dtype: torch.dtype, *, factor: float = 1, out: Tensor | None = None
    ) -> Float[Tensor, "row dim"]:
        """The rows in this frame, times a power of two; only the subtraction rounds."""
        out = rows.new_empty(rows.shape, dtype=dtype) if out is None else out
        centre = (self.centre * -factor).to(torch.promote_types(rows.dtype, dtype))
        return torch.add(centre, rows, alpha=factor / self.scale, out=out)


class Candidates(NamedTuple):
    """The best of the reference rows seen so far, in no order; where a score is infinite there is no row."""

    scores: Float[Tensor, "query candidate"]  # squared distances less the query's squared norm, in a `Frame`
    indices: Int[Tensor, "query candidate"]

    def against(self, scores: Float[Tensor, "query column"], start: int, kept: int) -> "Candidates":
        """The best `kept` of these and of the reference rows from `start` on, one for each column of `scores`.

        The n least scores are in the n groups with the least minima, and so on for groups of groups: few columns are
        ever compared.
        """
        full = self.scores.shape[1] == kept
        limit = self.scores.amax(dim=1, keepdim=True) if full else math.inf
        levels = [scores]
        for _ in range(LEVELS):
            levels.append(levels[-1].view(len(scores), GROUP, -1).amin(dim=1))
        values = levels.pop()
        columns = torch.arange(values.shape[1], device=scores.device).expand(values.shape)
        for level in reversed(levels):
            wanted = min(kept, int((values < limit).sum(dim=1).amax()) if full else values.shape[1])
            if wanted == 0:
                return self
            columns = columns.gather(1, values.topk(wanted, dim=1, largest=False, sorted=False).indices)
            members = torch.arange(0, level.shape[1], level.shape[1] // GROUP, device=scores.device)
            columns = (columns[:, None, :] + members[:, None]).flatten(1)
            values = level.gather(1, columns)
        values = torch.cat([self.scores, values], dim=1)
        indices = torch.cat([self.indices, columns.add_(start)], dim=1)
        best = values.topk(min(kept, values.shape[1]), dim=1, largest=False, sorted=False)
        return Candidates(best.values, indices.gather(1, best.indices))


def search(
    queries: Float[Tensor, "query dim"],
    reference: Float[Tensor, "sample dim"],
    k: int,
    exclude: Int[Tensor, " query"],
    scale: float,
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """Distances and indices of the `k` nearest reference rows, see `neighbours.nearest`, which checks its arguments.

    Searches in float32; in float64 for the queries that this leaves in doubt, where rounding may have lost a neighbour;
    and for those that even this does, around one of them after the other, with all that are near it. `scale` is a power
    of two near the largest value; -1 in `exclude` stands for no row.

    >>> points = torch.tensor([[1.0], [2.0], [4.0]])
    >>> search(points[:2], points, 1, exclude=torch.tensor([0, -1]), scale=4.0)
    (tensor([[1.],
            [0.]]), tensor([[1],
            [1]]))
    """
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty_like(distances, dtype=torch.int64)

    def doubtful(rows: Tensor, frame: Frame, dtype: torch.dtype, spare: int) -> Tensor:
        """Search for these queries; return those that may lack a neighbour."""
        rest = [rows[:0]]
        for span in rows.split(max(STATE_BYTES // (16 * (k + spare)), 1)) if len(rows) else ():
            found = _by_products((queries, span, exclude), reference, k, spare, frame, dtype)
            distances[span], indices[span], sure = found
            rest.append(span[~sure])
        return torch.cat(rest)

    frame = Frame.around(reference, scale)
    with _float32_products(queries.device):
        rows = doubtful(torch.arange(len(queries), device=queries.device), frame, torch.float32, SPARE)
        rows = doubtful(rows, frame, torch.float64, MORE_SPARE)
        while len(rows):
            first = queries[rows[:1]]
            gaps = [differences(first, queries, part[None], scale)[0] for part in rows.split(GATHER_ROWS)]
            near = torch.cat(gaps) * scale <= REACH * distances[rows[0], -1]
            around = Frame(first[0].double() / scale, scale)
            rest = doubtful(rows[near], around, torch.float64, SPARE)
            rows = torch.cat([rest[rest != rows[0]], rows[~near]])  # around itself no query is in doubt: its norm is 0
    return distances, indices


def ordered(
    distances: Float[Tensor, "query candidate"], indices: Int[Tensor, "query candidate"], k: int
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"]]:
    """The first `k` by distance, equal ones by index.

    >>> ordered(torch.tensor([[2.0, 1.0, 2.0]]), torch.tensor([[5, 7, 3]]), 2)
    (tensor([[1., 2.]]), tensor([[7, 3]]))
    """
    indices, order = indices.sort(dim=1)
    distances, again = distances.gather(1, order).sort(dim=1, stable=True)
    return distances[:, :k], indices.gather(1, again)[:, :k]


def differences(
    queries: Float[Tensor, "query dim"],
    reference: Float[Tensor, "sample dim"],
    indices: Int[Tensor, "query candidate"],
    scale: float,
) -> Float[Tensor, "query candidate"]:
    """Distances to the indexed rows over `scale`, from differences in float64, where near rows lose no digit.

    >>> differences(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [4.0, 5.0]]), torch.tensor([[1, 0]]), 1.0)
    tensor([[5., 0.]], dtype=torch.float64)
    """
    result = torch.empty(indices.shape, dtype=torch.float64, device=queries.device)
    room = GATHER_BYTES * _times(queries.device)
    block = max(room // (8 * indices.shape[1] * queries.shape[1]), 1)
    for first in range(0, len(queries), block):
        part = slice(first, first + block)
        rows = reference.index_select(0, indices[part].flatten()).double().view(*indices[part].shape, -1)
        rows.sub_(queries[part, None]).mul_(1 / scale)
        torch.linalg.vector_norm(rows, dim=2, out=result[part])
    return result


def tile_length(reference: Float[Tensor, "sample dim"], dtype: torch.dtype) -> int:
    """Rows of a tile: as many as memory allows, about the same in all tiles, a whole number of groups of groups."""
    row_bytes = reference.shape[1] * torch.promote_types(reference.dtype, dtype).itemsize
    tiles = -(-len(reference) // max(min(TILE, TILE_BYTES // row_bytes), 1))
    return _whole(-(-len(reference) // tiles))


def _by_products(
    asked: tuple[Tensor, Tensor, Tensor], reference: Tensor, k: int, spare: int, frame: Frame, dtype: torch.dtype
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"], Bool[Tensor, " query"]]:
    """Neighbours of some queries by products in `dtype`, and whether none of them can have been missed.

    `asked`: all queries, the numbers of those wanted, and what each of all queries excludes.
    """
    queries, span, exclude = asked
    kept = k + spare
    blocks = span.split(max(min(QUERY_BLOCK * _times(span.device), STATE_BYTES // (16 * GROUP * kept)), 1))
    best = [Candidates(frame.centre.new_empty(len(b), 0, dtype=dtype), b.new_empty(len(b), 0)) for b in blocks]
    length = tile_length(reference, dtype)
    tile = torch.empty((length, reference.shape[1]), dtype=dtype, device=span.device)
    room = torch.empty(len(blocks[0]) * length, dtype=dtype, device=span.device)
    for start in range(0, len(reference), length):
        rows = reference[start : start + length]
        width = _whole(len(rows))
        frame.place(rows, dtype, out=tile[: len(rows)])
        tile[len(rows) : width] = 0
        norms = torch.linalg.vector_norm(tile[:width], dim=1).square_()
        norms[len(rows) :] = math.inf
        for number, block in enumerate(blocks):
            points = frame.place(queries.index_select(0, block), dtype, factor=-2)
            scores = room[: len(block) * width].view(len(block), width)
            torch.mm(points, tile[:width].T, out=scores).add_(norms)
            skipped = exclude[block] - start
            (hit,) = ((skipped >= 0) & (skipped < len(rows))).nonzero(as_tuple=True)
            scores[hit, skipped[hit]] = math.inf
            best[number] = best[number].against(scores, start, kept)
    del tile, room
    decided = [
        _decided(queries.index_select(0, block), reference, k, candidates, frame)
        for block, candidates in zip(blocks, best, strict=True)
    ]
    distances, indices, sure = map(torch.cat, zip(*decided, strict=True))
    return distances, indices, sure


def _decided(
    queries: Tensor, reference: Tensor, k: int, candidates: Candidates, frame: Frame
) -> tuple[Float[Tensor, "query k"], Int[Tensor, "query k"], Bool[Tensor, " query"]]:
    """The best `k` candidates, by differences where products are not precise enough, and whether none can be missing.

    A score errs by at most `error` times the sum of both squared norms, if rounding falls at random [Higham and Mary,
    2019, doi:10.1137/18M1226312]. With |y|² <= 2 |x|² + 2 |x - y|², a row that is no candidate is no nearer than the
    last candidate's score says, less 3 `error` |x|² and less 2 `error` of its own squared distance.
    """
    dtype = candidates.scores.dtype
    norms = torch.linalg.vector_norm(frame.place(queries, dtype), dim=1, keepdim=True).square_()
    squares = candidates.scores + norms
    close = (squares.amin(dim=1) <= CLOSE * norms[:, 0]) | (queries.dtype == torch.float64)
    missing = squares.isinf()
    indices = candidates.indices.masked_fill(missing, 0)
    distances = squares.clamp(min=0).sqrt_().double()
    (rows,) = close.nonzero(as_tuple=True)
    distances[rows] = differences(queries[rows], reference, indices[rows], frame.scale)
    distances = distances.masked_fill_(missing, math.inf).mul_(frame.scale).to(queries.dtype)
    distances, indices = ordered(distances, indices, k)
    error = torch.finfo(dtype).eps * (math.sqrt(queries.shape[1]) + 2)
    furthest = (distances[:, -1].double() / frame.scale).square()
    needed = furthest * (1 + 2 * error - SLACK[queries.dtype]) + 3 * error * norms[:, 0]
    return distances, indices, ~close | (squares.amax(dim=1) >= needed) | (furthest == 0)


def _whole(rows: int) -> int:
    """The least whole number of groups of groups that has room for the rows."""
    return -(-rows // GROUP**LEVELS) * GROUP**LEVELS


def _times(device: torch.device) -> int:
    return 1 if device.type == "cpu" else ON_GPU


@contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """Products round as float32 does, whatever the caller lets them do; on a CPU by its faster kernels if those do."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with quick_products() if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
