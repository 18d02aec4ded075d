"""av-events: a synthetic audio-visual data set, generated from a seed, for running and testing the pipeline.

It is shaped like AudioSet (several labels a clip, raw waveform and RGB frames), but its sounds come from a synthesiser
and its pictures are coloured shapes: scores on it say nothing about the world. Ground truth is known down to which
event can be heard and which can be seen. `scene` makes one clip; `AvEvents` is a split of them, kept in a cache.
"""

import hashlib
import json
import logging
import math
import os
import uuid
from bisect import bisect_right
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustav.classifier import InputSpec, LabelKind, frames, waveform
from robustav.data.av_looks import LOOKS, picture
from robustav.data.av_sounds import SAMPLE_RATE, SOUNDS, Draws, ticks
from robustav.data.av_sounds import soundtrack as make_soundtrack
from robustav.data.samples import Progress, Sample

VERSION = 1  # of the generator: another version makes other scenes
SPLITS = ("train", "validation", "test")
BASE = tuple(SOUNDS)
_NUMBERS = (1, 1, 2, 2, 2, 3, 3)  # of events in a scene, equally likely

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AvEventsConfig:
    """Everything the scenes depend on. The defaults are what the shipped models were trained on.

    Classes past the ten base ones are those again in another pitch band, shape and hue ("bell-2"): far harder to tell
    apart, meant for load tests.
    """

    seed: int = 0
    classes: int = 10  # 2 to 527
    imbalance: float = 2.0  # how many times likelier the first class is than the last; 1: all alike
    cooccurrence: float = 0.2  # chance that a further event is the habitual partner of the one before
    modality_reliability: float = 0.85  # share of events that can be heard, and share that can be seen; 0.5 to 1
    seconds: float = 2.0  # 0.25 to 60
    frames: int = 4  # 1 to 64
    frame_size: int = 48  # pixels a side, 16 to 512
    train: int = 4000
    validation: int = 500
    test: int = 1000

    def __post_init__(self) -> None:
        self._check("seed", 0, 2**63 - 1, whole=True)
        self._check("classes", 2, 527, whole=True)
        self._check("imbalance", 1, 1000)
        self._check("cooccurrence", 0, 1)
        self._check("modality_reliability", 0.5, 1)
        self._check("seconds", 0.25, 60)
        self._check("frames", 1, 64, whole=True)
        self._check("frame_size", 16, 512, whole=True)
        for split in SPLITS:
            self._check(split, 1, 10_000_000, whole=True)

    def _check(self, name: str, low: float, high: float, whole: bool = False) -> None:
        value: Any = getattr(self, name)
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not (number and low <= value <= high):  # also catches NaN
            what = "a whole number" if whole else "a number"
            raise ValueError(f"`{name}` must be {what} from {low:,} to {high:,}, got {value!r}")
        # Equal knobs make equal cache keys, whether they came as 2 or 2.0.
        object.__setattr__(self, name, int(value) if whole else float(value))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The base classes first, then "string-2", "bell-2" and so on."""
        return tuple(_class_name(label) for label in range(self.classes))

    @property
    def specs(self) -> dict[str, InputSpec]:
        """What the clips look like to a model."""
        return {"audio": waveform(self.seconds, SAMPLE_RATE), "visual": frames(self.frames, self.frame_size)}


class Event(NamedTuple):
    """One event of a scene, in samples of the waveform; an event is audible, visible or both."""

    label: int
    start: int
    end: int
    audible: bool
    visible: bool


class Scene(NamedTuple):
    """One clip: int16 waveform [time] (32768 is amplitude 1), uint8 pictures [frame, 3, height, width], its truth."""

    audio: NDArray[np.int16]
    frames: NDArray[np.uint8]
    events: list[Event]


def scene(config: AvEventsConfig, split: str, index: int) -> Scene:
    """Scene `index` of a split. It depends on version, seed, split, index and knobs, not on the sizes of the splits.

    Sound, picture and plan draw from keys of their own: another frame size leaves every sound as it was.
    """
    key = (VERSION, config.seed, split, index)
    count = round(config.seconds * SAMPLE_RATE)
    events = plan(config, split, index)
    edges = ticks(config.frames + 1) * count // config.frames
    heard, seen = [], []
    for event in events:
        variant, base = divmod(event.label, len(BASE))
        if event.audible:
            heard.append((SOUNDS[BASE[base]].varied(variant), event.start, event.end))
        if event.visible:
            shown = (edges[:-1] < event.end) & (edges[1:] > event.start)
            seen.append((LOOKS[BASE[base]].varied(variant), shown.astype(np.int64)))
    audio = make_soundtrack(Draws("sound", *key), heard, count)
    return Scene(audio, picture(Draws("look", *key), seen, config.frames, config.frame_size), events)


def _class_name(label: int) -> str:
    variant, base = divmod(label, len(BASE))
    return f"{BASE[base]}-{variant + 1}" if variant else BASE[base]


@cache
def _weights(classes: int, imbalance: float) -> tuple[int, ...]:
    # A coarse grid, so that the last bit of a power does not reach the draws.
    return tuple(max(1, math.floor(imbalance ** (-label / (classes - 1)) * 2**16 + 0.5)) for label in range(classes))


def plan(config: AvEventsConfig, split: str, index: int) -> list[Event]:
    """What happens in a scene, without the making of it."""
    draws = Draws("plan", VERSION, config.seed, split, index)
    count = round(config.seconds * SAMPLE_RATE)
    weights = list(_weights(config.classes, config.imbalance))
    number = min(_NUMBERS[draws.below(len(_NUMBERS))], config.classes)
    events: list[Event] = []
    for _ in range(number):
        partner = (events[-1].label + config.classes // 2) % config.classes if events else None
        if partner is not None and weights[partner] and draws.chance(config.cooccurrence):
            label = partner
        else:
            edges = list(accumulate(weights))
            label = bisect_right(edges, draws.below(edges[-1]))
        weights[label] = 0
        length = min(count, draws.between(SAMPLE_RATE * 2 // 5, SAMPLE_RATE * 6 // 5))
        start = draws.below(count - length + 1)
        fate = draws.below(1 << 20)
        lost = round((1 - config.modality_reliability) * (1 << 20))
        events.append(Event(label, start, start + length, fate >= lost, not lost <= fate < 2 * lost))
    return events


def cache_dir() -> Path:
    """`$ROBUSTAV_CACHE`, else `robustav` in the user's cache folder."""
    if chosen := os.environ.get("ROBUSTAV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robustav"


class AvEvents:
    """A split of the synthetic data set av-events, for running and testing the pipeline; it satisfies `Samples`.

    The first use generates the split (seconds) and keeps it in `cache_dir()`; later uses map that file into memory
    once its checksum holds. `progress` is called while scenes are made. An unknown split raises `ValueError`.
    """

    label_kind: LabelKind = "multilabel"

    def __init__(
        self, split: str = "test", config: AvEventsConfig = AvEventsConfig(), progress: Progress | None = None
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}")
        self.split, self.config = split, config
        self.name = f"av-events/{split}"
        self.classes = config.class_names
        self.specs = config.specs
        size = getattr(config, split)
        digits = max(4, len(str(size - 1)))
        self.ids = tuple(f"{self.name}/{index:0{digits}}" for index in range(size))
        path = cache_dir() / f"av-events-{split}-{_knobs(config, split)}.safetensors"
        contents = _read(path)
        if contents is None:
            contents = _generate(config, split, progress)
            _write(path, contents)
        self._contents, self.digest = contents, _digest(contents)

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Sample:
        """Scene `index`: audio [time] in [-1, 1), visual [frame, 3, height, width] in [0, 1], labels [class]."""
        inputs = {
            "audio": self._contents["audio"][index].float() / 32768,
            "visual": self._contents["frames"][index].float() / 255,
        }
        return Sample(self.ids[index], inputs, (self.audible[index] | self.visible[index]).float())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All scenes as stored: audio [sample, time], frames [sample, frame, 3, height, width], labels [sample, class].

        Amplitude is audio (int16) / 32768, pixel value frames (uint8) / 255. Not to be written to.
        """
        return self._contents["audio"], self._contents["frames"], self.labels

    @property
    def labels(self) -> Tensor:
        """1 where the scene holds an event of the class, heard or seen; uint8 [sample, class]."""
        return self.audible | self.visible

    @property
    def audible(self) -> Tensor:
        """1 where the class is in the waveform; uint8 [sample, class]."""
        return self._contents["audible"]

    @property
    def visible(self) -> Tensor:
        """1 where the class is in the frames; uint8 [sample, class]."""
        return self._contents["visible"]


def _digest(contents: dict[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, types, shapes and little-endian bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(contents.items()):
        array = tensor.numpy()
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(little.data)
    return total.hexdigest()


def _knobs(config: AvEventsConfig, split: str) -> str:
    knobs = {name: value for name, value in asdict(config).items() if name not in SPLITS or name == split}
    return hashlib.sha256(json.dumps([VERSION, knobs], sort_keys=True).encode()).hexdigest()[:16]


def _generate(config: AvEventsConfig, split: str, progress: Progress | None) -> dict[str, Tensor]:
    size = getattr(config, split)
    shape = (config.frames, 3, config.frame_size, config.frame_size)
    contents = {
        "audio": torch.empty(size, round(config.seconds * SAMPLE_RATE), dtype=torch.int16),
        "frames": torch.empty(size, *shape, dtype=torch.uint8),
        "audible": torch.zeros(size, config.classes, dtype=torch.uint8),
        "visible": torch.zeros(size, config.classes, dtype=torch.uint8),
    }
    for index in range(size):
        made = scene(config, split, index)
        contents["audio"][index] = torch.from_numpy(made.audio)
        contents["frames"][index] = torch.from_numpy(made.frames)
        for event in made.events:
            contents["audible"][index, event.label] = event.audible
            contents["visible"][index, event.label] = event.visible
        if progress:
            progress(f"generating av-events/{split}", index + 1, size)
    return contents


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            contents = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            expected = (file.metadata() or {}).get("sha256")
        if _digest(contents) == expected:
            return contents
        reason = "its checksum does not match"
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error)
    logger.warning("%s cannot be used (%s): generating the scenes again", path, reason)
    return None


def _write(path: Path, contents: dict[str, Tensor]) -> None:
    # A name of its own and a rename: other processes see no file or a whole one.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contents, partial, metadata={"sha256": _digest(contents)})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        logger.warning("cannot keep the scenes in %s (%s): they stay in memory for this run", path.parent, error)
        with suppress(OSError):
            partial.unlink()
