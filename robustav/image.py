"""Differentiable image front end of published models: resize, centre crop, normalise."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.bpda import straight_through

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILTERS = ("bicubic", "bilinear")


class InRange(nn.Module):
    """Pixel values clipped to [0, 1]: bicubic filters overshoot."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Clipped."""
        return pixels.clamp(0, 1)


class Stored(nn.Module):
    """Pixel values clipped and rounded to what 8 bits hold."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Multiples of 1 / 255."""
        return (255 * pixels).round().clamp(0, 255) / 255


class ImageFrontEnd(nn.Module):
    """RGB frames in [0, 1] as CAV-MAE has them: short side to `size`, centre crop, ImageNet's mean and deviation.

    [*, 3, height, width] -> [*, 3, size, size], any number of axes before. The filters widen when they shrink a
    picture, as Pillow's do. Pillow also rounds to 8 bits, after the rows and again after the columns: where `rounded`,
    so does this, and gradients pass as if nothing were rounded. Otherwise values are a level or so off, and finite
    differences are those of the gradient. Clipping lets gradients pass either way.

    A model's frames were first shrunk to 224 with the bilinear filter and stored; frames of that size pass unresized.
    """

    def __init__(
        self,
        *,
        size: int = 224,
        filter: str = "bicubic",
        rounded: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"`size` must be at least 1 pixel, got {size}")
        if filter not in FILTERS:
            raise ValueError(f"`filter` must be one of {list(FILTERS)}, got {filter!r}")
        if len(mean) != 3 or len(std) != 3 or not all(math.isfinite(s) and s > 0 for s in std):
            raise ValueError(
                f"`mean` and `std` must be three numbers each, `std` positive, got {tuple(mean)} and {tuple(std)}"
            )
        self.size, self.filter, self.rounded = size, filter, rounded
        self.kept = straight_through(Stored() if rounded else InRange())
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, frames: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 size size"]:
        """Normalised pixels."""
        height, width = frames.shape[-2:]
        short = min(height, width)
        tall, wide = self.size * height // short, self.size * width // short
        pixels = frames.flatten(0, -4) if frames.ndim > 3 else frames[None]
        steps = ((height, wide), (tall, wide)) if self.rounded else ((tall, wide),)
        for step in steps:
            if pixels.shape[-2:] != step:
                shaped = F.interpolate(pixels, step, mode=self.filter, align_corners=False, antialias=True)
                pixels = self.kept(shaped)
        top, left = round((tall - self.size) / 2), round((wide - self.size) / 2)
        pixels = pixels[..., top : top + self.size, left : left + self.size]
        return ((pixels - self.mean) / self.std).reshape(*frames.shape[:-2], self.size, self.size)
