"""CAV-MAE [Gong et al., 2022, arXiv:2210.07839]: a stream for audio, one for pictures, and a block that both share."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, frames, waveform
from robustav.fbank import RECIPES, Fbank, frames_for
from robustav.image import ImageFrontEnd
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mixtures import averaged
from robustav.models.published.transformer import Attention, Mlp, Patches, grid, position_table

PATCH = 16  # pixels, frames and bins
ROWS = 8  # of patches in a spectrogram of 128 bins
CHANNELS = {"audio": 1, "visual": 3}
Norms = Literal["", "_a", "_v"]  # plain ones, audio's, pictures'
ENDINGS: dict[str, Norms] = {"audio": "_a", "visual": "_v"}  # of the names of a modality's official tensors


class Path(NamedTuple):
    """A mode: what is given, and the norms of each pass through the shared block; passes are averaged."""

    modalities: tuple[str, ...]
    passes: tuple[Norms, ...]


PATHS: dict[str, Path] = {
    "multimodal": Path(("audio", "visual"), ("",)),
    "audioonly": Path(("audio",), ("_a",)),
    "videoonly": Path(("visual",), ("_v",)),
    "missingaudioonly": Path(("audio",), ("", "_a")),
    "missingvideoonly": Path(("visual",), ("", "_v")),
}


class ThreeNormBlock(nn.Module):
    """A pre-norm block with three pairs of norms around one attention and one MLP."""

    def __init__(self, dim: int, heads: int, ratio: float = 4) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = Attention(dim, heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = Mlp(dim, int(ratio * dim))

    def forward(self, tokens: Float[Tensor, "batch token dim"], norms: Norms = "") -> Float[Tensor, "batch token dim"]:
        first, second = {
            "": (self.norm1, self.norm2),
            "_a": (self.norm1_a, self.norm2_a),
            "_v": (self.norm1_v, self.norm2_v),
        }[norms]
        tokens = tokens + self.attn(first(tokens))
        return tokens + self.mlp(second(tokens))


class Streams(Published):
    """What the pre-trained and the fine-tuned models share: front ends, streams of `specific` blocks, shared blocks.

    Features are [batch, frame, bin] for audio and [picture, 3, height, width] for pictures. Tokens of a spectrogram go
    by frequency first. `streams` says whose tensors there are.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int,
        depth: int,
        specific: int,
        heads: int,
        ratio: float,
        audio_frames: int | None,
        streams: tuple[str, ...],
        trained_positions: bool,
    ) -> None:
        super().__init__()
        audio_frames = audio_frames or frames_for(task.seconds)
        for name, size in (("audio_frames", audio_frames), ("task.size", task.size)):
            if size % PATCH:
                raise ValueError(f"`{name}` must be a multiple of {PATCH}, the size of a patch, got {size}")
        if not 0 < specific < depth:
            raise ValueError(f"`specific` must lie in 1..{depth - 1}, one block at least being shared, got {specific}")
        self.fbank = Fbank(**RECIPES["cav-mae"]._replace(frames=audio_frames)._asdict())
        self.pictures = ImageFrontEnd(size=task.size)
        side = task.size // PATCH
        grids = {"audio": (ROWS, audio_frames // PATCH), "visual": (side, side)}
        self.grids = {modality: grids[modality] for modality in streams}  # patches down and across
        for modality, shape in self.grids.items():
            end = ENDINGS[modality]
            table = nn.Parameter(position_table(*grid(*shape), dim), requires_grad=trained_positions)
            self.register_parameter(f"pos_embed{end}", table)
            self.register_parameter(f"modality{end}", token(dim))
            self.add_module(f"patch_embed{end}", Patches(dim, CHANNELS[modality], (PATCH, PATCH)))
            self.add_module(f"blocks{end}", blocks(specific, dim, heads, ratio))
            self.add_module(f"norm{end}", nn.LayerNorm(dim))
        self.blocks_u = blocks(depth - specific, dim, heads, ratio)
        self.norm = nn.LayerNorm(dim)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.fbank(raw) if modality == "audio" else self.pictures(raw)

    def picture(self, modality: str, x: Tensor) -> Float[Tensor, "batch channel height width"]:
        """Features as a picture: a spectrogram with frequency down and time across."""
        return x.transpose(1, 2)[:, None] if modality == "audio" else x

    def embedded(self, modality: str, x: Tensor) -> Float[Tensor, "batch token dim"]:
        """Patches that know where they are and what they are of."""
        end = ENDINGS[modality]
        patches = getattr(self, f"patch_embed{end}")(self.picture(modality, x))
        return patches + getattr(self, f"pos_embed{end}") + getattr(self, f"modality{end}")

    def own(self, modality: str, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Through the blocks of one modality, whose norms are the plain ones."""
        for block in getattr(self, f"blocks{ENDINGS[modality]}"):
            tokens = block(tokens)
        return tokens

    def shared(
        self, tokens: Float[Tensor, "batch token dim"], norms: Norms, *, skipped: int = 0
    ) -> Float[Tensor, "batch token dim"]:
        """Through the shared blocks and the last norm."""
        for block in self.blocks_u[skipped:]:
            tokens = block(tokens, norms)
        return getattr(self, f"norm{norms}")(tokens)

    def alone(self, modality: str, x: Tensor) -> Float[Tensor, "batch token dim"]:
        """Tokens of one modality by itself, under its own norms: what retrieval compares, averaged over tokens."""
        return self.shared(self.own(modality, self.embedded(modality, x)), ENDINGS[modality])

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict with position tables of this model's size.

        Of other clip lengths, as AST [Gong et al., 2021, arXiv:2104.01778] has it: a shorter clip gets the middle of
        the table, a longer one a table stretched bilinearly. Of other pictures, stretched bilinearly either way.
        Left as they are, for loading to refuse: a decoder, or a stream that this model has not.
        """
        kept = dict(state)
        for modality, shape in self.grids.items():
            for name in ("pos_embed", "decoder_pos_embed"):
                key = f"{name}{ENDINGS[modality]}"
                if key in kept:
                    kept[key] = resampled(kept[key], shape, spectrogram=modality == "audio")
        return kept


def blocks(count: int, dim: int, heads: int, ratio: float) -> nn.ModuleList:
    """Blocks one after the other."""
    return nn.ModuleList(ThreeNormBlock(dim, heads, ratio) for _ in range(count))


def token(dim: int) -> nn.Parameter:
    """A learned vector that is added to tokens or stands in for them."""
    return nn.Parameter(0.02 * torch.randn(1, 1, dim))


def resampled(table: Tensor, shape: tuple[int, int], *, spectrogram: bool) -> Tensor:
    """A table [1, token, dim] for a grid of another `shape`; one whose own grid cannot be told stays as it is."""
    count = table.shape[1] if table.ndim == 3 else 0
    rows = ROWS if spectrogram else math.isqrt(count) or 1
    columns = count // rows
    known = count and rows * columns == count and (spectrogram or rows == columns)
    if not known or shape == (rows, columns):
        return table
    laid_out = table.unflatten(1, (rows, columns))
    if spectrogram and shape[1] < columns:
        start = columns // 2 - shape[1] // 2
        return laid_out[:, :, start : start + shape[1]].flatten(1, 2)
    stretched = F.interpolate(laid_out.permute(0, 3, 1, 2), shape, mode="bilinear", align_corners=False)
    return stretched.flatten(2).transpose(1, 2)


class CavMae(Streams, Classifier):
    """CAV-MAE fine-tuned [Gong et al., 2022, arXiv:2210.07839]: scores of each picture with the clip's audio, averaged.

    Each stream is encoded once; the shared block sees every picture beside the same audio. Probabilities are averaged
    over pictures (sigmoids, or softmaxes of a multiclass task) and given as logits; with one picture, or audio alone,
    logits are the network's own. The latent has each picture's mean token, [batch, frame * dim].

    `mode` is the official one. "missingaudioonly" is for a model tuned on both of which audio alone is there: plain and
    audio's norms in turn, and their mean. Official files have both streams whatever the mode; the audio-only class is
    `streams=("audio",)`. `audio_frames` of the spectrogram: unless told, the least multiple of 128 that holds the clip.
    """

    def __init__(
        self,
        task: Task,
        mode: str = "multimodal",
        *,
        dim: int = 768,
        depth: int = 12,
        specific: int = 11,
        heads: int = 12,
        ratio: float = 4,
        audio_frames: int | None = None,
        streams: tuple[str, ...] = ("audio", "visual"),
    ) -> None:
        if mode not in PATHS:
            raise ValueError(f"`mode` must be one of {list(PATHS)}, got {mode!r}")
        super().__init__(
            task,
            dim=dim,
            depth=depth,
            specific=specific,
            heads=heads,
            ratio=ratio,
            audio_frames=audio_frames,
            streams=streams,
            trained_positions=True,
        )
        modalities, self.passes = PATHS[mode]
        if not set(modalities) <= set(streams):
            raise ValueError(f"`streams` must have {list(modalities)} for {mode!r}, got {list(streams)}")
        specs = {"audio": waveform(task.seconds), "visual": frames(task.frames, task.size)}
        self.specs = {modality: specs[modality] for modality in modalities}
        self.classes, self.label_kind = task.classes, task.label_kind
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(task.classes)))

    def encode(self, modality: str, x: Tensor) -> Float[Tensor, "batch frame token dim"]:
        pictures = x[:, None] if modality == "audio" else x
        tokens = self.own(modality, self.embedded(modality, pictures.flatten(0, 1)))
        return tokens.unflatten(0, pictures.shape[:2])

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch all"]:
        count = max(tokens.shape[1] for tokens in features.values())
        pairs = torch.cat([features[m].expand(-1, count, -1, -1) for m in sorted(features)], dim=2)
        means = [self.shared(pairs.flatten(0, 1), norms).mean(1) for norms in self.passes]
        return torch.stack(means).mean(0).unflatten(0, pairs.shape[:2]).flatten(1)

    def classify(self, latent: Float[Tensor, "batch all"]) -> Float[Tensor, "batch class"]:
        logits = self.mlp_head(latent.unflatten(1, (-1, self.norm.weight.numel())))
        return averaged(logits, self.label_kind)


def entry(summary: str, mode: str = "multimodal", *, alone: bool = False, task: Task = Task()) -> Entry:
    """A row of the table."""
    takes = {"audio": ("seconds",), "visual": ("frames", "size")}
    modalities = PATHS[mode].modalities
    streams = modalities if alone else ("audio", "visual")
    return Entry(
        make=lambda asked: CavMae(asked, mode, streams=streams),
        summary=summary,
        source="Gong et al.",
        paper="Gong et al., 2022, arXiv:2210.07839",
        licence="BSD-2-Clause",
        published="https://github.com/YuanGongND/cav-mae",
        task=task,
        takes=("classes", "label_kind", *(field for modality in modalities for field in takes[modality])),
        head="mlp_head.1.weight",
    )


# The names of VGGSound's classes are not ours to ship; base, scale+ and scale++ were pre-trained in other batch sizes.
VGGSOUND = Task(classes=tuple(f"VGGSound {i:03}" for i in range(309)), label_kind="multiclass")
MODELS: dict[str, Entry] = {
    "cav-mae": entry("CAV-MAE on AudioSet, scores averaged over 10 frames"),
    "cav-mae-vggsound": entry("CAV-MAE on VGGSound, scores averaged over 10 frames", task=VGGSOUND),
    "cav-mae-audio": entry("CAV-MAE, official audio-only class (files half the size)", "audioonly", alone=True),
    "cav-mae-audio-only": entry("CAV-MAE tuned on audio alone", "audioonly"),
    "cav-mae-visual-only": entry("CAV-MAE tuned on frames alone", "videoonly"),
    "cav-mae-missing-visual": entry("CAV-MAE tuned on both, given audio alone", "missingaudioonly"),
    "cav-mae-missing-audio": entry("CAV-MAE tuned on both, given frames alone", "missingvideoonly"),
}
