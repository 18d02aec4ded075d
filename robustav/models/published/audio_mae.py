"""Audio-MAE, a masked auto-encoder of spectrograms, and its classifier [Huang et al., 2022, arXiv:2207.06405]."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, waveform
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mae import Masking, masking, pixels_of, put_back, reconstruction_loss, taken
from robustav.models.published.transformer import Block, Patches, fbank_of, learned, position_table
from robustav.models.published.windows import WindowBlock

PATCH = 16
BINS = 128
CLASS_ROW = 1  # of a position table, before the patches
OFFICIAL_COLUMNS = 64  # of the grid that the official tables are made for


def grid_of(frames: int, stride: int = PATCH) -> tuple[int, int]:
    """Steps (over time) and bands (over frequency) of patches; tokens are step by step."""
    return (frames - PATCH) // stride + 1, (BINS - PATCH) // stride + 1


def codes(tokens: int, columns: int, dim: int) -> Float[Tensor, "1 all dim"]:
    """The fixed position table: a class row, then token i at row `i // columns` and column `i % columns`.

    Official tables are those of 8 rows and 64 columns, although 64 steps of 8 bands stand in them: a step's bands are
    neighbouring columns, and every eighth step begins a row. The models are trained so. Overlapping patches have the
    table of their true grid.
    """
    index = torch.arange(tokens)
    return position_table((index // columns).double(), (index % columns).double(), dim, leading=CLASS_ROW)


def fitted(table: Tensor, bands: int, columns: int, like: Tensor) -> Tensor:
    """A file's position table for another number of steps: its first codes, and where they end those that follow.

    Each token keeps its code, whatever the clip's length. A table of no whole number of steps stays as it is.
    """
    if table.ndim != 3 or table.shape[::2] != like.shape[::2]:
        return table
    have, wanted = table.shape[1], like.shape[1]
    if have in (CLASS_ROW, wanted) or (have - CLASS_ROW) % bands:
        return table
    further = codes(wanted - CLASS_ROW, columns, like.shape[2])[:, have:].to(table)
    return torch.cat([table[:, :wanted], further], dim=1)


def kept_of(sizes: tuple[int, ...], masked: tuple[float, ...]) -> tuple[int, ...]:
    """How many of each size are left of it once a share is masked, rounded down."""
    if not all(0 <= share < 1 for share in masked):
        raise ValueError(f"`masked` must be shares in [0, 1), got {masked}")
    return tuple(int(size * (1 - share)) for size, share in zip(sizes, masked, strict=True))


def led(first: Float[Tensor, "1 1 dim"], tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch all dim"]:
    """Tokens behind a class token."""
    return torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)


class AudioMAE(Published, Classifier):
    """The fine-tuned encoder. Time runs down its pictures: tokens are step by step, the bands of each in turn.

    In training, the share `masked` of steps and of bands is left out, at random, and `skip` of the residual branches:
    none in the first block, this share in the last. The latent is the normalised mean of the patches' tokens. Patches
    overlap where `stride` is below 16.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        stride: int = PATCH,
        masked: tuple[float, float] = (0.2, 0.2),
        skip: float = 0.1,
    ) -> None:
        super().__init__()
        self.specs = {"audio": waveform(task.seconds)}
        self.classes, self.label_kind = task.classes, task.label_kind
        self.log_mel = fbank_of("audio-mae", task.seconds)
        self.grid = grid_of(self.log_mel.frames or 0, stride)
        self.columns = OFFICIAL_COLUMNS if stride == PATCH else self.grid[1]
        self.kept = kept_of(self.grid, masked)
        self.cls_token = learned(1, 1, dim)
        self.pos_embed = nn.Parameter(codes(math.prod(self.grid), self.columns, dim), requires_grad=False)
        self.patch_embed = Patches(dim, size=(PATCH, PATCH), stride=(stride, stride))
        self.blocks = nn.Sequential(*(Block(dim, heads, skip=skip * i / max(1, depth - 1)) for i in range(depth)))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, len(task.classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "batch all dim"]:
        tokens = self.patch_embed(x[:, None]) + self.pos_embed[:, CLASS_ROW:]
        if self.training:
            tokens = self.thinned(tokens, torch.rand(len(x), sum(self.grid), device=x.device))
        return self.blocks(led(self.cls_token + self.pos_embed[:, :CLASS_ROW], tokens))

    def thinned(
        self, tokens: Float[Tensor, "batch token dim"], noise: Float[Tensor, "batch axes"]
    ) -> Float[Tensor, "batch kept dim"]:
        """The steps and bands of least noise, in the order of their noise; `noise` is of steps, then of bands."""
        steps, bands = (
            part.argsort(dim=1)[:, :kept] for part, kept in zip(noise.split(self.grid, dim=1), self.kept, strict=True)
        )
        return taken(tokens, (steps[:, :, None] * self.grid[1] + bands[:, None]).flatten(1))

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return self.fc_norm(features["audio"][:, CLASS_ROW:].mean(1))

    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        return self.head(latent)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the position table for clips of this model's length."""
        if "pos_embed" not in state:
            return dict(state)
        return {**state, "pos_embed": fitted(state["pos_embed"], self.grid[1], self.columns, self.pos_embed)}


def from_pretraining(state: Mapping[str, Tensor], model: AudioMAE) -> dict[str, Tensor]:
    """A start for fine-tuning: a pre-trained encoder as a state dict of `model`, whose classifier stays as it is.

    The decoder and the encoder's last norm are left out, as the paper does.
    """
    left_out = ("decoder_", "mask_token", "norm.")
    own = model.state_dict()
    classifier = {name: own[name] for name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")}
    return {name: tensor for name, tensor in state.items() if not name.startswith(left_out)} | classifier


class Reconstruction(NamedTuple):
    """What a pre-training model makes of a batch."""

    loss: Float[Tensor, ""]
    predicted: Float[Tensor, "batch token pixel"]
    hidden: Float[Tensor, "batch token"]  # 1 where a patch was to be guessed


class AudioMAEPretraining(Published):
    """The auto-encoder: from a part of a spectrogram's patches to all of them.

    It reads `Fbank.published("audio-mae")`. `masked` is the share of patches to hide or, if two, the shares of steps and
    of bands to hide altogether. The decoder attends within windows of `window` tokens, in every second block two steps
    later, or to all tokens where that is None. Where `normalised`, patches are guessed with mean 0 and variance 1.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 16,
        decoder_heads: int = 16,
        window: tuple[int, int] | None = (4, 4),
        masked: tuple[float] | tuple[float, float] = (0.8,),
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid_of(fbank_of("audio-mae", task.seconds).frames or 0)
        tokens = math.prod(self.grid)
        self.axes = self.grid if len(masked) == 2 else (tokens,)
        self.kept, self.windowed, self.normalised = kept_of(self.axes, masked), window is not None, normalised
        self.cls_token = learned(1, 1, dim)
        self.pos_embed = nn.Parameter(codes(tokens, OFFICIAL_COLUMNS, dim), requires_grad=False)
        self.mask_token = learned(1, 1, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(codes(tokens, OFFICIAL_COLUMNS, decoder_dim), requires_grad=False)
        self.patch_embed = Patches(dim, size=(PATCH, PATCH))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder_blocks = nn.Sequential(
            *(
                WindowBlock(decoder_dim, decoder_heads, self.grid, window=window, shift=(2 * (i % 2), 0))
                if window
                else Block(decoder_dim, decoder_heads)
                for i in range(decoder_depth)
            )
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, PATCH**2)

    def forward(
        self,
        features: Float[Tensor, "batch frame bin"],
        noise: Float[Tensor, "batch axes"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Hide, encode, guess. What has least `noise` stays visible: of tokens or, side by side, of steps and of bands."""
        if noise is None:
            device = features.device if generator is None else generator.device
            noise = torch.rand(len(features), sum(self.axes), generator=generator, device=device).to(features.device)
        mask = self.masking(noise)
        predicted = self.decode(self.encode(features, mask), mask)
        pixels = pixels_of(features[:, None], (PATCH, PATCH))
        loss = reconstruction_loss(predicted, pixels, mask.hidden, normalised=self.normalised)
        return Reconstruction(loss, predicted, mask.hidden)

    def masking(self, noise: Float[Tensor, "batch axes"]) -> Masking:
        """Which tokens to hide; where whole steps and bands are hidden, the others stay in their order."""
        if len(self.axes) == 1:
            return masking(noise, self.kept[0])
        parts = noise.split(self.axes, dim=1)
        steps, bands = (masking(part, kept).hidden for part, kept in zip(parts, self.kept, strict=True))
        hidden = torch.maximum(steps[:, :, None], bands[:, None]).flatten(1)
        place = torch.arange(hidden.shape[1], device=noise.device)
        return masking(hidden * len(place) + place, math.prod(self.kept))

    def encode(self, features: Float[Tensor, "batch frame bin"], mask: Masking) -> Float[Tensor, "batch all dim"]:
        """A class token, then the visible ones."""
        tokens = taken(self.patch_embed(features[:, None]) + self.pos_embed[:, CLASS_ROW:], mask.visible)
        return self.norm(self.blocks(led(self.cls_token + self.pos_embed[:, :CLASS_ROW], tokens)))

    def decode(self, latent: Float[Tensor, "batch all dim"], mask: Masking) -> Float[Tensor, "batch token pixel"]:
        """The guess of every patch, visible ones too."""
        embedded = self.decoder_embed(latent)
        tokens = put_back(embedded[:, CLASS_ROW:], self.mask_token, mask.restore)
        tokens = torch.cat([embedded[:, :CLASS_ROW], tokens], dim=1) + self.decoder_pos_embed
        decoded = self.decoder_blocks(tokens[:, CLASS_ROW:] if self.windowed else tokens)
        return self.decoder_pred(self.decoder_norm(decoded))[:, 0 if self.windowed else CLASS_ROW :]

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With position tables for clips of this model's length."""
        return dict(state) | {
            name: fitted(state[name], self.grid[1], OFFICIAL_COLUMNS, own)
            for name, own in (("pos_embed", self.pos_embed), ("decoder_pos_embed", self.decoder_pos_embed))
            if name in state
        }


CLASSIFIER = Entry(
    AudioMAE,
    "Audio-MAE, fine-tuned",
    "Huang et al.",
    paper="Huang et al., 2022, arXiv:2207.06405",
    licence="CC-BY-NC 4.0 (its README says CC-BY 4.0)",
    published="https://github.com/facebookresearch/AudioMAE",
    takes=("classes", "label_kind", "seconds"),
    head="head.weight",
)
PRETRAINING = replace(
    CLASSIFIER,
    make=AudioMAEPretraining,
    summary="Audio-MAE, pre-training, decoder with windows",
    takes=("seconds",),
    head="",
)
MODELS: dict[str, Entry] = {
    "audio-mae": CLASSIFIER,
    "audio-mae-small": replace(
        CLASSIFIER, make=lambda task: AudioMAE(task, dim=384, heads=6), summary="Audio-MAE, half as wide"
    ),
    "audio-mae-large": replace(
        CLASSIFIER,
        make=lambda task: AudioMAE(task, dim=1024, depth=24, heads=16),
        summary="Audio-MAE, wider and twice as deep",
    ),
    "audio-mae-overlap": replace(
        CLASSIFIER, make=lambda task: AudioMAE(task, stride=10), summary="Audio-MAE, patches every 10 bins and frames"
    ),
    "audio-mae-pretrain": PRETRAINING,
    "audio-mae-pretrain-global": replace(
        PRETRAINING,
        make=lambda task: AudioMAEPretraining(task, decoder_depth=8, window=None),
        summary="Audio-MAE, pre-training, decoder without windows",
    ),
}
