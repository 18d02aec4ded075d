"""`robustav selftest`: the defect catalogue, broken defences and honest models, on this machine."""

import json as json_
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS, FAILED_AUDIT

MARKS = {True: ("passed", "green"), False: ("FAILED", "bold red"), None: ("not applicable", "dim")}
KINDS = {
    "defect": "defects that other tools had",
    "planted": "broken defences, to be found out",
    "honest": "honest models, not to be accused",
}


def selftest(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False) -> None:
    """Prove on this machine, in about a minute, that the known ways to fool such a tool do not work here."""
    from robustav.selftest.run import selftest as run

    with Bars(ERRORS) as bars:
        outcomes = run(bars.attacks)
    failed = sum(outcome.passed is False for outcome in outcomes)
    if json:
        typer.echo(json_.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 160
        for kind, title in KINDS.items():
            table = Table("", title, "found", "seconds", box=None, pad_edge=False)
            for outcome in outcomes:
                if outcome.kind == kind:
                    word, style = MARKS[outcome.passed]
                    cells = Text(word, style), Text(outcome.name), Text(outcome.found), Text(f"{outcome.seconds:.1f}")
                    table.add_row(*cells)
            console.print(table)
            console.print()
        seconds = sum(outcome.seconds for outcome in outcomes)
        untested = sum(outcome.passed is None for outcome in outcomes)
        console.print(
            f"{len(outcomes) - failed - untested} passed, {failed} failed, {untested} not applicable, in {seconds:.0f} s",
            style="bold red" if failed else "bold green",
            highlight=False,
        )
    if failed:
        raise typer.Exit(FAILED_AUDIT)
