"""Guided mix-up with one adversarial step on top."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Inputs
from robustav.training.ascent import ascend
from robustav.training.guided import GuidedMixup
from robustav.training.method import Batch, Method, Work
from robustav.training.mixing import draw_place, mixed_losses


@dataclass(frozen=True)
class GuidedFGSM(GuidedMixup):
    """Guided mix-up, and one adversarial step from strong noise on top, as of N-FGSM [de Jorge et al., 2022,
    arXiv:2202.01181].

    Mixed at the input, the step starts from the mixed point and climbs the loss of its mixed label; at features or
    latent, the clips are attacked first and mixed after it. `share` of each batch is attacked, clips drawn at random.
    `steps` of `step_size` epsilons from uniform noise of `start_noise` epsilons; neither is clipped to the budget. Costs
    `1 + share * steps` passes of either kind a clip, and the looks of guided mix-up.
    """

    budgeted: ClassVar[bool] = True

    place: str = "input"
    share: float = 1.0
    steps: int = 1
    step_size: float = 1.0
    start_noise: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must lie in (0, 1], got {self.share:g}: for none, take guided-mixup")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}: for none, take guided-mixup")
        if not (self.step_size > 0 and self.start_noise >= 0):
            raise ValueError(
                f"`step_size` must be above 0 and `start_noise` not negative, got {self.step_size:g} and "
                f"{self.start_noise:g}"
            )

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        drawn, clips = self.clips(work, batch)
        place = draw_place(work.model, self.place, work.generator)
        if place != "input":
            clips = clips._replace(inputs=self.stepped(work, clips.inputs, clips.targets))
        mixed = self.mix(work, drawn, clips, place)
        if place == "input":
            mixed = mixed._replace(parts=self.stepped(work, mixed.parts, mixed.targets))
        return mixed_losses(work, mixed)

    def stepped(self, work: Work, inputs: Inputs, targets: Float[Tensor, "clip class"]) -> Inputs:
        """A share of the clips moved uphill; the others as they are."""
        clips = len(targets)
        rows = torch.randperm(clips, generator=work.generator)[: max(1, round(self.share * clips))].sort().values
        points = ascend(
            work,
            {m: x[rows] for m, x in inputs.items()},
            targets[rows],
            steps=self.steps,
            step_size=self.step_size,
            start="uniform",
            start_size=self.start_noise,
            clip=False,
        )
        return {m: x.index_copy(0, rows.to(x.device), points[m]) for m, x in inputs.items()}


METHODS: dict[str, type[Method]] = {"guided-fgsm": GuidedFGSM}
