"""A robustness report as text: terminal, Markdown, LaTeX, CSV, JSON. Nothing is computed here."""

import json
from collections.abc import Callable
from functools import partial

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustav.report.table import Report
from robustav.report.text import DASH, NONE, escape_md, finite, latex_table, markdown_skipped, markdown_table, number
from robustav.report.words import WORST

SCORES = {
    "mAP": "mAP",
    "AUC": "AUC",
    "d_prime": "d'",
    "LRAP": "LRAP",
    "top1": "top-1 hit",
    "hidden": "hidden",
    "success": "success",
    "drop": "drop",
}
ROOMY = ("AUC", "LRAP")  # not for a terminal: d' says the same as AUC, and LRAP is for those who know it
NOT_VALID = "not valid"


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
    if name == "condition":
        return condition(row)
    return "both" if row[name] == "audio+visual" else str(row[name]) or NONE


def condition(row: pd.Series) -> str:
    """A row's name; with a + where it counts what it and all before it reach."""
    return ("+ " if row["spared"] and row["condition"] != WORST else "") + str(row["condition"])


def flag_lines(report: Report) -> list[str]:
    """Each reason to doubt the numbers, with what to try."""
    if report.flags.empty:
        return []
    lines = []
    for (run, name, advice), rows in report.flags.groupby(["run", "name", "advice"], sort=False):
        of = f" ({run})" if len(report.headers) > 1 else ""
        lines.append(f"FLAG {name}{of}: {' '.join(rows['sentence'])} {advice}")
    return lines


BUDGETS = {"at_5": "5 %", "at_25": "25 %", "at_50": "half", "at_75": "75 %", "at_95": "95 %", "all": "all"}


def budget_grid(report: Report) -> tuple[list[str], list[list[str]]]:
    """The smallest budgets: at how many times epsilon which share of the clips is broken."""
    several = len(report.headers) > 1
    head = [*(["run"] if several else []), "smallest budget", "of", *BUDGETS.values(), "half, 95 %", "broken"]
    body = []
    for _, row in report.smallest.iterrows():
        bad = bool(row["violations"])
        cells = [NOT_VALID if bad else _times(row[column]) for column in BUDGETS]
        ends = [_times(row[end]) for end in ("at_50_low", "at_50_high")]
        between = NONE if bad or NONE in ends else DASH.join(ends)
        found = f"{row['broken']} of {row['clips']}" + (f" ({row['wrong']} wrong already)" if row["wrong"] else "")
        body.append([*([row["run"]] if several else []), row["condition"], row["budget"], *cells, between, found])
    return head, body


def _times(value: float) -> str:
    return NONE if pd.isna(value) else f"{value:.3g}"


def names(report: Report) -> list[str]:
    """What identifies a row: the run where there are several, then condition, modalities, and budgets likewise."""
    attacked = report.table[report.table["attacked"] != ""]
    budgets = attacked.groupby("attacked")["budget"].nunique().max() if len(attacked) else 0
    return [
        *(["run"] if len(report.headers) > 1 else []),
        "condition",
        "attacked",
        *(["budget"] if budgets > 1 else []),
    ]


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
    """For each run a header, then for each epsilon the scores (with intervals beneath) and what the attacks used; notes."""
    parts: list[RenderableType] = []
    for run, about in report.headers.items():
        header = Table.grid(padding=(0, 2))
        for key, text in about.items():
            header.add_row(Text(key, style="bold"), Text(text))
        parts += [header, Text()]
        if len(report.table):
            parts += _tables(report, report.table[report.table["run"] == run], digits)
            parts.append(Text())
    if len(report.smallest):
        head, body = budget_grid(report)
        table = Table(*head, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for cells in body:
            table.add_row(*map(Text, cells))
        parts += [Text("times the budget at which so many clips are broken:", style="dim"), table, Text()]
    parts += [Text(line, style="bold yellow") for line in flag_lines(report)]
    alarms = ("WARNING", "AUDIT")
    parts += [Text(note, style="bold red" if any(word in note for word in alarms) else "dim") for note in report.notes]
    if len(report.skipped):
        skipped = Table("skipped clip", "reason", box=box.SIMPLE, pad_edge=False)
        for _, row in report.skipped.iterrows():
            skipped.add_row(Text(row["sample"]), Text(row["reason"]))
        parts.append(skipped)
    return Group(*parts)


def _tables(report: Report, rows: pd.DataFrame, digits: int) -> list[RenderableType]:
    """One run's tables; the clean row stands alone above those of several epsilons."""
    parts: list[RenderableType] = []
    clean, attacked = rows[rows["attacked"] == ""], rows[rows["attacked"] != ""]
    if attacked.empty:
        return [_scores(clean, digits)]
    several = attacked["level"].nunique() > 1
    if several:
        parts.append(_scores(clean, digits))
    for _, level in attacked.groupby("level"):
        if several:
            parts += [Text(), Text(f"epsilon: {max(level['budget'], key=len)}", style="bold")]
        parts.append(_scores(level if several else rows, digits))
        parts += [
            Text("\nlargest change, median SNR, longest against its budget, passes a clip, wall time:", style="dim")
        ]
        parts.append(_used(report, level))
    return parts


def _scores(rows: pd.DataFrame, digits: int) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("condition", "on"):
        table.add_column(title, no_wrap=True)
    shown = {score: title for score, title in SCORES.items() if score not in ROOMY}
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    before = None
    for _, row in rows.iterrows():
        if before not in (None, row["attacked"]):
            table.add_section()
        before = row["attacked"]
        cells = ["\n".join(part for part in cell(row, score, digits) if part) for score in shown]
        style = "bold" if row["condition"] == WORST else ""
        table.add_row(Text(condition(row)), Text(label(row, "attacked")), *cells, style=style)
    return table


def _used(report: Report, rows: pd.DataFrame) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title in ("condition", "on"):
        table.add_column(title, no_wrap=True)
    columns = sizes(report)
    for title in columns:
        table.add_column(title, justify="right")
    for _, row in rows.iterrows():
        table.add_row(Text(condition(row)), Text(label(row, "attacked")), *(show(row) for show in columns.values()))
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
    lines = ["# Robustness report", ""]
    for run, about in report.headers.items():
        if len(report.headers) > 1:
            lines += [f"## {escape_md(run)}", ""]
        lines += [*(f"- **{key}**: {escape_md(text)}" for key, text in about.items()), ""]
    if len(report.table):
        head, body = _grid(report, lambda pair: f"{pair[0]} [{pair[1]}]" if pair[1] else pair[0])
        lines += markdown_table(head, body)
    if len(report.smallest):
        lines += ["", "Times the budget at which so many clips are broken:", "", *markdown_table(*budget_grid(report))]
    lines += ["", *(f"- **{escape_md(line)}**" for line in flag_lines(report))]
    lines += [f"- {escape_md(note)}" for note in report.notes]
    lines += markdown_skipped(report.skipped)
    return "\n".join(lines) + "\n"


def latex(report: Report) -> str:
    """A booktabs table with the notes beneath; needs `\\usepackage{booktabs}`."""
    if not len(report.table):
        return "% no clip could be used\n"
    head, body = _grid(report, lambda pair: f"{pair[0]} [{pair[1]}]" if pair[1] else pair[0])
    lines = [f"% {key}: {text}" for about in report.headers.values() for key, text in about.items()]
    lines += latex_table(head, body, len(names(report)))
    if len(report.smallest):
        lines += latex_table(*budget_grid(report), 2 + (len(report.headers) > 1))
    lines += [f"% {note}" for note in [*flag_lines(report), *report.notes]]
    lines += [f"% skipped {row['sample']}: {row['reason']}" for _, row in report.skipped.iterrows()]
    return "\n".join(lines) + "\n"


def csv(report: Report) -> str:
    """Every number at full precision, one line a condition; scores of rows that are not valid are left empty."""
    return blanked(report).to_csv(index=False)


def as_json(report: Report) -> str:
    """The whole report at full precision; what is not applicable, not valid or not finite is null."""
    rows = _records(blanked(report))
    whole = {
        "runs": report.headers,
        "rows": rows,
        "smallest": _records(report.smallest),
        "flags": _records(report.flags),
        "notes": report.notes,
        "skipped": report.skipped.to_dict("records"),
        "audit": "failed" if report.failed else "passed",
    }
    return json.dumps(whole, indent=1) + "\n"


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(k): finite(v) for k, v in row.items()} for row in table.astype(object).to_dict("records")]


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
