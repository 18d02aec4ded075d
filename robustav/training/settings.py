"""Settings as a command line writes them, `NAME(key=value, ...)`, read by the annotations of a dataclass."""

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from robustav.threat import parse_number

CALL = re.compile(r"(?P<name>[^()]+?)\s*(?:\((?P<settings>.*)\))?", re.DOTALL)
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_call(text: str, what: str) -> tuple[str, dict[str, str]]:
    """Name and settings, still as text; raises `ValueError` showing how `what` is written."""
    match = CALL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"`{what}` is written as NAME or NAME(key=value, ...), got {text!r}")
    given: dict[str, str] = {}
    for part in filter(None, map(str.strip, _split(match["settings"] or ""))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"`{what}` is written as NAME or NAME(key=value, ...), got {part!r} in {text!r}")
        if key in given:
            raise ValueError(f"a setting is given once, got {key!r} twice in {text!r}")
        given[key] = value
    return match["name"], given


def read_settings(made: type, given: dict[str, str], name: str) -> dict[str, Any]:
    """The values of `given` as the annotations of the dataclass `made` have them.

    Raises `ValueError` listing the settings that there are with their defaults.
    """
    known = {field.name: field for field in fields(made) if field.init}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {settings_of(made) or 'none'}")
    hints = get_type_hints(made)
    return {key: _read(text, hints[key], f"`{key}` of {name}") for key, text in given.items()}


def check_types(made: type, given: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for a value, as TOML has it, that is not what the annotations of the dataclass `made` ask for."""
    hints = get_type_hints(made)
    for key, value in given.items():
        wanted = [_words_if_not(value, kind) for kind in _alternatives(hints[key])]
        if all(wanted):
            raise ValueError(f"`{where}.{key}` must be {' or '.join(filter(None, wanted))}, got {value!r}")


def _alternatives(kind: Any) -> list[Any]:
    union = get_origin(kind) in (Union, types.UnionType)
    return [one for one in (get_args(kind) if union else [kind]) if one is not type(None)]


def _words_if_not(value: Any, kind: Any) -> str:
    """What the kind is called; empty if the value is one."""
    if get_origin(kind) in (tuple, Sequence):
        inner = get_args(kind)[0]
        many = [value] if isinstance(value, str) else value
        fits = isinstance(many, Sequence) and not any(_words_if_not(one, inner) for one in many)
        return "" if fits else f"a list of {'texts' if inner is str else 'numbers'}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        fits = isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
        return "" if fits else f"a {'whole ' if kind is int else ''}number"
    return "" if isinstance(value, str) else "text"


def settings_of(made: type) -> str:
    """Every setting of a dataclass with its default, as it would be written."""
    return ", ".join(f"{field.name}={_default(field)}" for field in fields(made) if field.init)


def _default(field: Field) -> str:
    return "..." if field.default is MISSING else str(field.default)


def _split(text: str) -> list[str]:
    """Apart at commas, but not at those within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read(text: str, kind: Any, what: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        return None if text.lower() == "none" and len(others) < len(get_args(kind)) else _read(text, others[0], what)
    if origin is Literal:
        values = {str(value): value for value in get_args(kind)}
        if text not in values:
            raise ValueError(f"{what} must be one of {', '.join(values)}, got {text!r}")
        return values[text]
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{what} must be true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    try:
        value = int(text) if kind is int else float(parse_number(text)) if kind is float else text
        if isinstance(value, str) or math.isfinite(value):
            return value
        raise ValueError
    except ValueError:
        raise ValueError(f"{what} must be a {'whole ' if kind is int else ''}number, got {text!r}") from None


def positive(settings: object, *names: str) -> None:
    """Raise `ValueError` unless these settings are above 0."""
    for name in names:
        if not (value := getattr(settings, name)) > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}")
