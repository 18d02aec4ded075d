"""Masked auto-encoding [He et al., 2021, arXiv:2111.06377]: which patches are hidden, and what their reconstruction costs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Masking(NamedTuple):
    """Which tokens are visible, in the order in which the encoder has them; `hidden` is 1 where a token is not."""

    visible: Int[Tensor, "batch kept"]
    hidden: Float[Tensor, "batch token"]
    restore: Int[Tensor, "batch token"]  # where each token went: visible ones first, then the hidden


def masking(noise: Float[Tensor, "batch token"], kept: int) -> Masking:
    """The `kept` tokens of least noise are visible, in the order of their noise."""
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    return Masking(order[:, :kept], (restore >= kept).to(noise.dtype), restore)


def taken(
    tokens: Float[Tensor, "batch token dim"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept dim"]:
    """Tokens by their index, of each clip its own."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def put_back(
    visible: Float[Tensor, "batch kept dim"], mask_token: Float[Tensor, "1 1 dim"], restore: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token dim"]:
    """Every token in its place, hidden ones as the mask token."""
    hidden = mask_token.expand(len(visible), restore.shape[1] - visible.shape[1], -1)
    return taken(torch.cat([visible, hidden], dim=1), restore)


def pixels_of(
    x: Float[Tensor, "batch channel height width"], size: tuple[int, int]
) -> Float[Tensor, "batch token pixel"]:
    """The pixels of each patch, row by row; within a patch by row, column and channel."""
    (high, wide), (height, width) = size, x.shape[2:]
    if height % high or width % wide:
        raise ValueError(f"patches of {high} x {wide} must tile the input, got {height} x {width}")
    return x.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def reconstruction_loss(
    predicted: Float[Tensor, "batch token pixel"],
    pixels: Float[Tensor, "batch token pixel"],
    hidden: Float[Tensor, "batch token"],
    *,
    normalised: bool,
) -> Float[Tensor, ""]:
    """Mean squared error over hidden patches; where `normalised`, of patches with mean 0 and variance 1."""
    if normalised:
        mean, variance = pixels.mean(2, keepdim=True), pixels.var(2, keepdim=True)
        pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    error = (predicted - pixels).square().mean(2)
    return (error * hidden).sum() / hidden.sum()
