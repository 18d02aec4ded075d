"""Norms as rows of a table: everything an attack, a projection and an audit ask of linf, l2 and l1.

`furthest` is the step of a ball that a direction rewards most, where each coordinate has only so much room downwards and
upwards (tensors at or above 0, infinite where nothing bounds it). A coordinate whose direction is 0 stays.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Radius = float | Tensor  # one for all samples, or [batch]
Draws = Sequence[torch.Generator]  # one generator a sample, so that no draw depends on batch mates

SPARSITY = 0.01  # share of coordinates that one l1 step writes to [Tramèr and Boneh, 2019, arXiv:1904.13000]
TINY = 1e-30  # keeps a zero gradient from dividing by zero; far below any gradient that means something


class Norm(NamedTuple):
    """All that is asked of a norm; a new norm is a new row of `NORMS`."""

    length: Callable[[Tensor], Tensor]  # [batch, *shape] -> [batch]
    shorten: Callable[[Tensor, Radius], Tensor]  # the nearest point of the ball, sample by sample
    steepest: Callable[[Tensor], Tensor]  # the step of length 1 that a gradient rewards most
    random: Callable[[Tensor, Draws], Tensor]  # uniform in the unit ball; shape and device of the first argument
    shared: bool  # coordinates share one budget, so a step spent on a blocked one is lost to the others
    furthest: Callable[[Tensor, Radius, Tensor, Tensor], Tensor]  # direction, radius, room down and up -> a step


def per_sample(value: Radius, like: Tensor) -> Radius:
    """Let a [batch] tensor broadcast against [batch, *shape]; a plain number is passed through."""
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value


def _draw(like: Tensor, draws: Draws, sample: Callable[[torch.Size, torch.Generator], Tensor]) -> Tensor:
    """One draw a sample from its own generator (on the CPU, so that every device sees the same numbers)."""
    if len(draws) != len(like):
        raise ValueError(f"`draws` must hold one generator a sample, got {len(draws)} for a batch of {len(like)}")
    return torch.stack([sample(like.shape[1:], generator) for generator in draws]).to(like)


def linf_length(delta: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch"]:
    """Largest absolute value."""
    return delta.flatten(1).abs().amax(1)


def linf_shorten(delta: Float[Tensor, " batch *shape"], radius: Radius) -> Float[Tensor, " batch *shape"]:
    """Clip every coordinate to [-radius, radius]."""
    bound = per_sample(radius, delta)
    return delta.clamp(-bound, bound)  # type: ignore[arg-type]  # both numbers or both tensors, which clamp accepts


def linf_random(like: Float[Tensor, " batch *shape"], draws: Draws) -> Float[Tensor, " batch *shape"]:
    """Uniform in the cube [-1, 1]."""
    return _draw(like, draws, lambda shape, generator: 2 * torch.rand(shape, generator=generator) - 1)


def l2_length(delta: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch"]:
    """Euclidean length, summed in float64: over a million pixels float32 would be off by 2 parts in 100 000."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64).to(delta.dtype)


def l2_shorten(delta: Float[Tensor, " batch *shape"], radius: Radius) -> Float[Tensor, " batch *shape"]:
    """Scale down whatever is longer than `radius`; leave the rest as it is."""
    factor = radius / l2_length(delta).clamp(min=TINY)
    return delta * per_sample(factor.clamp(max=1), delta)


def l2_steepest(gradient: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
    """The gradient at length 1; zero where it is zero."""
    # Largest value first: squares of a small gradient underflow, and its direction would be lost.
    scaled = gradient / per_sample(linf_length(gradient).clamp(min=TINY), gradient)
    return scaled / per_sample(l2_length(scaled).clamp(min=TINY), gradient)


def l2_random(like: Float[Tensor, " batch *shape"], draws: Draws) -> Float[Tensor, " batch *shape"]:
    """Uniform in the ball: a Gaussian direction, and a radius u^(1/d)."""

    def sample(shape: torch.Size, generator: torch.Generator) -> Tensor:
        direction = torch.randn(shape, generator=generator)
        radius = torch.rand((), generator=generator) ** (1 / max(shape.numel(), 1))
        return direction * (radius / direction.norm().clamp(min=TINY))

    return _draw(like, draws, sample)


def l1_length(delta: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch"]:
    """Sum of absolute values, in float64 for the same reason."""
    return delta.flatten(1).abs().sum(1, dtype=torch.float64).to(delta.dtype)


def l1_shorten(delta: Float[Tensor, " batch *shape"], radius: Radius) -> Float[Tensor, " batch *shape"]:
    """Euclidean projection on the l1 ball [Duchi et al., 2008, doi:10.1145/1390156.1390191, figure 1]."""
    # In float64: the threshold is a small difference of long sums, and what rounding leaves over is scaled away.
    size = delta.flatten(1).abs().double()
    radius = torch.as_tensor(radius, dtype=size.dtype, device=size.device).expand(len(size))[:, None]
    sorted_size = size.sort(dim=1, descending=True).values
    excess = sorted_size.cumsum(1) - radius
    rank = torch.arange(1, size.shape[1] + 1, device=size.device)
    kept = (sorted_size * rank > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp(min=0)
    shrunk = (size - threshold).clamp(min=0)
    shrunk = shrunk * (radius / shrunk.sum(1, keepdim=True).clamp(min=TINY)).clamp(max=1)
    projected = shrunk.reshape(delta.shape).to(delta) * delta.sign()
    inside = (size.sum(1) <= radius[:, 0]).reshape(-1, *[1] * (delta.ndim - 1))
    return torch.where(inside, delta, projected)


def l1_steepest(gradient: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch *shape"]:
    """Equal steps on the `SPARSITY` share of coordinates with the largest gradient (at least one).

    The true optimum moves one coordinate only, which the valid range soon blocks; a few at once get further
    [Tramèr and Boneh, 2019, arXiv:1904.13000].
    """
    flat = gradient.flatten(1)
    count = max(1, round(SPARSITY * flat.shape[1]))
    top = flat.abs().topk(count, dim=1)
    step = torch.zeros_like(flat).scatter(1, top.indices, flat.gather(1, top.indices).sign())
    return (step / step.abs().sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


def l1_random(like: Float[Tensor, " batch *shape"], draws: Draws) -> Float[Tensor, " batch *shape"]:
    """Uniform in the l1 ball: the first d of d + 1 exponentials over their sum, with random signs."""

    def sample(shape: torch.Size, generator: torch.Generator) -> Tensor:
        exponentials = torch.empty(shape.numel() + 1).exponential_(generator=generator)
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (exponentials[:-1] / exponentials.sum()).reshape(shape) * signs

    return _draw(like, draws, sample)


def _room(direction: Tensor, radius: Radius, down: Tensor, up: Tensor) -> Tensor:
    """How far each coordinate may go where its direction points, the radius included."""
    room = torch.where(direction > 0, up, down).masked_fill(direction == 0, 0)
    return room.minimum(torch.as_tensor(per_sample(radius, direction)).to(direction))


def linf_furthest(
    direction: Float[Tensor, " batch *shape"], radius: Radius, down: Tensor, up: Tensor
) -> Float[Tensor, " batch *shape"]:
    """Every coordinate as far as radius and room let it."""
    return direction.sign() * _room(direction, radius, down, up)


def l2_furthest(
    direction: Float[Tensor, " batch *shape"], radius: Radius, down: Tensor, up: Tensor
) -> Float[Tensor, " batch *shape"]:
    """The direction, stretched until its length is the radius, each coordinate stopping at its room."""
    size = direction.flatten(1).abs().double()
    size = size / size.amax(1, keepdim=True).clamp(min=TINY)
    room = _room(direction, radius, down, up).flatten(1).double()
    square = torch.as_tensor(radius, dtype=size.dtype, device=size.device).expand(len(size)).square()
    stopped = size == 0
    # Each coordinate that stops leaves more of the radius to the others, which may stop the next: never one too many.
    while True:
        free = size.masked_fill(stopped, 0).square().sum(1)
        left = square - room.masked_fill(~stopped, 0).square().sum(1)
        stretch = (left.clamp(min=0) / free.clamp(min=TINY)).sqrt()[:, None]
        more = stopped | (size * stretch >= room)
        if torch.equal(more, stopped):
            break
        stopped = more
    step = torch.where(stopped, room, size * stretch)
    return step.reshape(direction.shape).to(direction) * direction.sign()


def l1_furthest(
    direction: Float[Tensor, " batch *shape"], radius: Radius, down: Tensor, up: Tensor
) -> Float[Tensor, " batch *shape"]:
    """The coordinates that are rewarded most, one after the other, until the radius is spent."""
    room = _room(direction, radius, down, up).flatten(1).double()
    order = direction.flatten(1).abs().argsort(dim=1, descending=True, stable=True)
    wanted = room.gather(1, order)
    spent = wanted.cumsum(1) - wanted
    radius = torch.as_tensor(radius, dtype=room.dtype, device=room.device).expand(len(room))[:, None]
    step = torch.zeros_like(room).scatter(1, order, (radius - spent).clamp(min=0).minimum(wanted))
    return step.reshape(direction.shape).to(direction) * direction.sign()


NORMS: dict[str, Norm] = {
    "linf": Norm(linf_length, linf_shorten, torch.sign, linf_random, shared=False, furthest=linf_furthest),
    "l2": Norm(l2_length, l2_shorten, l2_steepest, l2_random, shared=True, furthest=l2_furthest),
    "l1": Norm(l1_length, l1_shorten, l1_steepest, l1_random, shared=True, furthest=l1_furthest),
}
