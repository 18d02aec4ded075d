"""The clips of a manifest as a model takes them: decoded when loaded, cut or padded, labelled by class name."""

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from robustav.classifier import FEATURE, InputSpec, LabelKind
from robustav.data.decode import NoTrackError, read_audio, read_frame_folder, read_frames
from robustav.data.manifest import FEATURES, Entry
from robustav.data.samples import Sample, SkippedError
from robustav.mel import with_end

MODALITIES = {"audio": (1, -1.0, 1.0), "visual": (4, 0.0, 1.0)}  # axes after the batch axis, low, high
FINGERPRINT = 2**20  # bytes hashed at either end of a file


class Clips:
    """The clips of a manifest as a model takes them: `Samples` whose clips are decoded when loaded.

    Audio is cut or padded with silence at its end to the model's length; `signal` tells which part is not padding.
    Pictures are spread over the same stretch of time as the audio, over the whole clip for a model without audio.
    Labels are class names in any case, or aliases (`{"/m/09x0r": "Speech"}`); where the whole is unknown, names
    separated by commas that are all known. `unknown_labels` maps each label that `classes` lacks to the ids of the
    clips that have it: it is ignored, and a clip with no other label is taken as unlabelled. `load` may be called
    from several threads.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        specs: Mapping[str, InputSpec],
        classes: Sequence[str],
        label_kind: LabelKind = "multilabel",
        *,
        name: str = "clips",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        check_specs(specs)
        self.entries, self.specs, self.classes = tuple(entries), dict(specs), tuple(classes)
        self.label_kind, self.name = label_kind, name
        self.ids = tuple(entry.id for entry in entries)
        if repeated := [name for name, count in Counter(self.ids).items() if count > 1]:
            raise ValueError(f"`entries` must have different ids, got {repeated[0]!r} more than once")
        exact = {label: index for index, label in enumerate(self.classes)}
        self.indices = {label.casefold(): index for label, index in exact.items()} | exact
        for alias, label in (aliases or {}).items():
            if (index := self.class_index(label)) is not None:
                self.indices.setdefault(alias.casefold(), index)
        self.unknown_labels: dict[str, list[str]] = {}
        self.known = [self.known_labels(entry) for entry in self.entries]

    def class_index(self, label: str) -> int | None:
        """The class that a name or an alias means: the one spelt just so, or else the one that differs in case."""
        return self.indices.get(label, self.indices.get(label.casefold()))

    def known_labels(self, entry: Entry) -> list[int] | None:
        """Class indices of a clip's labels, or None where it counts as unlabelled; notes the unknown ones."""
        if entry.labels is None:
            return None
        known: set[int] = set()
        for label in dict.fromkeys(entry.labels):
            whole = self.class_index(label)
            parts = [whole] if whole is not None else [self.class_index(part.strip()) for part in label.split(",")]
            if None in parts:
                self.unknown_labels.setdefault(label, []).append(entry.id)
            else:
                known.update(index for index in parts if index is not None)
        return sorted(known) if known or not entry.labels else None

    def load(self, index: int) -> Sample:
        """The clip at `index` of `ids`; raises `SkippedError` with the reason if it cannot be used."""
        entry = self.entries[index]
        labels = self.labels(index)
        inputs: dict[str, Tensor] = {}
        signal: dict[str, Tensor] = {}
        end = entry.end
        for modality, spec in self.specs.items():
            if spec.unit == FEATURE:
                inputs[modality] = read_features(entry.features(modality), modality, spec)
        if "audio" in self.specs.keys() - inputs.keys():
            spec = self.specs["audio"]
            length, rate = spec.shape[0], spec.sample_rate or 0
            end = min((entry.start or 0) + length / rate, math.inf if end is None else end)
            with needed("audio"):
                source = given(entry.audio or entry.path, "audio")
                audio = with_end(read_audio(source, sample_rate=rate, start=entry.start, end=end)[:length])
            inputs["audio"] = pad(audio, (0, length - len(audio)))
            if len(audio) < length:
                signal["audio"] = torch.arange(length) < len(audio)
        if "visual" in self.specs.keys() - inputs.keys():
            count, _, height, width = self.specs["visual"].shape
            with needed("visual"):
                inputs["visual"] = (
                    read_frames(
                        given(entry.path, "video"), count=count, height=height, width=width, start=entry.start, end=end
                    )
                    if entry.frames is None
                    else read_frame_folder(entry.frames, count=count, height=height, width=width)
                )
        return Sample(entry.id, inputs, labels, signal)

    def labels(self, index: int) -> Tensor | None:
        """A clip's labels as `Sample` has them."""
        known = self.known[index]
        if known is None:
            return None
        if self.label_kind == "multilabel":
            target = torch.zeros(len(self.classes))
            target[known] = 1
            return target
        if len(known) != 1:
            names = ", ".join(repr(self.classes[label]) for label in known)
            raise SkippedError(f"a multiclass model needs exactly one label, got {names or 'none'}")
        return torch.tensor(known[0])

    @cached_property
    def digest(self) -> str:
        """sha256 over ids, labels, times and the files' names, sizes, first and last MiB, wherever the files are."""
        marks: dict[Path, list[str | int]] = {}
        digest = hashlib.sha256()
        for entry in self.entries:
            files = list(entry.files())
            marks.update((file, fingerprint(file)) for file in files if file not in marks)
            row = [entry.id, entry.labels, entry.start, entry.end, [marks[file] for file in files]]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()


@contextmanager
def needed(modality: str) -> Iterator[None]:
    """Says of a missing track what it was needed for."""
    try:
        yield
    except NoTrackError as error:
        raise SkippedError(f"{error}, and the model needs {modality}") from error


def given(file: Path | None, kind: str) -> Path:
    if file is None:
        raise NoTrackError(f"no {kind} track")
    return file


def read_features(file: Path | None, modality: str, spec: InputSpec) -> Tensor:
    """An array of a .npy file, of the shape and range that the model reads; raises `SkippedError` otherwise."""
    if file is None:
        raise SkippedError(
            f"no {FEATURES[modality]}, and the model reads {modality} features of shape {list(spec.shape)}"
        )
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise SkippedError(f"no such file: {file.name}") from None
    except (ValueError, OSError, EOFError) as error:
        raise SkippedError(f"{file.name} is no .npy file of numbers (pickled objects are not read)") from error
    if not isinstance(array, np.ndarray) or array.shape != spec.shape or array.dtype.kind not in "fiu":
        got = f"{list(array.shape)} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise SkippedError(f"{file.name} must hold numbers of shape {list(spec.shape)}, got {got}")
    features = torch.from_numpy(array.astype(np.float32))
    if not bool(features.isfinite().all()) or not (spec.low <= features.min() and features.max() <= spec.high):
        low, high = features.aminmax()
        raise SkippedError(
            f"{file.name} must lie in [{spec.low:g}, {spec.high:g}], got values from {low:g} to {high:g}"
        )
    return features


def fingerprint(file: Path) -> list[str | int]:
    """Name, size, and the sha256 of both ends of a file; of a missing file, its name."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            digest = hashlib.sha256(stream.read(FINGERPRINT))
            stream.seek(max(FINGERPRINT, size - FINGERPRINT))
            digest.update(stream.read(FINGERPRINT))
    except OSError:
        return [file.name]
    return [file.name, size, digest.hexdigest()]


def check_specs(specs: Mapping[str, InputSpec]) -> None:
    """Raise `ValueError` unless clips can be brought into the form that `specs` asks for."""
    if not specs or (unknown := sorted(specs.keys() - MODALITIES.keys())):
        got = ", ".join(map(repr, unknown)) if specs else "none"
        raise ValueError(f"`specs` must name modalities among {', '.join(MODALITIES)}, got {got}")
    for modality, spec in specs.items():
        if spec.unit == FEATURE:
            continue
        axes, low, high = MODALITIES[modality]
        if len(spec.shape) != axes or (modality == "visual" and spec.shape[1] != 3):
            form = "(time,)" if modality == "audio" else "(frame, 3, height, width)"
            raise ValueError(
                f"`specs[{modality!r}]` must have the shape {form} to be read from clips, got {spec.shape}"
            )
        if (spec.low, spec.high) != (low, high):
            raise ValueError(
                f"`specs[{modality!r}]` must span [{low:g}, {high:g}], as clips do, got [{spec.low:g}, {spec.high:g}]: "
                "scale within the model"
            )
    if "audio" in specs and specs["audio"].unit != FEATURE and not specs["audio"].sample_rate:
        raise ValueError(f"`specs['audio']` must have a sample rate in Hz, got {specs['audio'].sample_rate}")
