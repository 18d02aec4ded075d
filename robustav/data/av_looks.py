"""The looks of av-events: coloured shapes that move over a textured background, drawn in integers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustav.data.av_sounds import Draws, Integers, sine, ticks

SIDE = 4096  # length units of a frame's side, whatever its size in pixels
TURN = 1 << 32  # phase units of a full turn
HUES = 1536  # steps round the colour circle, red at 0
QUARTER = TURN // 4

Distance = Callable[[Integers, Integers, int], Integers]  # (u, v, radius) -> how far inside, in length units


def _length(u: Integers, v: Integers) -> Integers:
    # IEEE 754 fixes the square root to the last bit.
    return np.sqrt((u * u + v * v).astype(np.float64)).astype(np.int64)


def _disc(u: Integers, v: Integers, radius: int) -> Integers:
    return radius - _length(u, v)


def _ring(u: Integers, v: Integers, radius: int) -> Integers:
    return radius // 4 - np.abs(_length(u, v) - radius * 3 // 4)


def _square(u: Integers, v: Integers, radius: int) -> Integers:
    return radius * 4 // 5 - np.maximum(np.abs(u), np.abs(v))


def _diamond(u: Integers, v: Integers, radius: int) -> Integers:
    return (radius - np.abs(u) * 3 // 2 - np.abs(v)) * 3 // 4


def _triangle(u: Integers, v: Integers, radius: int) -> Integers:
    return radius // 2 - np.maximum(v, (np.abs(u) * 7 // 8) - (v >> 1))


def _cross(u: Integers, v: Integers, radius: int) -> Integers:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(radius - np.maximum(u, v), radius // 3 - np.minimum(u, v))


def _bar(u: Integers, v: Integers, radius: int) -> Integers:
    return np.minimum(radius // 4 - np.abs(u), radius - np.abs(v))


def _stripes(u: Integers, v: Integers, radius: int) -> Integers:
    stripe = radius // 5 - np.abs(v % (radius * 4 // 5) - radius // 5)
    return np.minimum(radius - np.maximum(np.abs(u), np.abs(v)), stripe)


def _crescent(u: Integers, v: Integers, radius: int) -> Integers:
    return np.minimum(radius - _length(u, v), _length(u - radius // 2, v) - radius * 3 // 4)


def _corner(u: Integers, v: Integers, radius: int) -> Integers:
    return np.minimum(radius * 4 // 5 - np.maximum(np.abs(u), np.abs(v)), np.maximum(u, v) - radius // 4)


SHAPES: tuple[Distance, ...] = (_disc, _ring, _square, _diamond, _triangle, _cross, _bar, _stripes)
_STRANGE: tuple[Distance, ...] = (_crescent, _corner)  # only distractors have these


@dataclass(frozen=True)
class Motion:
    """What a shape does from the first frame to the last: drift in sides, growth in percent, spin in turns."""

    across: float = 0.0
    down: float = 0.0
    grow: int = 0
    spin: float = 0.0
    shake: int = 0  # length units by which each frame may be off


@dataclass(frozen=True)
class Look:
    """How a class looks: shape, hue and its spread, motion, tilt in 360ths of a turn, percent of the usual size."""

    shape: Distance
    hue: int
    motion: Motion
    spread: int = 70
    tilt: int = 15
    size: int = 100

    def varied(self, variant: int) -> "Look":
        """Another shape and hue in the same motion; variant 0 is the look itself."""
        shape = SHAPES[(SHAPES.index(self.shape) + variant) % len(SHAPES)]
        hue = (self.hue + 590 * variant) % HUES
        return Look(shape, hue, self.motion, self.spread, self.tilt, self.size)


LOOKS: dict[str, Look] = {
    "string": Look(_bar, 260, Motion(shake=160), tilt=20),
    "bell": Look(_triangle, 1300, Motion(spin=0.12), tilt=10),
    "clap": Look(_cross, 520, Motion(grow=40)),
    "rise": Look(_disc, 740, Motion(down=-0.5), spread=150, size=85),
    "fall": Look(_disc, 820, Motion(down=0.5), spread=150, size=85),
    "buzz": Look(_square, 1010, Motion(shake=200), spread=130, tilt=40, size=80),
    "beeps": Look(_diamond, 1080, Motion(), spread=130, tilt=40, size=90),
    "kick": Look(_disc, 20, Motion(grow=60), spread=90),
    "hiss": Look(_ring, 620, Motion(grow=50, across=0.2)),
    "warble": Look(_stripes, 120, Motion(across=0.3, spin=0.2), spread=80, size=110),
}


def _colour(hue: int, saturation: int, brightness: int) -> Integers:
    """RGB of a hue in `HUES` steps; saturation and brightness of 255."""
    around = np.abs((hue + np.array([0, 1024, 512], dtype=np.int64)) % HUES - HUES // 2) - 256
    pure = np.clip(around, 0, 255)
    return (255 - (255 - pure) * saturation // 255) * brightness // 255


@dataclass(frozen=True)
class _Canvas:
    """Frames being painted, [frame, 3, height, width] in 0 to 255, and where each pixel's centre lies."""

    frames: Integers
    centres: Integers

    def paint(self, draws: Draws, look: Look, saturation: int, shown: Integers) -> None:
        """One shape at a random place; `shown` is 1 for each frame that it is in, else 0."""
        count = len(self.frames)
        time = (ticks(count) * 2 - (count - 1)) * 128 // max(count - 1, 1)  # -128 to 128
        motion = look.motion
        radius = draws.between(340, 700) * look.size // 100
        drift = [round(motion.across * SIDE) * draws.between(60, 120) // 100 * (1 - 2 * draws.below(2))]
        drift.append(round(motion.down * SIDE) * draws.between(60, 120) // 100)
        places: list[Integers] = []
        for path in drift:
            margin = min(radius * 3 // 4 + abs(path) // 2, SIDE // 2)
            shake = np.array([draws.between(-motion.shake, motion.shake) for _ in range(count)], dtype=np.int64)
            places.append(draws.between(margin, SIDE - margin) + time * path // 256 + shake)
        x, y = (place[:, None] for place in places)
        scale = (256 + time * motion.grow // 100)[:, None, None]
        tilt = draws.between(-look.tilt, look.tilt) * TURN // 360
        angle = tilt + time * round(motion.spin * (1 - 2 * draws.below(2)) * TURN) // 256
        turn_x, turn_y = sine(angle + QUARTER)[:, None, None], sine(angle)[:, None, None]
        dx, dy = (self.centres - x)[:, None, :], (self.centres - y)[:, :, None]
        u = ((dx * turn_x + dy * turn_y) >> 14) * 256 // scale
        v = ((dy * turn_x - dx * turn_y) >> 14) * 256 // scale
        pixel = SIDE // self.frames.shape[-1]
        cover = np.clip(look.shape(u, v, radius) + pixel // 2, 0, pixel) * shown[:, None, None]
        cover = cover * draws.between(90, 256) // pixel
        hue = (look.hue + draws.between(-look.spread, look.spread)) % HUES
        colour = _colour(hue, saturation, draws.between(130, 255))
        self.frames[...] += ((colour[:, None, None] - self.frames) * cover[:, None]) >> 8


def _background(draws: Draws, centres: Integers) -> Integers:
    """A gradient between two dull colours, with stripes or checks of random pitch and direction; [3, height, width]."""
    ends = [_colour(draws.below(HUES), draws.between(0, 130), draws.between(40, 200)) for _ in range(2)]
    blend = (centres[:, None] + centres * (2 * draws.below(2) - 1)) % (2 * SIDE)
    blend = np.minimum(blend, 2 * SIDE - blend)
    plain = (ends[0][:, None, None] * blend + ends[1][:, None, None] * (SIDE - blend)) // SIDE
    steps = [draws.between(-6, 6) * (TURN // SIDE) for _ in range(4)]
    waves = [sine(steps[2 * n] * centres[:, None] + steps[2 * n + 1] * centres) for n in range(2)]
    pattern = waves[0] if draws.below(2) else (waves[0] * waves[1]) >> 14
    return plain + ((pattern * draws.between(0, 40)) >> 14)


def picture(draws: Draws, events: list[tuple[Look, Integers]], count: int, size: int) -> NDArray[np.uint8]:
    """`count` frames, [frame, 3, size, size]: events (look, 1 for each frame with it), distractors, a background."""
    centres = (2 * ticks(size) + 1) * SIDE // (2 * size)
    canvas = _Canvas(np.repeat(_background(draws, centres)[None], count, axis=0), centres)
    for _ in range(draws.below(3)):
        if draws.below(2):
            look, saturation = Look(SHAPES[draws.below(len(SHAPES))], 0, Motion(across=0.2), tilt=180), 30
        else:
            look, saturation = Look(_STRANGE[draws.below(len(_STRANGE))], draws.below(HUES), Motion(), tilt=180), 200
        canvas.paint(draws, look, saturation, np.ones(count, np.int64))
    for look, shown in events:
        canvas.paint(draws, look, draws.between(110, 255), shown)
    grain = (draws.noise(canvas.frames.size).reshape(canvas.frames.shape) * draws.between(6, 32)) >> 8
    return np.clip(canvas.frames + grain, 0, 255).astype(np.uint8)
