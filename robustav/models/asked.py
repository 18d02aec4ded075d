"""A model as the command line asks for it: a name, and in brackets what differs from its usual task."""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from robustav.models.entry import Task

TEXT = re.compile(r"(?P<name>.+?)\s*(?:\((?P<settings>[^()]*)\))?", re.DOTALL)
COLUMNS = ("display_name", "name", "class", "label")  # of a table of classes


class Asked(NamedTuple):
    """`cav-mae(frames=1, at=features)` as a name, fields of a `Task`, and whether to attack features."""

    name: str
    task: Mapping[str, Any]
    at_features: bool


def parse_model(text: str) -> Asked:
    """Settings are `classes=FILE`, `label_kind`, `seconds`, `frames`, `size` and `at=features`.

    Raises `ValueError` naming the setting, what was expected and what came.
    """
    match = TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"a model is written as NAME or 'NAME(key=value, ...)', got {text!r}")
    settings: dict[str, Any] = {}
    for part in (part.strip() for part in (match["settings"] or "").split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in READ:
            raise ValueError(f"a model's settings are {', '.join(f'{k}=' for k in READ)}, got {part!r} in {text!r}")
        if key in settings:
            raise ValueError(f"a setting is given once, got {key!r} twice in {text!r}")
        settings[key] = READ[key](value)
    at_features = settings.pop("at", False)
    return Asked(match["name"], settings, at_features)


def absolute(text: str) -> str:
    """The same model asked for from any folder: paths of classes, of a Hugging Face folder and of a factory in full."""
    match = TEXT.fullmatch(text.strip())
    assert match is not None
    kind, colon, rest = match["name"].partition(":")
    if kind in ("hf", "trained") and Path(rest).exists():
        name = f"{kind}:{Path(rest).resolve()}"
    elif kind.endswith(".py") and Path(kind).exists():
        name = f"{Path(kind).resolve()}{colon}{rest}"
    else:
        name = match["name"]
    settings = [part.strip() for part in (match["settings"] or "").split(",") if part.strip()]
    for i, part in enumerate(settings):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key == "classes":
            settings[i] = f"classes={Path(value).resolve()}"
    return f"{name}({', '.join(settings)})" if settings else name


def task_of(usual: Task, changes: Mapping[str, Any]) -> Task:
    """The usual task with what was asked for."""
    return replace(usual, **changes)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names in the order of a model's outputs: a name a line, or a CSV with a column display_name, name, class or label.

    A CSV with a column `index` must be in its order. Raises `ValueError` naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`classes` must be a file of class names, a name a line, and there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: must be UTF-8 text, got byte 0x{error.object[error.start]:02X} at {error.start}"
        ) from error
    if path.suffix.lower() == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        column = next((name for name in COLUMNS if rows and name in rows[0]), None)
        if column is None:
            raise ValueError(
                f"{path}: a table of classes must have a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
            )
        for expected, row in enumerate(rows):
            if row.get("index", str(expected)) != str(expected):
                raise ValueError(f"{path}, line {expected + 2}: must be index {expected}, got {row['index']!r}")
        names = [row[column].strip() for row in rows]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: class names must differ, got {repeated!r} more than once")
    if not names:
        raise ValueError(f"{path}: holds no class names")
    return tuple(names)


def _number(kind: type[int] | type[float], name: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise ValueError(f"`{name}` must be {words}, got {text!r}") from None

    return read


def _at(text: str) -> bool:
    if text not in ("raw", "features"):
        raise ValueError(f"`at` must be raw (waveform and pixels) or features (the front ends' outputs), got {text!r}")
    return text == "features"


READ: Mapping[str, Callable[[str], Any]] = {
    "classes": read_classes,
    "label_kind": str,
    "seconds": _number(float, "seconds"),
    "frames": _number(int, "frames"),
    "size": _number(int, "size"),
    "at": _at,
}
