"""Lists of clips: a CSV or JSON-lines manifest, a folder or one file."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustav.data.decode import frame_files, natural

FEATURES = {"audio": "audio_features", "visual": "visual_features"}  # modality -> column
COLUMNS = ("id", "path", "audio", "frames", *FEATURES.values(), "start", "end", "labels")
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


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: where a clip is, which part of it, and what it shows.

    `path` is a media file; `audio` and `frames` (a folder of pictures) take its place for their modality, and .npy files of
    features for models that read those in place of sound or pictures. `start` and
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
    audio_features: Path | None = None
    visual_features: Path | None = None

    def features(self, modality: str) -> Path | None:
        """The file that holds a modality's features."""
        return {"audio": self.audio_features, "visual": self.visual_features}[modality]

    def files(self) -> Iterator[Path]:
        """Every file that the clip is read from, in a fixed order."""
        yield from (
            file for file in (self.path, self.audio, self.audio_features, self.visual_features) if file is not None
        )
        if self.frames is not None and self.frames.is_dir():
            yield from sorted(frame_files(self.frames), key=natural)


def read_manifest(path: str | Path) -> list[Entry]:
    """The clips that `path` lists: a .csv, .tsv or JSON-lines manifest, a folder (searched deeply), or a media file.

    A table starts with a row of column names among id, path, audio, frames, audio_features, visual_features, start, end
    and labels; a line of JSON has them as keys. Each clip needs at least one file or folder, relative to the manifest; its id is the
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
    features = [place(column) for column in FEATURES.values()]
    source = next((file for file in (path, audio, frames, *features) if file is not None), None)
    if source is None:
        raise ValueError(
            f"{manifest}, line {line}: a clip needs a path, an audio file, a folder of frames or features, got none"
        )
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
    return Entry(str(name).strip(), path, audio, frames, start, end, names, line, *features)
