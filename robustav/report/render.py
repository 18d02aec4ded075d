"""A report as text: terminal, Markdown, LaTeX, CSV, JSON. Nothing is computed here."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustav.report.table import WORST, Report

SCORES = {"mAP": "mAP", "AUC": "AUC", "d_prime": "d'", "top1": "top-1 hit", "success": "success", "drop": "drop"}
NOT_VALID = "not valid"
NONE = "-"
DASH = "\u2013"  # one column wide, and no minus sign


def number(value: Any, digits: int = 3) -> str:
    """A number at fixed precision; a dash where there is none."""
    if value is None or pd.isna(value):
        return NONE
    return f"{value:.{digits}f}" if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def cell(row: pd.Series, score: str, digits: int = 3) -> tuple[str, str]:
    """A score and its interval (to `digits`), or that there is no valid one."""
    if row["violations"]:
        return NOT_VALID, ""
    if row[score] is None or pd.isna(row[score]):
        return NONE, ""
    shift = score == "d_prime"  # no share of anything: one digit less
    ends = number(row[f"{score}_low"], digits - shift), number(row[f"{score}_high"], digits - shift)
    return number(row[score], 3 - shift), "" if NONE in ends else f"{ends[0]}{DASH}{ends[1]}"


def label(row: pd.Series, name: str) -> str:
    """What stands in a row's first columns."""
    return "both" if row[name] == "audio+visual" else str(row[name]) or NONE


def names(report: Report) -> list[str]:
    """What identifies a row: the model where there are several, then condition, modalities, and epsilon likewise."""
    several = ["model"] if report.table["model"].nunique() > 1 else []
    levels = report.table.loc[report.table["attacked"] != "", "level"].nunique() > 1
    return [*several, "condition", "attacked", *(["budget"] if levels else [])]


def sizes(report: Report) -> dict[str, Callable[[pd.Series], str]]:
    """Columns of what an attack used."""
    columns: dict[str, Callable[[pd.Series], str]] = {}
    for name in report.table.columns:
        if name.startswith("max_abs_"):
            columns[f"max |d| {name.removeprefix('max_abs_')}"] = partial(_change, name)
        if name.startswith("snr_db_"):
            columns[f"SNR {name.removeprefix('snr_db_')}, dB"] = partial(_decibels, name)
    columns["of budget"] = lambda row: number(row["gauge"], 4) if row["attacked"] else NONE
    columns["fwd"] = lambda row: number(row["forwards"], 0)
    columns["bwd"] = lambda row: number(row["backwards"], 0)
    columns["s"] = lambda row: number(row["seconds"], 1)
    return columns


def _change(column: str, row: pd.Series) -> str:
    return f"{row[column]:.4g}" if row[column] > 0 else NONE


def _decibels(column: str, row: pd.Series) -> str:
    return number(row[column], 1)


def terminal(report: Report, digits: int = 3) -> RenderableType:
    """Header, scores (the interval beneath each), what the attacks used, notes; a table for each epsilon."""
    header = Table.grid(padding=(0, 2))
    for key, text in report.header:
        header.add_row(Text(key, style="bold"), Text(text))
    parts: list[RenderableType] = [header, Text()]
    levels = sorted(set(report.table["level"])) if len(report.table) else []
    several = len(levels) > 2  # the clean row has a level of its own
    if several:
        parts.append(_scores(report, report.table[report.table["level"] == levels[0]], digits))
    for level in levels[1:] or levels:
        rows = report.table[report.table["level"].isin([level] if several else levels)]
        if several:
            parts += [Text(), Text(f"epsilon: {max(rows['budget'], key=len)}", style="bold")]
        parts.append(_scores(report, rows, digits))
        if levels[1:]:
            parts += [
                Text("\nlargest change, median SNR, longest against its budget, passes a clip, wall time:", style="dim")
            ]
            parts.append(_used(report, rows[rows["attacked"] != ""]))
    parts += [Text()]
    parts += [Text(note, style="bold red" if note.startswith("WARNING") else "dim") for note in report.notes]
    if len(report.skipped):
        skipped = Table("skipped clip", "reason", box=box.SIMPLE, pad_edge=False)
        for _, row in report.skipped.iterrows():
            skipped.add_row(Text(row["sample"]), Text(row["reason"]))
        parts.append(skipped)
    return Group(*parts)


def _scores(report: Report, rows: pd.DataFrame, digits: int) -> Table:
    first = [name for name in names(report) if name != "budget"]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in first:
        table.add_column("on" if name == "attacked" else name, no_wrap=True)
    # Where it is narrow, AUC makes room: d' says the same.
    shown = {score: title for score, title in SCORES.items() if digits > 2 or score != "AUC"}
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    before = None
    for _, row in rows.iterrows():
        group = row["model"], row["attacked"]
        if before not in (None, group):
            table.add_section()
        before = group
        cells = ["\n".join(part for part in cell(row, score, digits) if part) for score in shown]
        style = "bold" if row["condition"] == WORST else ""
        table.add_row(*(Text(label(row, name)) for name in first), *cells, style=style)
    return table


def _used(report: Report, rows: pd.DataFrame) -> Table:
    columns, first = sizes(report), [name for name in names(report) if name != "budget"]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in first:
        table.add_column("on" if name == "attacked" else name, no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right")
    for _, row in rows.iterrows():
        table.add_row(*(Text(label(row, name)) for name in first), *(show(row) for show in columns.values()))
    return table


def print_terminal(report: Report, console: Console) -> None:
    """Print for reading; a pipe gets lines as long as they need to be."""
    if not console.is_terminal:
        console.width = 200
    console.print(terminal(report, 3 if console.width >= 100 else 2), highlight=False, markup=False)


def _grid(report: Report, join: Callable[[tuple[str, str]], str]) -> tuple[list[str], list[list[str]]]:
    columns = sizes(report)
    head = [*names(report), *SCORES.values(), *columns]
    body = [
        [label(row, name) for name in names(report)]
        + [join(cell(row, score)) for score in SCORES]
        + [show(row) if row["attacked"] else NONE for show in columns.values()]
        for _, row in report.table.iterrows()
    ]
    return head, body


def markdown(report: Report) -> str:
    """GitHub's tables; the interval in brackets behind each score."""
    lines = ["# Robustness report", "", *(f"- **{key}**: {_escape_md(text)}" for key, text in report.header), ""]
    if len(report.table):
        head, body = _grid(report, lambda pair: f"{pair[0]} [{pair[1]}]" if pair[1] else pair[0])
        lines += ["| " + " | ".join(map(_escape_md, head)) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(map(_escape_md, row)) + " |" for row in body]
    lines += ["", *(f"- {_escape_md(note)}" for note in report.notes)]
    if len(report.skipped):
        lines += ["", "| skipped clip | reason |", "| --- | --- |"]
        lines += [f"| {_escape_md(r['sample'])} | {_escape_md(r['reason'])} |" for _, r in report.skipped.iterrows()]
    return "\n".join(lines) + "\n"


def latex(report: Report) -> str:
    """A booktabs table with the notes beneath; needs `\\usepackage{booktabs}`."""
    if not len(report.table):
        return "% no clip could be used\n"
    head, body = _grid(report, lambda pair: f"{pair[0]} [{pair[1]}]" if pair[1] else pair[0])
    lines = [f"% {key}: {text}" for key, text in report.header]
    lines += [
        r"\begin{tabular}{" + "l" * len(names(report)) + "r" * (len(head) - len(names(report))) + "}",
        r"\toprule",
    ]
    lines += [" & ".join(map(_escape_tex, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_escape_tex, row)) + r" \\" for row in body]
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in report.notes)]
    lines += [f"% skipped {row['sample']}: {row['reason']}" for _, row in report.skipped.iterrows()]
    return "\n".join(lines) + "\n"


def csv(report: Report) -> str:
    """Every number at full precision, one line a condition; scores of rows that are not valid are left empty."""
    return blanked(report).to_csv(index=False)


def as_json(report: Report) -> str:
    """The whole report at full precision; what is not applicable, not valid or not finite is null."""
    finite = blanked(report).astype(object)
    rows = [{key: _finite(value) for key, value in row.items()} for row in finite.to_dict("records")]
    whole = {
        "header": dict(report.header),
        "rows": rows,
        "notes": report.notes,
        "skipped": report.skipped.to_dict("records"),
        "audit": "failed" if report.failed else "passed",
    }
    return json.dumps(whole, indent=1) + "\n"


def blanked(report: Report) -> pd.DataFrame:
    """The table without the scores of rows that the audit refused."""
    table = report.table.copy()
    if len(table):
        table["valid"] = table["violations"] == 0
        bad = ~table["valid"]
        for score in SCORES:
            for column in (score, f"{score}_low", f"{score}_high"):
                table[column] = table[column].astype(float).mask(bad)
    return table


FORMATS: dict[str, Callable[[Report], str]] = {"md": markdown, "tex": latex, "csv": csv, "json": as_json}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _escape_md(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", r"\<")


def _escape_tex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        ("&", r"\&"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        (DASH, "--"),
    ):
        text = text.replace(plain, escaped)
    return text.replace("|d|", r"$|\delta|$")
