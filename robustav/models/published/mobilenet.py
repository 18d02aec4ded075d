"""MobileNet-V2 [Sandler et al., 2018, arXiv:1801.04381], with the names that torchvision gives its modules."""

from jaxtyping import Float
from torch import Tensor, nn

from robustav.models.published.efficientnet import scaled

STEM, TOP = 32, 1280
STAGES = (  # ratio of inner channels to a block's input, channels, blocks, stride of the first one
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def unit(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, and a ReLU that ends at 6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Wider inside than at its ends, which have no ReLU."""

    def __init__(self, inputs: int, outputs: int, *, ratio: int, stride: int) -> None:
        super().__init__()
        inner = inputs * ratio
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([unit(inputs, inner, 1)] if ratio > 1 else []),
            unit(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch deeper lower narrower"]:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """[batch, channel, height, width] -> [batch, class]: `features`, their mean over the map, and `classifier`."""

    def __init__(self, classes: int, *, channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(STEM, width)
        layers: list[nn.Module] = [unit(channels, inputs, 3, stride=2)]
        for ratio, channels_of_stage, blocks, stride in STAGES:
            outputs = scaled(channels_of_stage, width)
            for index in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, ratio=ratio, stride=1 if index else stride))
                inputs = outputs
        top = scaled(TOP, max(1.0, width))
        self.features = nn.Sequential(*layers, unit(inputs, top, 1))
        self.classifier = nn.Linear(top, classes)

    def pooled(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """The features' mean over the map."""
        return self.features(x).mean((2, 3))

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        return self.classifier(self.pooled(x))
