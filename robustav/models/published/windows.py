"""Attention within windows of a grid of tokens, as Swin V2 has it [Liu et al., 2021, arXiv:2111.09883]."""

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.models.published.transformer import Mlp

APART = -100.0  # added to the logit between tokens that a shift brought into one window
COLDEST = 0.01  # the smallest temperature


def split(grid: Tensor, window: tuple[int, int]) -> Tensor:
    """[batch, row, column, *rest] -> [batch, window, token, *rest], windows and tokens row by row."""
    high, wide = window
    return grid.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def joined(windows: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The inverse of `split`."""
    (rows, columns), (high, wide) = grid, window
    parts = windows.unflatten(2, (high, wide)).unflatten(1, (rows // high, columns // wide))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def strangers(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Float[Tensor, "window token token"]:
    """What to add between tokens of one window that are not neighbours but met when the grid was rolled by `shift`."""
    rows, columns = (torch.arange(size) >= size - by for size, by in zip(grid, shift, strict=True))
    region = split((2 * rows[:, None] + columns.int())[None], window)[0]
    return APART * (region[:, :, None] != region[:, None]).float()


def offsets(window: tuple[int, int]) -> Float[Tensor, "token token 2"]:
    """Rows and columns between any two tokens of a window, as sign(d) log(1 + |d|)."""
    place = torch.cartesian_prod(*(torch.arange(size) for size in window)).float()
    apart = place[:, None] - place
    return apart.sign() * apart.abs().log1p()


class OffsetMlp(nn.Module):
    """The bias of each head between two tokens from the offset between them."""

    def __init__(self, heads: int, hidden: int = 384) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, hidden), nn.Linear(hidden, heads)

    def forward(self, offsets: Float[Tensor, "token token 2"]) -> Float[Tensor, "head token token"]:
        hidden = F.dropout(self.fc1(offsets).relu(), 0.1, self.training)
        return self.fc2(hidden).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Attention by the cosine of query and key over a temperature `tau` of each head, plus a bias by offset."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.ones(heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.meta_mlp = OffsetMlp(heads)
        self.offsets: Tensor
        self.register_buffer("offsets", offsets(window), persistent=False)

    def forward(
        self, tokens: Float[Tensor, "batch window token dim"], apart: Float[Tensor, "window token token"]
    ) -> Float[Tensor, "batch window token dim"]:
        query, key, value = self.qkv(tokens).unflatten(3, (3, len(self.tau), -1)).permute(3, 0, 1, 4, 2, 5)
        lengths = query.norm(dim=-1)[..., :, None] * key.norm(dim=-1)[..., None, :]
        cosine = query @ key.transpose(-1, -2) / lengths.clamp(min=1e-6)
        logits = cosine / self.tau.clamp(min=COLDEST)[:, None, None] + self.meta_mlp(self.offsets) + apart[:, None]
        return self.proj((logits.softmax(-1) @ value).transpose(2, 3).flatten(3))


class WindowBlock(nn.Module):
    """A block over a `grid` of tokens, row by row, whose branches are normalised after what they do.

    `shift` moves the windows down and to the right, so that tokens meet others than in an unshifted block.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        *,
        window: tuple[int, int] = (4, 4),
        shift: tuple[int, int] = (0, 0),
        ratio: float = 4,
    ) -> None:
        super().__init__()
        if any(size % part for size, part in zip(grid, window, strict=True)):
            raise ValueError(
                f"`window` must tile the grid of {grid[0]} x {grid[1]} tokens, got {window[0]} x {window[1]}"
            )
        self.grid, self.window, self.shift = grid, window, shift
        self.attn = WindowAttention(dim, heads, window)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(ratio * dim))
        self.apart: Tensor
        self.register_buffer("apart", strangers(grid, window, shift), persistent=False)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        tokens = tokens + self.norm1(self.attended(tokens))
        return tokens + self.norm2(self.mlp(tokens))

    def attended(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """What the tokens take from their windows."""
        down, right = self.shift
        grid = tokens.unflatten(1, self.grid).roll((-down, -right), (1, 2))
        windows = self.attn(split(grid, self.window), self.apart)
        return joined(windows, self.grid, self.window).roll((down, right), (1, 2)).flatten(1, 2)
