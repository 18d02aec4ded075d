"""Random noise: the control that every attack must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class Noise:
    """A full-length step in a random direction: the same norm, size and range as an attack, without the gradient.

    In linf that is the full epsilon with random signs, in l2 white noise of the full length.
    """

    knowledge: ClassVar[str] = "nothing"

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        direction = {
            m: torch.stack([torch.randn(inputs[m].shape[1:], generator=draw) for draw in draws]).to(inputs[m])
            for m in threat.budgets
        }
        return threat.project(inputs, threat.step(inputs, inputs, direction))
