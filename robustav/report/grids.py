"""Reports made of several tables, as text: terminal, Markdown, LaTeX, CSV, JSON. Nothing is computed here."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustav.report.text import escape_md, finite, latex_table, markdown_skipped, markdown_table

Cell = tuple[str, str]  # a value, and its interval or an empty string


@dataclass(frozen=True)
class Grid:
    """One table: the first `words` columns are text, the rest numbers with their intervals.

    `brief` tables are short enough for a terminal; the others are left to the formats that are kept.
    """

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[Cell]]
    words: int = 1
    brief: bool = True


@dataclass(frozen=True)
class GridReport:
    """Tables, what they are about, what their reader must know, and every number behind them in `rows`."""

    title: str
    headers: Mapping[str, str]
    grids: Sequence[Grid]
    notes: Sequence[str]
    rows: pd.DataFrame
    skipped: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["sample", "reason"]))


def terminal(report: GridReport, width: int) -> RenderableType:
    """Header, the brief tables with intervals beneath each value, notes, skipped clips."""
    header = Table.grid(padding=(0, 2))
    for key, text in report.headers.items():
        header.add_row(Text(key, style="bold"), Text(text))
    parts: list[RenderableType] = [header]
    for grid in report.grids:
        if grid.brief:
            parts += [Text(f"\n{grid.title}", style="bold"), *_tables(grid, width)]
    parts.append(Text())
    parts += [Text(note, style="bold red" if note.startswith("WARNING") else "dim") for note in report.notes]
    if len(report.skipped):
        skipped = Table("skipped clip", "reason", box=box.SIMPLE, pad_edge=False)
        for _, row in report.skipped.iterrows():
            skipped.add_row(Text(row["sample"]), Text(row["reason"]))
        parts.append(skipped)
    return Group(*parts)


def _tables(grid: Grid, width: int) -> list[Table]:
    """The grid in as many tables as its columns need; the words stand in each."""
    needed = [
        max(len(part) for text in [head, *("\n".join(row[i]) for row in grid.body)] for part in text.split("\n")) + 1
        for i, head in enumerate(grid.head)
    ]
    groups: list[list[int]] = [[]]
    room = width - sum(needed[: grid.words])
    for column in range(grid.words, len(grid.head)):
        if groups[-1] and sum(needed[c] for c in [*groups[-1], column]) > room:
            groups.append([])
        groups[-1].append(column)
    tables = []
    for group in groups:
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        columns = [*range(grid.words), *group]
        for column in columns:
            table.add_column(Text(grid.head[column]), justify="left" if column < grid.words else "right", no_wrap=True)
        for row in grid.body:
            table.add_row(*(Text("\n".join(part for part in row[column] if part)) for column in columns))
        tables.append(table)
    return tables


def print_terminal(report: GridReport, console: Console) -> None:
    """Print for reading; a pipe gets lines as long as they need to be."""
    if not console.is_terminal:
        console.width = 200
    console.print(terminal(report, console.width), highlight=False, markup=False)


def _joined(grid: Grid) -> list[list[str]]:
    return [[f"{value} [{ends}]" if ends else value for value, ends in row] for row in grid.body]


def markdown(report: GridReport) -> str:
    """GitHub's tables; the interval in brackets behind each value."""
    lines = [f"# {report.title}", "", *(f"- **{key}**: {escape_md(text)}" for key, text in report.headers.items())]
    for grid in report.grids:
        lines += ["", f"## {escape_md(grid.title)}", "", *markdown_table(grid.head, _joined(grid))]
    lines += ["", *(f"- {escape_md(note)}" for note in report.notes), *markdown_skipped(report.skipped)]
    return "\n".join(lines) + "\n"


def latex(report: GridReport) -> str:
    """Booktabs tables with the notes beneath; needs `\\usepackage{booktabs}`."""
    lines = [f"% {key}: {text}" for key, text in report.headers.items()]
    for grid in report.grids:
        lines += ["", f"% {grid.title}", *latex_table(grid.head, _joined(grid), grid.words)]
    lines += [f"% {note}" for note in report.notes]
    lines += [f"% skipped {row['sample']}: {row['reason']}" for _, row in report.skipped.iterrows()]
    return "\n".join(lines) + "\n"


def csv(report: GridReport) -> str:
    """Every number at full precision, one a line."""
    return report.rows.to_csv(index=False)


def as_json(report: GridReport) -> str:
    """The whole report at full precision; what is not there or not finite is null."""
    rows = [{key: finite(value) for key, value in row.items()} for row in report.rows.astype(object).to_dict("records")]
    whole = {
        "about": dict(report.headers),
        "rows": rows,
        "notes": list(report.notes),
        "skipped": report.skipped.to_dict("records"),
    }
    return json.dumps(whole, indent=1) + "\n"


FORMATS: dict[str, Callable[[GridReport], str]] = {"md": markdown, "tex": latex, "csv": csv, "json": as_json}
