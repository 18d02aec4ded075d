"""`robustav experiment`: run a recipe, report on its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS, FAILED_AUDIT, Format, Json, chosen_format, shard_of

FAILED = 1  # exit code where a training, an evaluation or a metric failed

experiment = typer.Typer(
    no_args_is_help=True, help="Recipes: train several models by several methods, judge them all, report."
)


@experiment.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as experiments/fusion-study.toml.")],
    out: Annotated[Path | None, typer.Option(help="The results' folder; default runs/NAME, after the recipe.")] = None,
    only: Annotated[
        str, typer.Option(help="Those MODEL/METHOD/SEED alone that fit a pattern, as in 'av-*/erm/0'.")
    ] = "*",
    shard: Annotated[str, typer.Option(help="This process's share, as in 0/2; run both with the same --out.")] = "0/1",
    budget: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which no further training or evaluation is begun.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Do what a recipe asks and what is not done yet, then write its report; the same command goes on."""
    share = shard_of(shard)
    from robustav.experiment.run import default_folder
    from robustav.experiment.run import run as run_recipe
    from robustav.experiment.summary import report_of, save

    with Bars(ERRORS) as bars:
        outcome = run_recipe(
            recipe,
            out,
            only=only,
            shard=share,
            budget=budget,
            device=device,
            say=lambda words: ERRORS.print(words, style="dim", highlight=False, markup=False, soft_wrap=True),
            progress=bars.attacks,
        )
    folder = default_folder(recipe, out)
    if outcome.failed:
        ERRORS.print(f"{len(outcome.failed)} failed; the same command tries them again:", style="bold red")
        for words, sentence in outcome.failed.items():
            ERRORS.print(f"  {words}: {sentence}", highlight=False, markup=False, soft_wrap=True)
    if outcome.left:
        ERRORS.print(f"{len(outcome.left)} of this process are left; the same command goes on with them.")
    if share == (0, 1) and outcome.judged:
        made, results = report_of(folder)
        for file in save(made, results, folder / "report"):
            typer.echo(file)
        _refuse_unsound(results.unsound)
    else:
        ERRORS.print(f"for the report of all that is done: robustav experiment report {folder}", soft_wrap=True)
    if outcome.failed:
        raise typer.Exit(FAILED)


@experiment.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `robustav experiment run` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Also write it there, as Markdown and CSV with figures.")] = None,
    format_: Format = None,
    json: Json = False,
) -> None:
    """Print the report of what is finished, and what is missing."""
    chosen = chosen_format(format_, json)
    from robustav.experiment.summary import report_of, save
    from robustav.report.grids import FORMATS, print_terminal

    made, results = report_of(folder)
    if chosen is None:
        print_terminal(made, Console())
    else:
        typer.echo(FORMATS[chosen](made), nl=False)
    if out is not None:
        for file in save(made, results, out):
            ERRORS.print(f"wrote {file}", style="dim", soft_wrap=True, highlight=False)
    _refuse_unsound(results.unsound)


def _refuse_unsound(conditions: Sequence[str]) -> None:
    if conditions:
        ERRORS.print(f"the audit failed in {len(conditions)} conditions: see the notes", style="bold red")
        raise typer.Exit(FAILED_AUDIT)
