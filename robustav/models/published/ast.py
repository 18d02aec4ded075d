"""AST, the Audio Spectrogram Transformer [Gong et al., 2021, arXiv:2104.01778]."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, waveform
from robustav.data.class_names import ESC50, SPEECH_COMMANDS
from robustav.fbank import Fbank
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.transformer import Block, Patches, fbank_of, learned
from robustav.published_log_mel import TaggingLogMel, TalLogMel

PATCH = 16
LEADING = 2  # tokens before the patches: class, distillation
IMAGENET = 1000  # classes
UNUSED = ("v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias")


def grid_of(bins: int, frames: int, stride: tuple[int, int]) -> tuple[int, int]:
    """Rows (over frequency) and columns (over time) of patches."""
    return (bins - PATCH) // stride[0] + 1, (frames - PATCH) // stride[1] + 1


# Tokens -> grid and stride, of the tables that files are likely to have; no two of them have as many tokens.
SIZES = [(64, 400, 8), *((128, 128 * n, stride) for stride in (10, 12, 14, 16) for n in range(1, 9))]
GRIDS = {math.prod(grid_of(b, f, (s, s))): (grid_of(b, f, (s, s)), (s, s)) for b, f, s in SIZES}


def regridded(
    table: Float[Tensor, "1 all dim"], grid: tuple[int, int], to: tuple[int, int]
) -> Float[Tensor, "1 other dim"]:
    """A position table for another grid: the centre where an axis is shorter, bilinear where it is longer."""
    codes = table[:, LEADING:].float().transpose(1, 2).unflatten(2, grid)
    for axis in (3, 2):
        have, wanted = codes.shape[axis], to[axis - 2]
        if wanted <= have:
            codes = codes.narrow(axis, have // 2 - wanted // 2, wanted)
        else:
            size = (codes.shape[2], wanted) if axis == 3 else (wanted, codes.shape[3])
            codes = F.interpolate(codes, size, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :LEADING], codes.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


class DistilledViT(nn.Module):
    """DeiT [Touvron et al., 2020, arXiv:2012.12877] of one channel: a class and a distillation token before the patches.

    `head` and `head_dist` are left over from ImageNet: files have them, nothing uses them.
    """

    def __init__(self, dim: int, depth: int, heads: int, stride: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.cls_token, self.pos_embed, self.dist_token = (learned(1, count, dim) for count in (1, LEADING + tokens, 1))
        self.patch_embed = Patches(dim, size=(PATCH, PATCH), stride=stride)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head, self.head_dist = nn.Linear(dim, IMAGENET), nn.Linear(dim, IMAGENET)

    def forward(self, x: Float[Tensor, "batch 1 bin frame"]) -> Float[Tensor, "batch all dim"]:
        leading = torch.cat([self.cls_token, self.dist_token], dim=1).expand(len(x), -1, -1)
        tokens = torch.cat([leading, self.patch_embed(x)], dim=1)
        return self.norm(self.blocks(tokens + self.pos_embed))


class AST(Published, Classifier):
    """A DeiT that reads patches of a log-mel, frequency by frequency; they overlap where `stride` is below 16.

    `stride` is over bins and frames. `log_mel` is AST's filter bank unless told; `bins` says how many it has. Features
    are all tokens, the latent is the mean of the two that lead. What the network reads is divided by `divisor` first.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        stride: tuple[int, int] = (10, 10),
        log_mel: Fbank | TaggingLogMel | TalLogMel | None = None,
        bins: int = 128,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        self.specs = {"audio": waveform(task.seconds)}
        self.classes, self.label_kind = task.classes, task.label_kind
        self.log_mel, self.divisor = log_mel or fbank_of("ast", task.seconds), divisor
        frames = self.log_mel.frames or 0
        if bins < PATCH or frames < PATCH:
            raise ValueError(
                f"`log_mel` must give at least {PATCH} bins and, in its setting `frames`, {PATCH} frames, "
                f"got {bins} and {self.log_mel.frames}"
            )
        self.grid, self.stride = grid_of(bins, frames, stride), stride
        self.v = DistilledViT(dim, depth, heads, stride, math.prod(self.grid))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(task.classes)))

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw) / self.divisor

    def encode(self, modality: str, x: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "batch all dim"]:
        return self.v(x.transpose(1, 2)[:, None])

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["audio"][:, :LEADING].mean(1)

    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        return self.mlp_head(latent)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With empty ImageNet heads where the file has none, and its position table for this model's grid.

        A table says only how many tokens it has. Its grid is that of `GRIDS`, or else has as many rows as this model's.
        One of another stride is left as it is, for loading to refuse: it belongs to another model.
        """
        table = state.get("v.pos_embed")
        if table is None or table.ndim != 3:
            return dict(state)
        own = self.state_dict()
        adapted = {name: torch.zeros(own[name].shape) for name in UNUSED} | dict(state)
        tokens, (rows, columns) = table.shape[1] - LEADING, self.grid
        grid, stride = GRIDS.get(tokens, ((rows, tokens // rows), self.stride))
        if stride == self.stride and tokens > 0 and tokens != rows * columns and tokens == math.prod(grid):
            adapted["v.pos_embed"] = regridded(table, grid, self.grid)
        return adapted


def from_deit(state: Mapping[str, Tensor], model: AST) -> dict[str, Tensor]:
    """A start from ImageNet: the state dict of a distilled DeiT as one of `model`, whose classifier stays as it is.

    Colours are summed in the patch filter; the square position table is regridded.
    """
    needed = ("dist_token", "pos_embed", "patch_embed.proj.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"`state` must be of a distilled DeiT, got one without {', '.join(missing)}")
    side = math.isqrt(state["pos_embed"].shape[1] - LEADING)
    changed = {
        "patch_embed.proj.weight": state["patch_embed.proj.weight"].sum(1, keepdim=True),
        "pos_embed": regridded(state["pos_embed"], (side, side), model.grid),
    }
    classifier = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("mlp_head.")}
    return {f"v.{name}": tensor for name, tensor in {**state, **changed}.items()} | classifier


OFFICIAL = Entry(
    AST,
    "AST, patches every 10 bins and 10 frames",
    "Gong et al.",
    paper="Gong et al., 2021, arXiv:2104.01778",
    licence="BSD-3-Clause",
    published="https://github.com/YuanGongND/ast",
    takes=("classes", "label_kind", "seconds"),
    head="mlp_head.1.weight",
)
TAGGING = replace(
    OFFICIAL,
    source="Li et al.",
    paper="Li et al., 2022, arXiv:2203.13448",
    published="https://github.com/lijuncheng16/AudioTaggingDoneRight",
)
MODELS: dict[str, Entry] = {
    "ast": OFFICIAL,
    "ast-s12": replace(OFFICIAL, make=lambda task: AST(task, stride=(12, 12)), summary="AST, patches every 12"),
    "ast-s14": replace(OFFICIAL, make=lambda task: AST(task, stride=(14, 14)), summary="AST, patches every 14"),
    "ast-s16": replace(OFFICIAL, make=lambda task: AST(task, stride=(16, 16)), summary="AST, patches side by side"),
    "ast-small": replace(OFFICIAL, make=lambda task: AST(task, dim=384, heads=6), summary="AST, half as wide"),
    "ast-tiny": replace(OFFICIAL, make=lambda task: AST(task, dim=192, heads=3), summary="AST, a quarter as wide"),
    "ast-esc50": replace(
        OFFICIAL,
        make=lambda task: AST(task, log_mel=fbank_of("ast-esc50", task.seconds)),
        summary="AST for ESC-50, 5 s",
        task=Task(ESC50, "multiclass", seconds=5.0),
    ),
    "ast-speech-commands": replace(
        OFFICIAL,
        make=lambda task: AST(task, log_mel=fbank_of("ast-speech-commands", task.seconds)),
        summary="AST for Speech Commands V2, 1 s",
        task=Task(SPEECH_COMMANDS, "multiclass", seconds=1.0),
    ),
    "ast-tagging-128": replace(
        TAGGING,
        make=lambda task: AST(task, log_mel=fbank_of("tagging-mix-0.3", task.seconds)),
        summary="AST of the tagging study, 128 bands",
    ),
    "ast-tagging-64": replace(
        TAGGING,
        make=lambda task: AST(task, stride=(8, 8), log_mel=TaggingLogMel.published("ast"), bins=64),
        summary="AST of the tagging study, 64 bands",
        takes=("classes", "label_kind"),
    ),
    "ast-64": replace(
        TAGGING,
        make=lambda task: AST(task, stride=(8, 8), log_mel=TalLogMel.published(), bins=64, divisor=8.0),
        summary="AST on the 64 bands of the TAL family",
        paper="Li et al., 2022, arXiv:2203.12122",
        licence="none stated",
        published="https://github.com/lijuncheng16/AudioSetDoneRight",
        takes=("classes", "label_kind"),
    ),
}
