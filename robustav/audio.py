"""Differentiable audio front ends: from batches of waveforms to spectrograms."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz, of every model of ours


def hertz_to_mel(frequency: Tensor | float) -> Tensor:
    """The mel scale as HTK and Kaldi have it: 1127 ln(1 + f / 700)."""
    device = frequency.device if isinstance(frequency, Tensor) else "cpu"
    return 1127.0 * torch.log1p(torch.as_tensor(frequency, dtype=torch.float64, device=device) / 700.0)


def mel_to_hertz(mel: Tensor) -> Tensor:
    """Inverse of `hertz_to_mel`."""
    return 700.0 * torch.expm1(mel / 1127.0)


def mel_filters(bins: int, mels: int, sample_rate: int, low: float, high: float) -> Float[Tensor, "bin mel"]:
    """Triangles that are `mels` steps of equal mel apart, peak 1, over the `bins` frequencies 0 .. sample_rate / 2."""
    if not 0 <= low < high <= sample_rate / 2:
        raise ValueError(
            f"`low` and `high` must satisfy 0 <= low < high <= {sample_rate / 2:g} Hz, got {low} and {high}"
        )
    edges = mel_to_hertz(
        torch.linspace(float(hertz_to_mel(low)), float(hertz_to_mel(high)), mels + 2, dtype=torch.float64)
    )
    frequencies = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


class _Power(torch.autograd.Function):
    """Real transforms both ways, where autograd's own gradient takes a complex one: half the time of a front end.

    Backward passes of any order, and batches of them by `vmap`; no forward mode.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(frames: Tensor, size: int) -> Tensor:
        real, imaginary = torch.view_as_real(torch.fft.rfft(frames, n=size)).unbind(-1)
        return real * real + imaginary * imaginary

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])  # and not the spectrum, for second derivatives to be right
        ctx.size = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # d|S_k|^2 / dx_n = 2 Re(S_k e^(i 2 pi k n / size)); an inverse transform counts all bins twice but the ends.
        (frames,) = ctx.saved_tensors
        ends = gradient.new_ones(gradient.shape[-1])
        ends[0] = 2
        if ctx.size % 2 == 0:
            ends[-1] = 2
        back = torch.fft.irfft(torch.fft.rfft(frames, n=ctx.size) * (gradient * ends), n=ctx.size, norm="forward")
        return back[..., : frames.shape[-1]], None


def power_spectrum(frames: Float[Tensor, "*frame time"], size: int | None = None) -> Float[Tensor, "*frame bin"]:
    """|S_k|^2 of each frame's Fourier transform, k = 0 .. size // 2; frames shorter than `size` are filled up with zeros.

    Raises `ValueError` for frames longer than `size`.
    """
    size = frames.shape[-1] if size is None else size
    if frames.shape[-1] > size:
        raise ValueError(f"`size` must be at least a frame's {frames.shape[-1]} samples, got {size}")
    # Transforms know no bfloat16: autocast would cast for the pass that it is on for, and not for the backward pass.
    power = _Power.apply(frames.float() if frames.dtype is torch.bfloat16 else frames, size)
    assert isinstance(power, Tensor)
    return power


def framed(waveform: Float[Tensor, "batch time"], window: int, hop: int) -> Float[Tensor, "batch frame window"]:
    """Windows of so many samples that begin `hop` apart; what does not fill one is left out.

    As `unfold`, whose gradient takes three times as long as this one's where windows are made of whole hops.
    """
    count, hops = 1 + (waveform.shape[1] - window) // hop, window // hop
    if window % hop:
        return waveform.unfold(1, window, hop)
    pieces = waveform[:, : (count + hops - 1) * hop].reshape(len(waveform), -1, hop)
    return torch.cat([pieces[:, first : first + count] for first in range(hops)], dim=2)


class LogMel(nn.Module):
    """Log-mel spectrogram of a batch of waveforms, [batch, time] -> [batch, 1, frame, mel].

    Power spectrum of Hann windows (`window` and `hop` in samples, no padding at the ends), mel triangles from `low` to
    `high` Hz, then `(log(power + floor) - shift) / scale`. The floor is added, not clipped to, so that silence has a
    gradient; with samples in [-1, 1] and the default floor it lies about 70 dB below a full-scale tone of one bin.
    """

    def __init__(
        self,
        *,
        window: int = 512,
        hop: int = 256,
        mels: int = 64,
        sample_rate: int = SAMPLE_RATE,
        low: float = 50.0,
        high: float = 8000.0,
        floor: float = 1e-3,
        shift: float = 0.0,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        if window % 2 or not 0 < hop <= window:
            raise ValueError(f"`window` must be even and `hop` lie in 1..window, got window={window} and hop={hop}")
        if not (floor > 0 and math.isfinite(floor) and scale != 0):
            raise ValueError(f"`floor` must be positive and `scale` not zero, got floor={floor} and scale={scale}")
        self.window, self.hop, self.floor, self.shift, self.scale = window, hop, floor, shift, scale
        self.hann: Tensor
        self.filters: Tensor
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", mel_filters(window // 2 + 1, mels, sample_rate, low, high), persistent=False)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch 1 frame mel"]:
        if waveform.shape[-1] < self.window:
            raise ValueError(f"a waveform needs at least {self.window} samples for one frame, got {waveform.shape[-1]}")
        power = power_spectrum(framed(waveform, self.window, self.hop) * self.hann)
        return ((torch.log(power @ self.filters + self.floor) - self.shift) / self.scale)[:, None]
