"""EfficientNet's trunk [Tan & Le, 2019, arXiv:1905.11946] as the audio models have it, without its classifier.

Modules have the names of efficientnet_pytorch. Blocks and trunk are `nn.Sequential`, their modules in the order of data
flow, so that `robustav.prepare` can fold every batch norm.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

DROP = 0.2  # of the last residual in training; of earlier ones in proportion to their depth
MULTIPLE = 8  # that numbers of channels are rounded to


class Scale(NamedTuple):
    """How much wider and deeper than B0 a network is, and the side in pixels of the pictures that it pads for."""

    width: float
    depth: float
    side: int


SCALES = {
    "b0": Scale(1.0, 1.0, 224),
    "b1": Scale(1.0, 1.1, 240),
    "b2": Scale(1.1, 1.2, 260),
    "b3": Scale(1.2, 1.4, 300),
    "b4": Scale(1.4, 1.8, 380),
    "b5": Scale(1.6, 2.2, 456),
    "b6": Scale(1.8, 2.6, 528),
    "b7": Scale(2.0, 3.1, 600),
}


class Stage(NamedTuple):
    """Of B0: blocks that share a shape; the first one has the stride."""

    repeats: int
    kernel: int
    stride: int
    ratio: int  # of a block's inner channels to its input's
    outputs: int


STEM, TOP = 32, 1280
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8, or the next one if that takes more than a tenth away."""
    wanted = channels * width
    rounded = max(MULTIPLE, int(wanted + MULTIPLE / 2) // MULTIPLE * MULTIPLE)
    return rounded if rounded >= 0.9 * wanted else rounded + MULTIPLE


def halved(side: int, stride: int) -> int:
    """The side of what comes out."""
    return math.ceil(side / stride)


def padding(side: int, kernel: int, stride: int, *, symmetric: bool) -> tuple[int, int]:
    """TensorFlow's "same" padding of a side: on both ends, and how much more at the far one (or, `symmetric`, at both)."""
    total = max((halved(side, stride) - 1) * stride + kernel - side, 0)
    return (halved(total, 2), 0) if symmetric else (total // 2, total % 2)


def wider(x: Float[Tensor, "batch channel height width"], more: int) -> Float[Tensor, "batch channel higher wider"]:
    """With zeros beyond the last row and column."""
    return F.pad(x, (0, more, 0, more)) if more else x


def norm(channels: int) -> nn.BatchNorm2d:
    """As TensorFlow's networks have it."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Sequential):
    """An inverted bottleneck with squeeze and excitation; `drop` is the chance that training leaves a residual out."""

    def __init__(
        self, inputs: int, outputs: int, *, ratio: int, kernel: int, stride: int, ends: tuple[int, int], drop: float
    ) -> None:
        super().__init__()
        inner, squeezed = inputs * ratio, max(1, inputs // 4)
        around, self.more = ends
        self.expands, self.residual, self.drop = ratio > 1, stride == 1 and inputs == outputs, drop
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, around, groups=inner, bias=False)
        self._bn1 = norm(inner)
        self._se_reduce, self._se_expand = nn.Conv2d(inner, squeezed, 1), nn.Conv2d(squeezed, inner, 1)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch deeper lower narrower"]:
        inner = F.silu(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.silu(self._bn1(self._depthwise_conv(wider(inner, self.more))))
        gate = self._se_expand(F.silu(self._se_reduce(inner.mean((2, 3), keepdim=True)))).sigmoid()
        out = self._bn2(self._project_conv(gate * inner))
        return self.kept(out) + x if self.residual else out

    def kept(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        """In training, zero for some clips and larger for the others [Huang et al., 2016, arXiv:1603.09382]."""
        if not self.training or not self.drop:
            return x
        keep = 1 - self.drop
        return x * torch.empty_like(x[:, :1, :1, :1]).bernoulli_(keep) / keep


class EfficientNet(nn.Sequential):
    """The trunk, [batch, channel, height, width] -> [batch, dim, height / 32, width / 32].

    efficientnet_pytorch pads as pictures of `scale.side` need it, whatever the input's size. Where an odd number of rows
    is wanted, 0.7.1 has one more at the far end, as TensorFlow; 0.7.0 rounds up at both ends, which is `symmetric`.
    """

    def __init__(self, scale: Scale, *, channels: int = 3, symmetric: bool = False) -> None:
        super().__init__()
        width, depth, side = scale
        around, self.more = padding(side, 3, 2, symmetric=symmetric)
        inputs, side = scaled(STEM, width), halved(side, 2)
        self._conv_stem, self._bn0 = nn.Conv2d(channels, inputs, 3, 2, around, bias=False), norm(inputs)
        plan = [(stage, index) for stage in STAGES for index in range(math.ceil(depth * stage.repeats))]
        blocks = []
        for number, (stage, index) in enumerate(plan):
            kernel, ratio, stride = stage.kernel, stage.ratio, 1 if index else stage.stride
            ends = padding(side, kernel, stride, symmetric=symmetric)
            outputs, drop = scaled(stage.outputs, width), DROP * number / len(plan)
            blocks.append(Block(inputs, outputs, ratio=ratio, kernel=kernel, stride=stride, ends=ends, drop=drop))
            inputs, side = outputs, halved(side, stride)
        self._blocks = nn.Sequential(*blocks)
        self.dim = scaled(TOP, width)
        self._conv_head, self._bn1 = nn.Conv2d(inputs, self.dim, 1, bias=False), norm(self.dim)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim lower narrower"]:
        low = F.silu(self._bn0(self._conv_stem(wider(x, self.more))))
        return F.silu(self._bn1(self._conv_head(self._blocks(low))))
