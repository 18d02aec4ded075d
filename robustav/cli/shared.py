"""What several commands share: where errors go, completion of names, and the choice of a format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ERRORS = Console(stderr=True)
FAILED_AUDIT = 1  # exit code
Format = Annotated[
    str | None, typer.Option("--format", help="Print md, tex, csv or json instead of the table for the terminal.")
]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]


def models_by_name(incomplete: str) -> list[str]:
    """Embedded models, for tab completion, from their weight files: no need to import torch."""
    files = (Path(__file__).parents[1] / "models" / "weights").glob("*.safetensors")
    return sorted(file.stem for file in files if file.stem.startswith(incomplete))


def chosen_format(name: str | None, json: bool) -> str | None:
    """The format asked for, None for the terminal; raises `typer.BadParameter` for one that there is not."""
    known = ("md", "tex", "csv", "json")
    if name is not None and name not in known:
        raise typer.BadParameter(f"must be one of {', '.join(known)}, got {name!r}", param_hint="--format")
    return "json" if json else name
