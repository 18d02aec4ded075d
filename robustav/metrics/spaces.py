"""The spaces that latents are looked at in, and how two sets of latents are made comparable."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.metrics.latents import checked, negligible
from robustav.metrics.neighbours import nearest_within

VARIANCE_KEPT = 0.95


class Space(NamedTuple):
    """A transformation of latents and what a report calls it."""

    transform: Callable[..., Tensor]  # (latents, reference=None) -> latents
    words: str


class Aligned(NamedTuple):
    """Two sets of paired latents in one space."""

    source: Float[Tensor, "sample dim"]
    target: Float[Tensor, "sample dim"]


class Axes(NamedTuple):
    """Principal axes of a set, the one of the largest variance first."""

    centre: Float[Tensor, " dim"]
    directions: Float[Tensor, "dim axis"]
    variances: Float[Tensor, " axis"]

    def coordinates(self, latents: Float[Tensor, "sample dim"], count: int) -> Float[Tensor, "sample kept"]:
        """Where latents lie along the first axes."""
        return (latents - self.centre.to(latents.dtype)) @ self.directions[:, :count].to(latents.dtype)


def raw(
    latents: Float[Tensor, "sample dim"], reference: Float[Tensor, "other dim"] | None = None
) -> Float[Tensor, "sample dim"]:
    """The latents themselves, checked, in the precision of `checked`. `reference` does not matter."""
    return checked(latents)


def unit(
    latents: Float[Tensor, "sample dim"], reference: Float[Tensor, "other dim"] | None = None
) -> Float[Tensor, "sample dim"]:
    """Each row at length 1, so that distances follow the cosine: its square is 2 - 2 cos. `reference` does not matter.

    >>> unit(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    latents = checked(latents)
    largest = latents.abs().amax(dim=1, keepdim=True)
    silent = (largest == 0).flatten()
    if silent.any():
        raise ValueError(
            f"`latents` must have a direction, but sample {int(silent.nonzero()[0])} is all zeros "
            f"({int(silent.sum())} of {len(latents)} samples concerned): leave those out or use another space"
        )
    scaled = latents / largest  # first, so that no square leaves the range of numbers
    return scaled / scaled.norm(dim=1, keepdim=True)


def whitened(
    latents: Float[Tensor, "sample dim"], reference: Float[Tensor, "other dim"] | None = None
) -> Float[Tensor, "sample axis"]:
    """The fewest principal axes that hold 95 % of the variance, each at variance 1.

    Centre, axes and variances are those of `reference`, by default of `latents` themselves: give the clean latents
    when attacked ones are to stay comparable to them.

    >>> whitened(torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]])).abs()
    tensor([[1.2247],
            [0.0000],
            [1.2247]], dtype=torch.float64)
    """
    latents = checked(latents)
    basis = latents if reference is None else checked(reference, "reference")
    _check_varies(basis, "latents" if reference is None else "reference")
    axes = _axes(basis)
    held = axes.variances.cumsum(dim=0) / axes.variances.sum()
    count = int((held < VARIANCE_KEPT).sum()) + 1
    return axes.coordinates(latents, count) / axes.variances[:count].sqrt().to(latents.dtype)


SPACES: Mapping[str, Space] = {
    "raw": Space(raw, "latents as they are"),
    "unit": Space(unit, "latents at length 1, compared by cosine"),
    "whitened": Space(whitened, "principal axes that hold 95 % of the variance, each at variance 1"),
}


def principal(
    latents: Float[Tensor, "sample dim"], dim: int, reference: Float[Tensor, "other dim"] | None = None
) -> Float[Tensor, "sample axis"]:
    """Coordinates on the first `dim` principal axes of `reference` (by default of `latents`), largest variance first.

    The sign of an axis is arbitrary.

    >>> principal(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 1).abs()
    tensor([[2.5000],
            [2.5000]], dtype=torch.float64)
    """
    latents = checked(latents)
    basis = latents if reference is None else checked(reference, "reference")
    most = min(basis.shape[1], len(basis) - 1)
    if not 1 <= dim <= most:
        raise ValueError(
            f"`dim` must be at least 1 and at most {most}, which {list(basis.shape)} latents span, got {dim}"
        )
    return _axes(basis).coordinates(latents, dim)


def matched(latents: Float[Tensor, "sample dim"], dim: int) -> Float[Tensor, "sample axis"]:
    """`principal` at a scale where the nearest other row is at distance 1 on average.

    Modalities of one `dim` and scale differ by the shape of their latents alone. Exact copies count as distance 0, and
    so enlarge everything: drop them first.

    >>> matched(torch.tensor([[0.0, 1.0], [4.0, 1.0], [8.0, 1.0]]), 1).abs()
    tensor([[1.],
            [0.],
            [1.]], dtype=torch.float64)
    """
    latents = checked(latents)
    coordinates = principal(latents, dim)
    gap = nearest_within(coordinates, 1).distances.mean()
    if gap <= negligible(latents):
        raise ValueError("`latents` must hold samples that are not copies of one another, but each has an exact copy")
    return coordinates / gap


def procrustes(source: Float[Tensor, "sample dim"], target: Float[Tensor, "row axis"]) -> Aligned:
    """Both sets centred and scaled alike, `source` turned or mirrored onto `target` [Schönemann, 1966].

    A coordinate is 1 in the mean square; no axis is stretched. Row i of both describes sample i. The rotation is the
    best one for these rows: with fewer rows than dims it finds agreement in anything, so align few dims (see
    `principal`) or read the result on other rows.

    >>> line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    >>> aligned = procrustes(line, 3 * line.flip(1) + 1)
    >>> torch.allclose(aligned.source, aligned.target)
    True
    """
    if source.shape != target.shape:
        raise ValueError(
            f"`source` and `target` must have one shape, row i of both for sample i, got {list(source.shape)} and "
            f"{list(target.shape)}: give both the same dim with `principal` or `matched`"
        )
    moving, still = _standard(source, "source"), _standard(target, "target")
    left, _, right = torch.linalg.svd(moving.T @ still)
    return Aligned(moving @ left @ right, still)


def _standard(latents: Float[Tensor, "sample dim"], name: str) -> Float[Tensor, "sample dim"]:
    """Centred, and 1 in the mean square of a coordinate."""
    latents = checked(latents, name)
    _check_varies(latents, name)
    centred = latents - latents.mean(dim=0)
    return centred / centred.square().mean().sqrt()


def _axes(latents: Float[Tensor, "sample dim"]) -> Axes:
    centre = latents.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(latents - centre, full_matrices=False)
    return Axes(centre, directions.T, lengths.square() / len(latents))


def _check_varies(latents: Float[Tensor, "sample dim"], name: str) -> None:
    if (latents - latents[0]).abs().max() <= negligible(latents):
        raise ValueError(
            f"`{name}` must vary, but all {len(latents)} samples are equal: look at the layer they come from"
        )
