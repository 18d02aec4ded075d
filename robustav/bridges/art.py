"""The Adversarial Robustness Toolbox: its attacks on our classifiers, and our classifiers as its estimators
[Nicolae et al., 2018, arXiv:1807.01069]."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from torch import Tensor, nn

from robustav.attacks.ascent import Pursuit, climb, look
from robustav.bridges.bridge import Bridge, Kind
from robustav.bridges.single import Clips, SingleInput, picture_shape
from robustav.classifier import Classifier, Inputs, InputSpec
from robustav.goals import Targeted
from robustav.threat import ThreatModel

LINF, L2 = ("linf",), ("l2",)
NORMS = {"linf": np.inf, "l2": 2, "l1": 1}
ALL = tuple(NORMS)

KINDS = {
    "FastGradientMethod": Kind(ALL, "loss", shares=("eps_step",), random="num_random_init", whole=True),
    "BasicIterativeMethod": Kind(LINF, "loss", shares=("eps_step",), random=False, whole=True),
    "ProjectedGradientDescent": Kind(ALL, "loss", shares=("eps_step",), random="num_random_init", whole=True),
    "MomentumIterativeMethod": Kind(ALL, "loss", shares=("eps_step",), random=False, whole=True),
    "AutoProjectedGradientDescent": Kind(ALL, "scores", shares=("eps_step",), seeks=True),
    "AutoConjugateGradient": Kind(ALL, "scores", shares=("eps_step",), seeks=True),
    "SquareAttack": Kind(("linf", "l2"), "scores", seeks=True, knowledge="scores", tiles=True),
    "CarliniL2Method": Kind(L2, "scores", epsilon=None, random=False),
    "CarliniLInfMethod": Kind(LINF, "scores", epsilon=None, random=False),
    "DeepFool": Kind(L2, "scores", epsilon=None, random=False),
    "ElasticNet": Kind(("l1",), "scores", epsilon=None, random=False),
    "HopSkipJump": Kind(("linf", "l2"), "verdicts", epsilon=None, knowledge="labels"),
    "BoundaryAttack": Kind(L2, "verdicts", epsilon=None, knowledge="labels"),
    "SignOPTAttack": Kind(L2, "verdicts", epsilon=None, knowledge="labels"),
}
REFUSED = {
    "NewtonFool": "it takes scores for probabilities, and climbs where they are logits",
    "UniversalPerturbation": "it makes one perturbation for all clips",
    "TargetedUniversalPerturbation": "it makes one perturbation for all clips",
    "SpatialTransformation": "it turns and shifts pictures, which no norm bounds",
    "Wasserstein": "it works in a distance that is no norm",
    "PixelAttack": "it counts changed values (l0), which no budget here bounds",
    "CarliniL0Method": "it counts changed values (l0), which no budget here bounds",
    "SaliencyMapMethod": "it counts changed values (l0), which no budget here bounds",
}


@dataclass(frozen=True)
class Art(Bridge):
    """An attack of ART, by the name of its class, on one modality in raw units (a waveform as a picture).

    Attacks that ask for a loss gradient get that of our goal, those that ask for a verdict are told whether our goal is
    reached: both take any goal and either kind of labels, as ART alone would not. Those that ask for the scores of
    classes attack multiclass models, with ART's own loss.
    """

    peer: ClassVar[str] = "art"
    module: ClassVar[str] = "art.attacks.evasion"
    kinds: ClassVar[Mapping[str, Kind]] = KINDS
    refused: ClassVar[Mapping[str, str]] = REFUSED

    def check(self, model: Classifier, threat: ThreatModel) -> str:
        """Also that the goal has a target only where the attack can have one."""
        modality = super().check(model, threat)
        if self.kind.asks == "scores" and isinstance(threat.goal, Targeted) and "targeted" not in self.parameters():
            raise ValueError(f"art's {self.name} cannot pursue the goal: {threat.goal.words(model.classes)}")
        return modality

    def _run(self, part: Pursuit, modality: str, radius: float, seed: int) -> Tensor:
        clips, clean, goal = Clips(part, modality, None), part.inputs[modality], part.threat.goal
        spec, size = part.model.specs[modality], len(part.labels)
        targeted = self.kind.asks == "scores" and isinstance(goal, Targeted)
        if self.kind.asks == "scores":
            labels = torch.full_like(part.labels, goal.target) if isinstance(goal, Targeted) else part.labels
            estimator = _pytorch_classifier(
                clips, spec, picture_shape(spec.shape), len(part.model.classes), clean.device
            )
            wanted = labels.cpu().numpy()
        else:
            estimator = _goal_estimator()(clips, spec)
            wanted = verdicts(torch.zeros(size, dtype=torch.bool))
        ours: dict[str, Any] = {"norm": NORMS[part.threat.budgets[modality].norm], "targeted": targeted}
        if self.kind.whole:
            ours["batch_size"] = size
        make = self.made(self.name)
        assert make is not None
        pictures = clean.reshape(size, *picture_shape(spec.shape)).cpu().numpy()
        with patch.object(np.random, "RandomState", _seeded(seed)), torch.enable_grad():
            attack = make(estimator, **self._arguments(radius, seed, len(part.model.classes), **ours))
            found = attack.generate(pictures, wanted)
        return clips.raw(torch.from_numpy(found).to(clean), part)


def verdicts(reached: Tensor) -> np.ndarray:
    """What ART takes for the scores of a classifier: the clip stands, or its goal is reached.

    The third class is there for ART's sake, whose rules for two classes are others; nothing is ever in it.
    """
    return F.one_hot(reached.long(), 3).float().cpu().numpy()


def as_art_estimator(model: Classifier, modality: str, held: Inputs | None = None) -> Any:
    """A classifier as an `art.estimators.classification.PyTorchClassifier` of one modality, in raw units and shape.

    `held` are the raw inputs of the other modalities, of one clip or of the whole batch; in the latter case give ART's
    attacks the `batch_size` of all clips. For a multilabel model the loss is the mean binary cross-entropy against
    multi-hot labels, which serves attacks that ask for `loss_gradient`; what ART predicts and counts as success is the
    highest score all the same. ART goes back through the weights as well, so freeze them if their gradients matter.
    """
    single = SingleInput(model, modality, held)
    spec = model.specs[modality]
    return _pytorch_classifier(
        single, spec, spec.shape, len(model.classes), single.tally.device, model.label_kind == "multilabel"
    )


def _mean_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """A bare function, since of ART's own losses the binary one has its labels arg-maxed."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits))


def _pytorch_classifier(
    module: nn.Module,
    spec: InputSpec,
    shape: tuple[int, ...],
    classes: int,
    device: torch.device | str,
    multilabel: bool = False,
) -> Any:
    return import_module("art.estimators.classification").PyTorchClassifier(
        module,
        loss=_mean_bce if multilabel else nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(spec.low, spec.high),
        device_type="cpu" if torch.device(device).type == "cpu" else "gpu",
    )


def _seeded(seed: int) -> Callable[..., np.random.RandomState]:
    """In place of `RandomState`, which some attacks make from the clock of the machine."""
    make = np.random.RandomState
    return lambda given=None: make(seed if given is None else given)


@cache
def _goal_estimator() -> Any:
    """The class of estimators whose loss is our goal's and whose classes are its verdicts; made when ART is there."""
    estimators, classification = (
        import_module(f"art.estimators.{name}") for name in ("estimator", "classification.classifier")
    )

    bases = (classification.ClassifierMixin, estimators.LossGradientsMixin, estimators.BaseEstimator)

    class GoalEstimator(*bases):  # type: ignore[misc]  # ART may not be there to be looked at
        """Our goal as ART asks for it."""

        channels_first = True

        def __init__(self, clips: Clips, spec: InputSpec) -> None:
            super().__init__(model=clips, clip_values=(spec.low, spec.high))
            self._input_shape, self.nb_classes = picture_shape(spec.shape), 3

        @property
        def input_shape(self) -> tuple[int, ...]:
            """Of one clip."""
            return self._input_shape

        def predict(self, x: np.ndarray, batch_size: int = 128, **settings: Any) -> np.ndarray:
            """The verdicts on some clips."""
            found = []
            for some in torch.from_numpy(np.asarray(x)).split(max(batch_size, 1)):
                here = self.model.at(some.to(self.model.place))
                found.append(verdicts(look(here.model, here.inputs, here.labels, here.threat).reached))
            return np.concatenate(found)

        def loss_gradient(self, x: np.ndarray, y: np.ndarray, **settings: Any) -> np.ndarray:
            """Of the goal's loss; `y` is not looked at."""
            here = self.model.at(torch.from_numpy(x).to(self.model.place))
            _, gradients = climb(here.model, here.inputs, here.labels, here.threat)
            return gradients[self.model.modality].reshape(x.shape).cpu().numpy()

        def fit(self, x: np.ndarray, y: np.ndarray, **settings: Any) -> None:
            """Not meant."""
            raise NotImplementedError("an attack has no business training the model")

    return GoalEstimator
