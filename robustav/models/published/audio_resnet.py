"""Residual networks over a log-mel with attention over time, of the ResNet, ResNeXt and wide families."""

from collections.abc import Mapping

import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, waveform
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mixtures import floored, mixture, shares
from robustav.models.published.resnet import Block, ResNetTrunk, with_counts
from robustav.published_log_mel import TalLogMel

FRAMES_PER_SECOND = 40


class AudioResNet(Published, Classifier):
    """A residual trunk over 64 bands [Li et al., 2022, arXiv:2203.12122]; its stem keeps the resolution.

    400 frames become 25 steps. Each step has a probability and, for each class, a sigmoid, at least 1e-7, as its weight
    among the steps.
    """

    def __init__(
        self,
        task: Task,
        block: Block = "bottleneck",
        layers: tuple[int, int, int, int] = (3, 4, 6, 3),
        *,
        planes: tuple[int, int, int, int] = (64, 128, 256, 512),
        width_per_group: int = 64,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = {"audio": waveform(task.seconds)}, task.classes, task.label_kind
        self.log_mel = TalLogMel.published(frames=round(FRAMES_PER_SECOND * task.seconds))
        trunk = ResNetTrunk(
            block, layers, channels=1, planes=planes, stem_stride=1, width_per_group=width_per_group, groups=groups
        )
        self.conv1, self.bn1, self.maxpool = trunk.conv1, trunk.bn1, trunk.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4
        self.att, self.fc = nn.Linear(trunk.width, len(task.classes)), nn.Linear(trunk.width, len(task.classes))

    def front_end(self, modality: str, raw: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame 64"]:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame 64"]) -> Float[Tensor, "batch step dim"]:
        """A vector for every 16 frames."""
        low = self.maxpool(F.relu(self.bn1(self.conv1(x[:, None]))))
        return self.layer4(self.layer3(self.layer2(self.layer1(low)))).mean(3).transpose(1, 2)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch latent"]:
        """The steps one after the other."""
        return features["audio"].flatten(1)

    def classify(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch class"]:
        steps = latent.unflatten(1, (-1, self.fc.in_features))
        return mixture(self.fc(steps), shares(floored(F.logsigmoid(self.att(steps)))))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_counts(state, self.state_dict())


def row(
    summary: str, block: Block, layers: tuple[int, int, int, int], *, width_per_group: int = 64, groups: int = 1
) -> Entry:
    """Of the table."""
    return Entry(
        make=lambda task: AudioResNet(task, block, layers, width_per_group=width_per_group, groups=groups),
        summary=f"{summary} over 64 mel bands, attention over time",
        source="Li et al.",
        paper="Li et al., 2022, arXiv:2203.12122",
        licence="none stated",
        published="https://github.com/lijuncheng16/AudioSetDoneRight",
        takes=("classes", "label_kind", "seconds"),
        head="fc.weight",
    )


MODELS: dict[str, Entry] = {
    "audio-resnet18": row("ResNet-18", "basic", (2, 2, 2, 2)),
    "audio-resnet34": row("ResNet-34", "basic", (3, 4, 6, 3)),
    "audio-resnet50": row("ResNet-50", "bottleneck", (3, 4, 6, 3)),
    "audio-resnet101": row("ResNet-101", "bottleneck", (3, 4, 23, 3)),
    "audio-resnet152": row("ResNet-152", "bottleneck", (3, 8, 36, 3)),
    "audio-resnext50-32x4d": row("ResNeXt-50", "bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "audio-resnext101-32x8d": row("ResNeXt-101", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "audio-wide-resnet50-2": row("Wide ResNet-50-2", "bottleneck", (3, 4, 6, 3), width_per_group=128),
    "audio-wide-resnet101-2": row("Wide ResNet-101-2", "bottleneck", (3, 4, 23, 3), width_per_group=128),
}
