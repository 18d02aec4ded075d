"""Training that keeps the modalities' features apart [Tian and Xu, 2021, arXiv:2104.02000]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.attacks import Attack
from robustav.classifier import Classifier, Trace
from robustav.goals import Goal
from robustav.models.small import head
from robustav.threat import ThreatModel
from robustav.training.defences.adaptive import Way, Ways
from robustav.training.defences.defended import Defended, defended, freeze_unread, side_by_side, widths
from robustav.training.method import Batch, Method, Work

NAME = "dissimilarity"


def similarity(features: Sequence[Float[Tensor, "batch dim"]]) -> Float[Tensor, " batch"]:
    """Cosine of two modalities' features, in [-1, 1]; of more, the mean over all pairs.

    >>> similarity([torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [4.0, 0.0]])])
    tensor([1., 0.])
    """
    return torch.stack([F.cosine_similarity(a, b, dim=1) for a, b in combinations(features, 2)]).mean(0)


class DissimilarFusion(Defended):
    """Late fusion of feature vectors of one length, side by side under one new head.

    A modality whose vector is longer than the shortest passes a linear layer first, since a cosine compares vectors of
    one length; networks of the paper have that from the start.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__(model)
        sizes = widths(model, NAME)
        dim = min(sizes.values())
        self.maps = nn.ModuleDict(
            {m: nn.Identity() if size == dim else nn.Linear(size, dim) for m, size in sizes.items()}
        )
        self.head = head(len(sizes) * dim, len(self.classes))
        freeze_unread(model)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.maps[modality](self.model.encode(modality, x))

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return side_by_side(features)

    def classify(self, latent: Tensor) -> Tensor:
        return self.head(latent)

    def adaptive_attacks(self) -> Mapping[str, Attack]:
        return {"aligned": Aligned(modalities=len(self.specs))}


@dataclass(frozen=True)
class Aligned(Ways):
    """Climb the loss and pull the modalities' features together, which training has pushed apart.

    One ascent for each weight of the cosine: 1, as in training, and 10, where the loss alone would decide.
    """

    modalities: int = 2
    weights: tuple[float, ...] = (1.0, 10.0)

    def ways(self, model: Classifier, threat: ThreatModel) -> Sequence[Way]:
        return [partial(self._together, weight) for weight in self.weights]

    def _together(self, weight: float, trace: Trace, labels: Tensor, goal: Goal) -> Tensor:
        return goal.loss(trace, labels) + weight * similarity(trace.latent.chunk(self.modalities, dim=1))


@dataclass(frozen=True)
class Dissimilarity(Method):
    """Plain training with the cosine of the modalities' features added to the loss [Tian and Xu, 2021, arXiv:2104.02000].

    Either kind of label, since the term reads no labels. Of the paper's defence this is the training; its other half,
    denoising features by sparse coding at test time, is not here: its thresholds hide gradients, and its stopping rule
    makes a clip's score depend on its batch mates. Costs what plain training costs.
    """

    weight: float = 1.0  # of the cosine

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"`weight` must be at or above 0, got {self.weight}")

    def check(self, model: Classifier) -> None:
        widths(model, NAME)

    def wrapped(self, model: Classifier) -> Classifier:
        return DissimilarFusion(model)

    def begin(self, work: Work) -> None:
        defended(work.model, DissimilarFusion, NAME)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        trace = work.trace(batch.inputs)
        together = similarity([trace.features[m] for m in sorted(trace.features)])
        return work.loss(trace.logits, batch.targets) + self.weight * together


METHODS: dict[str, type[Method]] = {NAME: Dissimilarity}
