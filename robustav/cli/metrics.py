"""`robustav metrics`: density, convexity, all, validate."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS, Format, Json, chosen_format, models_by_name

WHAT = ("density", "convexity", "all", "validate")
LATENTS, CONVEXITY, VALIDATE = "Density", "Convexity", "Validate"  # panels of the help


def metrics(
    what: Annotated[str, typer.Argument(help="density, convexity, all (both), or validate.", show_default=False)],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="With validate: folders that `robustav attack` wrote, best with 4 budgets or more."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            autocompletion=models_by_name,
            help="A name from `robustav models`, package.module:factory, or file.py:factory. Default: av-fusion; with validate "
            "the run's own.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="av-events (default; with validate the run's own), a manifest, a folder of clips, or one clip.",
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load into the model.")] = None,
    trust_pickle: Annotated[bool, typer.Option(help="Unpickle the checkpoint. This runs code that is in it.")] = False,
    latent: Annotated[
        str | None,
        typer.Option(metavar="MODULE", help="The last module of a wrapped network, whose input is the latent."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(help="Comma-separated: input, 'front end', features, latent, or modules of the network by name."),
    ] = "input,features,latent",
    k: Annotated[
        str,
        typer.Option(
            "--k", help="Nearest neighbours; 5,10,20,50 is a sweep. A class of fewer than 5 k clips is skipped."
        ),
    ] = "10",
    limit: Annotated[int, typer.Option(min=0, help="Clips to look at, drawn by seed; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of every random draw; global generators are never touched.")] = 0,
    resamples: Annotated[
        int | None, typer.Option(min=39, help="Bootstrap resamples. Default: 1000; with validate 2000.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Clips at a time. Default: 8 on a CPU, 64 on a GPU.")
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Stop at the first clip that cannot be used, instead of listing it.")
    ] = False,
    spaces: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: raw, unit (cosine), whitened. Default: all three.", rich_help_panel=LATENTS
        ),
    ] = None,
    adversarial: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="A run made with --keep N: where its adversarial examples lie among the clean clips.",
            rich_help_panel=LATENTS,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Other clips, such as av-events/train: how far the surveyed ones lie where those do.",
            rich_help_panel=LATENTS,
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs of clips a class. Default: 5000 at the latent, 200 at the features, 50 elsewhere.",
            rich_help_panel=CONVEXITY,
        ),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(
            help="Noise of the hardened convexity, in typical distances of clips. Default: 0.5,1,2,4.",
            rich_help_panel=CONVEXITY,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Probability at which a class counts as accepted (multi-label). Default: 0.5; with validate the run's.",
            rich_help_panel=CONVEXITY,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What robust means: ap (average precision; default for multi-label), hit (top-1; default for multi-class), or "
            "kept (one minus attack success).",
            rich_help_panel=VALIDATE,
        ),
    ] = None,
    attacked: Annotated[
        str | None,
        typer.Option(
            help="Under which attack: audio, visual, or both. Default: the most modalities.", rich_help_panel=VALIDATE
        ),
    ] = None,
    clips: Annotated[
        str,
        typer.Option(
            help="Where the metrics are measured: other (clips that the runs did not attack), same, or auto (other if there are "
            "half as many).",
            rich_help_panel=VALIDATE,
        ),
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="A folder for the report in every format, with figures.")] = None,
    format_: Format = None,
    json: Json = False,
) -> None:
    """Latent geometry: density and convexity of every class, layer and modality, and whether they predict robustness."""
    if what not in WHAT:
        raise typer.BadParameter(f"must be one of {', '.join(WHAT)}, got {what!r}", param_hint="WHAT")
    validating = what == "validate"
    if validating and not runs:
        raise typer.BadParameter("validate needs the folders of one or more runs: robustav metrics validate RUN ...")
    for name, given, fits in (
        ("RUNS", bool(runs), validating),
        ("--target", target is not None, validating),
        ("--attacked", attacked is not None, validating),
        ("--adversarial", adversarial is not None, what in ("density", "all")),
        ("--against", against is not None, what in ("density", "all")),
        ("--clips", clips != "auto", validating),
        ("--pairs", pairs is not None, what != "density"),
        ("--sigmas", sigmas is not None, what != "density"),
        ("--threshold", threshold is not None, what in ("convexity", "all")),
        ("--spaces", spaces is not None, what != "convexity"),
        ("a list of --k", "," in k, what != "convexity"),
        ("--limit", bool(limit), not validating),
    ):
        if given and not fits:
            raise typer.BadParameter(f"has no meaning for {what}: leave it out", param_hint=name)
    if out is not None and out.exists() and not out.is_dir():
        raise typer.BadParameter(f"must be a folder, {out} is a file", param_hint="--out")
    shown = chosen_format(format_, json)
    from robustav.geometry.convexity import Segments
    from robustav.geometry.survey import Survey
    from robustav.metrics.convexity import SIGMAS
    from robustav.metrics.spaces import SPACES
    from robustav.study import Wanted, study, validate_runs

    survey = Survey(
        model=model or "av-fusion",
        data=data,
        checkpoint=checkpoint,
        trust_pickle=trust_pickle,
        latent=latent,
        layers=_words(layers),
        seed=seed,
        limit=limit,
        threshold=0.5 if threshold is None else threshold,
        device=device,
        batch_size=batch_size,
        strict=strict,
        resamples=resamples or (2000 if validating else 1000),
    )
    ks = _numbers(k, int, "--k")
    wanted = Wanted(
        ks,
        tuple(SPACES) if spaces is None else _words(spaces),
        Segments(pairs, SIGMAS if sigmas is None else tuple(_numbers(sigmas, float, "--sigmas")), ks[0], seed),
        density=what != "convexity",
        convexity=what != "density",
        adversarial=adversarial,
        against=against,
    )
    with Bars(ERRORS) as bars:
        if validating:
            (found,) = validate_runs(
                runs or [],
                survey,
                wanted,
                targets=[target] if target else [],
                attacked=attacked,
                clips=clips,
                model=model,
                data=data,
                checkpoint=checkpoint,
                progress=bars.generation,
            ).values()
        else:
            found = study(survey, wanted, progress=bars.generation)
    from robustav.report.grids import FORMATS, print_terminal

    if shown is None:
        print_terminal(found.report, Console())
    else:
        typer.echo(FORMATS[shown](found.report), nl=False)
    if out is not None:
        for file in found.save(out):
            ERRORS.print(f"wrote {file}", style="dim", soft_wrap=True, highlight=False)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, kind: Callable[[str], float], option: str) -> list:
    try:
        found = [kind(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(
            f"must be numbers such as {'5,10' if kind is int else '0.5,1'}, got {text!r}", param_hint=option
        )
    return found
