"""Lists of clips: a CSV or JSON-lines manifest, a folder or one file, and the labelled clips that it names."""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from robustav.classifier import InputSpec, LabelKind
from robustav.data.clips import NoTrackError, frame_files, natural, read_audio, read_frame_folder, read_frames
from robustav.data.samples import Sample, SkippedError

COLUMNS = ("id", "path", "audio", "frames", "start", "end", "labels")
VIDEO_SUFFIXES = frozenset(
    {
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    }
)
AUDIO_SUFFIXES = frozenset(
    {".aac", ".aif", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"}
)
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
MODALITIES = {"audio": (1, -1.0, 1.0), "visual": (4, 0.0, 1.0)}  # axes after the batch axis, low, high
FINGERPRINT = 2**20  # bytes hashed at either end of a file


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: where a clip is, which part of it, and what it shows.

    `path` is a media file; `audio` and `frames` (a folder of pictures) take its place for their modality. `start` and
    `end` in seconds cut the media files, not the folder of frames, which is taken to show just that part. `labels` is
    None where nobody labelled the clip, and empty where it was labelled with no class. `line` is 0 for clips that came
    from no list.
    """

    id: str
    path: Path | None = None
    audio: Path | None = None
    frames: Path | None = None
    start: float | None = None
    end: float | None = None
    labels: tuple[str, ...] | None = None
    line: int = 0

    def files(self) -> Iterator[Path]:
        """Every file that the clip is read from, in a fixed order."""
        yield from (file for file in (self.path, self.audio) if file is not None)
        if self.frames is not None and self.frames.is_dir():
            yield from sorted(frame_files(self.frames), key=natural)


def read_manifest(path: str | Path) -> list[Entry]:
    """The clips that `path` lists: a .csv, .tsv or JSON-lines manifest, a folder (searched deeply), or a media file.

    A table starts with a row of column names among id, path, audio, frames, start, end and labels; a line of JSON has
    them as keys. Each clip needs a path, an audio file or a folder of frames, relative to the manifest; its id is the
    file's stem unless given; several labels stand side by side with ";" or "|" between them (in JSON, in a list). A
    clip without labels (an empty cell, null) is unlabelled; one labelled with no class has ";" alone, or []. Media
    files that are missing are found out when loaded, so that one does not lose the others.
    """
    path = Path(path)
    if path.is_dir():
        return folder_entries(path)
    if not path.exists():
        raise ValueError(f"no such manifest, folder or clip: {path}")
    suffix = path.suffix.lower()
    if suffix in MEDIA_SUFFIXES:
        return [Entry(path.stem, path)]
    if suffix in DELIMITERS:
        rows = table_rows(path, DELIMITERS[suffix])
    elif suffix in JSON_SUFFIXES:
        rows = json_rows(path)
    else:
        raise ValueError(
            f"{path}: a manifest must end in {', '.join(sorted(DELIMITERS.keys() | JSON_SUFFIXES))}, "
            f"a clip in one of {', '.join(sorted(MEDIA_SUFFIXES))}, got {suffix or 'no suffix'!r}"
        )
    entries = [entry_of(row, line, path) for line, row in rows]
    if not entries:
        raise ValueError(f"{path}: the manifest lists no clips")
    lines: dict[str, int] = {}
    for entry in entries:
        if (first := lines.setdefault(entry.id, entry.line)) != entry.line:
            raise ValueError(
                f"{path}, line {entry.line}, column id: ids must differ, got {entry.id!r} as on line {first}; "
                "an id that is not given is the stem of the file's name"
            )
    return entries


def folder_entries(folder: Path) -> list[Entry]:
    """Every media file below a folder, in order of name; unlabelled; the id is the path within, without its suffix."""
    inside = [file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in MEDIA_SUFFIXES]
    inside = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
    if not inside:
        raise ValueError(f"{folder}: no media file in the folder, looked for {', '.join(sorted(MEDIA_SUFFIXES))}")
    stems = [readable(file.with_suffix("")) for file in inside]
    counts = Counter(stems)
    return [
        Entry(stem if counts[stem] == 1 else readable(file), folder / file)
        for stem, file in zip(stems, inside, strict=True)
    ]


def readable(path: Path) -> str:
    """A path as an id; bytes that are no UTF-8 are written out, so that tables and files can hold it."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_of(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: must be UTF-8 text, got byte 0x{content[error.start]:02X}") from error


def table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and cells by column, empty cells left out, labels as a list."""
    reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not header:
                header = [cell.lower() for cell in cells]
                check_header(header, f"{path}, line {reader.line_num}")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: must have {len(header)} cells as the header has, "
                    f"got {len(cells)}; a cell with a {delimiter!r} in it needs quotes"
                )
            row: dict[str, Any] = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
            if "labels" in row:
                names = (name.strip() for name in row["labels"].replace("|", ";").split(";"))
                row["labels"] = [name for name in names if name]
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: cannot be read as a table: {error}") from error


def check_header(header: Sequence[str], where: str) -> None:
    if unknown := [column for column in header if column not in COLUMNS]:
        raise ValueError(
            f"{where}: the first row must name columns among {', '.join(COLUMNS)}, "
            f"got also {', '.join(map(repr, unknown))}"
        )
    if repeated := {column for column in header if header.count(column) > 1}:
        raise ValueError(f"{where}: columns must differ, got {', '.join(sorted(repeated))} more than once")


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values by key, nulls left out."""
    # Not splitlines: it also cuts at separators that may stand within a JSON string.
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: must be one JSON object a line, got {line.strip()[:40]!r}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be one JSON object a line, got a {type(row).__name__}")
        if unknown := sorted(row.keys() - set(COLUMNS)):
            raise ValueError(
                f"{where}: keys must be among {', '.join(COLUMNS)}, got also {', '.join(map(repr, unknown))}"
            )
        yield number, {key: value for key, value in row.items() if value is not None}


def entry_of(row: Mapping[str, Any], line: int, manifest: Path) -> Entry:
    """The entry of one row, its values checked. Raises `ValueError` naming file, line and column."""

    def refuse(column: str, expected: str, value: object) -> ValueError:
        return ValueError(f"{manifest}, line {line}, column {column}: must be {expected}, got {value!r}")

    def place(column: str) -> Path | None:
        value = row.get(column)
        if value is not None and (not isinstance(value, str) or not value.strip() or "\0" in value):
            raise refuse(column, "a path", value)
        return None if value is None else manifest.parent / value.strip()

    def seconds(column: str) -> float | None:
        value = row.get(column)
        try:
            number = None if value is None or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if value is not None and (number is None or not math.isfinite(number) or number < 0):
            raise refuse(column, "a number of seconds, 0 or more", value)
        return number

    path, audio, frames, start, end = place("path"), place("audio"), place("frames"), seconds("start"), seconds("end")
    source = path or audio or frames
    if source is None:
        raise ValueError(f"{manifest}, line {line}: a clip needs a path, an audio file or a folder of frames, got none")
    if end is not None and end <= (start or 0):
        raise refuse("end", f"after the start at {start or 0:g} s", row["end"])
    labels = row.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(label, str) and label.strip() for label in labels)
    ):
        raise refuse("labels", "a list of names", labels)
    name = row.get("id", source.name if source == frames else source.stem)
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise refuse("id", "a name", name)
    names = None if labels is None else tuple(label.strip() for label in labels)
    return Entry(str(name).strip(), path, audio, frames, start, end, names, line)


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
        if "audio" in self.specs:
            spec = self.specs["audio"]
            length, rate = spec.shape[0], spec.sample_rate or 0
            end = min((entry.start or 0) + length / rate, math.inf if end is None else end)
            with needed("audio"):
                source = given(entry.audio or entry.path, "audio")
                audio = read_audio(source, sample_rate=rate, start=entry.start, end=end)[:length]
            inputs["audio"] = pad(audio, (0, length - len(audio)))
            if len(audio) < length:
                signal["audio"] = torch.arange(length) < len(audio)
        if "visual" in self.specs:
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
    if "audio" in specs and not specs["audio"].sample_rate:
        raise ValueError(f"`specs['audio']` must have a sample rate in Hz, got {specs['audio'].sample_rate}")
