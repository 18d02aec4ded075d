"""What `robustav data` prints."""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import typer
from rich.table import Table

from robustav.cli.shared import wide_console, words_of
from robustav.data.av_events import SPLITS, AvEvents
from robustav.data.samples import Progress, SkippedError
from robustav.data.sources import DATA, load_samples
from robustav.models.zoo import inputs_of


def list_data(as_json: bool) -> None:
    """The data sets that come with the package, and how to bring one."""
    if as_json:
        typer.echo(json.dumps(DATA, indent=1))
        return
    table = Table("data", "what it is", box=None, pad_edge=False)
    for name, summary in DATA.items():
        table.add_row(name, summary)
    console = wide_console()
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
        facts |= {"config": asdict(samples.config), "inputs": {m: words_of(s) for m, s in samples.specs.items()}}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console = wide_console()
    console.print(f"{name}: {facts['summary']}", highlight=False)
    for modality, text in facts["inputs"].items():
        console.print(f"  {modality}: {text}", highlight=False, markup=False)
    table = Table("split", "scenes", "sha256", *facts["splits"]["test"]["positives"], box=None, pad_edge=False)
    for split, row in facts["splits"].items():
        table.add_row(split, str(row["scenes"]), row["sha256"][:12], *map(str, row["positives"].values()))
    console.print(table, highlight=False)


def check_data(path: str, model_name: str, as_json: bool, progress: Progress) -> int:
    """Read every clip as the model would; returns how many can be used."""
    model = inputs_of(model_name)
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
    console = wide_console()
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
