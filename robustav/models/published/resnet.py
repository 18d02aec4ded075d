"""The residual trunk of the published audio and picture networks [He et al., 2015, arXiv:1512.03385].

Modules have the names of official checkpoints. Blocks and trunk are `nn.Sequential`, their modules in the order of data
flow, so that `robustav.prepare` can fold every batch norm.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

Block = Literal["basic", "bottleneck"]


def convolution(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without a bias, padded to keep the size but for the stride; initialised for the ReLUs that read it."""
    made = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """What the residual is added to: the block's input, through a 1x1 convolution where its shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(convolution(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))


class Basic(nn.Sequential):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, outputs, 3, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch wider lower narrower"]:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.downsample(x))


class Bottleneck(nn.Sequential):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 one has the stride and the groups [Xie et al., 2016, arXiv:1611.05431]."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = convolution(inner, inner, 3, stride=stride, groups=groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = convolution(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch wider lower narrower"]:
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = F.relu(self.bn2(self.conv2(inner)))
        return F.relu(self.bn3(self.conv3(inner)) + self.downsample(x))


class ResNetTrunk(nn.Sequential):
    """A 7x7 stem, max pooling and four stages, [batch, channel, height, width] -> [batch, width, height / 32, width / 32].

    `width_per_group` (of 64 planes) and `groups` make the 3x3 convolutions of bottlenecks wider or grouped. With
    `stem_stride` 1 the map is twice as high and wide. `width` is the number of channels that come out.
    """

    def __init__(
        self,
        block: Block,
        layers: tuple[int, int, int, int],
        *,
        channels: int = 3,
        planes: tuple[int, int, int, int] = (64, 128, 256, 512),
        stem: int = 64,
        stem_stride: int = 2,
        width_per_group: int = 64,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if block == "basic" and (groups, width_per_group) != (1, 64):
            raise ValueError(
                f"`groups` and `width_per_group` must be 1 and 64 for basic blocks, got {groups} and {width_per_group}: "
                "take 'bottleneck'"
            )
        self.conv1, self.bn1 = convolution(channels, stem, 7, stride=stem_stride), nn.BatchNorm2d(stem)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.width = stem

        def stage(number: int) -> nn.Sequential:
            blocks: list[nn.Module] = []
            for index in range(layers[number]):
                stride = 2 if number and not index else 1
                outputs = planes[number] * (1 if block == "basic" else 4)
                inner = planes[number] * width_per_group // 64 * groups
                blocks.append(
                    Basic(self.width, outputs, stride)
                    if block == "basic"
                    else Bottleneck(self.width, inner, outputs, stride, groups)
                )
                self.width = outputs
            return nn.Sequential(*blocks)

        self.layer1, self.layer2, self.layer3, self.layer4 = stage(0), stage(1), stage(2), stage(3)


def with_counts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the batch counters of `own`, nought where an old file lacks them. Nothing reads them in eval mode."""
    lacking = (name for name in own if name.endswith("num_batches_tracked") and name not in state)
    return dict(state) | {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in lacking}
