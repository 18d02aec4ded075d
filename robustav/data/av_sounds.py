"""The sounds of av-events, and the arithmetic that gives equal bytes on every machine.

NumPy's sine, exponential and normal sampling differ in the last bit from one processor to the next. Here a scene is
made of integers only, and of tables whose entries lie far from a rounding tie; randomness is Philox's raw output, which
no release of NumPy may change.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

SAMPLE_RATE = 16_000  # Hz
UNIT = 1 << 14  # amplitude 1 inside the synthesiser
LOWEST = 55  # Hz: pitch 0
OCTAVE = 120  # pitch steps
FADE = 128  # samples: 8 ms, so that no sound starts or ends in a click


def fixed(function: Callable[[int], float], count: int, scale: int) -> Integers:
    """`scale * function(k)` for k below `count`, rounded; no entry so near a tie that a last bit could turn it."""
    values = [scale * function(k) for k in range(count)]
    assert all(abs(abs(value - math.floor(value)) - 0.5) > 1e-7 for value in values)
    return np.array([math.floor(value + 0.5) for value in values], dtype=np.int64)


_SINE = fixed(lambda k: math.sin(2 * math.pi * k / 4096), 4096, UNIT)
_HALVINGS = fixed(lambda k: 2 ** (-k / 256), 14 * 256, UNIT)  # 256 entries to a halving; nothing is left after 14
_RATIOS = fixed(lambda k: 2 ** (k / OCTAVE), 7 * OCTAVE, 1 << 20)
_DECIBELS = fixed(lambda k: 10 ** (-k / 40), 160, 1 << 15)  # half decibels below full scale


class Draws:
    """The random numbers of one key; equal keys draw equal numbers on every machine."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def below(self, end: int) -> int:
        """A whole number from 0 to `end` - 1."""
        return (int(self._philox.random_raw()) >> 32) * end >> 32

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both possible."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with `probability`, to a millionth."""
        return self.below(1 << 20) < round(probability * (1 << 20))

    def noise(self, count: int) -> Integers:
        """White, nearly normal noise of mean 0 and standard deviation 209: sums of eight bytes."""
        words = self._philox.random_raw(count)
        lanes = np.uint64(0x00FF00FF00FF00FF)
        pairs = (words & lanes) + ((words >> np.uint64(8)) & lanes)
        return ((pairs * np.uint64(0x0001000100010001)) >> np.uint64(48)).astype(np.int64) - 1020


def ticks(count: int) -> Integers:
    """0 to `count` - 1, of 64 bits on every platform."""
    return np.arange(count, dtype=np.int64)


def sine(phase: Integers) -> Integers:
    """`UNIT` times the sine of a phase in 2**-32 turns; any integer will do."""
    return _SINE[(phase >> 20) & 4095]


def advance(pitch: int) -> int:
    """Phase steps a sample of `pitch` (in `OCTAVE`ths of an octave above `LOWEST`, held within seven octaves)."""
    ratio = int(_RATIOS[min(max(pitch, 0), len(_RATIOS) - 1)])
    return (ratio * LOWEST * ((1 << 32) // SAMPLE_RATE)) >> 20


def to_level(sound: Integers, half_decibels: int) -> Integers:
    """`sound` scaled to a root mean square of `half_decibels` / 2 below full scale, in 16-bit steps."""
    power = int((sound * sound).sum()) // max(len(sound), 1)
    return (sound * ((int(_DECIBELS[half_decibels]) << 16) // max(math.isqrt(power), 1))) >> 16


def _decay(count: int, half_life: int) -> Integers:
    return _HALVINGS[np.minimum((ticks(count) * ((256 << 16) // half_life)) >> 16, len(_HALVINGS) - 1)]


def _partial(step: int, count: int) -> Integers:
    """A steady sine; silence where it would lie above half the sample rate."""
    return sine(ticks(count) * step) if step < 1 << 31 else np.zeros(count, np.int64)


def _smooth(noise: Integers, width: int) -> Integers:
    """Moving average over `width` samples: a low-pass at about `SAMPLE_RATE` / (2 `width`)."""
    total = np.cumsum(np.concatenate([np.zeros(width, np.int64), noise]))
    return (total[width:] - total[:-width]) // math.isqrt(width)


def _band(draws: Draws, count: int, step: int, width: int) -> Integers:
    """Noise in a band round `step`; the wider the average, the narrower the band."""
    return (_smooth(draws.noise(count), width) * _partial(step, count)) >> 8


def _gate(count: int, period: int, open_: int) -> Integers:
    """1 for the first `open_` samples of each `period`, else 0."""
    return (ticks(count) % period < open_).astype(np.int64)


def _struck(count: int, step: int, half_life: int, ratios: tuple[int, ...]) -> Integers:
    """Partials at `ratios` / 256 of `step`, the higher the weaker and the shorter."""
    made = np.zeros(count, np.int64)
    for n, ratio in enumerate(ratios, start=1):
        made += (_partial(ratio * step >> 8, count) * _decay(count, half_life // n) // n) >> 14
    return made


def _string(draws: Draws, count: int, step: int) -> Integers:
    return _struck(count, step, draws.between(1200, 3200), (256, 512, 769, 1028, 1290))


def _bell(draws: Draws, count: int, step: int) -> Integers:
    return _struck(count, step, draws.between(1600, 3800), (256, 512, 614, 768, 1126))


def _clap(draws: Draws, count: int, step: int) -> Integers:
    gap = draws.between(2000, 9000)
    noise = _band(draws, count, step, draws.between(4, 8))
    return (noise * _decay(gap, draws.between(400, 1400))[ticks(count) % gap]) >> 14


def _rise(draws: Draws, count: int, step: int) -> Integers:
    time = ticks(count)
    slope = step * draws.between(2, 5) // (2 * count)
    return sine(time * step + time * time * slope)


def _fall(draws: Draws, count: int, step: int) -> Integers:
    return _rise(draws, count, step)[::-1]


def _buzz(draws: Draws, count: int, step: int) -> Integers:
    saw = ((ticks(count) * step >> 17) & (2 * UNIT - 1)) - UNIT
    return (saw * (UNIT + (_partial(advance(0) // draws.between(3, 8), count) >> 1))) >> 14


def _beeps(draws: Draws, count: int, step: int) -> Integers:
    period = draws.between(1800, 4200)
    return _partial(step, count) * _gate(count, period, period // 2)


def _kick(draws: Draws, count: int, step: int) -> Integers:
    gap = draws.between(4000, 7000)
    sweep = step + ((step * _decay(gap, 500)) >> 13)
    beat = (sine(np.cumsum(sweep)) * _decay(gap, draws.between(900, 1800))) >> 14
    return beat[ticks(count) % gap]


def _hiss(draws: Draws, count: int, step: int) -> Integers:
    noise = _band(draws, count, step, draws.between(4, 7))
    return (noise * _decay(count, draws.between(900, 4000))) >> 14


def _warble(draws: Draws, count: int, step: int) -> Integers:
    swing = _partial(advance(0) // draws.between(6, 12), count)
    return sine(ticks(count) * step + (swing << draws.between(18, 20)))


@dataclass(frozen=True)
class Sound:
    """How a class sounds: synthesiser, pitches, half decibels by which it is quieter than others."""

    make: Callable[[Draws, int, int], Integers]
    low: int
    high: int
    quieter: int = 0

    def varied(self, variant: int) -> "Sound":
        """The same sound in another of seven pitch bands; variant 0 is the sound itself."""
        shift = (0, 60, -40, 100, -80, 140, 20)[variant % 7]
        return Sound(self.make, self.low + shift, self.high + shift, self.quieter)


SOUNDS: dict[str, Sound] = {
    "string": Sound(_string, 200, 380, 4),
    "bell": Sound(_bell, 200, 380, 4),
    "clap": Sound(_clap, 580, 700, 4),
    "rise": Sound(_rise, 300, 420),
    "fall": Sound(_fall, 300, 420),
    "buzz": Sound(_buzz, 30, 150),
    "beeps": Sound(_beeps, 420, 640),
    "kick": Sound(_kick, 0, 60),
    "hiss": Sound(_hiss, 620, 740, 4),
    "warble": Sound(_warble, 380, 560, 4),
}


def _hum(draws: Draws, count: int, step: int) -> Integers:
    return _partial(step, count) + (_partial(3 * step, count) >> 2)


def _clicks(draws: Draws, count: int, step: int) -> Integers:
    return draws.noise(count) * _gate(count, draws.between(700, 2600), 24)


def _rumble(draws: Draws, count: int, step: int) -> Integers:
    return _band(draws, count, step, 24)


_DISTRACTORS = (Sound(_hum, 60, 600), Sound(_clicks, 0, 0), Sound(_rumble, 120, 600))


def _place(track: Integers, draws: Draws, sound: Sound, start: int, end: int, half_decibels: int) -> None:
    count = end - start
    made = sound.make(draws, count, advance(draws.between(sound.low, sound.high)))
    edge = np.minimum(np.minimum(ticks(count), ticks(count)[::-1]), FADE)
    track[start:end] += to_level((made * edge) // FADE, half_decibels)


def soundtrack(draws: Draws, events: list[tuple[Sound, int, int]], count: int) -> NDArray[np.int16]:
    """`count` samples: the events (sound, first sample, last sample + 1), distractors, and background noise."""
    noise = draws.noise(count)
    background = noise + _smooth(noise, draws.between(2, 40)) * draws.between(0, 3)
    track = to_level(background, draws.between(40, 84))
    for sound, start, end in events:
        _place(track, draws, sound, start, end, draws.between(40, 84) + sound.quieter)
    for _ in range(draws.below(3)):
        start = draws.below(count // 2)
        end = min(count, start + draws.between(count // 8, count // 2))
        _place(track, draws, _DISTRACTORS[draws.below(len(_DISTRACTORS))], start, end, draws.between(44, 84))
    return np.clip(track, -32768, 32767).astype(np.int16)
