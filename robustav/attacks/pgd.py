"""Projected gradient ascent."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from robustav.attacks.ascent import climb, look
from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class PGD:
    """Climb the loss in all attacked modalities at once [Madry et al., 2018, arXiv:1706.06083].

    `relative_step` is a share of each modality's radius, one number or one a modality; 2.5 / steps unless told. The
    best of all iterates is returned, sample by sample; the last update is scored too, which costs one forward pass.
    Without a random start the clean point itself is no candidate, so that one full step is FGSM.
    """

    steps: int = 20
    relative_step: float | Mapping[str, float] | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        check_steps(self.steps)
        sizes = self.relative_step.values() if isinstance(self.relative_step, Mapping) else [self.relative_step]
        if any(size is not None and not size > 0 for size in sizes):
            raise ValueError(f"`relative_step` must be above 0, got {self.relative_step}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        size = 2.5 / self.steps if self.relative_step is None else self.relative_step
        x, best = (threat.start(inputs, draws) if self.random_start else inputs), None
        for step in range(self.steps):
            here, gradients = climb(model, x, labels, threat)
            if step or self.random_start:
                best = best.or_better(here) if best else here
            x = threat.project(inputs, threat.step(inputs, x, gradients, size))
        last = look(model, x, labels, threat)
        return (best.or_better(last) if best else last).inputs


def check_steps(steps: int) -> None:
    """Raise `ValueError` unless there is at least one step."""
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}")
