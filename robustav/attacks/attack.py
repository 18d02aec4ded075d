"""What an attack is: frozen settings and one call."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@runtime_checkable  # so that shape checking in the tests can look at an attack inside an attack
class Attack(Protocol):
    """Settings in a frozen dataclass; calling it returns inputs inside the threat, and nothing else.

    `draws` holds one generator a sample (see `robustav.randomness`), the only randomness an attack may use. The
    harness batches, freezes, counts, audits and judges; an attack that cannot handle a norm raises `ValueError`.
    """

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs: ...
