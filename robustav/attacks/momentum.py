"""Gradient ascent with momentum."""

from dataclasses import dataclass

from torch import Tensor

from robustav.attacks.ascent import climb, look
from robustav.attacks.pgd import check_steps
from robustav.classifier import Classifier, Inputs
from robustav.norms import TINY, Draws, l1_length, per_sample
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class MomentumFGSM:
    """MI-FGSM: `g <- decay g + gradient / ||gradient||_1`, steps of epsilon / steps along g [Dong et al., 2018,
    arXiv:1710.06081].

    Made to transfer between models. Each modality has its own momentum and its own normalisation. The best iterate is
    returned, sample by sample.
    """

    steps: int = 10
    decay: float = 1.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.decay >= 0:
            raise ValueError(f"`decay` must not be negative, got {self.decay}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        x, best = inputs, None
        momentum = {m: inputs[m].new_zeros(()) for m in threat.budgets}
        for step in range(self.steps):
            here, gradients = climb(model, x, labels, threat)
            if step:
                best = best.or_better(here) if best else here
            for m, gradient in gradients.items():
                momentum[m] = self.decay * momentum[m] + gradient / per_sample(l1_length(gradient) + TINY, gradient)
            x = threat.project(inputs, threat.step(inputs, x, momentum, 1 / self.steps))
        last = look(model, x, labels, threat)
        return (best.or_better(last) if best else last).inputs
