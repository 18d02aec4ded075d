"""Several tries of one attack, the best kept for every sample."""

from dataclasses import dataclass

from torch import Tensor

from robustav.attacks.ascent import look
from robustav.attacks.attack import Attack
from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class Restarts:
    """Run `attack` `times` times on fresh draws; the first run is what the attack alone would do.

    The best is chosen sample by sample, so that more restarts never lose a success.
    """

    attack: Attack
    times: int = 5

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"`times` must be at least 1, got {self.times}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        best = None
        for _ in range(self.times):
            tried = self.attack(model, inputs, labels, threat, draws=draws)
            here = look(model, tried, labels, threat)
            best = best.or_better(here) if best else here
        assert best is not None
        return best.inputs
