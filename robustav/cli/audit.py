"""`robustav audit`: the kept examples of a run, looked at again."""

import json as jsons
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS, FAILED_AUDIT, Json, models_by_name


def audit(
    run: Annotated[Path, typer.Argument(help="A folder that `robustav attack --keep N` wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", autocompletion=models_by_name, help="Unless told, the run's own.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Unless told, the run's own.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Unless told, the run's own.")] = None,
    trust_pickle: Annotated[bool, typer.Option(help="Unpickle the checkpoint. This runs code that is in it.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    json: Json = False,
) -> None:
    """Read the kept examples of a run from disk; measure, project and score them once more."""
    from robustav.evidence import reexamine

    given: dict[str, Any] = {"model": model, "data": data, "checkpoint": checkpoint}
    with Bars(ERRORS) as bars:
        found = reexamine(run, **given, trust_pickle=trust_pickle, device=device, progress=bars.generation)
    rows = found.to_dict("records")
    if json:
        typer.echo(jsons.dumps(rows, indent=1))
    else:
        table = Table(
            "condition", "on", "budget", "examples", "of budget", "moved", "logit change", "problems", box=None
        )
        for row in rows:
            sizes = (f"{row['gauge']:.6f}", f"{row['moved']:.2g}", f"{row['logit_change']:.2g}")
            cells = (
                row["condition"],
                row["attacked"] or "-",
                row["budget"] or "-",
                str(row["examples"]),
                *sizes,
                str(row["problems"]),
            )
            table.add_row(*map(Text, cells))
        console = Console()
        console.print(table, highlight=False)
        console.print(
            "Largest of all examples: length over budget as stored; how far projecting again moves them, in budgets; change "
            "of a logit against the ledger.",
            style="dim",
        )
        for row in rows:
            if row["problems"]:
                console.print(
                    Text(
                        f"{row['condition']}{' on ' + row['budget'] if row['budget'] else ''}: {row['example']}",
                        "bold red",
                    )
                )
    if found["problems"].any():
        ERRORS.print("the audit failed: an example is not what the ledger says", style="bold red")
        raise typer.Exit(FAILED_AUDIT)
