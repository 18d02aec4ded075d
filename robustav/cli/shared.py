"""What several commands share: where errors go, completion of names, and the choice of a format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from robustav.classifier import InputSpec

ERRORS = Console(stderr=True)
FAILED_AUDIT = 1  # exit code
Format = Annotated[
    str | None, typer.Option("--format", help="Print md, tex, csv or json instead of the table for the terminal.")
]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]


def models_by_name(incomplete: str) -> list[str]:
    """Models for tab completion, from a list on disk: no need to import torch."""
    names = (Path(__file__).parents[1] / "models" / "names.txt").read_text(encoding="utf-8").split()
    return sorted(name for name in names if name.startswith(incomplete))


def chosen_format(name: str | None, json: bool) -> str | None:
    """The format asked for, None for the terminal; raises `typer.BadParameter` for one that there is not."""
    known = ("md", "tex", "csv", "json")
    if name is not None and name not in known:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got {name!r}", param_hint="--format")
    return "json" if json else name


def wide_console() -> Console:
    """Standard output; where that is no terminal, wide enough for tables."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def words_of(spec: "InputSpec") -> str:
    """An input's shape, unit and range."""
    rate = f" at {spec.sample_rate} Hz" if spec.sample_rate else ""
    return f"{list(spec.shape)}{rate}, {spec.unit} in [{spec.low:g}, {spec.high:g}]"


def shard_of(text: str) -> tuple[int, int]:
    """`0/4` as index and count."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise typer.BadParameter(f"must be I/N with I from 0 to N - 1, as in 0/4, got {text!r}", param_hint="--shard")
    return int(index), int(count)
