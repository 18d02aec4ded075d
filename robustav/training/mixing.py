"""How clips are mixed: ratios, partners, places of the network, and the loss at points between clips."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor

from robustav.classifier import Classifier, Inputs, InputSpec, Wrapped
from robustav.norms import per_sample
from robustav.training.method import Batch, Work

PLACES = ("input", "features", "latent")
ANY = "any"  # one of the places for each batch, all as likely
LATENT = "latent"
SMALLEST_ALPHA = 0.01  # below it, ratios are 0 or 1 to float32

Parts = dict[str, Tensor]


class Mixed(NamedTuple):
    """Points between clips at a place of the network: a part for each modality, or the latent alone."""

    place: str
    parts: Parts
    targets: Float[Tensor, "clip class"]


def ratios(alpha: float | Float[Tensor, " clip"], uniform: Float[Tensor, "clip ..."]) -> Float[Tensor, "clip ..."]:
    """Beta(alpha, alpha) by its inverse distribution function: of equal uniform numbers equal ratios, whatever drew them.

    `alpha` may differ from clip to clip; at 1 the ratios are the uniform numbers, towards 0 they are 0 or 1.

    >>> ratios(1.0, torch.tensor([0.2, 0.5]))
    tensor([0.2000, 0.5000])
    """
    shape = torch.as_tensor(alpha, dtype=torch.float64).clamp(min=SMALLEST_ALPHA)
    shape = shape.reshape(-1, *[1] * (uniform.ndim - 1)) if shape.ndim else shape
    return torch.as_tensor(betaincinv(shape.numpy(), shape.numpy(), uniform.double().numpy())).float()


def draw_ratios(alpha: float, clips: int, generator: torch.Generator, per_clip: bool) -> Float[Tensor, " clip"]:
    """A ratio for each clip, or one that all share."""
    return ratios(alpha, torch.rand(clips if per_clip else 1, generator=generator)).expand(clips)


def between(
    x: Float[Tensor, " clip *shape"], y: Float[Tensor, " clip *shape"], ratio: Float[Tensor, " clip"]
) -> Float[Tensor, " clip *shape"]:
    """`ratio` of `x` and the rest of `y`.

    >>> between(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([0.75, 1.0])).flatten()
    tensor([0.7500, 0.0000])
    """
    return torch.lerp(y, x, per_sample(ratio, x))


def places_of(model: Classifier) -> tuple[str, ...]:
    """Where clips of this model can be mixed. A wrapped network has no features, and a latent only if it is named."""
    if isinstance(model, Wrapped):
        return ("input",) if model.head_name is None else ("input", "latent")
    return PLACES


def check_place(model: Classifier, place: str) -> None:
    """Raise `ValueError` saying what is missing, unless clips can be mixed there; "any" asks for the latent too."""
    wanted = LATENT if place == ANY else place
    if wanted in places_of(model):
        return
    if wanted == LATENT:
        raise ValueError(
            f"`place` {place!r} mixes latents, and this wrapped network's latent is not known: name its last module with "
            "Wrapped(..., latent=...), or set place='input'"
        )
    raise ValueError(
        "`place` 'features' needs an encoder a modality, and a wrapped network has none: set place='input'"
    )


def check_setting(place: str) -> None:
    """Raise `ValueError` unless there is such a place."""
    if place not in (ANY, *PLACES):
        raise ValueError(f"`place` must be one of {[ANY, *PLACES]}, got {place!r}")


def draw_place(model: Classifier, place: str, generator: torch.Generator) -> str:
    """The place, or one of the model's where any will do; a number is drawn in either case."""
    drawn = float(torch.rand((), generator=generator))
    there = places_of(model)
    return there[int(drawn * len(there))] if place == ANY else place


def parts_at(work: Work, inputs: Inputs, place: str) -> Parts:
    """What a place holds for some clips. A forward pass a clip is counted except at the input."""
    if place == "input":
        return dict(inputs)
    features = work.features(inputs)
    return features if place == "features" else {LATENT: work.model.fuse(features)}


def logits_from(work: Work, place: str, parts: Parts) -> Float[Tensor, "clip class"]:
    """From a place to the logits; completes the pass that `parts_at` has begun."""
    if place == "input":
        return work.trace(parts).logits
    return work.model.finish(parts).logits if place == "features" else work.model.classify(parts[LATENT])


def in_range(inputs: Parts, specs: Mapping[str, InputSpec]) -> Inputs:
    """What rounding or noise put outside the valid range, back at its edge."""
    return {m: x.clamp(specs[m].low, specs[m].high) for m, x in inputs.items()}


def permuted(clips: int, generator: torch.Generator) -> Int[Tensor, " clip"]:
    """A partner for each clip of a batch; one in each batch has itself, on average."""
    return torch.randperm(clips, generator=generator)


def mixed_targets(
    targets: Float[Tensor, "clip class"], partner: Int[Tensor, " clip"], ratio: Float[Tensor, " clip"]
) -> Float[Tensor, "clip class"]:
    """The labels of both clips by their shares; a label that both have stays whole."""
    return between(targets, targets[partner], ratio)


def mixed_at(
    work: Work, batch: Batch, place: str, partner: Int[Tensor, " clip"], ratio: Float[Tensor, " clip"]
) -> Mixed:
    """A batch whose clips are each mixed with one of its others, by one ratio for all modalities."""
    parts = {name: between(x, x[partner], ratio) for name, x in parts_at(work, batch.inputs, place).items()}
    if place == "input":
        parts = in_range(parts, work.model.specs)
    return Mixed(place, parts, mixed_targets(batch.targets, partner, ratio))


def mixed_losses(work: Work, mixed: Mixed) -> Float[Tensor, " clip"]:
    """Plain training's loss of mixed clips."""
    return work.loss(logits_from(work, mixed.place, mixed.parts), mixed.targets)


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` unless it can be a parameter of the Beta distribution."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be a number above 0, got {alpha:g}")
