"""Differentiable change of a waveform's sample rate."""

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn


class Resample(nn.Module):
    """Another sample rate by windowed sinc interpolation [Smith, ccrma.stanford.edu/~jos/resample], [*, time] -> [*, time].

    `zeros` crossings of the sinc on either side, under a Hann window or, with `beta`, a Kaiser window; the filter's edge
    lies at `rolloff` of the lower Nyquist frequency. torchaudio's `functional.resample` has the same settings as
    `lowpass_filter_width`, `rolloff` and `beta`. Linear, so its gradient is exact. `ceil(time x to / from)` samples.

    Rates need a common divisor: the filter bank has about `from x to / divisor^2` entries.
    """

    def __init__(
        self, from_rate: int, to_rate: int, *, zeros: int = 6, rolloff: float = 0.99, beta: float | None = None
    ) -> None:
        super().__init__()
        if from_rate < 1 or to_rate < 1:
            raise ValueError(f"`from_rate` and `to_rate` must be at least 1 Hz, got {from_rate} and {to_rate}")
        if zeros < 1 or not 0 < rolloff <= 1:
            raise ValueError(f"`zeros` must be at least 1 and `rolloff` lie in (0, 1], got {zeros} and {rolloff}")
        divisor = math.gcd(from_rate, to_rate)
        self.period, self.phases = from_rate // divisor, to_rate // divisor  # samples in, samples out
        edge = rolloff * min(self.period, self.phases)
        self.reach = math.ceil(zeros * self.period / edge)  # samples
        taps = torch.arange(-self.reach, self.reach + self.period, dtype=torch.float64)[:, None] / self.period
        phases = torch.arange(self.phases, dtype=torch.float64) / self.phases
        crossings = ((taps - phases) * edge).clamp(-zeros, zeros)
        if beta is None:
            window = torch.cos(0.5 * math.pi * crossings / zeros).square()
        else:
            inside = (1 - (crossings / zeros).square()).sqrt()
            window = torch.i0(beta * inside) / torch.i0(torch.tensor(beta, dtype=torch.float64))
        kernel = torch.sinc(crossings) * window * edge / self.period
        self.kernel: Tensor
        self.register_buffer("kernel", kernel.float(), persistent=False)  # [tap, phase]

    def forward(self, waveform: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch resampled"]:
        """The same sound; its ends border on silence."""
        if self.period == self.phases:
            return waveform
        time = waveform.shape[-1]
        padded = F.pad(waveform, (self.reach, self.reach + self.period))
        resampled = padded.unfold(-1, len(self.kernel), self.period) @ self.kernel
        return resampled.flatten(-2)[..., : -(-time * self.phases // self.period)]
