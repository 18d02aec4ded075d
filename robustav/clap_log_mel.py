"""The log-mel of CLAP as Hugging Face's transformers have it, at the model's own sample rate (48 kHz)."""

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.audio import power_spectrum
from robustav.mel import check_length, floored_log, hertz_to_slaney, in_chunks, slaney_to_hertz, triangles

DECIBEL = 10 / math.log(10)  # decibels of power a unit of the natural logarithm
FLOOR = 1e-10  # power at which decibels are cut off


class ClapLogMel(nn.Module):
    """CLAP's log-mel without feature fusion [Wu et al., 2022, arXiv:2211.06687].

    [batch, time] -> [batch, 1, frame, bin], in decibels.

    A clip shorter than `length` samples is repeated as often as it fits whole (unless `repeated` is false), then filled
    up with zeros. Periodic Hann windows of `window` samples centred on every `hop`-th, ends mirrored; Slaney mel bands
    of area 1 Hz of the power spectrum, floored at -100. `alive` as in `Fbank`.
    """

    def __init__(
        self,
        *,
        length: int = 480_000,
        rate: int = 48_000,
        bins: int = 64,
        window: int = 1024,
        hop: int = 480,
        low: float = 50.0,
        high: float = 14_000.0,
        repeated: bool = True,
        alive: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= low < high <= rate / 2:
            raise ValueError(f"`low` and `high` must satisfy 0 <= low < high <= {rate / 2:g} Hz, got {low} and {high}")
        check_hop(window, hop, length)
        self.length, self.window, self.hop, self.repeated, self.alive = length, window, hop, repeated, alive
        edges = slaney_to_hertz(
            torch.linspace(hertz_to_slaney(low), hertz_to_slaney(high), bins + 2, dtype=torch.float64)
        )
        filters = triangles(torch.arange(window // 2 + 1, dtype=torch.float64) * rate / window, edges)
        self.hann: Tensor
        self.filters: Tensor
        self.floor: Tensor
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", (filters * 2 / (edges[2:] - edges[:-2])).float(), persistent=False)
        self.register_buffer("floor", torch.tensor(FLOOR), persistent=False)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch 1 frame bin"]:
        """`1 + length // hop` frames."""
        check_length(waveform, 1)
        if waveform.shape[1] > self.length:
            raise ValueError(f"a waveform must have at most {self.length} samples, got {waveform.shape[1]}: cut it")
        return in_chunks(self.decibels, waveform, self.window * (1 + self.length // self.hop))[:, None]

    def decibels(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Of some clips at once."""
        if self.repeated:
            waveform = waveform.repeat(1, self.length // waveform.shape[1])
        filled = F.pad(waveform, (0, self.length - waveform.shape[1]))
        mirrored = F.pad(filled, (self.window // 2, self.window // 2), mode="reflect")
        power = power_spectrum(mirrored.unfold(1, self.window, self.hop) * self.hann)
        return DECIBEL * floored_log(power @ self.filters, self.floor, alive=self.alive)


def check_hop(window: int, hop: int, length: int) -> None:
    """Refuse windows that cannot be laid over a clip."""
    if window % 2 or not 0 < hop <= window or length <= window // 2:
        raise ValueError(
            "`window` must be even, `hop` lie in 1..window and `length` be above window / 2, got "
            f"{window}, {hop} and {length}"
        )
