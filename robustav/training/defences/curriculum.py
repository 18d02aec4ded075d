"""Adversarial training of audio and video that grows harder with the epochs [Zhang Z. et al., 2025, arXiv:2502.11858]."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from robustav.attacks import APGD, Attack, Restarts
from robustav.classifier import Classifier, Inputs, InputSpec
from robustav.norms import per_sample
from robustav.training.ascent import attacked, uniform, within
from robustav.training.defences.defended import Defended, defended
from robustav.training.method import Batch, Method, Work
from robustav.training.settings import positive

NAME = "av-curriculum"
LONGEST_STEP = 1.25  # epsilons, of a single step [Wong et al., 2020, arXiv:2001.03994]


def owners(length: int, pieces: int, chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " {length}"]:
    """For every place on a time axis, cut into pieces, the place whose perturbation it takes: the same place within the
    nearest chosen piece (of two, the earlier).

    >>> owners(6, 3, torch.tensor([1]))
    tensor([2, 3, 2, 3, 2, 3])
    """
    size = -(-length // pieces)
    place = torch.arange(length)
    chosen = chosen.sort().values
    nearest = chosen[((place // size)[:, None] - chosen).abs().argmin(1)]
    return (nearest * size + place % size).clamp(max=length - 1)


def pooled(x: Float[Tensor, "batch time ..."], owner: Int[Tensor, " time"]) -> Float[Tensor, "batch time ..."]:
    """Sum over all places that share a perturbation, at each of them: the gradient by what they share."""
    return torch.zeros_like(x).index_add(1, owner, x).index_select(1, owner)


class SharedFrames(Defended):
    """The model as it is: what this defence changed is its weights."""

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.fuse(features)

    def classify(self, latent: Tensor) -> Tensor:
        return self.model.classify(latent)

    def adaptive_attacks(self) -> Mapping[str, Attack]:
        # Every frame with a perturbation of its own, nothing masked, many steps and restarts: all that training spared.
        return {"every-frame": Restarts(APGD(200), 3)}


@dataclass(frozen=True)
class AVCurriculum(Method):
    """Learn at points whose perturbation is made for a `share` of the frames and lent to their neighbours, harder with
    every epoch [Zhang Z. et al., 2025, arXiv:2502.11858].

    From the first epoch to the last, attack steps rise from 1 to `steps`, the masked stretch of each clip from nothing to
    `mask`, dropout of features from 0 to `dropout`; without `rising` all are at their height from the start. The stretch
    is the same in all modalities if `synchronous`, and masked for the attack too. Frames are a video's own, and of a
    waveform as many equal `pieces`; which are sampled is drawn for each batch. What is shared saves no pass here, since a
    network reads whole clips: costs steps + 1 passes of either kind a clip. Either kind of label, any set of modalities.
    """

    budgeted: ClassVar[bool] = True

    steps: int = 10
    reach: float = 2.5  # epsilons that all steps make together
    share: float = 0.25
    pieces: int = 8
    mask: float = 0.3  # of a clip's length
    dropout: float = 0.3
    synchronous: bool = True
    rising: bool = True

    def __post_init__(self) -> None:
        positive(self, "steps", "reach", "pieces")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {self.share}")
        for name in ("mask", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at or above 0 and below 1, got {getattr(self, name)}")

    def wrapped(self, model: Classifier) -> Classifier:
        return SharedFrames(model)

    def begin(self, work: Work) -> None:
        defended(work.model, SharedFrames, NAME)

    def settled(self, work: Work) -> bool:
        return super().settled(work) and (not self.rising or work.epoch >= work.epochs)  # at its height in the last

    def progress(self, work: Work) -> float:
        """How far the curriculum has come: 0 in the first epoch, 1 in the last."""
        return work.epoch / (work.epochs - 1) if self.rising and work.epochs > 1 else 1.0

    def steps_now(self, work: Work) -> int:
        """Attack steps of this epoch."""
        return 1 + round((self.steps - 1) * self.progress(work))

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        hidden = self._hidden(work, batch)
        points = self._craft(work, batch, hidden)
        features = work.features(_masked(points, hidden, work.model.specs))
        rate = self.dropout * self.progress(work)
        kept = {m: _dropped(x, rate, work.generator) for m, x in features.items()}
        return work.loss(work.model.finish(kept).logits, batch.targets)

    def _hidden(self, work: Work, batch: Batch) -> dict[str, Bool[Tensor, "batch time"]]:
        """The stretch of each clip that is masked, by modality."""
        length, count, found = self.mask * self.progress(work), len(batch.rows), {}
        begins = torch.rand(count, 1, generator=work.generator)
        for m, x in batch.inputs.items():
            begin = (1 - length) * begins
            time = (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
            found[m] = ((begin <= time) & (time < begin + length)).to(x.device)
            if not self.synchronous:
                begins = torch.rand(count, 1, generator=work.generator)
        return found

    def _craft(self, work: Work, batch: Batch, hidden: Mapping[str, Tensor]) -> Inputs:
        """Ascend in the perturbation that frames share."""
        steps, budgets, clean = self.steps_now(work), attacked(work), batch.inputs
        owner = {m: self._owner(work, work.model.specs[m], clean[m]) for m in budgets}
        points = {}
        for m, budget in budgets.items():
            noise = uniform(clean[m], budget.norm, work.generator).index_select(1, owner[m])
            points[m] = within(budget, clean[m], clean[m] + per_sample(budget.radius(clean[m]), clean[m]) * noise)
        with work.crafting():
            for _ in range(steps):
                points = {m: x.detach().requires_grad_() for m, x in points.items()}
                seen = _masked({**clean, **points}, hidden, work.model.specs)
                gradients = work.gradients(work.loss(work.trace(seen).logits, batch.targets).sum(), points)
                for m, budget in budgets.items():
                    together = pooled(gradients[m], owner[m])
                    moved = budget.step(clean[m], points[m].detach(), together, min(LONGEST_STEP, self.reach / steps))
                    points[m] = within(budget, clean[m], moved)
        return {**clean, **points}

    def _owner(self, work: Work, spec: InputSpec, x: Tensor) -> Tensor:
        """Whose perturbation each place of a modality takes, for one batch."""
        pieces = min(self.pieces, spec.shape[0]) if len(spec.shape) == 1 else spec.shape[0]
        chosen = torch.randperm(pieces, generator=work.generator)[: max(1, round(self.share * pieces))]
        return owners(spec.shape[0], pieces, chosen).to(x.device)


def _masked(inputs: Inputs, hidden: Mapping[str, Tensor], specs: Mapping[str, InputSpec]) -> Inputs:
    """Silence and black (or what of the valid range is nearest to 0) where a clip is hidden."""
    found = {}
    for m, x in inputs.items():
        nothing = min(max(0.0, specs[m].low), specs[m].high)
        found[m] = x.masked_fill(hidden[m].reshape(*hidden[m].shape, *[1] * (x.ndim - 2)), nothing)
    return found


def _dropped(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Dropout of features, drawn from the training's generator."""
    return x * (torch.rand(x.shape, generator=generator) >= rate).to(x) / (1 - rate)


METHODS: dict[str, type[Method]] = {NAME: AVCurriculum}
