"""Stored adversarial examples, looked at again: read from disk, measured, projected and scored anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError

from robustav import audit, keep
from robustav.classifier import Inputs
from robustav.data.samples import Progress
from robustav.data.sources import load_samples
from robustav.goal_names import recorded_goal
from robustav.harness import as_evaluated, pick_device
from robustav.ledger import Ledger
from robustav.models.zoo import load_model
from robustav.plan import recorded_budgets
from robustav.reader import Batch, Reader
from robustav.record import check_model
from robustav.threat import ThreatModel


def reexamine(
    run: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    checkpoint: Path | None = None,
    trust_pickle: bool = False,
    device: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> pd.DataFrame:
    """One line a condition: how many examples it kept, and what is wrong with any of them as they lie on disk.

    Every example is read back, measured against its budget, range and untouched modalities, projected once more (which
    must not move it), and scored by the model, whose scores and verdict must be those of the ledger. Model and data are
    the run's own unless given. Columns: condition, attacked, examples, gauge (largest length over budget), moved (largest
    change by projecting again, in budgets), logit_change (largest), problems (count), example (the first problem in
    words). Raises `ValueError` where the run kept nothing, or model or data are not those of the run.
    """
    ledger = Ledger(run)
    record = ledger.record()
    identity, asked = record["identity"], record["about"].get("asked", {})
    weights = checkpoint or asked.get("checkpoint")
    name = model or str(asked.get("model", identity["model"]))
    network, _ = load_model(name, None if weights is None else Path(weights), trust_pickle=trust_pickle)
    check_model(ledger, network)
    samples, _ = load_samples(data or asked.get("data"), network, progress)
    if samples.digest != identity["data"]:
        raise ValueError(f"{run} attacked other data than {samples.name}: give the run's own with --data")
    places = {sample: i for i, sample in enumerate(samples.ids)}
    where = pick_device(device)
    goal = recorded_goal(identity["goal"])
    reader = Reader(network, samples, goal, 1, where, seed=identity["seed"])
    # A clip of which any condition kept an example should have one wherever it was attacked.
    kept = {name for key in identity["conditions"] for name in samples.ids if keep.has(run, key, name)}
    if not kept:
        raise ValueError(f"{run} kept no examples: run the same attack again with --keep N")
    lines = []
    with as_evaluated(network, where):
        for done, (key, described) in enumerate(identity["conditions"].items()):
            progress(f"looking again: {key}", done, len(identity["conditions"]))
            rows = ledger.read(key).query("skipped.isna() and settled == ''").set_index("sample")
            found = []
            for sample in rows.index:
                if keep.has(run, key, sample):
                    (batch,), _ = reader.read([places[sample]])
                    found.append(_look(reader, ledger, key, described, batch, rows.loc[sample]))
            found += [
                {"gauge": 0.0, "moved": 0.0, "logit_change": 0.0, "problem": f"{sample}: its example is missing"}
                for sample in rows.index
                if sample in kept and not keep.has(run, key, sample)
            ]
            if found:
                lines.append(_line(key, described, found))
    return pd.DataFrame(lines)


def _look(
    reader: Reader, ledger: Ledger, key: str, described: Mapping[str, Any], batch: Batch, row: pd.Series
) -> dict[str, Any]:
    """What is wrong with one stored example, and its sizes; one that is no input of its threat is not scored."""
    (sample,) = batch.ids
    sizes = dict.fromkeys(("gauge", "moved", "logit_change"), 0.0)
    folder = keep.folder_of(ledger.folder, key, sample)
    try:
        stored = {m: x[None].to(reader.device) for m, x in keep.load(folder).items()}
    except (SafetensorError, OSError) as error:
        return {**sizes, "problem": f"{sample}: {folder / keep.TENSORS} cannot be read: {error}"}
    try:
        problem = _unlawful(reader, described, batch, stored, sizes)
    except ValueError as error:  # another form than the clip's
        problem = str(error)
    if not problem:
        scored = reader.score(stored, batch.ids, f"{key} looked at again")
        logits = torch.tensor(row["logits"], device=reader.device)[None]
        sizes["logit_change"] = (scored.logits - logits).abs().max().item()
        reached = torch.tensor([bool(row["reached"])], device=reader.device)
        again = reader.goal.given(batch.clean).reached(scored, batch.labels)
        if not reader.model.stochastic:
            largest = batch.clean.logits.abs().max().item()
            (moved,) = audit.rescore_violations(logits, scored.logits, reached, again, largest)
            problem = moved and f"it is not what was scored, or the model is random: {moved.partition(': ')[0]}"
    return {**sizes, "problem": f"{sample}: {problem}" if problem else ""}


def _unlawful(
    reader: Reader, described: Mapping[str, Any], batch: Batch, stored: Inputs, sizes: dict[str, float]
) -> str:
    """How an example leaves its threat, in words; enters its sizes."""
    if not described["attacked"]:
        audit.check_form(batch.inputs, stored)
        same = all(torch.equal(stored[m], x) for m, x in batch.inputs.items())
        return "" if same else "the clean clip is another than today's"
    threat = ThreatModel(recorded_budgets(described, reader.model.specs), reader.goal).given(writable=batch.writable)
    bounded = not described["smallest"]
    (problem,) = audit.violations(batch.inputs, stored, threat, reader.model.specs, batch.writable, bounded=bounded)
    sizes["gauge"] = threat.gauge(batch.inputs, stored).item()
    if bounded and not problem:
        sizes["moved"] = threat.gauge(stored, threat.project(batch.inputs, stored)).item()
        if sizes["moved"] > audit.TOLERANCE:
            return f"projecting it again moves it by {sizes['moved']:.3g} of its budget"
    return problem


def _line(key: str, described: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    problems = [one["problem"] for one in found if one["problem"]]
    return {
        "condition": described["name"],
        "attacked": "+".join(described["attacked"]),
        "level": described["level"],
        "budget": ", ".join(f"{m} {radius}" for m, radius in described["radii"].items()),
        "examples": len(found),
        **{name: max(one[name] for one in found) for name in ("gauge", "moved", "logit_change")},
        "problems": len(problems),
        "example": problems[0] if problems else "",
    }
