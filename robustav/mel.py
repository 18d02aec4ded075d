"""What published log-mel front ends share: their triangles, a logarithm that floors values but not gradients, chunks."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor

from robustav.audio import SAMPLE_RATE, hertz_to_mel

EPSILON = 2.0**-23  # float32's, 1.19e-7: where Kaldi and MSM-MAE floor power
END = 1e-7  # amplitude, -140 dBFS: below every floor of a front end
CHUNK = 2**19  # samples under analysis at once on a CPU: what its cache holds

SLANEY_BEND = 1000.0  # Hz: the scale is linear below and logarithmic above
SLANEY_MEL = 200 / 3  # Hz a mel below the bend
SLANEY_STEP = math.log(6.4) / 27  # of the logarithm of the frequency, a mel above the bend


def triangles(positions: Float[Tensor, " bin"], edges: Float[Tensor, " edge"]) -> Float[Tensor, "bin mel"]:
    """Triangles of peak 1, each over three neighbouring edges, at some positions on the edges' scale."""
    at = positions[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def frequencies(fft: int) -> Float[Tensor, " bin"]:
    """Of the bins of a real FFT over `fft` samples, in Hz."""
    return torch.arange(fft // 2 + 1, dtype=torch.float64) * SAMPLE_RATE / fft


def kaldi_filters(fft: int, mels: int, low: float, high: float) -> Float[Tensor, "bin mel"]:
    """Kaldi's triangles: straight flanks over the mel scale, not over frequency; nothing of the highest bin.

    In float32, as the models were trained: next to an edge, rounding is a percent of a weight. The logarithm alone is
    taken in float64 and then rounded, since the last bit of torch's float32 one depends on the processor.
    """
    low_mel, high_mel = (float(hertz_to_mel(hertz)) for hertz in (low, high))
    edges = low_mel + torch.arange(mels + 2, dtype=torch.float32) * ((high_mel - low_mel) / (mels + 1))
    positions = 1127.0 * (1 + frequencies(fft)[:-1].float() / 700).double().log().float()
    return F.pad(triangles(positions, edges), (0, 0, 0, 1))


def slaney_filters(fft: int, mels: int, low: float, high: float) -> Float[Tensor, "bin mel"]:
    """Triangles over frequency at equal steps of Slaney's mel scale, each of area 1 Hz: librosa's default."""
    low_mel, high_mel = hertz_to_slaney(low), hertz_to_slaney(high)
    place = torch.get_default_device()  # numbers are made on the CPU, whatever the model is built on
    with torch.device("cpu"):
        edges = slaney_to_hertz(torch.linspace(low_mel, high_mel, mels + 2, dtype=torch.float64))
        filters = (triangles(frequencies(fft), edges) * 2 / (edges[2:] - edges[:-2])).float()
    return filters.to(place)


def hertz_to_slaney(hertz: float) -> float:
    """Slaney's mel scale: 1000 Hz is 15 mel, and another 27 mel are a factor of 6.4."""
    if hertz <= SLANEY_BEND:
        return hertz / SLANEY_MEL
    return SLANEY_BEND / SLANEY_MEL + math.log(hertz / SLANEY_BEND) / SLANEY_STEP


def slaney_to_hertz(mel: Tensor) -> Tensor:
    """Inverse of `hertz_to_slaney`."""
    above = (mel - SLANEY_BEND / SLANEY_MEL).clamp(min=0)
    return torch.where(above > 0, SLANEY_BEND * torch.exp(SLANEY_STEP * above), SLANEY_MEL * mel)


def floored_log(power: Tensor, floor: Tensor, *, alive: bool) -> Tensor:
    """The natural logarithm of `max(power, floor)`; where `alive`, with the gradient of `log(power + floor)`.

    A log-mel that is cut off at a floor has no gradient in the quiet bins, where an attack has most to gain: it would
    look robust there and is not. The values are the same either way; the gradients differ by the share
    `floor / (power + floor)`, which is nothing in loud bins.
    """
    return _AliveLog.apply(power, floor) if alive else torch.maximum(power, floor).log()


class _AliveLog(torch.autograd.Function):
    """Forwards the logarithm of the larger, backwards that of the sum."""

    @staticmethod
    def forward(ctx: Any, power: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(power, floor)
        return torch.maximum(power, floor).log_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        power, floor = ctx.saved_tensors
        shared = gradients[0] / (power + floor)
        return shared, shared.sum_to_size(floor.shape) if ctx.needs_input_grad[1] else None


def in_chunks(
    analyse: Callable[[Tensor], Tensor], waveform: Float[Tensor, "batch time"], size: int
) -> Float[Tensor, "batch frame bin"]:
    """`analyse` some clips at a time on a CPU, so that what `size` numbers a clip become stays in its cache."""
    if waveform.device.type != "cpu":
        return analyse(waveform)
    return torch.cat([analyse(clips) for clips in waveform.split(max(1, CHUNK // size))])


def fitted(spectrogram: Float[Tensor, "batch frame bin"], frames: int | None) -> Float[Tensor, "batch frames bin"]:
    """Cut to `frames`, or filled up with zeros; all as they are where `frames` is None."""
    return spectrogram if frames is None else F.pad(spectrogram, (0, 0, 0, frames - spectrogram.shape[1]))


def with_end(recording: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
    """A recording that does not end in digital silence, which `signal_ends` would take for padding: its last sample is `END`.

    Otherwise the silence would be filled up instead of analysed, and the least sound there would change the score.
    """
    if len(recording) and recording[-1] == 0:
        recording = recording.clone()
        recording[-1] = END
    return recording


def signal_ends(waveform: Float[Tensor, "batch time"], *, padded: bool) -> Int[Tensor, " batch"]:
    """Where each clip's padding begins: after its last sample that is not zero; a silent clip, and any not `padded`, has none."""
    length = waveform.shape[1]
    sounding = (waveform != 0) & padded
    ends = length - sounding.flip(1).int().argmax(1)
    return torch.where(sounding.any(1), ends, length)


def centred(waveform: Float[Tensor, "batch time"], ends: Int[Tensor, " batch"]) -> Float[Tensor, "batch time"]:
    """Less the mean of what comes before the padding, which stays zero."""
    signal = torch.arange(waveform.shape[1], device=waveform.device) < ends[:, None]
    mean = torch.where(signal, waveform, 0.0).sum(1, keepdim=True) / ends[:, None]  # padding has no gradient, exactly
    return torch.where(signal, waveform - mean, 0.0)


def filled_up(
    spectrogram: Float[Tensor, "batch frame bin"], whole: Int[Tensor, " batch"]
) -> Float[Tensor, "batch frame bin"]:
    """With zeros in place of what comes after each clip's `whole` frames."""
    places = torch.arange(spectrogram.shape[1], device=spectrogram.device)
    return torch.where((places < whole[:, None])[:, :, None], spectrogram, 0.0)


def check_normalisation(frames: int | None, mean: float, divisor: float) -> None:
    """Refuse what cannot normalise a spectrogram."""
    if frames is not None and frames < 1:
        raise ValueError(f"`frames` must be at least 1, or None for as many as the waveform has, got {frames}")
    if not (math.isfinite(mean) and math.isfinite(divisor) and divisor > 0):
        raise ValueError(f"`mean` must be finite and `divisor` positive and finite, got {mean} and {divisor}")


def check_length(waveform: Tensor, needed: int) -> None:
    """Refuse waveforms too short for one frame."""
    if waveform.shape[-1] < needed:
        raise ValueError(f"a waveform needs at least {needed} samples, got {waveform.shape[-1]}: pad it with zeros")
