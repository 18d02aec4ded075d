"""What every renderer needs: numbers, escapes, and tables in Markdown and LaTeX."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

NONE = "-"
DASH = "\u2013"  # one column wide, and no minus sign


def number(value: Any, digits: int = 3) -> str:
    """A number at fixed precision; a dash where there is none."""
    if value is None or pd.isna(value):
        return NONE
    return f"{value:.{digits}f}" if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def between(low: float, high: float, digits: int = 3) -> str:
    """Both ends of an interval; a dash between numbers with a minus sign would be hard to read."""
    return f"{number(low, digits)}{DASH if low >= 0 else ' to '}{number(high, digits)}"


def finite(value: Any) -> Any:
    """A value as JSON can hold it: None in place of what is not finite, Python's numbers for NumPy's."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def escape_md(text: str) -> str:
    """Text as it stands in a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", r"\<")


def escape_tex(text: str) -> str:
    """Text as it stands in LaTeX."""
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


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of one of GitHub's tables."""
    lines = ["| " + " | ".join(map(escape_md, head)) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(map(escape_md, row)) + " |" for row in body]


def markdown_skipped(skipped: pd.DataFrame) -> list[str]:
    """The lines that list skipped clips; none if there are none."""
    if not len(skipped):
        return []
    return ["", *markdown_table(["skipped clip", "reason"], skipped[["sample", "reason"]].to_numpy().tolist())]


def latex_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a booktabs table whose first `left` columns are words."""
    lines = [r"\begin{tabular}{" + "l" * left + "r" * (len(head) - left) + "}", r"\toprule"]
    lines += [" & ".join(map(escape_tex, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escape_tex, row)) + r" \\" for row in body]
    return [*lines, r"\bottomrule", r"\end{tabular}"]
