"""What the published defences have in common: a classifier around another, and what its robust score is worth."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from robustav.classifier import Classifier, Inputs

Wanted = TypeVar("Wanted", bound=Classifier)


class Defended(Classifier):
    """A classifier around another, changed by a defence; inputs and features are the other's unless told.

    `needs_adaptive` declares that a robust score means something only once an attack that knows the defence has run;
    see `missing_adaptive`. Parts of the other that are no longer read are frozen (`freeze_unread`), not removed.
    """

    needs_adaptive = True

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.specs, self.classes = model.specs, model.classes
        self.label_kind, self.stochastic = model.label_kind, model.stochastic

    @property
    def modalities(self) -> list[str]:
        """In the order in which fusion sees them."""
        return sorted(self.specs)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.model.front_end(modality, raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model.encode(modality, x)


def defended(model: Classifier, wanted: type[Wanted], method: str) -> Wanted:
    """The model, if the method has wrapped it."""
    if not isinstance(model, wanted):
        raise ValueError(
            f"`model` must be what `wrapped` of {method} returns, a {wanted.__name__}, got {type(model).__name__}"
        )
    return model


def check_several(model: Classifier, method: str) -> None:
    """Raise `ValueError` unless the model reads two modalities or more."""
    if len(model.specs) < 2:
        raise ValueError(
            f"{method} compares modalities, and `model` reads only {', '.join(model.specs)}: choose one that reads two, "
            "such as av-fusion"
        )


def widths(model: Classifier, method: str) -> dict[str, int]:
    """Length of each modality's feature vector, in the order of names.

    Raises `ValueError` unless there are two modalities or more, each with one vector a clip before they meet.
    """
    check_several(model, method)
    training = model.training
    with torch.no_grad():
        features = model.eval().features(blank(model))
    model.train(training)
    for m, x in features.items():
        if x.ndim != 2:
            raise ValueError(
                f"{method} needs one feature vector for each modality (late fusion), but `model` gives {m} features of shape "
                f"[batch, {', '.join(map(str, x.shape[1:]))}]: choose one that fuses late, such as av-fusion"
            )
    return {m: features[m].shape[1] for m in sorted(features)}


def blank(model: Classifier) -> Inputs:
    """One clip of zeros, on the model's device."""
    like = next(model.parameters(), torch.zeros(()))
    return {m: like.new_zeros(1, *spec.shape).clamp(spec.low, spec.high) for m, spec in model.specs.items()}


def freeze_unread(model: Classifier) -> None:
    """Freeze what a model's features do not depend on: its own fusion and head, once another has taken their place."""
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        total = torch.stack([x.sum() for x in model.eval().features(blank(model)).values()]).sum()
    found = (
        torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else [None] * len(parameters)
    )
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.train(training)


def parts(latent: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Features that were laid side by side, by modality."""
    return dict(zip(sizes, latent.split(list(sizes.values()), dim=1), strict=True))


def side_by_side(features: Mapping[str, Tensor]) -> Tensor:
    """Feature vectors in the order of the modalities' names, [batch, dim]."""
    return torch.cat([features[m] for m in sorted(features)], dim=1)
