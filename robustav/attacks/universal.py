"""One perturbation for every clip, and the controls that it must beat."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.randomness import draw_for
from robustav.threat import ThreatModel


@dataclass(frozen=True, eq=False)
class Universal:
    """Add one and the same perturbation to every clip [Moosavi-Dezfooli et al., 2017, arXiv:1610.08401].

    `perturbation` maps modality to a tensor of one clip's shape, such as `robustav.universal.learn` makes from other
    clips than these. Around each clip it is cut to the budget, the valid range and the signal; it is never enlarged, so
    one learnt for a smaller budget stays smaller. With `shift` it is rolled along its first axis (time of a waveform,
    frames of a video) by a random share of its length, one share a clip for all modalities: nobody can time it.
    """

    perturbation: Mapping[str, Tensor]
    shift: bool = True
    name: str = ""
    digest: str = field(init=False)
    knowledge: ClassVar[str] = "universal"

    def __post_init__(self) -> None:
        if not self.perturbation:
            raise ValueError("`perturbation` must hold at least one modality, got none")
        for m, delta in self.perturbation.items():
            if not (delta.ndim and delta.is_floating_point() and delta.isfinite().all()):
                raise ValueError(
                    f"`perturbation[{m!r}]` must be finite floating point values of one clip's shape, "
                    f"got {delta.dtype} {list(delta.shape)}"
                )
        own = {m: delta.detach().to("cpu", torch.float32, copy=True) for m, delta in self.perturbation.items()}
        object.__setattr__(self, "perturbation", own)
        object.__setattr__(self, "digest", digest_of_perturbation(own))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{m}={list(delta.shape)}" for m, delta in sorted(self.perturbation.items()))
        name = f"name={self.name!r}, " if self.name else ""
        return f"Universal({name}{shapes}, sha256={self.digest[:16]!r}, shift={self.shift})"

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        for m in threat.budgets:
            if m not in self.perturbation or self.perturbation[m].shape != inputs[m].shape[1:]:
                has = {name: list(delta.shape) for name, delta in self.perturbation.items()}
                raise ValueError(
                    f"`perturbation` must have {m!r} of shape {list(inputs[m].shape[1:])}, got {has}: learn it on this "
                    "model's inputs, with a budget for every modality that is attacked"
                )
        shares = time_shares(draws, self.shift)
        added = {m: inputs[m] + rolled(self.perturbation[m].to(inputs[m]), shares) for m in threat.budgets}
        return threat.project(inputs, added)


@dataclass(frozen=True, eq=False)
class Shuffled:
    """A control: the same values as a universal perturbation in another order, fixed by `seed`.

    A waveform is permuted in time, a picture within each frame and channel. What this loses is what the order held.
    """

    universal: Universal
    seed: int = 0
    shuffled: Universal = field(init=False, repr=False)
    knowledge: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        orders = {m: draw_for(self.seed, "shuffled", m) for m in self.universal.perturbation}
        permuted = {m: _permuted(delta, orders[m]) for m, delta in self.universal.perturbation.items()}
        object.__setattr__(self, "shuffled", Universal(permuted, self.universal.shift))

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        return self.shuffled(model, inputs, labels, threat, draws=draws)


@dataclass(frozen=True)
class FixedNoise:
    """A control: one random direction for every clip, fixed by `seed`, at the full length of the budget.

    What `Noise` is to attacks on single clips this is to `Universal`. In linf it is the full epsilon with random signs.
    """

    seed: int = 0
    shift: bool = True
    knowledge: ClassVar[str] = "nothing"

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        shares = time_shares(draws, self.shift)
        directions = {}
        for m in threat.budgets:
            direction = torch.randn(inputs[m].shape[1:], generator=draw_for(self.seed, "fixed noise", m))
            directions[m] = rolled(direction.to(inputs[m]), shares)
        return threat.project(inputs, threat.step(inputs, inputs, directions))


def time_shares(draws: Draws, shift: bool) -> list[float]:
    """How far each clip's perturbation is rolled, as a share of its length in [0, 1)."""
    return [torch.rand((), generator=draw).item() if shift else 0.0 for draw in draws]


def rolled(delta: Float[Tensor, "*shape"], shares: Sequence[float]) -> Float[Tensor, "batch *shape"]:
    """The perturbation once a clip, each rolled along the first axis by its share of that axis."""
    return torch.stack([delta.roll(int(share * len(delta)), 0) for share in shares])


def rolled_back(gradient: Float[Tensor, "batch *shape"], shares: Sequence[float]) -> Float[Tensor, "*shape"]:
    """The adjoint of `rolled`: from the gradient by every clip's perturbation to that by the one they share."""
    parts = [one.roll(-int(share * len(one)), 0) for one, share in zip(gradient, shares, strict=True)]
    return torch.stack(parts).sum(0)


def digest_of_perturbation(perturbation: Mapping[str, Tensor]) -> str:
    """SHA-256 over the modalities, shapes and values (as float32) of a perturbation."""
    digest = hashlib.sha256()
    for m, delta in sorted(perturbation.items()):
        digest.update(f"{m} {list(delta.shape)}\n".encode())
        digest.update(delta.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _permuted(delta: Tensor, draw: torch.Generator) -> Tensor:
    """Pictures ([..., height, width]) each within itself; a waveform, or anything of two axes, as a whole."""
    rows = delta.flatten(-2).flatten(0, -2) if delta.ndim > 2 else delta.reshape(1, -1)
    return torch.stack([row[torch.randperm(len(row), generator=draw)] for row in rows]).reshape(delta.shape)
