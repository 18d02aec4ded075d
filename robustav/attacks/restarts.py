"""Several tries of one attack, the best kept for every sample."""

from dataclasses import dataclass

from torch import Tensor

from robustav.attacks.ascent import Point, Pursuit, look, merged
from robustav.attacks.attack import Attack
from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class Restarts:
    """Run `attack` `times` times on fresh draws; the first run is what the attack alone would do.

    The best is chosen sample by sample, so that more restarts never lose a success. With `stop`, clips that have one are
    not tried again.
    """

    attack: Attack
    times: int = 5
    stop: bool = False

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"`times` must be at least 1, got {self.times}")

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        best, clips = None, Pursuit(model, inputs, labels, threat, draws)
        for _ in range(self.times):
            if best is not None and self.stop and best.reached.any():
                rows = (~best.reached).nonzero().flatten()
                if not len(rows):
                    break
                best = merged(best, rows, self._once(clips.at(rows)))
            else:
                here = self._once(clips)
                best = best.or_better(here) if best else here
        assert best is not None
        return best.inputs

    def _once(self, clips: Pursuit) -> Point:
        tried = self.attack(clips.model, clips.inputs, clips.labels, clips.threat, draws=clips.draws)
        return look(clips.model, tried, clips.labels, clips.threat)
