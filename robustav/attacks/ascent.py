"""The one thing every gradient attack does: look at a point, see its loss and its gradient, keep the better point."""

from typing import NamedTuple

import torch
from torch import Tensor

from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


class Point(NamedTuple):
    """A batch of inputs with what the goal makes of it."""

    inputs: Inputs
    loss: Tensor  # [batch]
    reached: Tensor  # [batch] bool

    def or_better(self, other: "Point") -> "Point":
        """Sample by sample, the point that reaches the goal; of two alike, the one with the larger loss."""
        better = other.reached & ~self.reached | (other.reached == self.reached) & (other.loss > self.loss)
        inputs = {
            m: x if x is other.inputs[m] else torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), other.inputs[m], x)
            for m, x in self.inputs.items()
        }
        loss = torch.where(better, other.loss, self.loss)
        return Point(inputs, loss, torch.where(better, other.reached, self.reached))


class Pursuit(NamedTuple):
    """What an attack works on, and the part of it that some clips make."""

    model: Classifier
    inputs: Inputs
    labels: Tensor
    threat: ThreatModel
    draws: Draws

    def at(self, rows: Tensor) -> "Pursuit":
        """The same for some clips of the batch (indices)."""
        return Pursuit(
            self.model.at(rows),
            {m: x[rows] for m, x in self.inputs.items()},
            self.labels[rows],
            self.threat.at(rows),
            [self.draws[i] for i in rows.tolist()],
        )


def put(whole: Inputs, rows: Tensor, part: Inputs) -> Inputs:
    """`whole` with the clips `rows` replaced by those of `part`."""
    return {m: x.index_copy(0, rows, part[m]) if part[m] is not x else x for m, x in whole.items()}


def merged(best: Point, rows: Tensor, here: Point) -> Point:
    """`best`, or what was found for the clips `rows` where that is better."""
    kept = Point({m: x[rows] for m, x in best.inputs.items()}, best.loss[rows], best.reached[rows]).or_better(here)
    return Point(
        put(best.inputs, rows, kept.inputs),
        best.loss.index_copy(0, rows, kept.loss),
        best.reached.index_copy(0, rows, kept.reached),
    )


def look(model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel) -> Point:
    """Loss and verdict of the goal, without a gradient."""
    with torch.no_grad():
        trace = model.trace(inputs)
        loss, reached = threat.goal.loss(trace, labels), threat.goal.reached(trace, labels)
        model.note(loss, reached)
        return Point(inputs, loss, reached)


def climb(model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel) -> tuple[Point, Inputs]:
    """`look`, and the gradient of each sample's loss by every attacked modality.

    The losses are summed, so a sample's gradient does not depend on its batch mates. Raises `FloatingPointError`
    naming the samples whose gradient is not finite: going on would report an attack that never took place.
    """
    leaves = {m: inputs[m].detach().requires_grad_() for m in threat.budgets}
    with torch.enable_grad():
        trace = model.trace({**inputs, **leaves})
        loss = threat.goal.loss(trace, labels)
        if loss.requires_grad:
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        else:  # nothing that is attacked reaches the loss: a gradient of zero, which the harness counts
            found = tuple(torch.zeros_like(x) for x in leaves.values())
    gradients = dict(zip(leaves, found, strict=True))
    for modality, gradient in gradients.items():
        bad = ~gradient.flatten(1).sum(1).isfinite()  # a sum is finite unless a term is not (or it overflows)
        if bad.any():
            raise FloatingPointError(
                f"the gradient by {modality!r} is not finite for samples {bad.nonzero().flatten().tolist()} of the batch: "
                "look for a logarithm or square root of zero in the front end"
            )
    with torch.no_grad():
        reached = threat.goal.reached(trace, labels)
        model.note(loss.detach(), reached)
        return Point(inputs, loss.detach(), reached), gradients
