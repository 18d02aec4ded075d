"""MSM-MAE [Niizumi et al., 2022, arXiv:2204.12260]: masked spectrogram modelling, and clips classified by its features.

Spectrograms have the bins as rows and the frames as columns; tokens run along the frames first.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustav.classifier import Classifier, waveform
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mae import Masking, masking, pixels_of, put_back, reconstruction_loss, taken
from robustav.models.published.transformer import Attention, Block, Patches, grid, position_table, waves
from robustav.published_log_mel import MsmMaeLogMel

BINS = 80
MEAN, STD = (
    -7.1,
    4.2,
)  # AudioSet's in this log-mel, as the same authors have them [Niizumi et al., 2022, arXiv:2210.14648]


class KeylessBias(Attention):
    """Attention of BEiT [Bao et al., 2021, arXiv:2106.08254]: queries and values have a bias, keys have none."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def projected(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token three"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(tokens, self.qkv.weight, bias)


def blocks_of(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """`depth` blocks one after the other."""
    return nn.ModuleList([Block(dim, heads, attention=KeylessBias(dim, heads)) for _ in range(depth)])


def initialise(module: nn.Module) -> None:
    """Weights as in MAE [He et al., 2021, arXiv:2111.06377]: Glorot's uniform ones, patches as one linear map."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def hide(noise: Float[Tensor, "batch token"], ratio: float) -> Masking:
    """All but `int(token * (1 - ratio))` tokens are hidden: those of most noise."""
    return masking(noise, int(noise.shape[1] * (1 - ratio)))


def hide_given(hidden: Float[Tensor, "batch token"]) -> Masking:
    """Tokens are hidden where this is 1, as many in every clip; the others stay in order."""
    counts = hidden.sum(1)
    if (counts != counts[0]).any():
        raise ValueError(f"`hidden` must hide as many tokens in every clip, got {counts.int().tolist()}")
    tokens = hidden.shape[1]
    order = torch.arange(tokens, dtype=hidden.dtype, device=hidden.device)
    return masking(hidden * tokens + order, tokens - int(counts[0]))


class Encoder(Published):
    """What pre-training and use have in common, with the names of the official checkpoints.

    The position table is fixed; it is stored all the same, and follows the grid that the patches really have.
    """

    def __init__(
        self, *, bins: int, frames: int, patch: tuple[int, int], dim: int, depth: int, heads: int, class_token: bool
    ) -> None:
        super().__init__()
        high, wide = patch
        if bins % high or frames % wide:
            raise ValueError(
                f"`patch` must tile {bins} bins x {frames} frames, got {high} x {wide}: choose `frames` divisible by {wide}"
            )
        self.bins, self.frames, self.grid, self.leading = bins, frames, (bins // high, frames // wide), int(class_token)
        self.cls_token: Tensor | None
        self.register_parameter("cls_token", nn.Parameter(torch.empty(1, 1, dim)) if class_token else None)
        self.pos_embed = nn.Parameter(self.table(dim), requires_grad=False)
        self.patch_embed = Patches(dim, size=patch)
        self.blocks = blocks_of(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.apply(initialise)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def table(self, dim: int) -> Float[Tensor, "1 all dim"]:
        """The position table in two dimensions."""
        return position_table(*grid(*self.grid), dim, leading=self.leading)

    def embedded(
        self, spectrogram: Float[Tensor, "batch 1 bin frame"], visible: Int[Tensor, "batch kept"] | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """Patches with their positions, all or the visible ones in this order, after the class token if there is one."""
        if spectrogram.shape[2:] != (self.bins, self.frames):
            raise ValueError(
                f"`spectrogram` must have {self.bins} bins and {self.frames} frames, got {list(spectrogram.shape[2:])}"
            )
        tokens = self.patch_embed(spectrogram) + self.pos_embed[:, self.leading :]
        if visible is not None:
            tokens = taken(tokens, visible)
        if self.cls_token is None:
            return tokens
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)

    def encoded(
        self, spectrogram: Float[Tensor, "batch 1 bin frame"], visible: Int[Tensor, "batch kept"] | None = None
    ) -> Float[Tensor, "batch token dim"]:
        """The last block's output, normed."""
        tokens = self.embedded(spectrogram, visible)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def every_layer(self, spectrogram: Float[Tensor, "batch 1 bin frame"]) -> Float[Tensor, "layer batch token dim"]:
        """Every block's output, the last one normed."""
        outputs = [self.embedded(spectrogram)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return torch.stack([*outputs[1:-1], self.norm(outputs[-1])])


class Reconstruction(NamedTuple):
    """What pre-training makes of a batch."""

    loss: Float[Tensor, ""]
    predicted: Float[Tensor, "batch token pixel"]  # of a patch, row by row
    masking: Masking


class MsmMaePretraining(Encoder):
    """The masked auto-encoder, with a decoder that is thrown away after pre-training.

    Input is the normalised log-mel, [batch, 1, bin, frame]. The decoder's position table runs along the token index
    with sines and cosines in turn or, where `decoder_2d`, is the encoder's kind. `normalised` targets have mean 0 and
    variance 1 within a patch. Without a class token the official decoder still drops the first token that it is given:
    every visible token then stands where its predecessor in the encoder's order should. So it is here.
    """

    def __init__(
        self,
        task: Task,
        *,
        bins: int = BINS,
        frames: int = 208,
        patch: tuple[int, int] = (16, 16),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 384,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        class_token: bool = True,
        decoder_2d: bool = False,
        normalised: bool = False,
        ratio: float = 0.75,
    ) -> None:
        super().__init__(
            bins=bins, frames=frames, patch=patch, dim=dim, depth=depth, heads=heads, class_token=class_token
        )
        if not 0 < ratio < 1:
            raise ValueError(f"`ratio` of hidden patches must lie between 0 and 1, got {ratio:g}")
        self.patch, self.decoder_2d, self.normalised, self.ratio = patch, decoder_2d, normalised, ratio
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(self.decoder_table(decoder_dim), requires_grad=False)
        self.decoder_blocks = blocks_of(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = nn.LayerNorm(decoder_dim, 1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch[0] * patch[1])
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def decoder_table(self, dim: int) -> Float[Tensor, "1 all dim"]:
        """The decoder's position table."""
        if self.decoder_2d:
            return self.table(dim)
        sines, cosines = waves(torch.arange(self.grid[0] * self.grid[1]).double(), dim).chunk(2, dim=1)
        return F.pad(torch.stack([sines, cosines], dim=2).flatten(1), (0, 0, self.leading, 0))[None].float()

    def decoded(
        self, encoded: Float[Tensor, "batch kept dim"], restore: Int[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token pixel"]:
        """Every patch's pixels from the visible tokens."""
        visible = self.decoder_embed(encoded)
        tokens = put_back(visible[:, 1:], self.mask_token, restore)
        tokens = torch.cat([visible[:, : self.leading], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, self.leading :]

    def forward(self, spectrogram: Float[Tensor, "batch 1 bin frame"], hidden: Masking | None = None) -> Reconstruction:
        """Hide patches, at random unless told which (`hide`, `hide_given`), and reconstruct them."""
        if hidden is None:
            hidden = hide(
                torch.rand(len(spectrogram), self.grid[0] * self.grid[1], device=spectrogram.device), self.ratio
            )
        predicted = self.decoded(self.encoded(spectrogram, hidden.visible), hidden.restore)
        pixels = pixels_of(spectrogram, self.patch)
        return Reconstruction(
            reconstruction_loss(predicted, pixels, hidden.hidden, normalised=self.normalised), predicted, hidden
        )


class MsmMae(Encoder, Classifier):
    """A linear classifier of MSM-MAE's clip features [Niizumi et al., 2022, arXiv:2204.12260], which have no head of their own.

    The log-mel is cut into chunks of `frames`, the last filled up with zeros, each encoded for itself; all bins of a
    time step side by side are its feature, whose mean over time is the clip's. The official features append a whole
    empty chunk where the length fits already, and drop what it gives; here it is left out.

    `mean` and `std` are those of the log-mel over the data of pre-training; a probe that was trained with others needs
    them.
    """

    def __init__(
        self,
        task: Task,
        *,
        frames: int = 208,
        patch: tuple[int, int] = (16, 16),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        class_token: bool = True,
        mean: float = MEAN,
        std: float = STD,
    ) -> None:
        super().__init__(
            bins=BINS, frames=frames, patch=patch, dim=dim, depth=depth, heads=heads, class_token=class_token
        )
        self.specs, self.classes, self.label_kind = {"audio": waveform(task.seconds)}, task.classes, task.label_kind
        self.log_mel = MsmMaeLogMel(mean=mean, std=std, padded=True)
        self.head = nn.Linear(self.grid[0] * dim, len(task.classes))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also a pre-training file: its decoder is dropped, its head has to be joined (`with_head`)."""
        return super().adapted({k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))})

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw)

    def chunks(self, log_mel: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "chunk 1 bin chunkframe"]:
        """What the encoder reads, clip by clip."""
        padded = F.pad(log_mel.transpose(1, 2), (0, -log_mel.shape[1] % self.frames))
        return padded.unflatten(2, (-1, self.frames)).transpose(1, 2).flatten(0, 1)[:, None]

    def steps(
        self, tokens: Float[Tensor, "chunk token dim"], batch: int, frames: int
    ) -> Float[Tensor, "batch step wide"]:
        """The features of clips of `frames` from the tokens of their chunks."""
        rows, columns = self.grid
        whole = tokens[:, self.leading :].unflatten(1, (rows, columns)).transpose(1, 2).flatten(2)
        steps = whole.unflatten(0, (batch, -1)).flatten(1, 2)
        return steps[:, : steps.shape[1] - columns * (-frames % self.frames) // self.frames]

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """The features of the frames that a clip has; zeros after those of a clip that was padded."""
        steps = self.steps(self.encoded(self.chunks(x)), *x.shape[:2])
        sounding = (x != 0).any(2)
        frames = x.shape[1] - sounding.flip(1).int().argmax(1)  # all of a clip without any
        columns = self.grid[1]
        own = -(-frames // self.frames) * columns - columns * (-frames % self.frames) // self.frames
        places = torch.arange(steps.shape[1], device=x.device)
        return torch.where((places < own[:, None])[:, :, None], steps, 0.0)

    def layers(self, log_mel: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "layer batch step wide"]:
        """The features of every layer, the last of which is `encode`'s."""
        each = self.every_layer(self.chunks(log_mel))
        return torch.stack([self.steps(tokens, *log_mel.shape[:2]) for tokens in each])

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        steps = features["audio"]
        return steps.sum(1) / (steps != 0).any(2).sum(1, keepdim=True).clamp(min=1)

    def classify(self, latent: Tensor) -> Tensor:
        return self.head(latent)


def with_head(
    state: Mapping[str, Tensor], weight: Float[Tensor, "class dim"], bias: Float[Tensor, " class"]
) -> dict[str, Tensor]:
    """The state dict of a pre-trained file and of a linear head trained on its clip features.

    Of a probe on standardised features, give `weight / std` and `bias - weight @ (mean / std)`.
    """
    return {**state, "head.weight": weight, "head.bias": bias}


def entry(make: Callable[[Task], nn.Module], summary: str, *, takes: tuple[str, ...] = (), head: str = "") -> Entry:
    """A row of the table."""
    return Entry(
        make=make,
        summary=summary,
        source="Niizumi et al.",
        paper="Niizumi et al., 2022, arXiv:2204.12260",
        licence="evaluation only, no distribution",
        published="https://github.com/nttcslab/msm-mae",
        takes=takes,
        head=head,
    )


def both(frames: int, patch: tuple[int, int], suffix: str) -> dict[str, Entry]:
    """The two models of a configuration."""
    what = f"{frames} frames, patches {patch[0]} x {patch[1]}"
    return {
        f"msm-mae-pretrain-{suffix}": entry(
            lambda task: MsmMaePretraining(task, frames=frames, patch=patch), f"masked auto-encoder, {what}"
        ),
        f"msm-mae-{suffix}": entry(
            lambda task: MsmMae(task, frames=frames, patch=patch),
            f"linear on its features, {what}",
            takes=("classes", "label_kind", "seconds"),
            head="head.weight",
        ),
    }


MODELS: dict[str, Entry] = {
    **both(512, (16, 16), "512"),
    **both(208, (16, 16), "208"),
    **both(208, (16, 8), "208-16x8"),
    **both(208, (16, 4), "208-16x4"),
    **both(208, (8, 16), "208-8x16"),
    **both(208, (80, 4), "208-80x4"),
}
