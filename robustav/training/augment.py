"""Changes that leave a clip's labels true: louder, shifted, partly silenced or flipped, each clip differently.

All of them are made on raw inputs, before a method and its adversary see them, so that they do not depend on a model's
front end. SpecAugment's masks, too: what a mask on a spectrogram hides is taken out of the waveform.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.audio import hertz_to_mel, mel_to_hertz
from robustav.classifier import FEATURE, Inputs, InputSpec
from robustav.training.settings import parse_call, read_settings

Waveforms = Float[Tensor, "batch time"]
Pictures = Float[Tensor, "batch frame channel height width"]


def louder(waveforms: Waveforms, decibels: float, generator: torch.Generator) -> Waveforms:
    """Each louder or softer by up to `decibels`, uniform in dB; not yet cut to the valid range."""
    gain = (2 * torch.rand(len(waveforms), 1, generator=generator) - 1) * decibels
    return waveforms * (10 ** (gain / 20)).to(waveforms)


def shifted_in_time(waveforms: Waveforms, share: float, generator: torch.Generator) -> Waveforms:
    """Each rolled round by up to `share` of its length, either way."""
    time = waveforms.shape[1]
    shift = (2 * torch.rand(len(waveforms), 1, generator=generator) - 1) * (share * time / 2)
    steps = shift.round().long().flatten().tolist()
    return torch.stack([clip.roll(step) for clip, step in zip(waveforms, steps, strict=True)])


def silenced(waveforms: Waveforms, share: float, generator: torch.Generator) -> Waveforms:
    """Nothing to be heard for a stretch of up to `share` of each [Park et al., 2019, arXiv:1904.08779], masks in time."""
    time = waveforms.shape[1]
    start, end = (edge * time for edge in _stretch(len(waveforms), share, generator))
    position = torch.arange(time) + 0.5
    return waveforms.masked_fill(((position >= start) & (position < end)).to(waveforms.device), 0.0)


def band_stopped(waveforms: Waveforms, share: float, sample_rate: int, generator: torch.Generator) -> Waveforms:
    """Without a band of up to `share` of the mel scale [Park et al., 2019, arXiv:1904.08779], masks in frequency.

    Peaks may grow: not yet cut to the valid range.
    """
    top = float(hertz_to_mel(sample_rate / 2))
    low, high = (mel_to_hertz(edge * top) for edge in _stretch(len(waveforms), share, generator))
    spectrum = torch.fft.rfft(waveforms)
    frequency = torch.linspace(0, sample_rate / 2, spectrum.shape[1])
    stopped = ((frequency >= low) & (frequency < high)).to(waveforms.device)
    return torch.fft.irfft(spectrum.masked_fill(stopped, 0.0), n=waveforms.shape[1])


def shifted_in_space(pictures: Pictures, pixels: int, generator: torch.Generator) -> Pictures:
    """Each rolled round by up to `pixels`, all its frames alike."""
    batch, _, _, height, width = pictures.shape
    down, right = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator)
    rows = ((torch.arange(height) - down) % height).to(pictures.device)[:, None, None, :, None]
    columns = ((torch.arange(width) - right) % width).to(pictures.device)[:, None, None, None, :]
    return pictures.gather(3, rows.expand(pictures.shape)).gather(4, columns.expand(pictures.shape))


def flipped(pictures: Pictures, generator: torch.Generator) -> Pictures:
    """Half of them left to right, all frames alike."""
    chosen = (torch.rand(len(pictures), generator=generator) < 0.5).to(pictures.device)
    return torch.where(chosen[:, None, None, None, None], pictures.flip(-1), pictures)


def _stretch(count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start and end of a stretch of [0, 1], uniform in length up to `share` and then in place; [count, 1] each."""
    length, place = torch.rand(2, count, 1, generator=generator)
    length = length * share
    start = place * (1 - length)
    return start, start + length


@dataclass(frozen=True)
class Augmentation:
    """How much is done to each clip; 0 turns a part off. What a model reads as features is left alone."""

    gain_db: float = 6.0
    time_shift: float = 1.0  # of the clip's length, circular: 1 is anywhere
    pixels: int = 2
    flip: bool = False
    time_mask: float = 0.0  # of the clip's length
    band_mask: float = 0.0  # of the mel scale up to half the sample rate

    def __post_init__(self) -> None:
        for name in ("gain_db", "pixels"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name in ("time_shift", "time_mask", "band_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in [0, 1], got {getattr(self, name)}")

    def __call__(self, inputs: Inputs, specs: Mapping[str, InputSpec], generator: torch.Generator) -> Inputs:
        """The clips changed, in their valid ranges; draws do not depend on the order of the dict."""
        changed = {m: self._changed(inputs[m], specs[m], generator) for m in sorted(inputs)}
        return {m: changed[m] for m in inputs}

    def _changed(self, x: Tensor, spec: InputSpec, generator: torch.Generator) -> Tensor:
        if spec.unit == FEATURE:
            return x
        if len(spec.shape) == 1:
            x = shifted_in_time(x, self.time_shift, generator) if self.time_shift else x
            x = louder(x, self.gain_db, generator) if self.gain_db else x
            x = band_stopped(x, self.band_mask, spec.sample_rate or 1, generator) if self.band_mask else x
            x = silenced(x, self.time_mask, generator) if self.time_mask else x
            return x.clamp(spec.low, spec.high)
        x = shifted_in_space(x, self.pixels, generator) if self.pixels else x
        return flipped(x, generator) if self.flip else x


LIGHT = Augmentation()
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(**{field.name: type(field.default)() for field in fields(Augmentation)}),  # type: ignore[arg-type, misc]
    "light": LIGHT,
    "full": replace(LIGHT, flip=True, time_mask=0.2, band_mask=0.2),
}


def parse_augmentation(text: str) -> Augmentation:
    """A key of `AUGMENTATIONS`, in brackets what differs: `light`, `full(flip=false)`."""
    name, given = parse_call(text, "augment")
    if name not in AUGMENTATIONS:
        raise ValueError(f"`augment` must be one of {', '.join(AUGMENTATIONS)}, got {name!r}")
    return replace(AUGMENTATIONS[name], **read_settings(Augmentation, given, name))
