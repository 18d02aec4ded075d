"""Which samples to join: pairs of one class, or of a class and the rest."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Pairs(NamedTuple):
    """Samples `first` and `second`, and the class in whose name they are joined."""

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cls: Int[Tensor, " pair"]


def draw_pairs(labels: Bool[Tensor, "sample class"], count: int, generator: torch.Generator) -> Pairs:
    """Of each class, `count` ordered pairs of different members, uniform and with replacement, in order of class.

    A class with fewer than two members gets none.

    >>> labels = torch.tensor([[True, False], [True, True], [True, False]])
    >>> draw_pairs(labels, 4, torch.Generator().manual_seed(0)).cls
    tensor([0, 0, 0, 0])
    """

    def draw(inside: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        if len(inside) < 2:
            return inside[:0], inside[:0]
        first = _randint(len(inside), count, generator)
        second = _randint(len(inside) - 1, count, generator)
        return inside[first], inside[second + (second >= first)]

    return _per_class(labels, count, draw)


def draw_flip_pairs(labels: Bool[Tensor, "sample class"], count: int, generator: torch.Generator) -> Pairs:
    """Of each class, `count` pairs of a member and a sample that is none, uniform and with replacement.

    A class without members, or with no one outside it, gets none.

    >>> draw_flip_pairs(torch.tensor([[True], [False], [True]]), 3, torch.Generator().manual_seed(0)).second
    tensor([1, 1, 1])
    """

    def draw(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
        if not len(inside) or not len(outside):
            return inside[:0], inside[:0]
        return inside[_randint(len(inside), count, generator)], outside[_randint(len(outside), count, generator)]

    return _per_class(labels, count, draw)


def ordered_pairs(labels: Bool[Tensor, "sample class"], count: int) -> Pairs:
    """Of each class, the first `count` ordered pairs in the order of their sample numbers: (0, 1), (0, 2), ..., (1, 0).

    The order of the code released with Li et al. (2022, arXiv:2203.12122), for comparison only: a class of more than
    `count` members is measured from a single sample. A small class gives fewer pairs than `count`.

    >>> ordered_pairs(torch.tensor([[True], [False], [True], [True]]), 4)[:2]
    (tensor([0, 0, 2, 2]), tensor([2, 3, 0, 3]))
    """

    def order(inside: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        others = len(inside) - 1
        number = torch.arange(min(count, len(inside) * others))
        first, second = number // max(others, 1), number % max(others, 1)
        return inside[first], inside[second + (second >= first)]

    return _per_class(labels, count, order)


def _per_class(labels: Tensor, count: int, draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Pairs:
    """Pairs of every class, drawn from the samples inside and outside it."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1 pair a class, got {count}")
    found = [Pairs(*torch.zeros(3, 0, dtype=torch.int64))]
    for cls, column in enumerate(labels.cpu().T):
        first, second = draw(column.nonzero().squeeze(1), (~column).nonzero().squeeze(1))
        found.append(Pairs(first, second, torch.full_like(first, cls)))
    return Pairs(*(torch.cat(fields).to(labels.device) for fields in zip(*found, strict=True)))


def _randint(high: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=generator.device).cpu()
