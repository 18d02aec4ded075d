"""The embedded models: small networks for av-events, one for each modality and each place to fuse them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from torch import Tensor, nn

from robustav.audio import LogMel
from robustav.classifier import Classifier, InputSpec, LateFusion

WIDTH = 128  # channels of the last convolution
VISUAL_WIDTH = 160  # likewise, of the visual encoder


class FramePairs(nn.Module):
    """Frames beside their change since the frame before, [batch, frame, 3, ...] -> [batch, frame, 6, ...]."""

    def forward(self, frames: Tensor) -> Tensor:
        centred = 2 * frames - 1
        change = torch.cat([torch.zeros_like(centred[:, :1]), centred[:, 1:] - centred[:, :-1]], dim=1)
        return torch.cat([centred, change], dim=2)


def convolution(channels_in: int, channels_out: int, stride: int, size: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def trunk(channels: int) -> nn.Sequential:
    """Four convolutions that halve a map three times more; 0.25 M parameters."""
    return nn.Sequential(
        convolution(channels, 32, 2), convolution(32, 64, 2), convolution(64, WIDTH, 2), convolution(WIDTH, WIDTH, 1)
    )


def mean_and_max(x: Tensor) -> Tensor:
    """Over all but batch and channel, [batch, channel, ...] -> [batch, 2 channel]."""
    x = x.flatten(2)
    return torch.cat([x.mean(2), x.amax(2)], dim=1)


class AudioEncoder(nn.Module):
    """Spectrogram [batch, 1, frame, mel] to a vector [batch, 2 x WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(1, 16, 2, 5), *trunk(16))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return mean_and_max(self.layers(spectrogram))


class VisualEncoder(nn.Module):
    """Frame pairs [batch, frame, 6, height, width] to a vector [batch, 2 x VISUAL_WIDTH].

    The maximum over each frame's places (a shape is small), then mean and maximum over frames.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(6, 32, 2, 5), convolution(32, 64, 2), convolution(64, 96, 2), convolution(96, VISUAL_WIDTH, 1)
        )

    def forward(self, pairs: Tensor) -> Tensor:
        frames = self.layers(pairs.flatten(0, 1)).amax((2, 3)).unflatten(0, pairs.shape[:2])
        return mean_and_max(frames.transpose(1, 2))


def head(dim: int, classes: int) -> nn.Sequential:
    """A linear layer behind dropout."""
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(dim, classes))


def late(specs: Mapping[str, InputSpec], classes: tuple[str, ...]) -> LateFusion:
    """An encoder each for whichever of audio and visual `specs` names, joined at the head."""
    encoders: dict[str, nn.Module] = {"audio": AudioEncoder(), "visual": VisualEncoder()}
    front_ends: dict[str, nn.Module] = {"audio": LogMel(), "visual": FramePairs()}
    widths = {"audio": 2 * WIDTH, "visual": 2 * VISUAL_WIDTH}
    return LateFusion(
        {m: encoders[m] for m in specs},
        head(sum(widths[m] for m in specs), len(classes)),
        specs=specs,
        classes=classes,
        front_ends={m: front_ends[m] for m in specs},
    )


class EarlyFusion(Classifier):
    """Spectrogram and frames laid over one another on one grid, then a single network."""

    def __init__(self, specs: Mapping[str, InputSpec], classes: tuple[str, ...]) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = dict(specs), classes, "multilabel"
        self.log_mel, self.pairs = LogMel(), FramePairs()
        self.grid = specs["visual"].shape[2] // 2
        self.audio_stem = convolution(1, 16, 2, 5)
        self.visual_stem = convolution(6 * specs["visual"].shape[0], 32, 2, 5)
        self.layers = trunk(48)
        self.head = head(2 * WIDTH, len(classes))

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw) if modality == "audio" else self.pairs(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if modality == "audio":
            return F.adaptive_avg_pool2d(self.audio_stem(x), (self.grid, self.grid))
        return F.adaptive_avg_pool2d(self.visual_stem(x.flatten(1, 2)), (self.grid, self.grid))

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return mean_and_max(self.layers(torch.cat([features["audio"], features["visual"]], dim=1)))

    def classify(self, latent: Tensor) -> Tensor:
        return self.head(latent)


class JointBlock(nn.Module):
    """One pre-norm transformer block over tokens [batch, token, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mix = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.query_key_value(self.norm_attention(tokens)).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        return tokens + self.mix(self.norm_mix(tokens))


class MidFusion(Classifier):
    """Convolutions for each modality, then a transformer over the tokens of both."""

    def __init__(self, specs: Mapping[str, InputSpec], classes: tuple[str, ...], dim: int = 96) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = dict(specs), classes, "multilabel"
        self.log_mel, self.pairs = LogMel(), FramePairs()
        self.stems = nn.ModuleDict(
            {
                m: nn.Sequential(
                    convolution(c, 16, 2, 5), convolution(16, 32, 2), convolution(32, 64, 2), convolution(64, dim, 2)
                )
                for m, c in (("audio", 1), ("visual", 6))
            }
        )
        self.kind = nn.ParameterDict({m: nn.Parameter(0.02 * torch.randn(dim)) for m in ("audio", "visual")})
        self.blocks = nn.Sequential(JointBlock(dim, 4), JointBlock(dim, 4))
        self.norm = nn.LayerNorm(dim)
        self.head = head(2 * dim, len(classes))

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw) if modality == "audio" else self.pairs(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if modality == "audio":
            tokens = self.stems["audio"](x).flatten(2).transpose(1, 2)
        else:
            maps = self.stems["visual"](x.flatten(0, 1))
            tokens = maps.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2]).flatten(1, 2)
        return tokens + self.kind[modality]

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([features["audio"], features["visual"]], dim=1)
        return mean_and_max(self.norm(self.blocks(tokens)).transpose(1, 2))

    def classify(self, latent: Tensor) -> Tensor:
        return self.head(latent)
