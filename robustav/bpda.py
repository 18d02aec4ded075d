"""Stand-ins for stages without a useful gradient, so that an attack can climb through them."""

from typing import Any

import torch
from torch import Tensor, nn


class StraightThrough(nn.Module):
    """Made by `straight_through`."""

    def __init__(self, module: nn.Module, backward: nn.Module | None = None) -> None:
        super().__init__()
        self.module, self.stand_in = module, backward or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """What `module` makes of `x`, with the gradient of the stand-in."""
        with torch.no_grad():
            exact = self.module(x)
        smooth = self.stand_in(x)
        if (exact.shape, exact.dtype) != (smooth.shape, smooth.dtype):
            raise ValueError(
                f"`backward` must return what `module` returns, {exact.dtype} {list(exact.shape)}, "
                f"got {smooth.dtype} {list(smooth.shape)}: give a differentiable stand-in of that shape"
            )
        return _Exchange.apply(smooth, exact)


class _Exchange(torch.autograd.Function):
    """The value of the second argument, the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(module: nn.Module, backward: nn.Module | None = None) -> StraightThrough:
    """`module` forwards, `backward` (unless told, the identity) backwards: BPDA [Athalye et al., 2018, arXiv:1802.00420].

    For a stage whose own gradient is zero, wrong or missing: `backward` is a differentiable approximation of it,
    returning the same shape. The value is exactly that of `module`.

    >>> class Quantiser(nn.Module):
    ...     def forward(self, x):
    ...         return (4 * x).round() / 4
    >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> y = straight_through(Quantiser())(x)
    >>> y.detach(), torch.autograd.grad(y.square().sum(), x)
    (tensor([0.2500, 0.7500]), (tensor([0.5000, 1.5000]),))

    A defence hands attacks a copy of itself with the stand-in inside; verdicts still come from the defence:

    >>> class Defended(nn.Module):
    ...     def __init__(self, quantiser):
    ...         super().__init__()
    ...         self.quantiser = quantiser
    ...     def surrogate(self):
    ...         return Defended(straight_through(self.quantiser))
    >>> Defended(Quantiser()).surrogate().quantiser
    StraightThrough(
      (module): Quantiser()
      (stand_in): Identity()
    )
    """
    return StraightThrough(module, backward)
