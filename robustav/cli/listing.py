"""What `robustav models` and `robustav data` print."""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from robustav.classifier import InputSpec
from robustav.data.av_events import SPLITS, AvEvents
from robustav.data.samples import Progress, SkippedError
from robustav.data.sources import DATA, load_samples
from robustav.models.zoo import MODELS, load_model


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def _spec(spec: InputSpec) -> str:
    rate = f" at {spec.sample_rate} Hz" if spec.sample_rate else ""
    return f"{list(spec.shape)}{rate}, {spec.unit} in [{spec.low:g}, {spec.high:g}]"


def _facts(name: str) -> dict[str, Any]:
    model, about = load_model(name)
    return {
        "name": name,
        "summary": about.get("summary", type(model).__name__),
        "inputs": {m: _spec(spec) for m, spec in model.specs.items()},
        "classes": list(model.classes),
        "label_kind": model.label_kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "stages": {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()},
        "source": about.get("source", name),
        "card": about.get("card", {}),
    }


def list_models(as_json: bool) -> None:
    """A line a model, with what its card says of clean data."""
    rows = [_facts(name) for name in MODELS]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("model", "what it is", "inputs", "parameters", "clean mAP (95 %)", box=None, pad_edge=False)
    for row in rows:
        clean = row["card"].get("clean", {})
        ends = "..".join(f"{end:.3f}" for end in clean.get("mAP_95", []))
        score = f"{clean['mAP']:.3f} ({ends})" if clean else "-"
        table.add_row(row["name"], row["summary"], "\n".join(row["inputs"]), f"{row['parameters']:,}", score)
    console = _console()
    console.print(table, highlight=False)
    console.print(
        "One in full: robustav models NAME. Your own: --model package.module:factory or file.py:factory.", style="dim"
    )


def show_model(name: str, as_json: bool) -> None:
    """Everything known of one model."""
    facts = _facts(name)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{facts['name']}: {facts['summary']}")
    for modality, text in facts["inputs"].items():
        table.add_row(f"input {modality}", text)
    table.add_row("classes", f"{len(facts['classes'])}, {facts['label_kind']}: {', '.join(facts['classes'][:12])}")
    table.add_row("parameters", f"{facts['parameters']:,}")
    for stage, count in facts["stages"].items():
        table.add_row("", f"{stage}: {count:,}")
    table.add_row("source", facts["source"])
    for key, value in facts["card"].items():
        if key not in ("model", "summary", "parameters"):
            table.add_row(key, json.dumps(value) if not isinstance(value, str) else value)
    _console().print(table, highlight=False, markup=False)


def list_data(as_json: bool) -> None:
    """The data sets that come with the package, and how to bring one."""
    if as_json:
        typer.echo(json.dumps(DATA, indent=1))
        return
    table = Table("data", "what it is", box=None, pad_edge=False)
    for name, summary in DATA.items():
        table.add_row(name, summary)
    console = _console()
    console.print(table, highlight=False)
    console.print(
        "Your own: --data MANIFEST (CSV with the columns id, path, audio, frames, start, end, labels, or JSON lines), a folder,\n"
        "or a clip. What would be skipped, and why: robustav data check PATH.",
        style="dim",
        highlight=False,
    )


def show_data(name: str, as_json: bool, progress: Progress) -> None:
    """Splits, shapes, classes and checksums of one data set; generates it where it is not cached."""
    if name not in DATA:
        raise ValueError(f"no data {name!r}: there is {', '.join(DATA)}; for your own, `robustav data check {name}`")
    facts: dict[str, Any] = {"name": name, "summary": DATA[name], "splits": {}}
    for split in SPLITS:
        samples = AvEvents(split, progress=progress)
        positives = samples.labels.sum(0).tolist()
        facts["splits"][split] = {
            "scenes": len(samples),
            "sha256": samples.digest,
            "positives": dict(zip(samples.classes, positives, strict=True)),
        }
        facts |= {"config": asdict(samples.config), "inputs": {m: _spec(s) for m, s in samples.specs.items()}}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console = _console()
    console.print(f"{name}: {facts['summary']}", highlight=False)
    for modality, text in facts["inputs"].items():
        console.print(f"  {modality}: {text}", highlight=False, markup=False)
    table = Table("split", "scenes", "sha256", *facts["splits"]["test"]["positives"], box=None, pad_edge=False)
    for split, row in facts["splits"].items():
        table.add_row(split, str(row["scenes"]), row["sha256"][:12], *map(str, row["positives"].values()))
    console.print(table, highlight=False)


def check_data(path: str, model_name: str, as_json: bool, progress: Progress) -> int:
    """Read every clip as the model would; returns how many can be used."""
    model, _ = load_model(model_name)
    samples, _ = load_samples(path, model, progress)
    bad: dict[str, str] = {}
    labels: Counter[str] = Counter()
    unlabelled = 0
    for index, clip in enumerate(samples.ids):
        progress("reading clips", index, len(samples.ids))
        try:
            sample = samples.load(index)
        except SkippedError as reason:
            bad[clip] = str(reason)
            continue
        unlabelled += sample.labels is None
        if sample.labels is not None:
            chosen = sample.labels.nonzero().flatten().tolist() if sample.labels.ndim else [int(sample.labels)]
            labels.update(samples.classes[c] for c in chosen)
    usable = len(samples.ids) - len(bad)
    unknown = {label: len(ids) for label, ids in getattr(samples, "unknown_labels", {}).items()}
    if as_json:
        facts = {"clips": len(samples.ids), "usable": usable, "unlabelled": unlabelled, "labels": dict(labels)}
        typer.echo(json.dumps({**facts, "unknown_labels": unknown, "skipped": bad}, indent=1))
        return usable
    console = _console()
    console.print(
        f"{usable} of {len(samples.ids)} clips can be used with {model_name}; {unlabelled} of them have no label it knows",
        highlight=False,
    )
    if labels:
        console.print(
            "labels: " + ", ".join(f"{name} {count}" for name, count in labels.most_common(20)),
            highlight=False,
            markup=False,
        )
    if unknown:
        shown = ", ".join(f"{name!r} ({count})" for name, count in list(unknown.items())[:20])
        console.print(f"labels that the model lacks: {shown}", highlight=False, markup=False)
    if bad:
        table = Table("skipped clip", "reason", box=None, pad_edge=False)
        for clip, words in bad.items():
            table.add_row(clip, words)
        console.print(table, highlight=False, markup=False)
    return usable
