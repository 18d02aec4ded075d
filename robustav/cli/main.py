"""The commands. Each reads its arguments, calls one library function and prints one thing.

Everything heavy is imported inside a command: help and tab completion must not wait for torch.
"""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from robustav import __version__
from robustav.cli.audit import audit
from robustav.cli.experiment import experiment
from robustav.cli.metrics import metrics
from robustav.cli.progress import Bars
from robustav.cli.selftest import selftest
from robustav.cli.shared import ERRORS, FAILED_AUDIT, Format, Json, chosen_format, models_by_name, shard_of
from robustav.cli.train import train

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
BAD_INPUT, INTERRUPTED = 2, 130


def _attacks(incomplete: str) -> list[str]:
    from robustav.attacks import ATTACKS

    return [name for name in [*ATTACKS, "universal", "torchattacks:", "art:"] if name.startswith(incomplete)]


def _suites(incomplete: str) -> list[str]:
    return [name for name in ("quick", "standard", "thorough") if name.startswith(incomplete)]


Figures = Annotated[bool, typer.Option("--figures", help="Also draw figures, into the run's folder.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robustav {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """How easily can an audio, visual or audio-visual classifier be fooled, and can that number be trusted?"""


@app.command()
def attack(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            autocompletion=models_by_name,
            help="A name from `robustav models`, hf:FOLDER, timm:NAME, package.module:factory or file.py:factory; settings in "
            "brackets, as in 'cav-mae(frames=1)' or 'ast(at=features)'.",
        ),
    ] = "av-fusion",
    eps: Annotated[
        list[str] | None,
        typer.Option(
            "--eps",
            "-e",
            help="Budget in each modality's own unit: 0.01, or 4/255, or audio=0.002,visual=4/255, or snr=30dB. "
            "A list (0.001,0.01, or --eps again) gives a curve. Default 0.01.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="av-events (default), a manifest (CSV or JSON lines), a folder of clips, or one clip."
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load into the model.")] = None,
    trust_pickle: Annotated[bool, typer.Option(help="Unpickle the checkpoint. This runs code that is in it.")] = False,
    norm: Annotated[str | None, typer.Option(help="linf (default), l2 or l1. An SNR is always l2.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            autocompletion=_suites,
            help="quick (is there anything to defend?), standard, or thorough (what a claim of robustness needs).",
        ),
    ] = "standard",
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attacks",
            "--attack",
            autocompletion=_attacks,
            help="In place of a suite, comma-separated: noise, fgsm, pgd, momentum, apgd, aimed, fmn, fab, mla-lp, square, "
            "rays, universal, torchattacks:NAME, art:NAME.",
        ),
    ] = None,
    attacked: Annotated[
        list[str] | None,
        typer.Option(help="Modalities to attack: audio, visual, or both. Again for more; default: each, and both."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of iterative attacks; each attack and suite has its own default.")
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=1, help="Random restarts of pgd and apgd; the best is kept for each clip.")
    ] = 1,
    eot: Annotated[
        int | None,
        typer.Option(min=1, help="Passes that attacks average, for random models. Default: 20 if declared so, else 1."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            autocompletion=models_by_name, help="A second model: what breaks it is tried on this one (transfer)."
        ),
    ] = None,
    source_checkpoint: Annotated[Path | None, typer.Option(help="Weights to load into the second model.")] = None,
    learn_on: Annotated[
        str | None, typer.Option(help="Clips to learn a universal perturbation on. Default: av-events/train.")
    ] = None,
    smallest: Annotated[
        bool, typer.Option("--smallest", help="Also find the smallest budget that breaks each clip: the whole curve.")
    ] = False,
    goal: Annotated[
        str,
        typer.Option(
            help="untargeted, targeted:CLASS, hide:CLASS,CLASS, inject:CLASS,CLASS, stealth:CLASS,CLASS (hide, and leave "
            "the rest alone), top-k:K, corpus-ap, or push-latent."
        ),
    ] = "untargeted",
    loss: Annotated[
        str | None,
        typer.Option(
            help="What to climb: bce, ranking, top1, hinges, ml-dlr, top1-dlr (multi-label); ce, margin, dlr (multi-class)."
        ),
    ] = None,
    success: Annotated[
        str | None, typer.Option(help="When an untargeted attack has won: top1 (default), label-set or misclassified.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="What the run is for: mAP (every attack on every clip), or hits (clips that are broken are left alone, up "
            "to five times faster). Default: mAP of multi-label models, hits of others."
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Probability at which a class counts as predicted (multi-label).")
    ] = 0.5,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="Clips to attack, drawn by seed; 0: all. Default: 100 of av-events, else all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw; global generators are never touched.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Clips at a time; auto: 8 on a CPU, 64 on a GPU.")] = "auto",
    shard: Annotated[
        str, typer.Option(help="This process's share, as in 0/4; run all four with the same --out.")
    ] = "0/1",
    strict: Annotated[
        bool, typer.Option(help="Stop at the first clip that cannot be used, instead of listing it.")
    ] = False,
    probe: Annotated[
        int,
        typer.Option(
            min=0, help="Clips on which the model itself is looked at, for flags: some 100 passes each; 0: none."
        ),
    ] = 16,
    keep: Annotated[int, typer.Option(min=0, help="Keep the adversarial examples of the first N clips.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder; default runs/MODEL-DIGEST. The same command goes on where it was stopped."
        ),
    ] = None,
    figures: Figures = False,
    format_: Format = None,
    json: Json = False,
) -> None:
    """Attack a classifier and print a robustness report table."""
    chosen = chosen_format(format_, json)
    settings: dict[str, Any] = {"shard": shard_of(shard), "batch_size": _whole_or_auto(batch_size)}
    from robustav.evaluation import Evaluation
    from robustav.harness import Settings

    evaluation = Evaluation(
        model=model,
        eps=eps or ["0.01"],
        data=data,
        checkpoint=checkpoint,
        trust_pickle=trust_pickle,
        norm=norm,
        suite=suite,
        attacks=_split(attacks) or [""] if attacks is not None else [],
        attacked=attacked or [],
        steps=steps,
        restarts=restarts,
        eot=eot,
        smallest=smallest,
        source=source,
        source_checkpoint=source_checkpoint,
        learn_on=learn_on,
        score=score,  # type: ignore[arg-type]  # checked there
        goal=goal,
        loss=loss,
        success=success,
        threshold=threshold,
        seed=seed,
        limit=limit,
    )
    try:
        with Bars(ERRORS) as bars:
            made = Settings(device=device, strict=strict, keep=keep, probed=probe, progress=bars.attacks, **settings)
            ledger = evaluation.run(out, made, progress=bars.generation)
    except KeyboardInterrupt:
        ERRORS.print("stopped: the same command goes on where it was")
        raise typer.Exit(INTERRUPTED) from None
    if made.shard[1] > 1:
        ERRORS.print(f"shard {shard} done; when all are, print the report with: robustav report {ledger.folder}")
        return
    _print_report([ledger.folder], chosen, figures)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `robustav attack` wrote.")],
    figures: Figures = False,
    format_: Format = None,
    json: Json = False,
) -> None:
    """Print the report of one run, or of several in one table."""
    _print_report(runs, chosen_format(format_, json), figures)


@app.command()
def models(
    what: Annotated[
        str | None,
        typer.Argument(
            autocompletion=models_by_name,
            help="One model, in full; `check` to say which model FILE fits; `convert` to write FILE to OUT as safetensors.",
        ),
    ] = None,
    files: Annotated[list[str] | None, typer.Argument(help="With `check`: FILE. With `convert`: FILE OUT.")] = None,
    trust_pickle: Annotated[bool, typer.Option(help="Unpickle FILE. This runs code that is in it.")] = False,
    json: Json = False,
) -> None:
    """List the models, or show one: inputs, stages, weights and how they were made; or look into a checkpoint."""
    from robustav.cli.models import check_checkpoint, convert_checkpoint, list_models, show_model

    given = files or []
    wanted = {"check": "FILE", "convert": "FILE OUT"}.get(what or "", "")
    if len(given) != len(wanted.split()):
        words = " ".join(given) or "nothing"
        raise typer.BadParameter(f"`{what}` takes {wanted or 'no file'}, got {words}")
    if what == "check":
        if not check_checkpoint(given[0], trust_pickle, json):
            raise typer.Exit(FAILED_AUDIT)
    elif what == "convert":
        convert_checkpoint(given[0], given[1], trust_pickle)
    else:
        show_model(what, json) if what else list_models(json)


@app.command()
def data(
    what: Annotated[
        str | None, typer.Argument(help="`av-events`, or `check` to read every clip of PATH as the model would.")
    ] = None,
    path: Annotated[str | None, typer.Argument(help="With `check`: a manifest, a folder or a clip.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", autocompletion=models_by_name, help="Whose inputs to read.")
    ] = "av-fusion",
    json: Json = False,
) -> None:
    """List the data sets, show one, or check your own before attacking."""
    from robustav.cli.data import check_data, list_data, show_data

    if what == "check":
        if path is None:
            raise typer.BadParameter("`check` needs a PATH: a manifest, a folder or a clip")
        with Bars(ERRORS) as bars:
            usable = check_data(path, model, json, bars.generation)
        if not usable:
            raise ValueError(f"no clip of {path} can be used with {model}")
    elif path is not None:
        raise typer.BadParameter(f"only `check` takes a PATH, got {what!r} and {path!r}")
    elif what is None:
        list_data(json)
    else:
        with Bars(ERRORS) as bars:
            show_data(what, json, bars.generation)


app.command()(train)
app.command()(metrics)
app.add_typer(experiment, name="experiment")
app.command()(audit)
app.command()(selftest)


def _print_report(folders: list[Path], chosen: str | None, figures: bool) -> None:
    from robustav.ledger import Ledger
    from robustav.report import FORMATS, build, print_terminal

    ledgers = [Ledger(folder) for folder in folders]
    made = build(ledgers)
    if chosen is None:
        print_terminal(made, Console())
    else:
        typer.echo(FORMATS[chosen](made), nl=False)
    ERRORS.print(f"kept in {', '.join(map(str, folders))}", style="dim", soft_wrap=True, highlight=False)
    if figures:
        from robustav.report.figures import draw

        # Those of several runs belong to none of them.
        for file in draw(made, ledgers, (folders[0] if len(folders) == 1 else Path()) / "figures"):
            ERRORS.print(f"drew {file}", style="dim", soft_wrap=True, highlight=False)
    if made.failed:
        ERRORS.print("the audit failed: see the rows marked 'not valid'", style="bold red")
        raise typer.Exit(FAILED_AUDIT)
    if made.table.empty:
        raise ValueError("no clip could be used: the reasons are in the table of skipped clips")


def _split(text: str) -> list[str]:
    """Names apart at commas, but not at those within brackets, as in `torchattacks:PGD(steps=5,alpha=0.1)`."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text) if part.strip()]


def _whole_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or text == "0":
        raise typer.BadParameter(f"must be auto or a number from 1, got {text!r}", param_hint="--batch-size")
    return int(text)


def main() -> None:
    """The console script: one sentence for bad input, no traceback (unless ROBUSTAV_TRACEBACK is set)."""
    # Read when torch is imported: threads that spin while they wait make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, OSError) as error:
        if os.environ.get("ROBUSTAV_TRACEBACK"):
            raise
        ERRORS.print(f"robustav: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        sys.exit(BAD_INPUT)
