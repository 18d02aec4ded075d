"""PSLA's convolutional networks with attention over time [Gong et al., 2021, arXiv:2102.01243]."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, waveform
from robustav.fbank import RECIPES, Fbank, Recipe, frames_for
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.efficientnet import SCALES, EfficientNet, Scale
from robustav.models.published.mixtures import floored, mean_logit, mixture, shares, weighted
from robustav.models.published.mobilenet import MobileNetV2
from robustav.models.published.resnet import ResNetTrunk, with_counts
from robustav.published_log_mel import TaggingLogMel

Activation = Literal["sigmoid", "softmax"]

PSLA = Recipe(1056, -4.6476, 4.5699)  # AudioSet; divided by one standard deviation, where later models take two
HEADS = 4
ROWS = 4  # of a map, which attention has as one


def clip_fbank(recipe: Recipe, seconds: float) -> Fbank:
    """The recipe's filter bank; clips of other than 10 s get as many blocks of 128 frames as they need."""
    frames = recipe.frames + frames_for(seconds) - frames_for(10.0)
    return Fbank(**recipe._replace(frames=frames)._asdict())


class Pointwise(nn.Conv2d):
    """A 1x1 convolution over time, [batch, step, dim] -> [batch, step, class], in float32 at least.

    Under autocast, bfloat16 has nothing between 1 and 1 - 1/256.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__(dim, classes, 1)

    def forward(self, steps: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch step class"]:
        scores = F.linear(steps, self.weight.flatten(1), self.bias)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def log_probability(
    scores: Float[Tensor, "batch step class"], activation: Activation
) -> Float[Tensor, "batch step class"]:
    """The logarithm of a sigmoid, or of a softmax over the classes (not over the steps)."""
    return F.logsigmoid(scores) if activation == "sigmoid" else F.log_softmax(scores, dim=2)


def log_odds(scores: Float[Tensor, "batch step class"], activation: Activation) -> Float[Tensor, "batch step class"]:
    """The logit of the same probability."""
    if activation == "sigmoid":
        return scores
    yes, top = F.log_softmax(scores, dim=2), scores.argmax(2, keepdim=True)
    others = yes.scatter(2, top, -math.inf).logsumexp(2, keepdim=True)
    return yes - torch.log1p(-yes.exp().scatter(2, top, 0)).scatter(2, top, others)


def log_shares(scores: Float[Tensor, "batch step class"], activation: Activation) -> Float[Tensor, "batch step class"]:
    """The logarithm of each step's weight for each class; as officially, what they share in is 1e-7 at least."""
    return shares(floored(log_probability(scores, activation)))


class MeanPooling(nn.Module):
    """Each class's probability, averaged over the steps."""

    def __init__(self, dim: int, classes: int, activation: Activation = "sigmoid") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.cla = Pointwise(dim, classes)

    def forward(self, steps: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch class"]:
        return mean_logit(log_odds(self.cla(steps), self.activation))


class Attention(nn.Module):
    """Each class's probability, averaged over the steps with weights of its own."""

    def __init__(self, dim: int, classes: int, activation: Activation = "sigmoid") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.att, self.cla = Pointwise(dim, classes), Pointwise(dim, classes)

    def log_weights(self, steps: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch step class"]:
        """See `log_shares`."""
        return log_shares(self.att(steps), self.activation)

    def forward(self, steps: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch class"]:
        return mixture(log_odds(self.cla(steps), self.activation), self.log_weights(steps))


class MultiHeadAttention(nn.Module):
    """Four such averages, added with learnt weights.

    Nothing makes these sum to 1: officially, probabilities may leave [0, 1]. See `weighted` for the logits of those.
    """

    def __init__(self, dim: int, classes: int, activation: Activation = "sigmoid") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.att = nn.ModuleList(Pointwise(dim, classes) for _ in range(HEADS))
        self.cla = nn.ModuleList(Pointwise(dim, classes) for _ in range(HEADS))
        self.head_weight = nn.Parameter(torch.full((HEADS,), 1 / HEADS))

    def forward(self, steps: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch class"]:
        heads = [
            mixture(log_odds(cla(steps), self.activation), log_shares(att(steps), self.activation))
            for att, cla in zip(self.att, self.cla, strict=True)
        ]
        return weighted(torch.stack(heads, dim=1), self.head_weight)


POOLINGS: dict[int, type[MeanPooling] | type[Attention] | type[MultiHeadAttention]] = {
    0: MeanPooling,
    1: Attention,
    HEADS: MultiHeadAttention,
}


def adapted(state: Mapping[str, Tensor], own: Mapping[str, Tensor], unused: str) -> dict[str, Tensor]:
    """Without the classifier that ImageNet's weights bring along, with the batch counters that old files lack."""
    return with_counts({name: x for name, x in state.items() if not name.startswith(unused)}, own)


class EfficientNetAttention(Published, Classifier):
    """PSLA's network: an EfficientNet over 128 mel bands, attention over time; a step for every 32 frames.

    `heads` is 4 (as officially for every number above 1), 1, or 0 for a mean over the steps. PSLA's own checkpoints are
    older than efficientnet_pytorch 0.7.1 and were made with 0.7.0, whose padding is `symmetric`.
    """

    def __init__(
        self,
        task: Task,
        scale: Scale = SCALES["b2"],
        *,
        heads: int = HEADS,
        activation: Activation = "sigmoid",
        recipe: Recipe = PSLA,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        if heads not in POOLINGS:
            raise ValueError(f"`heads` must be {HEADS}, 1, or 0 for a mean over time, got {heads}")
        self.specs, self.classes, self.label_kind = {"audio": waveform(task.seconds)}, task.classes, task.label_kind
        self.fbank = clip_fbank(recipe, task.seconds)
        self.effnet = EfficientNet(scale, channels=1, symmetric=symmetric)
        self.attention = POOLINGS[heads](self.effnet.dim, len(task.classes), activation)

    def front_end(self, modality: str, raw: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame 128"]:
        return self.fbank(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame 128"]) -> Float[Tensor, "batch step dim"]:
        """The mean of a map's four rows."""
        return self.effnet(x.transpose(1, 2)[:, None]).mean(2).transpose(1, 2)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch latent"]:
        """The steps one after the other."""
        return features["audio"].flatten(1)

    def classify(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch class"]:
        return self.attention(latent.unflatten(1, (-1, self.effnet.dim)))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return adapted(state, self.state_dict(), "effnet._fc.")


class ResNetAttention(Published, Classifier):
    """ResNet-50 with attention over time in the tagging study [Li et al., 2022, arXiv:2203.13448].

    Clips are cut or filled up to 1024 frames of 128 bands, or 400 of 64. The code lays what the trunk gives out anew, as
    [channel, 4, bins / 4], and averages the 4. With 128 bands that is the map as it was, 2048 channels of 4 rows and 32
    columns. With 64 it was 2048 x 2 x 13 and becomes 832 x 4 x 16: each "step" mixes channels, bands and times. The
    checkpoints were trained so.
    """

    def __init__(
        self,
        task: Task,
        bins: Literal[64, 128] = 128,
        *,
        layers: tuple[int, int, int, int] = (3, 4, 6, 3),
        planes: tuple[int, int, int, int] = (64, 128, 256, 512),
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        if bins not in (64, 128):
            raise ValueError(f"`bins` must be 64 or 128, got {bins}")
        self.specs, self.classes, self.label_kind = {"audio": waveform(task.seconds)}, task.classes, task.label_kind
        self.log_mel = Fbank.published("tagging-mix-0.5") if bins == 128 else TaggingLogMel.published("tal")
        self.model = ResNetTrunk("bottleneck", layers, channels=1, planes=planes)
        cells = 4 * 32 if bins == 128 else 2 * 13
        self.steps = bins // ROWS
        self.dim = self.model.width * cells // (ROWS * self.steps)
        self.attention = Attention(self.dim, len(task.classes), activation)

    def front_end(self, modality: str, raw: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "batch step dim"]:
        """What the code takes for the means of four rows."""
        flat = self.model(x.transpose(1, 2)[:, None]).flatten(1)
        return flat.unflatten(1, (-1, ROWS, self.steps)).mean(2).transpose(1, 2)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch latent"]:
        """The steps one after the other."""
        return features["audio"].flatten(1)

    def classify(self, latent: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch class"]:
        return self.attention(latent.unflatten(1, (-1, self.dim)))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return adapted(state, self.state_dict(), "model.fc.")


class MobileNet(Published, Classifier):
    """MobileNet-V2 over 128 mel bands, one of PSLA's baselines: the mean over the map, one linear layer."""

    def __init__(self, task: Task, *, width: float = 1.0, recipe: Recipe = PSLA) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = {"audio": waveform(task.seconds)}, task.classes, task.label_kind
        self.fbank = clip_fbank(recipe, task.seconds)
        self.model = MobileNetV2(len(task.classes), channels=1, width=width)

    def front_end(self, modality: str, raw: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame 128"]:
        return self.fbank(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame 128"]) -> Float[Tensor, "batch dim"]:
        return self.model.pooled(x.transpose(1, 2)[:, None])

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["audio"]

    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        return self.model.classifier(latent)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_counts(state, self.state_dict())


def efficientnet(
    name: str,
    heads: int = HEADS,
    *,
    recipe: Recipe = PSLA,
    symmetric: bool = True,
    pooling: str = "4 heads of attention over time",
    published: str = "",
    source: str = "Gong et al.",
    paper: str = "Gong et al., 2021, arXiv:2102.01243",
) -> Entry:
    """A row of the table."""
    return Entry(
        make=lambda task: EfficientNetAttention(task, SCALES[name], heads=heads, recipe=recipe, symmetric=symmetric),
        summary=f"EfficientNet-{name.upper()}, {pooling}",
        source=source,
        paper=paper,
        licence="BSD-3-Clause",
        published=published,
        takes=("classes", "label_kind"),
        head="attention.cla.0.weight" if heads == HEADS else "attention.cla.weight",
    )


def resnet(bins: Literal[64, 128], summary: str) -> Entry:
    """A row of the table."""
    return Entry(
        make=lambda task: ResNetAttention(task, bins),
        summary=summary,
        source="Li et al.",
        paper="Li et al., 2022, arXiv:2203.13448",
        licence="BSD-3-Clause",
        published=TAGGING,
        takes=("classes", "label_kind"),
        head="attention.cla.weight",
    )


OWN, TAGGING = "https://github.com/YuanGongND/psla", "https://github.com/lijuncheng16/AudioTaggingDoneRight"
MODELS: dict[str, Entry] = {
    **{f"psla-{name}": efficientnet(name, published=OWN if name == "b2" else "") for name in SCALES},
    "psla-b2-single-head": efficientnet("b2", 1, pooling="one head of attention over time"),
    "psla-b2-mean": efficientnet("b2", 0, pooling="mean over time"),
    "psla-b2-tagging": efficientnet(
        "b2",
        recipe=RECIPES["tagging-mix-0.5"],
        symmetric=False,
        pooling="4 heads, of the tagging study",
        published=TAGGING,
        source="Li et al.",
        paper="Li et al., 2022, arXiv:2203.13448",
    ),
    "psla-mobilenet-v2": Entry(
        make=MobileNet,
        summary="MobileNet-V2 over 128 mel bands",
        source="Gong et al.",
        paper="Gong et al., 2021, arXiv:2102.01243",
        licence="BSD-3-Clause",
        takes=("classes", "label_kind"),
        head="model.classifier.weight",
    ),
    "psla-resnet50-128": resnet(128, "ResNet-50 over 128 mel bands, attention over time"),
    "psla-resnet50-64": resnet(64, "ResNet-50 over 64 mel bands, attention over mixed steps"),
}
