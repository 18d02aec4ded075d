"""Adversarial weight perturbation: the worst weights nearby, taken for one step and given back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustav.norms import TINY


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are perturbed: trainable kernels and matrices, no biases and no scales of a normalisation."""
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1]


def perturb(weights: list[nn.Parameter], gradients: Sequence[Tensor | None], gamma: float) -> Callable[[], None]:
    """Move each weight `w` by `gamma ||w|| g / ||g||` along its gradient [Wu et al., 2020, arXiv:2004.05884, eq. 10].

    Returns what puts back, bit by bit, what was there. A weight without a gradient stays.
    """
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.add_(gradient * (gamma * weight.norm() / gradient.norm().clamp(min=TINY)))

    def restore() -> None:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)

    return restore


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leaves running statistics as they were, whatever passes through the model meanwhile."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
