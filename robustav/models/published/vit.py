"""Plain vision transformers over a clip's frames: ViT, DeiT, and the fine-tuned MAE."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, frames
from robustav.image import IMAGENET_MEAN, IMAGENET_STD, ImageFrontEnd
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mixtures import averaged
from robustav.models.published.transformer import Block, Patches

READOUTS = ("token", "mean")
HALF = (0.5, 0.5, 0.5)


class Vit(Published, Classifier):
    """ViT [Dosovitskiy et al., 2020, arXiv:2010.11929] on each frame; the frames' probabilities are averaged.

    A checkpoint's keys tell its `readout`: with `norm.*` the head reads the class token, "token"; with `fc_norm.*` it
    reads the normed mean of the patches, "mean", as MAE's does [He et al., 2021, arXiv:2111.06377]. Probabilities
    (sigmoids, or softmaxes of a multiclass task) are averaged over frames and given as logits; with one frame, logits
    are the network's own. The latent has what the head reads of each frame, [batch, frame * dim]. `mean` and `std` are
    those that the checkpoint was trained with.
    """

    def __init__(
        self,
        task: Task,
        *,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        readout: str = "token",
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"`readout` must be one of {list(READOUTS)}, got {readout!r}")
        if task.size % patch:
            raise ValueError(f"`size` of frames must be a multiple of the patches' {patch}, got {task.size}")
        self.specs = {"visual": frames(task.frames, task.size)}
        self.classes, self.label_kind = task.classes, task.label_kind
        self.readout, self.dim = readout, dim
        self.pixels = ImageFrontEnd(size=task.size, mean=mean, std=std)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (task.size // patch) ** 2, dim))
        self.patch_embed = Patches(dim, channels=3, size=(patch, patch))
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6) if readout == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, 1e-6) if readout == "mean" else nn.Identity()
        self.blocks.apply(initialise)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        self.head = nn.Linear(dim, len(task.classes))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict; the position table of square frames of another size is interpolated, bicubic."""
        fitting, table = dict(state), state.get("pos_embed")
        if table is not None and table.ndim == 3 and table.shape[::2] == self.pos_embed.shape[::2]:
            fitting["pos_embed"] = resampled(table, math.isqrt(self.pos_embed.shape[1]))
        return fitting

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.pixels(raw)

    def read(self, pixels: Float[Tensor, "many 3 height width"]) -> Float[Tensor, "many dim"]:
        """What the head reads of pictures."""
        first = self.cls_token.expand(len(pixels), -1, -1)
        tokens = torch.cat([first, self.patch_embed(pixels)], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return self.fc_norm(tokens[:, 0] if self.readout == "token" else tokens[:, 1:].mean(1))

    def encode(self, modality: str, x: Tensor) -> Float[Tensor, "batch frame dim"]:
        return self.read(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return features["visual"].flatten(1)

    def classify(self, latent: Tensor) -> Tensor:
        logits = self.head(latent.unflatten(1, (-1, self.dim)))
        return averaged(logits, self.label_kind)


def initialise(module: nn.Module) -> None:
    """Weights as in DeiT [Touvron et al., 2020, arXiv:2012.12877]."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def resampled(table: Float[Tensor, "1 all dim"], side: int) -> Float[Tensor, "1 wanted dim"]:
    """A table for `side` x `side` patches behind the class token; one that is of no square grid stays as it is."""
    old = math.isqrt(max(0, table.shape[1] - 1))
    if old == side or 1 + old**2 != table.shape[1]:
        return table
    square = table[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    stretched = F.interpolate(square, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], stretched.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


# What the 1000 classes are called is not ours to ship.
IMAGENET = Task(classes=tuple(f"ImageNet {i:03}" for i in range(1000)), label_kind="multiclass")


class Family(NamedTuple):
    """What the checkpoints of one source have in common."""

    source: str
    paper: str
    published: str
    licence: str = "Apache-2.0"
    readout: str = "token"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


GOOGLE, META = "https://github.com/google-research/vision_transformer", "https://github.com/facebookresearch/"
VIT = Family("Dosovitskiy et al.", "Dosovitskiy et al., 2020, arXiv:2010.11929", GOOGLE, mean=HALF, std=HALF)
AUGREG = Family("Steiner et al.", "Steiner et al., 2021, arXiv:2106.10270", GOOGLE, mean=HALF, std=HALF)
DEIT = Family("Touvron et al.", "Touvron et al., 2020, arXiv:2012.12877", META + "deit")
MAE = Family("He et al.", "He et al., 2021, arXiv:2111.06377", META + "mae", "CC-BY-NC 4.0", "mean")


def entry(family: Family, size: str, dim: int, depth: int, heads: int, patch: int = 16) -> Entry:
    """A row of the table."""
    return Entry(
        make=lambda task: Vit(
            task,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            readout=family.readout,
            mean=family.mean,
            std=family.std,
        ),
        summary=f"{size} plain transformer, patches of {patch}, {family.readout} readout",
        source=family.source,
        paper=family.paper,
        licence=family.licence,
        published=family.published,
        task=IMAGENET,
        takes=("classes", "label_kind", "frames", "size"),
        head="head.weight",
    )


MODELS: dict[str, Entry] = {
    "vit-tiny": entry(AUGREG, "tiny", 192, 12, 3),
    "vit-small": entry(AUGREG, "small", 384, 12, 6),
    "vit-small-32": entry(AUGREG, "small", 384, 12, 6, patch=32),
    "vit-base": entry(VIT, "base", 768, 12, 12),
    "vit-base-32": entry(VIT, "base", 768, 12, 12, patch=32),
    "vit-large": entry(VIT, "large", 1024, 24, 16),
    "vit-large-32": entry(VIT, "large", 1024, 24, 16, patch=32),
    "vit-huge-14": entry(VIT, "huge", 1280, 32, 16, patch=14),
    "deit-tiny": entry(DEIT, "tiny", 192, 12, 3),
    "deit-small": entry(DEIT, "small", 384, 12, 6),
    "deit-base": entry(DEIT, "base", 768, 12, 12),
    "mae-vit-base": entry(MAE, "base", 768, 12, 12),
    "mae-vit-large": entry(MAE, "large", 1024, 24, 16),
    "mae-vit-huge-14": entry(MAE, "huge", 1280, 32, 16, patch=14),
}
