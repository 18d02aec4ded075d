"""Kaldi's log-mel filter bank on batches of waveforms: the front end of AST, Audio-MAE and CAV-MAE."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.audio import SAMPLE_RATE, power_spectrum
from robustav.mel import (
    EPSILON,
    centred,
    check_length,
    check_normalisation,
    filled_up,
    fitted,
    floored_log,
    in_chunks,
    kaldi_filters,
    signal_ends,
)

WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FFT = 512  # samples
LOW, HIGH = 20.0, 8000.0  # Hz
PRE_EMPHASIS = 0.97


class Recipe(NamedTuple):
    """How a published model has its filter banks: cut or zero-padded to `frames`, then `(x - mean) / divisor`."""

    frames: int
    mean: float
    divisor: float


RECIPES = {
    "ast": Recipe(1024, -4.2677393, 2 * 4.5689974),  # AudioSet
    "ast-esc50": Recipe(512, -6.6268077, 2 * 5.358466),
    "ast-speech-commands": Recipe(128, -6.845978, 2 * 5.5654526),
    "audio-mae": Recipe(1024, -4.2677393, 2 * 4.5689974),
    "cav-mae": Recipe(1024, -5.081, 4.4849),  # AudioSet and VGGSound
    "tagging-mix-0.5": Recipe(1024, -3.3458831, 2 * 4.1563106),  # trained on mixtures, every second clip one
    "tagging-mix-0.3": Recipe(1024, -3.6788461, 2 * 4.3739743),
}


def frames_for(seconds: float) -> int:
    """The least multiple of 128 frames that holds a clip at 16 kHz: 1024 of 10 s, 512 of 5 s, 128 of 1 s."""
    return 128 * -(-round(seconds * SAMPLE_RATE) // (128 * HOP))


class Fbank(nn.Module):
    """Kaldi's log-mel filter bank of waveforms at 16 kHz, [batch, time] -> [batch, frame, bin].

    Amplitudes in [-1, 1], not scaled to 16 bits. The clip's mean is removed; then frames of 25 ms every 10 ms without
    padding, each less its mean, pre-emphasised, under a symmetric Hann window (Kaldi's "hanning"); triangles of the
    power spectrum from 20 Hz to 8 kHz, natural logarithm, no dither, no energy. It is torchaudio's
    `compliance.kaldi.fbank` with `htk_compat` as the models' authors call it, with the same rounding: deep nulls of a
    spectrum are rounding, and each reordering shows there.

    Where `frames` is given, zeros at a clip's end are taken for padding: as the models' authors do, the mean is that of
    what comes before them, and only frames within it are analysed; the rest are 0 before normalisation.

    Power is floored at 1.19e-7 as there. `alive` lets gradients through that floor (see `floored_log`); without it they
    are the official ones, zero in quiet bins. Digital silence has the gradient zero either way: power is flat there.
    """

    def __init__(
        self,
        *,
        bins: int = 128,
        frames: int | None = None,
        mean: float = 0.0,
        divisor: float = 1.0,
        alive: bool = True,
    ) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"`bins` must be at least 1, got {bins}")
        check_normalisation(frames, mean, divisor)
        self.frames, self.mean, self.divisor, self.alive = frames, mean, divisor, alive
        self.hann: Tensor
        self.filters: Tensor
        self.floor: Tensor
        self.register_buffer("hann", torch.hann_window(WINDOW, periodic=False)[1:], persistent=False)
        self.register_buffer("filters", kaldi_filters(FFT, bins, LOW, HIGH), persistent=False)
        self.register_buffer("floor", torch.tensor(EPSILON), persistent=False)

    @classmethod
    def published(cls, name: str) -> "Fbank":
        """The filter bank of a published model, by its name in `RECIPES`."""
        if name not in RECIPES:
            raise ValueError(f"`name` must be one of {sorted(RECIPES)}, got {name!r}")
        return cls(**RECIPES[name]._asdict())

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """The filter bank, cut or padded to `frames` and then normalised, as the models were trained."""
        check_length(waveform, WINDOW)
        return in_chunks(self.normalised, waveform, FFT * (1 + (waveform.shape[1] - WINDOW) // HOP))

    def normalised(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Of some clips at once."""
        ends = signal_ends(waveform, padded=self.frames is not None)
        whole = 1 + (ends - WINDOW).clamp(min=0) // HOP
        spectrogram = fitted(filled_up(self.log_mel(centred(waveform, ends)), whole), self.frames)
        spectrogram -= self.mean
        spectrogram /= self.divisor
        return spectrogram

    def log_mel(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """The filter bank as it is, of some clips at once, whose mean is 0."""
        frames = waveform.unfold(1, WINDOW, HOP)
        frames = frames - frames.mean(-1, keepdim=True)
        emphasised = frames[..., :-1] * -PRE_EMPHASIS  # of all samples but a frame's first, which the window zeroes
        emphasised += frames[..., 1:]
        emphasised *= self.hann
        power = power_spectrum(F.pad(emphasised, (1, 0)), FFT)
        return floored_log(power @ self.filters, self.floor, alive=self.alive)
