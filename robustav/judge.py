"""The judge: lets an attack try on the clips of one part, and trusts nothing that it returns."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from robustav import audit, keep
from robustav.classifier import Classifier, Inputs, Trace
from robustav.ledger import Ledger
from robustav.plan import Condition
from robustav.prepare import AGREEMENT, prepare, quick_products
from robustav.randomness import draws_for
from robustav.reader import Batch, Reader
from robustav.threat import snr_db
from robustav.view import AttackView, Tally

log = logging.getLogger(__name__)


class Cost(NamedTuple):
    """What an attack spent on each clip, and the share of its gradients that were zero."""

    forwards: list[int]
    backwards: list[int]
    zero_gradients: list[float]


@dataclass
class Judge:
    """Attacks, audits and scores what a reader read; `kept` names the clips whose examples are stored."""

    reader: Reader
    seed: int
    ledger: Ledger
    kept: frozenset[str] = frozenset()
    prepared: Classifier | None = None
    agreed: set[tuple[str, ...]] = field(default_factory=set)  # attacked sets whose view was held against the model

    def judge(self, row: Condition, batch: Batch) -> list[dict[str, Any]]:
        """One condition on one batch: attack, audit, score, score again, and a row for each clip."""
        goal, size = self.reader.goal.given(batch.clean), len(batch.ids)
        if row.attack is None or row.threat is None:
            returned, cost, found = batch.inputs, Cost([0] * size, [0] * size, [0.0] * size), [""] * size
            gauge, trace = torch.zeros(size), batch.clean
        else:
            threat = row.threat.given(clean=batch.clean, writable=batch.writable)
            returned, cost = self._attack(row, batch)
            found = audit.violations(batch.inputs, returned, threat, self.reader.model.specs, batch.writable)
            gauge = threat.gauge(batch.inputs, returned)
            trace = self.reader.score(returned, batch.ids)
        again = self._score_again(returned, batch.ids)
        reached = goal.reached(trace, batch.labels)
        largest = batch.clean.logits.abs().max().item()
        rescored = audit.rescore_violations(
            trace.logits, again.logits, reached, goal.reached(again, batch.labels), largest
        )
        found = [audit.join(*words) for words in zip(found, rescored, strict=True)]
        for i, name in enumerate(batch.ids):
            if name in self.kept:
                found[i] = audit.join(
                    found[i], self._keep(row, batch.cut(slice(i, i + 1)), returned, i, trace, largest)
                )
        loss, gap = goal.loss(trace, batch.labels), (trace.logits - again.logits).abs().amax(1)
        columns: dict[str, Sequence[Any]] = {
            "sample": batch.ids,
            "labels": [x.nonzero().flatten().tolist() if x.ndim else [int(x)] for x in batch.labels],
            "labelled": batch.labelled,
            "logits": list(trace.logits.float().cpu().numpy()),
            "loss": loss.tolist(),
            "reached": reached.tolist(),
            "gauge": gauge.tolist(),
            "forwards": cost.forwards,
            "backwards": cost.backwards,
            "zero_gradients": cost.zero_gradients,
            "rescore_gap": gap.tolist(),
            "violation": found,
            **self._sizes(row, batch, returned),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _score_again(self, inputs: Inputs, ids: Sequence[str]) -> Trace:
        """The same clips in other company: every second one, then the rest.

        A score that depends on chance or on batch mates, be it on their mean only, shows itself.
        """
        order = torch.cat([torch.arange(0, len(ids), 2), torch.arange(1, len(ids), 2)]).to(self.reader.device)
        groups = [group for group in order.split(-(-len(ids) // 2)) if len(group)]
        traces = [self.reader.score({m: x[g] for m, x in inputs.items()}, [ids[i] for i in g.tolist()]) for g in groups]
        back = order.argsort()
        return Trace({}, torch.cat([t.latent for t in traces])[back], torch.cat([t.logits for t in traces])[back])

    def _attack(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        """The attack's answer for one batch, from the prepared copy and with un-attacked modalities held."""
        if self.prepared is None:
            self.prepared = prepare(self.reader.model, batch.inputs)
        with quick_products() if self.reader.device.type == "cpu" else nullcontext():
            for m, raw in batch.inputs.items():
                if m not in row.attacked and m not in batch.held:
                    with torch.no_grad():
                        batch.held[m] = self.prepared.encode(m, self.prepared.front_end(m, raw))
            if row.attacked not in self.agreed:
                self._check_view(row, batch)
            return self._in_halves(row, batch)

    def _check_view(self, row: Condition, batch: Batch) -> None:
        """What the attack sees must score as the model does, or it attacks something else. Looks at one clip."""
        one = batch.cut(slice(0, 1))
        with torch.no_grad():
            seen = self._view(row, one)({m: one.inputs[m] for m in row.attacked})
        own, again = self.reader.score(one.inputs, one.ids).logits, self.reader.score(one.inputs, one.ids).logits
        allowed = 2 * AGREEMENT * batch.clean.logits.abs().max()
        if (again - own).abs().max() <= allowed < (seen - own).abs().max():  # a random model is the audit's business
            raise ValueError(
                "the model's stages (front_end, encode, fuse, classify) give other scores than the model itself, so an "
                "attack would be blind to what lies between: put that into a stage, and leave trace and forward alone"
            )
        self.agreed.add(row.attacked)

    def _view(self, row: Condition, batch: Batch) -> AttackView:
        assert self.prepared is not None
        held = {m: x for m, x in batch.held.items() if m not in row.attacked}
        return AttackView(self.prepared, row.attacked, held, Tally(len(batch.ids), row.attacked, self.reader.device))

    def _in_halves(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        """The attack on a batch; if a GPU runs out of memory, on its halves."""
        try:
            return self._attack_once(row, batch)
        except torch.cuda.OutOfMemoryError:
            if len(batch.ids) < 2:
                raise
            log.warning("out of GPU memory with %d clips at once: trying halves", len(batch.ids))
        middle = len(batch.ids) // 2
        (one, cost), (other, rest) = (
            self._in_halves(row, batch.cut(part)) for part in (slice(None, middle), slice(middle, None))
        )
        returned = {m: torch.cat([one[m], other[m]]) for m in one}
        return returned, Cost(
            cost.forwards + rest.forwards,
            cost.backwards + rest.backwards,
            cost.zero_gradients + rest.zero_gradients,
        )

    def _attack_once(self, row: Condition, batch: Batch) -> tuple[Inputs, Cost]:
        assert row.attack is not None and row.threat is not None
        view = self._view(row, batch)
        threat = row.threat.given(clean=batch.clean, writable=batch.writable)
        # Copies, since an attack that writes into what it was given would change the clean clips of later conditions.
        given = {m: batch.inputs[m].clone() for m in row.attacked}
        draws = draws_for(self.seed, batch.ids, row.name, *row.attacked)
        try:
            attacked = row.attack(view, given, batch.labels, threat, draws=draws)
        except FloatingPointError as error:
            raise ValueError(f"{row.key} on clips {batch.ids}: {error}") from error
        returned = {**batch.inputs, **{m: x.detach() for m, x in attacked.items()}}
        tally = view.tally
        return returned, Cost(tally.forwards.tolist(), tally.backwards.tolist(), tally.zero_gradients().tolist())

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
            (words,) = audit.violations(one.inputs, stored, threat, self.reader.model.specs, one.writable)
        goal, alone = self.reader.goal.given(one.clean), self.reader.score(stored, one.ids)
        before = Trace({}, trace.latent[i : i + 1], trace.logits[i : i + 1])
        verdicts = goal.reached(before, one.labels), goal.reached(alone, one.labels)
        (rescored,) = audit.rescore_violations(before.logits, alone.logits, *verdicts, largest)
        return audit.join(words and f"as stored: {words}", rescored and f"as stored: {rescored}")
