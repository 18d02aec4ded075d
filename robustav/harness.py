"""The harness: runs every condition over every clip, part by part, and trusts no attack."""

import hashlib
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import robustav
from robustav import audit, keep
from robustav.classifier import Classifier, Inputs, Trace, check_modalities
from robustav.data.samples import Sample, Samples, SkippedError
from robustav.goals import Goal, label_set
from robustav.ledger import Ledger, digest_of, digest_of_model, schema
from robustav.plan import CLEAN, Condition
from robustav.prepare import AttackView, prepare, quick_products
from robustav.randomness import draws_for
from robustav.threat import snr_db

log = logging.getLogger(__name__)

PART = 32  # clips, or one batch if that is larger: what a kill can cost, for one condition
BATCH = {"cpu": 8, "cuda": 64}  # small batches stay in a CPU's cache; memory errors on a GPU halve them

Progress = Callable[[int, int, str], None]  # clips x conditions done, in all, what is being done


class Batch(NamedTuple):
    """Usable clips of one batch, on the device, with what the untouched model says of them."""

    ids: list[str]
    inputs: Inputs
    writable: dict[str, Tensor]
    labels: Tensor
    labelled: list[bool]
    clean: Trace


@dataclass(frozen=True)
class Settings:
    """How a run is computed, as against what: nothing here may change a decision, and a test says so."""

    device: str = "auto"
    batch_size: int | None = None  # None: 8 on a CPU, 64 on a GPU
    shard: tuple[int, int] = (0, 1)  # this process's share of the parts: index, count
    strict: bool = False  # stop at the first clip that cannot be used
    keep: int = 0  # clips of which the adversarial examples are kept
    progress: Progress = field(default=lambda done, total, what: None)

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"`shard` must be (index, count) with 0 <= index < count, got {self.shard}")
        if self.keep < 0:
            raise ValueError(f"`keep` must not be negative, got {self.keep}")


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` must be 'auto', 'cpu' or a device that torch can use, got {name!r}") from error
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
    checkpoint's name). The model comes back in the mode and with the gradient flags it had.
    Raises `ValueError` for inputs that do not fit, non-finite scores (naming the clip), or a folder that holds
    another run. Audit findings do not raise: they are in the ledger, and `failures` lists them.
    """
    settings = settings or Settings()
    device = pick_device(settings.device)
    if samples.label_kind != model.label_kind:
        raise ValueError(f"the model is {model.label_kind}, but {samples.name} is labelled {samples.label_kind}")
    if tuple(samples.classes) != tuple(model.classes):
        raise ValueError(f"{samples.name} has {len(samples.classes)} classes, not the model's {len(model.classes)}")
    chosen = choose(samples, limit, seed)
    batch_size = settings.batch_size or BATCH["cuda" if device.type == "cuda" else "cpu"]
    part_size = batch_size * max(1, -(-PART // batch_size))
    weights = digest_of_model(model)
    record = make_record(model, samples, rows, goal, seed, chosen, batch_size, device, weights, about)
    name = re.sub(r"[^\w.-]+", "_", str(record["about"].get("model", record["model"]))).strip("._")
    ledger = Ledger(Path(out or Path("runs") / f"{name}-{digest_of(record['identity'])[:8]}"))
    ledger.begin(record)
    with as_evaluated(model, device):
        work = _Work(model, samples, rows, goal, seed, chosen[: settings.keep], batch_size, device, ledger, settings)
        parts = [chosen[i : i + part_size] for i in range(0, len(chosen), part_size)]
        work.run([(n, part) for n, part in enumerate(parts) if n % settings.shard[1] == settings.shard[0]])
        if any(module.training for module in model.modules()):
            raise ValueError("the model put itself into train mode while it was scored: scores would depend on batches")
    if digest_of_model(model) != weights:
        raise ValueError("the model's parameters or buffers changed while it was evaluated: no score can be trusted")
    return ledger


def make_record(
    model: Classifier,
    samples: Samples,
    rows: Sequence[Condition],
    goal: Goal,
    seed: int,
    chosen: Sequence[int],
    batch_size: int,
    device: torch.device,
    weights: str,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a run is. `identity` decides whether a folder holds the same run; the rest is for the reader."""
    identity = {
        "weights": weights,
        "data": samples.digest,
        "clips": digest_of([samples.ids[i] for i in chosen]),
        "classes": digest_of(list(model.classes)),
        "conditions": {row.key: row.describe(model.specs) for row in rows},
        "goal": goal.words(model.classes),
        "seed": seed,
        "batch_size": batch_size,
        "device": device.type,
        "versions": {"robustav": robustav.__version__, "torch": torch.__version__},
    }
    specs = {
        m: {"shape": list(s.shape), "low": s.low, "high": s.high, "unit": s.unit, "sample_rate": s.sample_rate}
        for m, s in model.specs.items()
    }
    return {
        "identity": identity,
        "model": type(model).__name__,
        "about": dict(about or {}),
        "label_kind": model.label_kind,
        "classes": list(model.classes),
        "specs": specs,
        "samples": samples.name,
        "clips": len(chosen),
        "clips_in_all": len(samples.ids),
        "unknown_labels": {k: len(v) for k, v in getattr(samples, "unknown_labels", {}).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": _device_name(device),
        "python": platform.python_version(),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@contextmanager
def as_evaluated(model: Classifier, device: torch.device) -> Iterator[None]:
    """On the device, in eval mode, parameters frozen; afterwards mode and flags are as they were, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.to(device).eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass
class _Work:
    """One process's share of a run."""

    model: Classifier
    samples: Samples
    rows: Sequence[Condition]
    goal: Goal
    seed: int
    kept: Sequence[int]
    batch_size: int
    device: torch.device
    ledger: Ledger
    settings: Settings

    def __post_init__(self) -> None:
        self.columns = schema(self.model.specs)
        self.prepared: Classifier | None = None
        self.modalities = sorted(self.model.specs)

    def run(self, parts: Sequence[tuple[int, Sequence[int]]]) -> None:
        done, total = 0, sum(len(part) for _, part in parts) * len(self.rows)
        for number, indices in parts:
            missing = [row for row in self.rows if not self._has(row, number, indices)]
            done += len(indices) * (len(self.rows) - len(missing))
            if missing:
                self.settings.progress(done, total, "reading clips")
                batches, skipped = self._load(indices)
                self._check_resumed(number, batches)
                held: list[dict[str, Tensor]] = [{} for _ in batches]
                for row in missing:
                    self.settings.progress(done, total, row.key)
                    began = time.perf_counter()
                    found = [r for i, batch in enumerate(batches) for r in self._judge(row, batch, held[i])]
                    self.ledger.write(row.key, number, [*found, *skipped], self.columns)
                    self.ledger.write_seconds(row.key, number, time.perf_counter() - began)
                    done += len(indices)
            self.settings.progress(done, total, "")

    def _has(self, row: Condition, number: int, indices: Sequence[int]) -> bool:
        """Whether a part is there, and with it the examples that were asked for."""
        if not self.ledger.has(row.key, number):
            return False
        wanted = [self.samples.ids[i] for i in indices if i in self.kept]
        if not wanted:
            return True
        usable = self.ledger.read_part(row.key, number).query("skipped.isna()")["sample"]
        return all(keep.has(self.ledger.folder, row.key, name) for name in set(wanted) & set(usable))

    def _load(self, indices: Sequence[int]) -> tuple[list[Batch], list[dict[str, Any]]]:
        """Usable clips in batches, and a ledger row for each clip that is not."""
        usable: list[Sample] = []
        skipped: list[dict[str, Any]] = []
        for index in indices:
            try:
                usable.append(self.samples.load(index))
            except SkippedError as reason:
                if self.settings.strict:
                    raise ValueError(f"clip {self.samples.ids[index]!r} cannot be used: {reason}") from reason
                skipped.append({"sample": self.samples.ids[index], "skipped": str(reason)})
        groups = [usable[i : i + self.batch_size] for i in range(0, len(usable), self.batch_size)]
        return [self._batch(group) for group in groups], skipped

    def _batch(self, group: Sequence[Sample]) -> Batch:
        ids = [sample.id for sample in group]
        for sample in group:
            # A clip may have more than the model reads, never less.
            check_modalities({m: x for m, x in sample.inputs.items() if m in self.model.specs}, self.model.specs)
        inputs = {m: torch.stack([s.inputs[m] for s in group]).to(self.device) for m in self.modalities}
        for modality, x in inputs.items():
            self.model.specs[modality].check(modality, x)
        writable = {}
        for m in self.modalities:
            if any(m in sample.signal for sample in group):
                whole = torch.ones(self.model.specs[m].shape, dtype=torch.bool)
                masks = [sample.signal[m].expand_as(whole) if m in sample.signal else whole for sample in group]
                writable[m] = torch.stack(masks).to(self.device)
        clean = self._score(inputs, ids)
        labelled = [sample.labels is not None for sample in group]
        guess = own_labels(clean.logits, self.goal)
        labels = torch.stack([g if s.labels is None else s.labels.to(g) for s, g in zip(group, guess, strict=True)])
        self.goal.check(labels, len(self.model.classes))
        return Batch(ids, inputs, writable, labels, labelled, clean)

    def _score(self, inputs: Inputs, ids: Sequence[str]) -> Trace:
        """The untouched model's word on a batch; scores that are not finite raise, naming the clip."""
        try:
            with torch.no_grad():
                trace = self.model.trace(inputs)
        except RuntimeError as error:  # what torch raises for shapes and types that do not go together
            shapes = ", ".join(f"{m} {list(x.shape)}" for m, x in inputs.items())
            raise ValueError(f"the model failed on a batch with {shapes}: {error}") from error
        expected = (len(ids), len(self.model.classes))
        if tuple(trace.logits.shape) != expected:
            raise ValueError(f"the model must return logits {list(expected)}, got {list(trace.logits.shape)}")
        bad = ~trace.logits.isfinite().all(1)
        if bad.any():
            raise ValueError(
                f"the model's scores of clip {ids[int(bad.nonzero()[0])]!r} are not finite (NaN or infinite)"
            )
        return Trace({}, trace.latent, trace.logits)

    def _check_resumed(self, number: int, batches: Sequence[Batch]) -> None:
        """A clean part from an earlier process must hold the very scores that the model gives now."""
        if not batches or not self.ledger.has(CLEAN.key, number):
            return
        stored = self.ledger.read_part(CLEAN.key, number).query("skipped.isna()")
        now = torch.cat([batch.clean.logits for batch in batches]).cpu().numpy()
        same_clips = list(stored["sample"]) == [name for batch in batches for name in batch.ids]
        if not same_clips or not np.allclose(np.stack(stored["logits"]), now, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{self.ledger.folder} was begun with a model or data that gave other scores than today's, "
                "although weights and names are the same: choose another --out"
            )

    def _judge(self, row: Condition, batch: Batch, held: dict[str, Tensor]) -> list[dict[str, Any]]:
        """One condition on one batch: attack, audit, score, score again, and a row for each clip."""
        goal = self.goal.given(batch.clean)
        size = len(batch.ids)
        if row.attack is None or row.threat is None:
            returned, cost, found = batch.inputs, _Cost(0, 0, [0.0] * size), [""] * size
            gauge, logits = torch.zeros(size), batch.clean
        else:
            threat = row.threat.given(clean=batch.clean, writable=batch.writable)
            returned, cost = self._attack(row, batch, held)
            found = audit.violations(batch.inputs, returned, threat, self.model.specs, batch.writable)
            gauge = threat.gauge(batch.inputs, returned)
            logits = self._score(returned, batch.ids)
        # Scored again in reverse order: a score that depends on chance or on batch mates shows itself.
        again = self._score({m: x.flip(0) for m, x in returned.items()}, batch.ids[::-1])
        again = Trace({}, again.latent.flip(0), again.logits.flip(0))
        reached, reached_again = goal.reached(logits, batch.labels), goal.reached(again, batch.labels)
        found = [
            audit.join(*words)
            for words in zip(
                found, audit.rescore_violations(logits.logits, again.logits, reached, reached_again), strict=True
            )
        ]
        loss = goal.loss(logits, batch.labels)
        gap = (logits.logits - again.logits).abs().amax(1)
        sizes = self._sizes(row, batch, returned)
        rows: list[dict[str, Any]] = []
        for i, name in enumerate(batch.ids):
            labels = batch.labels[i]
            rows.append(
                {
                    "sample": name,
                    "labels": labels.nonzero().flatten().tolist() if labels.ndim else [int(labels)],
                    "labelled": batch.labelled[i],
                    "logits": logits.logits[i].float().cpu().numpy(),
                    "loss": loss[i].item(),
                    "reached": bool(reached[i]),
                    "gauge": gauge[i].item(),
                    "forwards": cost.forwards,
                    "backwards": cost.backwards,
                    "zero_gradients": cost.zero_gradients[i],
                    "rescore_gap": gap[i].item(),
                    "violation": found[i],
                    **{column: values[i] for column, values in sizes.items()},
                }
            )
        self._keep(row, batch, returned, rows)
        return rows

    def _attack(self, row: Condition, batch: Batch, held: dict[str, Tensor]) -> tuple[Inputs, "_Cost"]:
        """The attack's answer for one batch; a GPU out of memory gets it in halves."""
        assert row.attack is not None and row.threat is not None
        if self.prepared is None:
            self.prepared = prepare(self.model, batch.inputs)
        products = quick_products() if self.device.type == "cpu" else nullcontext()
        with products:
            for modality in self.modalities:
                if modality not in row.attacked and modality not in held:
                    with torch.no_grad():
                        raw = batch.inputs[modality]
                        held[modality] = self.prepared.encode(modality, self.prepared.front_end(modality, raw))
            return self._attack_slice(row, batch, held, 0, len(batch.ids))

    def _attack_slice(
        self, row: Condition, batch: Batch, held: dict[str, Tensor], first: int, last: int
    ) -> tuple[Inputs, "_Cost"]:
        """The attack's answer for clips `first` to `last`; if a GPU runs out of memory, in halves."""
        try:
            return self._attack_once(row, batch, held, slice(first, last))
        except torch.cuda.OutOfMemoryError:
            if last - first < 2:
                raise
            log.warning("out of GPU memory with %d clips at once: trying halves", last - first)
        middle = (first + last) // 2
        halves = [self._attack_slice(row, batch, held, *ends) for ends in ((first, middle), (middle, last))]
        returned = {m: torch.cat([half[0][m] for half in halves]) for m in batch.inputs}
        cost = halves[0][1]
        return returned, cost._replace(zero_gradients=cost.zero_gradients + halves[1][1].zero_gradients)

    def _attack_once(
        self, row: Condition, batch: Batch, held: dict[str, Tensor], part: slice
    ) -> tuple[Inputs, "_Cost"]:
        assert row.attack is not None and row.threat is not None and self.prepared is not None
        others = {m: x[part] for m, x in held.items() if m not in row.attacked}
        view = AttackView(self.prepared, row.attacked, others)
        clean = Trace({}, batch.clean.latent[part], batch.clean.logits[part])
        threat = row.threat.given(clean=clean, writable={m: mask[part] for m, mask in batch.writable.items()})
        inputs = {m: batch.inputs[m][part] for m in row.attacked}
        # Attacks that write into what they were given would change the clean batch of every later condition.
        given = {m: x.clone() for m, x in inputs.items()}
        draws = draws_for(self.seed, batch.ids[part], row.name, *row.attacked)
        try:
            attacked = row.attack(view, given, batch.labels[part], threat, draws=draws)
        except FloatingPointError as error:
            raise ValueError(f"{row.key} on clips {batch.ids[part]}: {error}") from error
        returned = {m: x[part] for m, x in batch.inputs.items()} | {m: x.detach() for m, x in attacked.items()}
        size = len(batch.ids[part])
        return returned, _Cost(view.forwards, view.backwards, view.zero_gradients(size).tolist())

    def _sizes(self, row: Condition, batch: Batch, returned: Inputs) -> dict[str, list[float]]:
        """Measured sizes of the perturbation, for each modality: largest value, length in its norm, SNR."""
        columns: dict[str, list[float]] = {}
        for m, clean in batch.inputs.items():
            delta = returned[m].double() - clean.double()
            columns[f"max_abs_{m}"] = delta.flatten(1).abs().amax(1).tolist()
            rules = row.threat.budgets[m].rules if row.threat and m in row.threat.budgets else None
            columns[f"length_{m}"] = rules.length(delta).tolist() if rules else [0.0] * len(batch.ids)
            columns[f"snr_db_{m}"] = snr_db(clean, returned[m]).tolist()
        return columns

    def _keep(self, row: Condition, batch: Batch, returned: Inputs, rows: list[dict[str, Any]]) -> None:
        """Store the examples that were asked for, read them back and audit what was read."""
        wanted = {self.samples.ids[i] for i in self.kept}
        for i, name in enumerate(batch.ids):
            if name not in wanted:
                continue
            folder = keep.store(
                self.ledger.folder, row.key, name, {m: x[i] for m, x in returned.items()}, self.model.specs
            )
            stored = {m: x[None].to(self.device) for m, x in keep.load(folder).items()}
            words = ""
            if row.threat is not None:
                one = {m: x[i : i + 1] for m, x in batch.inputs.items()}
                writable = {m: mask[i : i + 1] for m, mask in batch.writable.items()}
                threat = row.threat.given(writable=writable)
                (words,) = audit.violations(one, stored, threat, self.model.specs, writable)
            clean = Trace({}, batch.clean.latent[i : i + 1], batch.clean.logits[i : i + 1])
            goal, labels = self.goal.given(clean), batch.labels[i : i + 1]
            alone = self._score(stored, [name])
            before = torch.as_tensor(rows[i]["logits"], device=self.device)[None]
            was = torch.tensor([rows[i]["reached"]], device=self.device)
            (rescored,) = audit.rescore_violations(before, alone.logits, was, goal.reached(alone, labels))
            rows[i]["violation"] = audit.join(rows[i]["violation"], words and f"as stored: {words}", rescored)


class _Cost(NamedTuple):
    forwards: int
    backwards: int
    zero_gradients: list[float]


def own_labels(logits: Tensor, goal: Goal) -> Tensor:
    """The model's own prediction as labels, for clips that nobody labelled: its label set, at least its top class."""
    if goal.label_kind == "multiclass":
        return logits.argmax(1)
    top = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return torch.maximum(top, label_set(logits, goal.threshold, goal.label_kind).to(logits))


def failures(ledger: Ledger) -> dict[str, list[str]]:
    """Condition -> what the audit found, a line a clip; conditions without a finding are left out."""
    found = {}
    for key in ledger.record()["identity"]["conditions"]:
        rows = ledger.read(key)
        bad = rows[rows["violation"].fillna("") != ""]
        if len(bad):
            found[key] = [f"{clip}: {words}" for clip, words in zip(bad["sample"], bad["violation"], strict=True)]
    return found


def skipped(ledger: Ledger) -> dict[str, str]:
    """Clip -> why it could not be used."""
    rows = ledger.read(CLEAN.key)
    rows = rows[rows["skipped"].notna()]
    return dict(zip(rows["sample"], rows["skipped"], strict=True))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
