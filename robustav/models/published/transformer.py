"""What the published spectrogram and picture transformers share: patches, attention, blocks, fixed position tables.

As in ViT [Dosovitskiy et al., 2020, arXiv:2010.11929], with the names that official checkpoints have.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.fbank import RECIPES, Fbank, frames_for


def fbank_of(recipe: str, seconds: float) -> Fbank:
    """A filter bank of `RECIPES` for clips of any length: 1024 frames for 10 s, 512 for 5 s, 128 for 1 s."""
    return Fbank(**RECIPES[recipe]._replace(frames=frames_for(seconds))._asdict())


def learned(*shape: int) -> nn.Parameter:
    """Tokens or a position table to learn, at first near zero."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class Patches(nn.Module):
    """A linear map of each patch, [batch, channel, height, width] -> [batch, token, dim], row by row."""

    def __init__(
        self, dim: int, channels: int = 1, size: tuple[int, int] = (16, 16), stride: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride or size)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token dim"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def projected(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token three"]:
        """Queries, keys and values side by side."""
        return self.qkv(tokens)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        query, key, value = self.projected(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        return self.fc2(F.gelu(self.fc1(tokens)))


def sometimes(branch: Float[Tensor, "batch token dim"], skip: float) -> Float[Tensor, "batch token dim"]:
    """Stochastic depth [Huang et al., 2016, arXiv:1603.09382]: zero for a share `skip` of clips, scaled up for the rest."""
    if skip == 0:
        return branch
    kept = torch.rand(len(branch), 1, 1, device=branch.device) >= skip
    return branch * kept / (1 - skip)


class Block(nn.Module):
    """A pre-norm block. `attention` takes the place of the usual one; `skip` is how often training drops a branch."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ratio: float = 4,
        eps: float = 1e-6,
        attention: nn.Module | None = None,
        skip: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps), attention or Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps), Mlp(dim, int(ratio * dim))
        self.skip = skip

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        skip = self.skip if self.training else 0.0
        tokens = tokens + sometimes(self.attn(self.norm1(tokens)), skip)
        return tokens + sometimes(self.mlp(self.norm2(tokens)), skip)


def waves(positions: Float[Tensor, " token"], dim: int) -> Float[Tensor, "token dim"]:
    """Sines, then cosines, of `positions` times `10000 ** (-k / (dim / 2))`, in float64."""
    rates = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(
    rows: Float[Tensor, " token"], columns: Float[Tensor, " token"], dim: int, *, leading: int = 0
) -> Float[Tensor, "1 all dim"]:
    """The fixed table of MAE [He et al., 2021, arXiv:2111.06377]: columns in the first half of the width, rows in the other.

    `leading` tokens before the patches have zeros.
    """
    table = torch.cat([waves(columns, dim // 2), waves(rows, dim // 2)], dim=1)
    return F.pad(table, (0, 0, leading, 0))[None].float()


def grid(rows: int, columns: int) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Row and column of each token, row by row."""
    index = torch.arange(rows * columns)
    return (index // columns).double(), (index % columns).double()
