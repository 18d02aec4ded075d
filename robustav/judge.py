"""The judge: lets an attack try on the clips of one part, and trusts nothing that it returns."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustav import audit, keep
from robustav.attacks import trait
from robustav.classifier import Classifier, Inputs, Trace
from robustav.ledger import Ledger
from robustav.plan import Condition
from robustav.prepare import AGREEMENT, prepare, quick_products
from robustav.randomness import draws_for, seeded
from robustav.reader import Batch, Reader, joined
from robustav.threat import snr_db
from robustav.view import AttackView, Tally

log = logging.getLogger(__name__)

FIRMER = (1.001, 1.003, 1.01, 1.03, 1.1)  # times a smallest perturbation, tried until the model agrees


class Cost(NamedTuple):
    """What an attack spent on each clip of a batch and what it saw on the way; columns of the ledger."""

    forwards: list[int]
    backwards: list[int]
    zero_gradients: list[float]
    by_modality: dict[str, list[float]]  # zero gradients of each attacked modality
    late_gain: list[float | None]
    ever_reached: list[bool]

    @classmethod
    def of(cls, tally: Tally) -> "Cost":
        """What a tally says, as columns."""
        late = [None if gain != gain else gain for gain in tally.late_gain().tolist()]
        by_modality = {m: shares.tolist() for m, shares in tally.zero_by_modality().items()}
        spent = tally.forwards.tolist(), tally.backwards.tolist(), tally.zero_gradients().tolist()
        return cls(*spent, by_modality, late, tally.ever_reached.bool().tolist())

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        by_modality = {m: shares + other.by_modality[m] for m, shares in self.by_modality.items()}
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.zero_gradients + other.zero_gradients,
            by_modality,
            self.late_gain + other.late_gain,
            self.ever_reached + other.ever_reached,
        )


@dataclass
class Judge:
    """Attacks, audits and scores what a reader read; `kept` names the clips whose examples are stored."""

    reader: Reader
    seed: int
    ledger: Ledger
    kept: frozenset[str] = frozenset()
    prepared: dict[str, Classifier] = field(default_factory=dict)  # what attacks see, by the weights of its source
    agreed: set[tuple[str, ...]] = field(default_factory=set)  # attacked sets whose view was held against the model

    def judge(
        self, row: Condition, batches: Sequence[Batch], settled: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """One condition on the clips of a part: a ledger row for each.

        `settled` holds the rows of clips that a cheaper condition broke, by sample: they stand here too.
        """
        lines = {name: _left_to(line) for name, line in settled.items()}
        for batch in self._unsettled(batches, settled):
            lines |= {line["sample"]: line for line in self._judge(row, batch)}
        return [lines[name] for batch in batches for name in batch.ids]

    def _unsettled(self, batches: Sequence[Batch], settled: Mapping[str, Any]) -> list[Batch]:
        """What is left to attack, in batches as full as before."""
        if not any(name in settled for batch in batches for name in batch.ids):
            return list(batches)
        parts = [(b, [i for i, name in enumerate(b.ids) if name not in settled]) for b in batches]
        parts = [(b, rows) for b, rows in parts if rows]
        if not parts:
            return []
        whole, size = joined([b.at(rows) for b, rows in parts]), self.reader.batch_size
        return [whole.at(range(i, min(i + size, len(whole.ids)))) for i in range(0, len(whole.ids), size)]

    def _judge(self, row: Condition, batch: Batch) -> list[dict[str, Any]]:
        """One condition on one batch: attack, audit, score, score again, and a row for each clip."""
        goal, size = self.reader.goal.given(batch.clean), len(batch.ids)
        if row.attack is None or row.threat is None:
            nothing = Cost([0] * size, [0] * size, [0.0] * size, {}, [None] * size, [False] * size)
            returned, cost, found = batch.inputs, nothing, [""] * size
            gauge, trace = torch.zeros(size), batch.clean
        else:
            threat = row.threat.given(clean=batch.clean, writable=batch.writable)
            returned, cost = self._attack(row, batch)
            if trait(row.attack, "roams", False):
                returned = self._firm(row, batch, returned)
            specs = self.reader.model.specs
            found = audit.violations(batch.inputs, returned, threat, specs, batch.writable, bounded=not row.smallest)
            gauge = threat.gauge(batch.inputs, returned)
            trace = self.reader.score(returned, batch.ids, row.key)
        again = self._score_again(returned, batch.ids, row.key)
        reached = goal.reached(trace, batch.labels)
        largest = batch.clean.logits.abs().max().item()
        if not self.reader.model.stochastic:
            rescored = audit.rescore_violations(
                trace.logits, again.logits, reached, goal.reached(again, batch.labels), largest
            )
            found = [audit.join(*words) for words in zip(found, rescored, strict=True)]
        for i, name in enumerate(batch.ids):
            if name in self.kept:
                found[i] = audit.join(found[i], self._keep(row, batch.at([i]), returned, i, trace, largest))
        loss, gap = goal.loss(trace, batch.labels), (trace.logits - again.logits).abs().amax(1)
        columns: dict[str, Sequence[Any]] = {
            "sample": batch.ids,
            "labels": [x.nonzero().flatten().tolist() if x.ndim else [int(x)] for x in batch.labels],
            "labelled": batch.labelled,
            "logits": list(trace.logits.float().cpu().numpy()),
            "loss": loss.tolist(),
            "reached": reached.tolist(),
            "settled": [""] * size,
            "gauge": gauge.tolist(),
            "forwards": cost.forwards,
            "backwards": cost.backwards,
            "zero_gradients": cost.zero_gradients,
            "late_gain": cost.late_gain,
            "ever_reached": cost.ever_reached,
            "reached_source": self._fools_source(row, batch, returned),
            "rescore_gap": gap.tolist(),
            "violation": found,
            **{f"zero_gradients_{m}": shares for m, shares in cost.by_modality.items()},
            **self._sizes(row, batch, returned),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _firm(self, row: Condition, batch: Batch, returned: Inputs) -> Inputs:
        """What a minimum-norm attack returned, a little longer where the model itself does not agree that it is enough.

        Such an attack ends a hair beyond the boundary of its own, prepared copy; the model may round otherwise, and a clip
        that breaks would count as one that stands. Nothing leaves its budget for it.
        """
        assert row.threat is not None
        threat, goal = row.threat.given(writable=batch.writable), self.reader.goal.given(batch.clean)
        delta = {m: returned[m] - batch.inputs[m] for m in row.attacked}
        moved = torch.stack([d.flatten(1).abs().amax(1) > 0 for d in delta.values()]).any(0)
        for factor in FIRMER:
            scored = self.reader.score(returned, batch.ids, f"{row.key} firm {factor}")
            missed = moved & ~goal.reached(scored, batch.labels)
            if not missed.any():
                break
            longer = {m: batch.inputs[m] + factor * d for m, d in delta.items()}
            if row.smallest:
                longer = {m: x.clamp(threat.budgets[m].low, threat.budgets[m].high) for m, x in longer.items()}
            else:
                longer = threat.project(batch.inputs, {**batch.inputs, **longer})
            chosen = {
                m: torch.where(missed.reshape(-1, *[1] * (x.ndim - 1)), longer[m], x)
                for m, x in returned.items()
                if m in delta
            }
            returned = {**returned, **chosen}
        return returned

    def _fools_source(self, row: Condition, batch: Batch, returned: Inputs) -> Sequence[bool | None]:
        """Whether a transfer attack's examples do to their source what they should do to the model; None for clips that the
        source has wrong as they are."""
        if row.source is None:
            return [None] * len(batch.ids)
        reader = replace(self.reader, model=row.source.model)

        def verdict(inputs: Inputs, purpose: str, given: Trace | None = None) -> tuple[Trace, Tensor]:
            scored = reader.score({m: inputs[m] for m in reader.model.specs}, batch.ids, f"{row.key} source {purpose}")
            return scored, self.reader.goal.given(given or scored).reached(scored, batch.labels)

        clean, wrong = verdict(batch.inputs, "clean")
        _, reached = verdict(returned, "returned", clean)
        return [None if before else now for before, now in zip(wrong.tolist(), reached.tolist(), strict=True)]

    def _score_again(self, inputs: Inputs, ids: Sequence[str], purpose: str) -> Trace:
        """The same clips in other company: every second one, then the rest.

        A score that depends on chance or on batch mates, be it on their mean only, shows itself.
        """
        order = torch.cat([torch.arange(0, len(ids), 2), torch.arange(1, len(ids), 2)]).to(self.reader.device)
        groups = [group for group in order.split(-(-len(ids) // 2)) if len(group)]
        traces = [
            self.reader.score({m: x[g] for m, x in inputs.items()}, [ids[i] for i in g.tolist()], f"{purpose} again")
            for g in groups
        ]
        back = order.argsort()
        return Trace({}, torch.cat([t.latent for t in traces])[back], torch.cat([t.logits for t in traces])[back])

    def _attack(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        """The attack's answer for one batch, from the prepared copy and with un-attacked modalities held."""
        with quick_products() if self.reader.device.type == "cpu" else nullcontext():
            if row.attacked not in self.agreed and row.source is None:
                self._check_view(row, batch)
            return self._in_halves(row, batch)

    def _seen(self, row: Condition, batch: Batch) -> Classifier:
        """What the attack sees: the model, its declared stand-in, or the source of a transfer attack, made ready."""
        name = row.source.weights if row.source else ""
        if name not in self.prepared:
            model = row.source.model if row.source else self.reader.model.surrogate()
            self.prepared[name] = prepare(model, {m: batch.inputs[m] for m in model.specs})
        return self.prepared[name]

    def _held(self, row: Condition, batch: Batch) -> dict[str, Tensor]:
        """What the attack does not touch: features, encoded once a batch and source; raw where the model is stochastic."""
        model, name = self._seen(row, batch), row.source.weights if row.source else ""
        others = [m for m in model.specs if m not in row.attacked]
        if model.stochastic:
            return {m: batch.inputs[m] for m in others}
        for m in others:
            if (name, m) not in batch.held:
                with torch.no_grad():
                    batch.held[name, m] = model.encode(m, model.front_end(m, batch.inputs[m]))
        return {m: batch.held[name, m] for m in others}

    def _check_view(self, row: Condition, batch: Batch) -> None:
        """What the attack sees must score as the model does, or it attacks something else. Looks at one clip.

        A declared stand-in may differ, and a random model is the audit's business.
        """
        model = self.reader.model
        if model.surrogate() is model and not model.stochastic:
            self._held(row, batch)
            one = batch.at([0])
            with torch.no_grad():
                seen = self._view(row, one)({m: one.inputs[m] for m in row.attacked})
            own, again = (self.reader.score(one.inputs, one.ids, purpose).logits for purpose in ("view", "view again"))
            allowed = 2 * AGREEMENT * batch.clean.logits.abs().max()
            if (again - own).abs().max() <= allowed < (seen - own).abs().max():
                raise ValueError(
                    "the model's stages (front_end, encode, fuse, classify) give other scores than the model itself, so an "
                    "attack would be blind to what lies between: put that into a stage, and leave trace and forward alone"
                )
        self.agreed.add(row.attacked)

    def _view(self, row: Condition, batch: Batch) -> AttackView:
        tally = Tally(len(batch.ids), row.attacked, self.reader.device)
        return AttackView(self._seen(row, batch), row.attacked, self._held(row, batch), tally)

    def _in_halves(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        """The attack on a batch; if a GPU runs out of memory, on its halves."""
        try:
            return self._attack_once(row, batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch.ids) < 2:
                raise
            log.warning("out of GPU memory with %d clips at once: trying halves", len(batch.ids))
        middle, size = len(batch.ids) // 2, len(batch.ids)
        (one, cost), (other, rest) = (
            self._in_halves(row, batch.at(part)) for part in (range(middle), range(middle, size))
        )
        return {m: torch.cat([one[m], other[m]]) for m in one}, cost + rest

    def _attack_once(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        assert row.attack is not None and row.threat is not None
        view = self._view(row, batch)
        threat = row.threat.given(clean=batch.clean, writable=batch.writable)
        # Copies, since an attack that writes into what it was given would change the clean clips of later conditions.
        given = {m: batch.inputs[m].clone() for m in row.attacked}
        draws = draws_for(self.seed, batch.ids, row.name, *row.attacked)
        attack = row.attack.smallest if row.smallest else row.attack  # type: ignore[attr-defined]
        try:
            with seeded(self.seed, "attack", row.key, *batch.ids):
                attacked = attack(view, given, batch.labels, threat, draws=draws)
        except FloatingPointError as error:
            raise ValueError(f"{row.key} on clips {batch.ids}: {error}") from error
        returned = {**batch.inputs, **{m: x.detach() for m, x in attacked.items()}}
        cost = Cost.of(view.tally)
        if row.source is not None:  # what it met on the way is about the source
            cost = cost._replace(ever_reached=[False] * len(batch.ids), late_gain=[None] * len(batch.ids))
        return returned, cost

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

    def _keep(self, row: Condition, one: Batch, returned: Inputs, i: int, trace: Trace, largest: float) -> str:
        """Store one clip's example, read it back, audit and score what was read; returns what is wrong with it."""
        name = one.ids[0]
        example = {m: x[i] for m, x in returned.items()}
        folder = keep.store(self.ledger.folder, row.key, name, example, self.reader.model.specs)
        stored = {m: x[None].to(self.reader.device) for m, x in keep.load(folder).items()}
        words = ""
        if row.threat is not None:
            threat = row.threat.given(writable=one.writable)
            (words,) = audit.violations(
                one.inputs, stored, threat, self.reader.model.specs, one.writable, bounded=not row.smallest
            )
        goal, alone = self.reader.goal.given(one.clean), self.reader.score(stored, one.ids, f"{row.key} kept")
        before = Trace({}, trace.latent[i : i + 1], trace.logits[i : i + 1])
        verdicts = goal.reached(before, one.labels), goal.reached(alone, one.labels)
        (rescored,) = (
            [""]
            if self.reader.model.stochastic
            else audit.rescore_violations(before.logits, alone.logits, *verdicts, largest)
        )
        return audit.join(words and f"as stored: {words}", rescored and f"as stored: {rescored}")


def _left_to(line: Mapping[str, Any]) -> dict[str, Any]:
    """A clip's row under a condition that leaves it to a cheaper one: that one's point, at no cost."""
    spent = {name: None for name in line if name.startswith(("zero_gradients", "late_gain"))}
    return {**line, **spent, "settled": line["settled"] or line["condition"], "forwards": 0, "backwards": 0}
