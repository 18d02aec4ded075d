"""One step to the edge of the budget."""

from dataclasses import dataclass

from torch import Tensor

from robustav.attacks.ascent import climb
from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class FGSM:
    """`x + epsilon sign(gradient)`, and the like in other norms [Goodfellow et al., 2015, arXiv:1412.6572].

    A sanity baseline: a model that only withstands this one withstands nothing.
    """

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        _, gradients = climb(model, inputs, labels, threat)
        return threat.project(inputs, threat.step(inputs, inputs, gradients))
