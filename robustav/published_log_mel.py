"""Log-mel front ends of published models that centre their frames: MSM-MAE's, and the 64 bands of the TAL family."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.audio import power_spectrum
from robustav.mel import (
    EPSILON,
    centred,
    check_length,
    check_normalisation,
    filled_up,
    fitted,
    floored_log,
    in_chunks,
    signal_ends,
    slaney_filters,
)

DECIBEL = 10 / math.log(10)  # decibels of power a unit of the natural logarithm
FLOOR = 1e-10  # where decibels are cut off
RANGE = 1e-8  # of the clip's loudest band, 80 dB below it

# Of each band, over AudioSet, as AudioSetDoneRight's normalizer.pkl has them, to six digits.
# fmt: off
TAL_MEAN = (
    -8.97656, -6.86349, -6.22534, -6.05586, -6.02351, -6.32873, -6.61698, -6.86473, -7.09301, -7.39872, -7.65067,
    -7.95758, -8.2449, -8.51084, -8.82151, -9.11344, -9.31099, -9.7399, -9.83429, -10.2546, -10.3235, -10.4351,
    -10.7148, -10.9402, -10.9387, -11.3045, -11.2553, -11.3882, -11.6185, -11.6943, -11.7522, -12.0244, -12.0668,
    -12.2816, -12.5694, -12.6467, -12.9045, -13.077, -13.1332, -13.2975, -13.575, -13.7102, -14.1114, -14.3209,
    -14.4982, -14.6791, -14.9446, -15.1556, -15.5958, -15.9605, -16.439, -16.9976, -17.4779, -17.8417, -18.324,
    -18.752, -19.1837, -19.639, -20.1167, -20.468, -20.8057, -21.1682, -21.9937, -26.0463,
)
TAL_STD = (
    13.0214, 12.8803, 12.5071, 12.3389, 12.2301, 12.1323, 12.0788, 12.0351, 12.0183, 11.9885, 11.991,
    11.958, 11.9734, 11.9778, 11.9442, 11.901, 11.8954, 11.789, 11.8236, 11.7374, 11.7585, 11.7401,
    11.7069, 11.6742, 11.7165, 11.6345, 11.6446, 11.5986, 11.5755, 11.5718, 11.5865, 11.5412, 11.5363,
    11.4992, 11.4706, 11.4805, 11.4623, 11.4542, 11.4583, 11.4556, 11.4513, 11.4641, 11.4179, 11.3854,
    11.364, 11.3576, 11.3529, 11.3472, 11.3258, 11.3162, 11.3349, 11.4866, 11.6222, 11.6334, 11.6827,
    11.7656, 11.8354, 11.889, 12.0496, 12.099, 12.1027, 12.0913, 12.0598, 11.3156,
)
# fmt: on


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
        frames = padded.unfold(1, self.window, self.hop) * self.hann
        if self.magnitude:
            return (
                torch.fft.rfft(frames, n=self.fft).abs() @ self.filters
            )  # at 0, `abs` has the gradient 0; a root, none
        return power_spectrum(frames, self.fft) @ self.filters


def long_mel(*, magnitude: bool) -> CentredMel:
    """The 64 bands of the TAL family: windows of 64 ms every 25 ms, at 16 kHz."""
    return CentredMel(bins=64, window=1024, hop=400, fft=4096, magnitude=magnitude)


class MsmMaeLogMel(nn.Module):
    """MSM-MAE's log-mel [Niizumi et al., 2022, arXiv:2204.12260], at 16 kHz; the model has the axes the other way round.

    80 bands from 50 Hz to 8 kHz of 25 ms every 10 ms, `log(power + 1.19e-7)`, then `(x - mean) / std` with the
    statistics of the data. A batch's own are not offered: a clip's scores must not depend on its batch mates. Where
    `padded`, zeros at a clip's end are padding (see `with_end`), and its frames the mean.
    """

    def __init__(self, *, frames: int | None = None, mean: float = 0.0, std: float = 1.0, padded: bool = False) -> None:
        super().__init__()
        check_normalisation(frames, mean, std)
        self.frames, self.mean, self.std, self.padded = frames, mean, std, padded
        self.mel = CentredMel(bins=80, window=400, hop=160, fft=400, low=50.0, mirrored=True)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """Normalised, then cut or filled up with zeros, which then are the mean."""
        normalised = ((self.mel(waveform) + EPSILON).log() - self.mean) / self.std
        whole = 1 + signal_ends(waveform, padded=self.padded) // self.mel.hop
        return fitted(filled_up(normalised, whole), self.frames)


class TalLogMel(nn.Module):
    """The log-mel of TALNet, TAL-trans and MMT [Li et al., 2022, arXiv:2203.12122]: 64 bands of MAGNITUDE, in decibels.

    Decibels are `10 log10` of the magnitude (so half of what they would be), floored at 1e-10 and at 80 below the
    clip's loudest band; the first 400 frames, then `(x - mean) / std`, which the checkpoints have for each band (see
    `published`). Every value at the lower floor follows the loudest band; `alive` gives it, beside that, a gradient
    of its own (see `floored_log`).
    """

    def __init__(
        self,
        *,
        frames: int | None = 400,
        mean: Tensor | Sequence[float] | float = 0.0,
        std: Tensor | Sequence[float] | float = 1.0,
        alive: bool = True,
    ) -> None:
        super().__init__()
        means, stds = one_a_band("mean", mean), one_a_band("std", std)
        for band_mean, band_std in zip(means, stds, strict=True):
            check_normalisation(frames, band_mean, band_std)
        self.frames, self.alive, self.mel = frames, alive, long_mel(magnitude=True)
        self.means: Tensor
        self.stds: Tensor
        self.register_buffer("means", torch.tensor(means), persistent=False)
        self.register_buffer("stds", torch.tensor(stds), persistent=False)

    @classmethod
    def published(cls, *, frames: int | None = 400) -> "TalLogMel":
        """With the statistics of AudioSet that the published checkpoints were trained with."""
        return cls(frames=frames, mean=TAL_MEAN, std=TAL_STD)

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frame bin"]:
        """At most `frames` frames; a shorter clip is not padded."""
        mel = self.mel(waveform)
        floor = (RANGE * mel.amax((1, 2), keepdim=True)).clamp(min=FLOOR)
        decibels = DECIBEL * floored_log(mel, floor, alive=self.alive)
        return (decibels[:, : self.frames] - self.means) / self.stds


def one_a_band(name: str, value: Tensor | Sequence[float] | float) -> list[float]:
    """Numbers of the 64 bands from as many or from what they share."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")  # to be read even where others are on "meta"
    if numbers.shape not in ((), (64,)):
        raise ValueError(
            f"`{name}` must be a number or 64 of them, one for each band, got {list(numbers.shape)} numbers"
        )
    return numbers.expand(64).tolist()


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
    (`TAGGING_RECIPES`) go with the model that was trained so. Zeros at a clip's end are padding, as in `Fbank`.
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
        ends = signal_ends(waveform, padded=self.frames is not None)
        mel = self.mel(centred(waveform, ends))
        doubled = 2 * DECIBEL * floored_log(mel, self.floor, alive=self.alive)
        whole = 1 + ends // self.mel.hop
        return (fitted(filled_up(doubled, whole), self.frames) - self.mean) / self.divisor
