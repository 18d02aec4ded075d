"""Log-mel front ends of published models that centre their frames: MSM-MAE's, and the 64 bands of the TAL family."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.mel import EPSILON, check_length, check_normalisation, fitted, floored_log, in_chunks, slaney_filters

DECIBEL = 10 / math.log(10)  # decibels of power a unit of the natural logarithm
FLOOR = 1e-10  # where decibels are cut off
RANGE = 1e-8  # of the clip's loudest band, 80 dB below it


class CentredMel(nn.Module):
    """Slaney mel bands of periodic Hann windows centred on every `hop`-th sample, [batch, time] -> [batch, frame, bin].

    Frames at the ends are filled up with zeros or, where `mirrored`, by reflection. The bands are of the power spectrum
    over `fft` points or, where `magnitude`, of its root.
    """

    def __init__(
        self,
        *,
        bins: int,
        window: int,
        hop: int,
        fft: int,
        low: float = 0.0,
        high: float = 8000.0,
        magnitude: bool = False,
        mirrored: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.hop, self.fft, self.magnitude, self.mirrored = window, hop, fft, magnitude, mirrored
        self.hann: Tensor
        self.filters: Tensor
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", slaney_filters(fft, bins, low, high), persistent=False)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """`1 + time // hop` frames."""
        check_length(waveform, self.window // 2 + 1 if self.mirrored else 1)
        return in_chunks(self.bands, waveform, self.fft * (1 + waveform.shape[1] // self.hop))

    def bands(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Of some clips at once."""
        ends = (self.window // 2, self.window // 2)
        padded = F.pad(waveform, ends, mode="reflect" if self.mirrored else "constant")
        spectrum = torch.fft.rfft(padded.unfold(1, self.window, self.hop) * self.hann, n=self.fft)
        if self.magnitude:
            return spectrum.abs() @ self.filters  # at 0, `abs` has the gradient 0, where a root has none
        return (spectrum.real.square() + spectrum.imag.square()) @ self.filters


def long_mel(*, magnitude: bool) -> CentredMel:
    """The 64 bands of the TAL family: windows of 64 ms every 25 ms, at 16 kHz."""
    return CentredMel(bins=64, window=1024, hop=400, fft=4096, magnitude=magnitude)


class MsmMaeLogMel(nn.Module):
    """MSM-MAE's log-mel [Niizumi et al., 2022, arXiv:2204.12260], at 16 kHz; the model has the axes the other way round.

    80 bands from 50 Hz to 8 kHz of 25 ms every 10 ms, `log(power + 1.19e-7)`, then `(x - mean) / std` with the
    statistics of the data. A batch's own are not offered: a clip's scores must not depend on its batch mates.
    """

    def __init__(self, *, frames: int | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        check_normalisation(frames, mean, std)
        self.frames, self.mean, self.std = frames, mean, std
        self.mel = CentredMel(bins=80, window=400, hop=160, fft=400, low=50.0, mirrored=True)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Normalised, then cut or filled up with zeros, which then are the mean."""
        return fitted(((self.mel(waveform) + EPSILON).log() - self.mean) / self.std, self.frames)


class TalLogMel(nn.Module):
    """The log-mel of TALNet, TAL-trans and MMT [Li et al., 2022, arXiv:2203.12122]: 64 bands of MAGNITUDE, in decibels.

    Decibels are `10 log10` of the magnitude (so half of what they would be), floored at 1e-10 and at 80 below the
    clip's loudest band; the first 400 frames, then `(x - mean) / std`, which the checkpoints have for each band: pass
    their two vectors. Every value at the lower floor follows the loudest band; `alive` gives it, beside that, a gradient
    of its own (see `floored_log`).
    """

    def __init__(
        self,
        *,
        frames: int | None = 400,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        alive: bool = True,
    ) -> None:
        super().__init__()
        means, stds = one_a_band("mean", mean), one_a_band("std", std)
        for band_mean, band_std in zip(means.tolist(), stds.tolist(), strict=True):
            check_normalisation(frames, band_mean, band_std)
        self.frames, self.alive, self.mel = frames, alive, long_mel(magnitude=True)
        self.means: Tensor
        self.stds: Tensor
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("stds", stds, persistent=False)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """At most `frames` frames; a shorter clip is not padded."""
        mel = self.mel(waveform)
        floor = (RANGE * mel.amax((1, 2), keepdim=True)).clamp(min=FLOOR)
        decibels = DECIBEL * floored_log(mel, floor, alive=self.alive)
        return (decibels[:, : self.frames] - self.means) / self.stds


def one_a_band(name: str, value: Tensor | float) -> Float[Tensor, "64"]:
    """A vector of the 64 bands from a vector or from what they share."""
    numbers = torch.as_tensor(value, dtype=torch.float32)
    if numbers.shape not in ((), (64,)):
        raise ValueError(
            f"`{name}` must be a number or 64 of them, one for each band, got {list(numbers.shape)} numbers"
        )
    return numbers.expand(64).clone()


class TaggingRecipe(NamedTuple):
    """Statistics that a recipe of the tagging study was trained with, on the doubled scale: mean and 2 x deviation."""

    mean: float
    divisor: float


TAGGING_RECIPES = {
    "tal-trans": TaggingRecipe(-29.686901, 2 * 40.898224),  # masks 12 / 60, 30% mixtures
    "tal": TaggingRecipe(-29.072655, 2 * 40.71728),  # masks 12 / 75, 30% mixtures; the ResNet's too
    "ast": TaggingRecipe(-27.248297, 2 * 37.681698),  # masks 12 / 75, 50% mixtures
    "plain": TaggingRecipe(-38.193954, 2 * 45.802143),  # no augmentation
}


class TaggingLogMel(nn.Module):
    """The 64 bands of the audio tagging study's models [Li et al., 2022, arXiv:2203.13448]: `20 log10` of POWER.

    Twice the decibels, which is what the models and their statistics were made with. The clip's mean is removed first;
    the floor is 1e-10 (-200), without a range; `alive` as in `Fbank`. Statistics measured on augmented training data
    (`TAGGING_RECIPES`) go with the model that was trained so.
    """

    def __init__(
        self, *, frames: int | None = 400, mean: float = 0.0, divisor: float = 1.0, alive: bool = True
    ) -> None:
        super().__init__()
        check_normalisation(frames, mean, divisor)
        self.frames, self.mean, self.divisor, self.alive = frames, mean, divisor, alive
        self.mel = long_mel(magnitude=False)
        self.floor: Tensor
        self.register_buffer("floor", torch.tensor(FLOOR), persistent=False)

    @classmethod
    def published(cls, name: str) -> "TaggingLogMel":
        """With the statistics of a recipe, by its name in `TAGGING_RECIPES`."""
        if name not in TAGGING_RECIPES:
            raise ValueError(f"`name` must be one of {sorted(TAGGING_RECIPES)}, got {name!r}")
        return cls(**TAGGING_RECIPES[name]._asdict())

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Cut or filled up with zeros to `frames`, and then normalised."""
        mel = self.mel(waveform - waveform.mean(1, keepdim=True))
        doubled = 2 * DECIBEL * floored_log(mel, self.floor, alive=self.alive)
        return (fitted(doubled, self.frames) - self.mean) / self.divisor
