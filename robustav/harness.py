"""The harness: runs every condition over every clip, part by part, and goes on where it was killed."""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustav import keep
from robustav.classifier import Classifier
from robustav.data.samples import Progress, Samples
from robustav.flags import probe
from robustav.goals import Goal
from robustav.judge import Judge
from robustav.ledger import Ledger, digest_of, digest_of_model, schema
from robustav.plan import CLEAN, Condition, Source
from robustav.reader import Batch, Reader, joined
from robustav.record import identity_of, record_of

PART = 32  # clips, or one batch if that is larger: what a kill can cost, for one condition
BATCH = {"cpu": 8, "cuda": 64}  # small batches stay in a CPU's cache; memory errors on a GPU halve them


@dataclass(frozen=True)
class Settings:
    """How a run is computed, as against what: nothing here may change a decision, and a test says so."""

    device: str = "auto"
    batch_size: int | None = None  # None: 8 on a CPU, 64 on a GPU
    shard: tuple[int, int] = (0, 1)  # this process's share of the parts: index, count
    strict: bool = False  # stop at the first clip that cannot be used
    keep: int = 0  # clips of which the adversarial examples are kept
    probed: int = 16  # clips on which the model itself is looked at, for flags; 0: it is not
    spare: bool = True  # do not attack clips that a cheaper condition broke, where the plan allows it
    progress: Progress = field(default=lambda what, done, total: None)

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"`shard` must be (index, count) with 0 <= index < count, got {self.shard}")
        for name in ("keep", "probed"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU if there is one, else the CPU. Others lack the float64 that the audit needs."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float64)
        if device.type not in BATCH:
            raise RuntimeError("neither a CPU nor a CUDA GPU")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"`device` must be 'auto', 'cpu' or a CUDA device that is there, got {name!r}") from error
    return device


def choose(samples: Samples, limit: int | None, seed: int) -> list[int]:
    """Indices of the clips to evaluate: all, or `limit` of them drawn by (seed, id), in the order of the data."""
    if limit is None or limit >= len(samples.ids):
        return list(range(len(samples.ids)))
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}")
    ranks = {i: hashlib.sha256(f"{seed}\x1f{name}".encode()).digest() for i, name in enumerate(samples.ids)}
    return sorted(sorted(ranks, key=ranks.__getitem__)[:limit])


def evaluate(
    model: Classifier,
    samples: Samples,
    rows: Sequence[Condition],
    goal: Goal,
    out: Path | str | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    about: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
) -> Ledger:
    """Run every condition in `rows` over `samples` and write one ledger row for each clip and condition into `out`.

    `out` is by default `runs/NAME-DIGEST`, so that the same question finds its own answer. A run that was killed goes
    on where it stopped, and ends with the same bytes. `about` is kept in the record as it is (a model card, a
    checkpoint's name). The model comes back on its device, in the mode and with the gradient flags it had.
    Raises `ValueError` for inputs that do not fit, non-finite scores (naming the clip), a model that changes while it
    is evaluated, or a folder that holds another run. Audit findings do not raise: they are in the ledger, and
    `ledger.failures` lists them.
    """
    settings = settings or Settings()
    _check(model, samples, rows, goal, seed)
    device = pick_device(settings.device)
    chosen = choose(samples, limit, seed)
    batch_size = settings.batch_size or BATCH[device.type]
    part_size = batch_size * max(1, -(-PART // batch_size))
    weights = digest_of_model(model)
    identity = identity_of(
        model,
        weights,
        samples,
        chosen,
        rows,
        goal,
        seed=seed,
        batch_size=batch_size,
        device=device,
        name=(about or {}).get("model"),
    )
    record = record_of(identity, model, samples, chosen, device, about)
    name = re.sub(r"[^\w.-]+", "_", identity["model"]).strip("._")
    ledger = Ledger(Path(out or Path("runs") / f"{name}-{digest_of(identity)[:8]}"))
    ledger.begin(record)
    parts = [chosen[i : i + part_size] for i in range(0, len(chosen), part_size)]
    index, count = settings.shard
    kept = frozenset(samples.ids[i] for i in chosen[: settings.keep])
    reader = Reader(model, samples, goal, batch_size, device, settings.strict, seed)
    sources = {row.source.weights: row.source.model for row in rows if row.source}
    with ExitStack() as stack:
        for evaluated in (model, *sources.values()):
            stack.enter_context(as_evaluated(evaluated, device))
        if goal.needs_corpus:
            goal = learned_goal(reader, chosen, part_size, settings.progress)
            rows = [
                replace(row, threat=replace(row.threat, goal=goal)) if row.threat is not None else row for row in rows
            ]
        judge = Judge(replace(reader, goal=goal), seed, ledger, kept)
        if index == 0 and settings.probed and not ledger.has_flags():
            settings.progress("looking at the model itself", 0, 1)
            _look(judge, rows, parts, settings.probed)
        mine = [(n, part) for n, part in enumerate(parts) if n % count == index]
        _run(judge, rows, mine, settings.progress, settings.spare)
        if digest_of_model(model) != weights:
            _unsound(ledger, "the model's parameters or buffers changed while it was evaluated")
    if count == 1:
        ledger.clear_debris()
    return ledger


def _check(model: Classifier, samples: Samples, rows: Sequence[Condition], goal: Goal, seed: int) -> None:
    """Everything that can be known to be wrong before anything is computed."""
    if samples.label_kind != model.label_kind:
        raise ValueError(f"the model is {model.label_kind}, but {samples.name} is labelled {samples.label_kind}")
    if tuple(samples.classes) != tuple(model.classes):
        raise ValueError(f"{samples.name} has {len(samples.classes)} classes, not the model's {len(model.classes)}")
    goal.check_model(len(model.classes), model.label_kind)
    for row in rows:
        if row.source is not None:
            _check_source(row.source, model, row.attacked)
        row.check(model)
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}")
    keys = [row.key for row in rows]
    if CLEAN.key not in keys or len(set(keys)) < len(keys):
        raise ValueError(f"`rows` must hold the clean condition and no condition twice, got {keys}")
    if other := [row.key for row in rows if row.threat is not None and row.threat.goal != goal]:
        raise ValueError(f"`rows` must attack with the goal that is judged, but {other[0]} has another")


def _check_source(source: Source, model: Classifier, attacked: Sequence[str]) -> None:
    """Raise `ValueError` unless what breaks the source can be tried on the model."""
    other = source.model
    if other.label_kind != model.label_kind or tuple(other.classes) != tuple(model.classes):
        raise ValueError(
            f"the source {source.name} must have the model's classes and kind of labels, got {len(other.classes)} "
            f"{other.label_kind} classes for {len(model.classes)} {model.label_kind} ones"
        )
    for m, spec in other.specs.items():
        if m not in model.specs:
            raise ValueError(
                f"the source {source.name} reads {m}, which the model does not: what breaks it cannot be tried"
            )
        if model.specs[m] != spec:
            raise ValueError(f"the source {source.name} reads {m} as {spec}, but the model as {model.specs[m]}")
    if missing := [m for m in attacked if m not in other.specs]:
        raise ValueError(f"the source {source.name} does not read {missing[0]}: attack {', '.join(other.specs)} only")


@contextmanager
def as_evaluated(model: Classifier, device: torch.device) -> Iterator[None]:
    """On the device, in eval mode, parameters frozen; afterwards everything is as it was, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    home = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), device)
    model.to(device).eval().requires_grad_(False)
    try:
        yield
    finally:
        model.to(home)
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _run(
    judge: Judge,
    rows: Sequence[Condition],
    parts: Sequence[tuple[int, Sequence[int]]],
    progress: Progress,
    spare: bool,
) -> None:
    """Every missing part of the ledger, and one look at what is there already."""
    ledger, columns = judge.ledger, schema(judge.reader.model.specs)
    done, total = 0, sum(len(part) for _, part in parts) * len(rows)
    versions = _versions(judge.reader.model)
    for number, indices in parts:
        missing = [row for row in rows if not _has(judge, row, number, indices)]
        done += len(indices) * (len(rows) - len(missing))
        # Even a finished run is looked into once: the model's code may be another than when it was computed.
        if missing or number == parts[0][0]:
            progress("reading clips", done, total)
            batches, skipped = judge.reader.read(indices)
            _check_resumed(ledger, number, batches)
        broken: dict[str, dict[str, dict[str, Any]]] = {}  # by condition: what it broke of this part
        for row in missing:
            progress(f"attacking: {row.key}", done, total)
            began = time.perf_counter()
            settled: dict[str, dict[str, Any]] = {}
            for earlier in row.after if spare else ():
                if earlier not in broken:
                    broken[earlier] = ledger.broken(earlier, number)
                settled = {**broken[earlier], **settled}  # the first that broke a clip settles it
            found = judge.judge(row, batches, settled)
            if any(module.training for module in judge.reader.model.modules()):
                _unsound(ledger, "the model put itself into train mode while it was scored")
            if _versions(judge.reader.model) != versions:
                _unsound(ledger, "the model's parameters or buffers changed while it was evaluated")
            # Seconds first: a part that is there is never timed again.
            ledger.write_seconds(row.key, number, time.perf_counter() - began)
            ledger.write(row.key, number, [*found, *skipped], columns)
            done += len(indices)
    progress("done", done, total)


def learned_goal(reader: Reader, chosen: Sequence[int], size: int, progress: Progress) -> Goal:
    """The reader's goal, knowing what the model says of all clean clips: one pass before the run, in every process."""
    logits, labels = [], []
    for i in range(0, len(chosen), size):
        progress("clean scores of all clips", i, len(chosen))
        for batch in reader.read(chosen[i : i + size])[0]:
            logits.append(batch.clean.logits)
            labels.append(batch.labels)
    if not logits:
        return reader.goal
    return reader.goal.learned(torch.cat(logits), torch.cat(labels))


def _look(judge: Judge, rows: Sequence[Condition], parts: Sequence[Sequence[int]], clips: int) -> None:
    """Keep what a look at the model itself, under the first epsilon's widest threat, gives reason to doubt."""
    threats = [row.threat for row in rows if row.threat is not None and row.level == 0]
    batches: list[Batch] = []
    for part in parts:
        if sum(len(batch.ids) for batch in batches) < clips:
            batches += judge.reader.read(part)[0]
    if not threats or not batches:
        return
    batch = joined(batches)
    batch = batch.at(range(min(clips, len(batch.ids))))
    threat = max(threats, key=lambda threat: len(threat.budgets)).given(clean=batch.clean, writable=batch.writable)
    model = judge.reader.model
    judge.ledger.write_flags(probe(model, batch.inputs, batch.labels, threat.goal, threat, seed=judge.seed))


def _has(judge: Judge, row: Condition, number: int, indices: Sequence[int]) -> bool:
    """Whether a part is there, and with it the examples that were asked for."""
    if not judge.ledger.has(row.key, number):
        return False
    wanted = judge.kept & {judge.reader.samples.ids[i] for i in indices}
    if not wanted:
        return True
    # A clip left to another condition has its example there.
    usable = judge.ledger.read_part(row.key, number).query("skipped.isna() and settled == ''")["sample"]
    return all(keep.has(judge.ledger.folder, row.key, name) for name in wanted & set(usable))


def _check_resumed(ledger: Ledger, number: int, batches: Sequence[Batch]) -> None:
    """A clean part from an earlier process must hold the very scores that the model gives now."""
    if not ledger.has(CLEAN.key, number):
        return
    stored = ledger.read_part(CLEAN.key, number).query("skipped.isna()")
    same = list(stored["sample"]) == [name for batch in batches for name in batch.ids]
    if same and batches:
        before = np.stack(stored["logits"].to_list())
        now = torch.cat([batch.clean.logits for batch in batches]).float().cpu().numpy()
        same = bool(np.abs(before - now).max() <= 1e-3 * np.abs(before).max())
    if not same:
        raise ValueError(
            f"{ledger.folder} was begun with a model or clips that gave other scores than today's, although weights and "
            "names are the same (was the model's code changed?): choose another --out, or delete the folder"
        )


def _versions(model: torch.nn.Module) -> list[int]:
    """A count that moves with every write into a parameter or buffer."""
    return [tensor._version for tensor in [*model.parameters(), *model.buffers()]]


def _unsound(ledger: Ledger, reason: str) -> None:
    """End a run whose numbers cannot be trusted, and see that no report is made of it."""
    ledger.declare_unsound(reason)
    raise ValueError(f"{reason}: no score can be trusted")
