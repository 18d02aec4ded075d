"""What every metric of latents asks of them: two axes, finite values, enough precision and bounded memory."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

FLOAT64_ROWS = 50_000  # above this, float64 costs more memory and time than its digits are worth
CHUNK_BYTES = 2**26  # of working memory, 64 MiB


def checked(latents: Float[Tensor, "..."], name: str = "latents") -> Float[Tensor, "sample dim"]:
    """The latents, detached, in the precision that distances are taken in; `ValueError` unless finite [sample, dim].

    float64 up to 50 000 rows, float32 above, where invariances hold to about six digits only.

    >>> checked(torch.zeros(3, 2)).dtype
    torch.float64
    """
    if latents.ndim != 2 or 0 in latents.shape:
        raise ValueError(f"`{name}` must be [sample, dim] with at least one of each, got {list(latents.shape)}")
    precise = latents.detach().to(torch.float64 if len(latents) <= FLOAT64_ROWS else torch.float32)
    broken = ~precise.isfinite()
    if broken.any():
        row, column = broken.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}` must be finite, got {precise[row, column].item()} first at sample {row}, dim {column} "
            f"({int(broken.any(dim=1).sum())} of {len(latents)} samples concerned): look at what the model gives there"
        )
    return precise


def negligible(*latents: Float[Tensor, "..."]) -> float:
    """A distance that rounding alone can put between copies of a row, once they were centred, scaled or rotated.

    >>> negligible(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    4.440892098500626e-13
    """
    return max(1000 * torch.finfo(x.dtype).eps * x.abs().max().item() for x in latents)


def check_k(k: int, candidates: int, whose: str) -> None:
    """Raise `ValueError` unless a row with that many candidates has `k` neighbours."""
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}")
    if k > candidates:
        raise ValueError(
            f"`k` must be at most {candidates}, the number of {whose}, got {k}: lower it, or leave out a set this small"
        )


def blocks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Consecutive ranges of rows that each take at most `CHUNK_BYTES`, or are one row long."""
    length = max(CHUNK_BYTES // bytes_per_row, 1)
    return (slice(start, start + length) for start in range(0, rows, length))
