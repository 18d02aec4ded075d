"""Expectation over transformation: attacks on models that draw their scores at random."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustav.attacks.attack import Attack
from robustav.classifier import Classifier, Inputs, Trace
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class EOT:
    """Let `attack` see the mean over `times` draws of a random model [Athalye et al., 2018, arXiv:1707.07397].

    The mean is taken of scores and latents, not of losses: loss, gradient and verdict then speak of the same averaged
    model, whatever loss the attack steers by. Where a loss is linear in the scores it is the mean loss too. One pass
    costs `times` passes, and is counted so.

    `at_once` is the number of draws in one batch, all unless told. Fewer bound the memory; for a gradient, each pass is
    then made a second time, on fresh draws.
    """

    attack: Attack
    times: int = 20
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"`times` must be at least 1, got {self.times}")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"`at_once` must be at least 1 draw, got {self.at_once}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        averaged = Averaged(model, self.times, self.at_once or self.times)
        return self.attack(averaged, inputs, labels, threat, draws=draws)


class Averaged(Classifier):
    """A view of a random classifier that answers with the mean of `times` passes; its stages are single passes."""

    def __init__(self, model: Classifier, times: int, at_once: int) -> None:
        super().__init__()
        self.model, self.times, self.at_once = model, times, at_once
        self.specs, self.classes = model.specs, model.classes
        self.label_kind, self.stochastic = model.label_kind, model.stochastic

    def trace(self, inputs: Inputs) -> Trace:
        counts = [min(self.at_once, self.times - done) for done in range(0, self.times, self.at_once)]
        sums = [
            _Forgetful.apply(self, count, tuple(inputs), *inputs.values())
            if len(counts) > 1
            else self.summed(count, inputs)
            for count in counts
        ]
        latent, logits = (torch.stack(part).sum(0) / self.times for part in zip(*sums, strict=True))
        return Trace({}, latent, logits)

    def summed(self, count: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Latent and logits summed over `count` draws, each clip repeated in one batch."""
        x = next(iter(inputs.values()))
        rows = torch.arange(len(x), device=x.device).repeat(count)
        trace = self.model.at(rows).trace({m: x[rows] for m, x in inputs.items()})
        return trace.latent.unflatten(0, (count, -1)).sum(0), trace.logits.unflatten(0, (count, -1)).sum(0)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.model.front_end(modality, raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model.encode(modality, x)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.fuse(features)

    def classify(self, latent: Tensor) -> Tensor:
        return self.model.classify(latent)

    def at(self, rows: Tensor) -> "Averaged":
        return Averaged(self.model.at(rows), self.times, self.at_once)

    def note(self, loss: Tensor, reached: Tensor) -> None:
        self.model.note(loss, reached)


class _Forgetful(torch.autograd.Function):
    """`Averaged.summed` that keeps nothing for the backward pass, and makes the pass again there.

    Not `torch.utils.checkpoint`: its forward pass registers the hooks by which an `AttackView` counts a second time.
    """

    @staticmethod
    def forward(ctx: Any, averaged: Averaged, count: int, names: tuple[str, ...], *values: Tensor) -> Any:
        ctx.save_for_backward(*values)
        ctx.averaged, ctx.count, ctx.names = averaged, count, names
        return averaged.summed(count, dict(zip(names, values, strict=True)))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        wanted = ctx.needs_input_grad[3:]
        values = [x.detach().requires_grad_(want) for x, want in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            sums = ctx.averaged.summed(ctx.count, dict(zip(ctx.names, values, strict=True)))
        reaching = [(total, slope) for total, slope in zip(sums, slopes, strict=True) if total.requires_grad]
        leaves = [x for x in values if x.requires_grad]
        if not reaching:  # nothing that is attacked reaches the scores
            return None, None, None, *(None for _ in values)
        totals, slopes = zip(*reaching, strict=True)
        found = iter(torch.autograd.grad(totals, leaves, slopes, allow_unused=True))
        return None, None, None, *(next(found) if want else None for want in wanted)
