"""The reader: from indices to batches of usable clips with what the untouched model says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustav.classifier import Classifier, Inputs, Trace, check_modalities
from robustav.data.samples import Sample, Samples, SkippedError
from robustav.goals import Goal, label_set
from robustav.randomness import seeded

DRAWS = 20  # passes that a verdict on a stochastic model averages [Athalye et al., 2018, arXiv:1707.07397]


class Batch(NamedTuple):
    """Usable clips of one batch, on the device, with what the untouched model says of them."""

    ids: list[str]
    inputs: Inputs
    writable: dict[str, Tensor]
    labels: Tensor
    labelled: list[bool]
    clean: Trace
    held: dict[tuple[str, str], Tensor]  # features by (source, modality), filled in when first needed

    def at(self, rows: Sequence[int]) -> "Batch":
        """Some of its clips."""
        return Batch(
            [self.ids[i] for i in rows],
            {m: x[rows] for m, x in self.inputs.items()},
            {m: x[rows] for m, x in self.writable.items()},
            self.labels[rows],
            [self.labelled[i] for i in rows],
            Trace({}, self.clean.latent[rows], self.clean.logits[rows]),
            {m: x[rows] for m, x in self.held.items()},
        )


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one."""

    def together(parts: Sequence[dict[Any, Tensor]]) -> dict[Any, Tensor]:
        return {m: torch.cat([part[m] for part in parts]) for m in parts[0]}

    if len(batches) == 1:
        return batches[0]
    masked = {m for b in batches for m in b.writable}
    masks = [{m: b.writable.get(m, torch.ones_like(b.inputs[m], dtype=torch.bool)) for m in masked} for b in batches]
    held = [b.held for b in batches] if len({frozenset(b.held) for b in batches}) == 1 else [{} for _ in batches]
    clean = Trace({}, torch.cat([b.clean.latent for b in batches]), torch.cat([b.clean.logits for b in batches]))
    return Batch(
        [name for b in batches for name in b.ids],
        together([b.inputs for b in batches]),
        together(masks),
        torch.cat([b.labels for b in batches]),
        [one for b in batches for one in b.labelled],
        clean,
        together(held),
    )


@dataclass(frozen=True)
class Reader:
    """Reads clips for one model and one goal; a clip that cannot be used is a row, or with `strict` an error."""

    model: Classifier
    samples: Samples
    goal: Goal
    batch_size: int
    device: torch.device
    strict: bool = False
    seed: int = 0  # of models that draw at random

    def read(self, indices: Sequence[int]) -> tuple[list[Batch], list[dict[str, Any]]]:
        """Usable clips in batches, and a ledger row for each clip that is not."""
        usable: list[Sample] = []
        skipped: list[dict[str, Any]] = []
        for index in indices:
            try:
                usable.append(self.samples.load(index))
            except SkippedError as reason:
                if self.strict:
                    raise ValueError(f"clip {self.samples.ids[index]!r} cannot be used: {reason}") from reason
                skipped.append({"sample": self.samples.ids[index], "skipped": str(reason)})
        groups = [usable[i : i + self.batch_size] for i in range(0, len(usable), self.batch_size)]
        return [self._batch(group) for group in groups], skipped

    def _batch(self, group: Sequence[Sample]) -> Batch:
        specs = self.model.specs
        for sample in group:
            # A clip may have more than the model reads, never less.
            check_modalities({m: x for m, x in sample.inputs.items() if m in specs}, specs)
            for modality, spec in specs.items():
                try:
                    spec.check(modality, sample.inputs[modality][None])
                except (ValueError, TypeError) as error:
                    raise ValueError(f"clip {sample.id!r}: {error}") from error
        ids = [sample.id for sample in group]
        inputs = {m: torch.stack([s.inputs[m] for s in group]).to(self.device) for m in sorted(specs)}
        writable = {}
        for m in specs:
            if any(m in sample.signal for sample in group):
                whole = torch.ones(specs[m].shape, dtype=torch.bool)
                masks = [sample.signal[m].expand_as(whole) if m in sample.signal else whole for sample in group]
                writable[m] = torch.stack(masks).to(self.device)
        clean = self.score(inputs, ids, "clean")
        guess = own_labels(clean.logits, self.goal)
        labels = torch.stack([g if s.labels is None else _as(s, g) for s, g in zip(group, guess, strict=True)])
        self.goal.check(labels, len(self.model.classes))
        return Batch(ids, inputs, writable, labels, [s.labels is not None for s in group], clean, {})

    def score(self, inputs: Inputs, ids: Sequence[str], purpose: str) -> Trace:
        """The untouched model's word on a batch: of a model declared stochastic, the mean over `DRAWS` passes.

        A model that draws at random draws by (seed, purpose, clips). Raises `ValueError` for scores that are not finite (naming the clip), of the wrong shape, or of a model that
        writes into its inputs.
        """
        shapes = ", ".join(f"{m} {list(x.shape)}" for m, x in inputs.items())
        versions = {m: x._version for m, x in inputs.items()}
        try:
            with torch.no_grad(), seeded(self.seed, purpose, *ids):
                traces = [self.model.trace(inputs) for _ in range(DRAWS if self.model.stochastic else 1)]
        except Exception as error:  # whatever a user's model raises, it is this batch that it could not take
            raise ValueError(f"the model failed on a batch with {shapes}: {type(error).__name__}: {error}") from error
        if written := [m for m, x in inputs.items() if x._version != versions[m]]:
            raise ValueError(f"the model writes into its inputs ({', '.join(written)}): have it work on a copy")
        latent, logits = (
            torch.stack(many).mean(0) if len(many) > 1 else many[0]
            for many in zip(*[t[1:] for t in traces], strict=True)
        )
        expected = (len(ids), len(self.model.classes))
        if tuple(logits.shape) != expected:
            raise ValueError(f"the model must return logits {list(expected)}, got {list(logits.shape)}")
        bad = ~logits.isfinite().all(1)
        if bad.any():
            raise ValueError(
                f"the model's scores of clip {ids[int(bad.nonzero()[0])]!r} are not finite (NaN or infinite)"
            )
        return Trace({}, latent, logits)


def own_labels(logits: Tensor, goal: Goal) -> Tensor:
    """The model's own prediction as labels, for clips that nobody labelled: its label set, at least its top class."""
    if goal.label_kind == "multiclass":
        return logits.argmax(1)
    top = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return torch.maximum(top, label_set(logits, goal.threshold, goal.label_kind).to(logits))


def _as(sample: Sample, like: Tensor) -> Tensor:
    """A clip's labels on the device of `like`; raises `ValueError` for another kind of labels."""
    labels = sample.labels
    assert labels is not None
    if labels.shape != like.shape or labels.is_floating_point() != like.is_floating_point():
        raise ValueError(
            f"clip {sample.id!r}: the labels must be {like.dtype} {list(like.shape)} for this kind of model, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return labels.to(like)
