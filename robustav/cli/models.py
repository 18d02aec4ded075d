"""What `robustav models` prints: the list, one model in full, which model a checkpoint fits, a checkpoint converted."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table
from torch import nn

from robustav.classifier import Classifier
from robustav.cli.shared import wide_console, words_of
from robustav.models.asked import parse_model, task_of
from robustav.models.checkpoints import convert, digest_of_file, read_card, read_checkpoint
from robustav.models.entry import Entry, Task
from robustav.models.fit import Fit, fits, weightless
from robustav.models.zoo import EMBEDDED, MODELS, load_model

SHOWN = 3  # of the models that come nearest to a checkpoint


def list_models(as_json: bool) -> None:
    """A line a model: embedded ones with what their card says of clean data, published ones with paper and licence."""
    facts = {name: _facts(name, entry, weightless(entry)) for name, entry in MODELS.items()}
    if as_json:
        typer.echo(json.dumps(list(facts.values()), indent=1))
        return
    console = wide_console()
    table = Table("with weights", "what it is", "inputs", "parameters", "clean mAP (95 %)", box=None, pad_edge=False)
    for name in EMBEDDED:
        row, clean = facts[name], read_card(MODELS[name].path)["clean"]
        low, high = clean["mAP_95"]
        score = f"{clean['mAP']:.3f} ({low:.3f}..{high:.3f})"
        table.add_row(name, row["summary"], ", ".join(row["inputs"]), f"{row['parameters']:,}", score)
    console.print(table, highlight=False)
    console.print()
    table = Table("give a checkpoint", "what it is", "inputs", "parameters", box=None, pad_edge=False)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, row in facts.items():
        if name not in EMBEDDED:
            groups.setdefault((row["paper"], row["licence"]), []).append(row)
    for (paper, licence), rows in groups.items():
        table.add_row(f"[dim]{paper}[/]", f"[dim]code and weights: {licence}[/]")
        for row in rows:
            inputs = ", ".join(row["inputs"]) or "pre-training"
            table.add_row(f"  {row['name']}", row["summary"], inputs, f"{row['parameters'] / 1e6:.1f} M")
    console.print(table, highlight=False)
    console.print(
        "One in full: robustav models NAME. Which of them a checkpoint is: robustav models check FILE. Your own: --model hf:FOLDER, "
        "timm:NAME, package.module:factory or file.py:factory.",
        style="dim",
        highlight=False,
    )


def _facts(name: str, entry: Entry, model: nn.Module) -> dict[str, Any]:
    told: dict[str, Any] = {"inputs": {}, "classes": [], "label_kind": ""}
    if isinstance(model, Classifier):
        inputs = {m: words_of(spec) for m, spec in model.specs.items()}
        told = {"inputs": inputs, "classes": list(model.classes), "label_kind": model.label_kind}
    return {
        "name": name,
        "summary": entry.summary,
        **told,
        "parameters": sum(p.numel() for p in model.parameters()),
        "source": entry.source,
        "paper": entry.paper,
        "licence": entry.licence,
        "published": entry.published,
        "settings": list(entry.takes),
    }


def stages(model: Classifier) -> dict[str, str]:
    """What each stage gives for one clip, of a model without memory for its weights."""
    with torch.device("meta"), torch.no_grad():
        raw = {m: torch.empty(1, *spec.shape) for m, spec in model.specs.items()}
        seen = {m: model.front_end(m, x) for m, x in raw.items()}
        features = {m: model.encode(m, x) for m, x in seen.items()}
        latent = model.fuse(features)
        logits = model.classify(latent)
    told = {"front end": seen, "encode": features}
    lines = {f"{stage} {m}": str(list(x.shape[1:])) for stage, of in told.items() for m, x in of.items()}
    return lines | {"fuse (latent)": str(list(latent.shape[1:])), "classify": str(list(logits.shape[1:]))}


def show_model(text: str, as_json: bool) -> None:
    """Everything known of one model, which may be a user's own."""
    asked = parse_model(text)
    model: nn.Module
    if asked.name in MODELS:
        entry = MODELS[asked.name]
        task = task_of(entry.task, asked.task)
        model = weightless(entry, task)
        facts = _facts(asked.name, entry, model)
        if entry.weights:
            facts["card"] = read_card(entry.path)
        if isinstance(model, Classifier):
            facts["stages"] = stages(model)
            facts["usual"] = {
                f.name: _usual(getattr(entry.task, f.name)) for f in fields(Task) if f.name in entry.takes
            }
            facts["usual"]["at"] = "raw"
    else:
        model, about = load_model(text)
        facts = _facts(text, Entry(lambda _: model, type(model).__name__, "your own"), model) | about
    facts["parts"] = {n: sum(p.numel() for p in child.parameters()) for n, child in model.named_children()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{facts['name']}: {facts['summary']}")
    for modality, words in facts["inputs"].items():
        table.add_row(f"input {modality}", words)
    for stage, shape in facts.get("stages", {}).items():
        table.add_row(stage, shape)
    if facts["classes"]:
        shown = "; ".join(facts["classes"][:8]) + " ..." * (len(facts["classes"]) > 8)
        table.add_row("classes", f"{len(facts['classes'])}, {facts['label_kind']}: {shown}")
    table.add_row("parameters", f"{facts['parameters']:,}")
    for part, count in facts["parts"].items():
        if count:
            table.add_row("", f"{part}: {count:,}")
    for key in ("source", "paper", "licence", "published"):
        if facts[key]:
            table.add_row(key, facts[key])
    for key, value in facts.get("usual", {}).items():
        table.add_row(f"setting {key}", f"usually {value}; another: --model '{asked.name}({key}=...)'")
    for key, value in facts.get("card", {}).items():
        if key not in ("model", "summary", "parameters"):
            table.add_row(key, json.dumps(value) if not isinstance(value, str) else value)
    wide_console().print(table, highlight=False, markup=False)


def _usual(value: object) -> str:
    return f"{len(value)} names" if isinstance(value, tuple) else str(value)


def check_checkpoint(path: str, trust_pickle: bool, as_json: bool) -> bool:
    """Say which models a checkpoint fits; returns whether any."""
    state = read_checkpoint(path, trust_pickle=trust_pickle)
    found = fits(state, MODELS)
    fitting = [fit for fit in found if fit.exact and not fit.resampled] or [fit for fit in found if fit.exact]
    digest = digest_of_file(path)
    if as_json:
        rows = [
            fit._asdict() | {"differs": fit.differs._asdict(), "fits": fit.exact} for fit in (fitting or found[:SHOWN])
        ]
        typer.echo(json.dumps({"file": path, "sha256": digest, "tensors": len(state), "models": rows}, indent=1))
        return bool(fitting)
    console = wide_console()
    console.print(f"{path}: {len(state)} tensors, sha256 {digest}", highlight=False, markup=False, soft_wrap=True)
    nearest = [] if fitting else [fit for fit in found[:SHOWN] if fit.shared]
    table = Table.grid(padding=(0, 2))
    for fit in fitting or nearest:
        table.add_row(fit.name, MODELS[fit.name].summary, _verdict(fit))
    words = "fits no model that is known here" + ("; the nearest:" if nearest else ", and shares no name with any")
    console.print("fits" if fitting else words, highlight=False)
    console.print(table, highlight=False, markup=False)
    if len(fitting) > 1:
        console.print(
            "Names and shapes are all that a file tells. Models that share them differ in what it does not hold: the front end "
            "with its normalisation, the number of passes through shared layers. Take the one that the file was trained as.",
            style="dim",
            highlight=False,
        )
    return bool(fitting)


def _verdict(fit: Fit) -> str:
    if not fit.exact:
        return str(fit.differs)
    said = [f"{fit.classes} classes: name them, --model '{fit.name}(classes=FILE)'"] if fit.classes is not None else []
    if fit.resampled:
        takes = [f"{key}=..." for key in ("seconds", "size") if key in MODELS[fit.name].takes]
        said.append(
            f"made for another length or size: say {' or '.join(takes)}, or {', '.join(fit.resampled)} is resampled"
        )
    return "; ".join(said) or "as it is"


def convert_checkpoint(source: str, target: str, trust_pickle: bool) -> None:
    """Write it as safetensors and print both checksums."""
    for file, digest in convert(source, Path(target), trust_pickle=trust_pickle).items():
        typer.echo(f"{digest}  {file}")
