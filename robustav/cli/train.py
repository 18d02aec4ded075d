"""`robustav train`: a recipe from options, one training, and what it scores and costs."""

import json as jsons
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustav.cli.progress import Bars
from robustav.cli.shared import ERRORS, Json, models_by_name

INTERRUPTED = 130  # exit code
MODEL, ADVERSARY, LEARNING, RUN = "Model and data", "Adversary in training", "Learning", "Run"  # panels of the help


def _methods(incomplete: str) -> list[str]:
    from robustav.training.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def train(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the training; default runs/MODEL-METHOD-DIGEST. The same command goes on where it was stopped.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            autocompletion=models_by_name,
            rich_help_panel=MODEL,
            help="A name from `robustav models`, hf:FOLDER, timm:NAME, package.module:factory or file.py:factory.",
        ),
    ] = "av-fusion",
    method: Annotated[
        str,
        typer.Option(
            autocompletion=_methods,
            help="One of --list, settings in brackets, as in 'pgd-at(steps=7)'; or file.py:Class for your own.",
        ),
    ] = "erm",
    list_: Annotated[bool, typer.Option("--list", help="List the methods with their settings, and exit.")] = False,
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", rich_help_panel=MODEL, help="Clips to train on: av-events/train, a manifest or a folder."
        ),
    ] = "av-events/train",
    validation: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODEL,
            help="Clips for the score of each epoch. Default: av-events/validation for av-events, else none.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(rich_help_panel=MODEL, help="Weights to start from. Default: random ones.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=MODEL, help="Clips to train on, drawn by seed. Default: all.")
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", rich_help_panel=MODEL, help="Show rare classes as often as common ones.")
    ] = False,
    augment: Annotated[
        str,
        typer.Option(
            rich_help_panel=MODEL,
            help="none, light (loudness, shifts) or full (flips and SpecAugment's masks too); settings in brackets, as in "
            "'full(time_mask=0.1)'.",
        ),
    ] = "light",
    eps: Annotated[
        str,
        typer.Option(
            "--eps",
            "-e",
            rich_help_panel=ADVERSARY,
            help="Budget of methods that have an adversary: 0.01, 4/255, audio=0.002,visual=4/255, or snr=30dB.",
        ),
    ] = "0.003",
    norm: Annotated[
        str | None, typer.Option(rich_help_panel=ADVERSARY, help="linf (default), l2 or l1. An SNR is always l2.")
    ] = None,
    ramp: Annotated[
        float, typer.Option(rich_help_panel=ADVERSARY, help="Share of the steps over which that budget grows from 0.")
    ] = 0.0,
    attacked: Annotated[
        str,
        typer.Option(
            rich_help_panel=ADVERSARY, help="audio, visual or both. Default: what --eps covers.", show_default=False
        ),
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=LEARNING, help="Passes over the clips.")] = 14,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=LEARNING, help="Of all processes together.")] = 32,
    optimizer: Annotated[str, typer.Option(rich_help_panel=LEARNING, help="adamw or sgd.")] = "adamw",
    learning_rate: Annotated[float, typer.Option(rich_help_panel=LEARNING, help="Highest.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=LEARNING, help="Not of biases and gains.")] = 0.05,
    momentum: Annotated[float, typer.Option(rich_help_panel=LEARNING, help="Of sgd.")] = 0.9,
    warmup: Annotated[
        float, typer.Option(rich_help_panel=LEARNING, help="Share of the steps in which the learning rate rises.")
    ] = 0.3,
    cosine: Annotated[
        bool, typer.Option(rich_help_panel=LEARNING, help="Then let it fall to 0 along a cosine, or leave it.")
    ] = True,
    ema: Annotated[
        float, typer.Option(rich_help_panel=LEARNING, help="Decay of the running mean of the weights; 0: none.")
    ] = 0.99,
    clip_norm: Annotated[float, typer.Option(rich_help_panel=LEARNING, help="Longest gradient; 0: any.")] = 0.0,
    score: Annotated[
        str | None,
        typer.Option(rich_help_panel=LEARNING, help="mAP or top1. Default: mAP of multi-label models, top1 of others."),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=LEARNING, help="Stop after so many epochs without a better score; 0: never."
        ),
    ] = 0,
    keep: Annotated[str, typer.Option(rich_help_panel=LEARNING, help="last weights, or best by the score.")] = "last",
    seed: Annotated[int, typer.Option(rich_help_panel=RUN, help="Of weights, order, augmentation and method.")] = 0,
    precision: Annotated[
        str, typer.Option(rich_help_panel=RUN, help="32, or bf16 (mixed; float16 would lose the gradients of inputs).")
    ] = "32",
    device: Annotated[str, typer.Option(rich_help_panel=RUN, help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    devices: Annotated[
        int,
        typer.Option(
            min=1, rich_help_panel=RUN, help="Processes to start, one a device; torchrun's own count goes first."
        ),
    ] = 1,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", rich_help_panel=RUN, help="Also write curves for TensorBoard, if installed."),
    ] = False,
    json: Json = False,
) -> None:
    """Train a classifier, plainly or so that attacks find it harder; on two cores av-fusion takes a minute or two."""
    if list_:
        _print_methods(json)
        return
    from robustav.training.loop import train as run
    from robustav.training.recipe import Recipe

    recipe = Recipe(
        model=model,
        method=method,
        data=data,
        validation=validation,
        checkpoint=None if checkpoint is None else str(checkpoint),
        eps=eps,
        norm=norm,
        ramp=ramp,
        attacked=attacked,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        warmup=warmup,
        cosine=cosine,
        ema=ema,
        clip_norm=clip_norm,
        augment=augment,
        balanced=balanced,
        limit=limit,
        seed=seed,
        precision=precision,
        score=score,
        patience=patience,
        keep=keep,
    )
    out = out or Path("runs") / recipe.name
    try:
        with Bars(ERRORS) as bars:
            trained = run(
                recipe, out, device=device, devices=devices, tensorboard=tensorboard, progress=bars.generation
            )
    except KeyboardInterrupt:
        ERRORS.print("stopped: the same command goes on after the last epoch that was finished")
        raise typer.Exit(INTERRUPTED) from None
    if not first_process():
        return
    if json:
        typer.echo(jsons.dumps(trained.card, indent=1))
        return
    Console().print(_summary(trained.card), highlight=False)
    for note in _notes(trained.card):
        Console().print(note, highlight=False, markup=False, soft_wrap=True)
    Console().print(f"attack it: robustav attack --model trained:{out}", style="dim", soft_wrap=True, highlight=False)


def first_process() -> bool:
    """Whether this is the process that speaks for all."""
    import torch.distributed as processes

    return not processes.is_initialized() or processes.get_rank() == 0


def _summary(card: Mapping[str, Any]) -> Table:
    """Scores and cost in lines."""
    cost = card["cost"]
    table = Table.grid(padding=(0, 2))
    table.add_row("method", Text(card["method"]))
    table.add_row("weights", Text(card["weights"]))
    scores = ", ".join(f"{name} {value:.3f}" for name, value in card["scores"].items())
    table.add_row("validation", scores or "none")
    passes = f"{cost['forwards_a_clip']:.2f} forward and {cost['backwards_a_clip']:.2f} backward passes a clip"
    table.add_row(
        "cost", f"{passes}, {cost['clips']:,} clips, {cost['seconds']:.0f} s, {cost['peak_memory_mib']:,} MiB"
    )
    return table


def _notes(card: Mapping[str, Any]) -> list[str]:
    """What was left out of the clips that it was trained and validated on."""
    from robustav.report.words import notes_of_labels

    notes = []
    for data in card["data"].values():
        if "skipped" in data:
            count, (clip, reason) = data["skipped"], next(iter(data["reasons"].items()))
            notes.append(
                f"{count} clip{'s' * (count > 1)} of {data['name']} cannot be used and {'are' if count > 1 else 'is'} "
                f"left out, such as {clip} ({reason})."
            )
        notes += notes_of_labels(data.get("unknown_labels", {}))
    return notes


def _print_methods(as_json: bool) -> None:
    """A line a method, and its settings."""
    from robustav.training.methods import described

    if as_json:
        rows = [{"method": name, "summary": words, "settings": own} for name, (words, own) in described().items()]
        typer.echo(jsons.dumps(rows, indent=1))
        return
    table = Table("method", "what it is, and its settings", box=None, pad_edge=False)
    for name, (words, own) in described().items():
        table.add_row(name, Text(words) + Text(f"\n{own}" if own else "", style="dim"))
    Console().print(table, highlight=False)
