"""Fusion that looks for the one input that does not fit, and leaves it out [Yang K. et al., 2021, arXiv:2206.12714]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.attacks import Attack
from robustav.classifier import Classifier, Inputs, Trace
from robustav.goals import Goal
from robustav.models.small import head
from robustav.threat import Budget, ThreatModel
from robustav.training.ascent import ascend
from robustav.training.defences.adaptive import Way, Ways
from robustav.training.defences.defended import Defended, defended, parts, side_by_side, widths
from robustav.training.method import Batch, Method, Work
from robustav.training.settings import positive

NAME = "odd-one-out"
CERTAIN = 1e4  # a logit of the gate that leaves the other experts nothing


class GatedFusion(Defended):
    """k + 1 heads, one for each modality that may be odd and leaves it out, the last for none; mixed by a gate.

    The gate reads all features and says which modality is odd, or none (its last logit); scores are the experts' scores,
    weighted by its softmax. The expert for none is the fusion and head of the model inside. The latent is all features
    side by side, then the gate's k + 1 logits.
    """

    def __init__(self, model: Classifier, hidden: int) -> None:
        super().__init__(model)
        self.sizes = widths(model, NAME)
        dim, classes = sum(self.sizes.values()), len(self.classes)
        self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, len(self.sizes) + 1))
        self.without = nn.ModuleDict({m: head(dim - size, classes) for m, size in self.sizes.items()})

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        together = side_by_side(features)
        return torch.cat([together, self.gate(together)], dim=1)

    def classify(self, latent: Tensor) -> Tensor:
        return (self.odd(latent).softmax(1)[:, :, None] * self.experts(latent)).sum(1)

    def odd(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch odd"]:
        """The gate's logits: each modality odd, in the order of names, and none."""
        return latent[:, -len(self.sizes) - 1 :]

    def experts(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch odd class"]:
        """Each expert's scores, in the order of the gate's logits."""
        features = parts(latent[:, : -len(self.sizes) - 1], self.sizes)
        found = [
            self.without[odd](side_by_side({m: x for m, x in features.items() if m != odd})) for odd in self.modalities
        ]
        return torch.stack([*found, self.model.classify(self.model.fuse(features))], dim=1)

    def adaptive_attacks(self) -> Mapping[str, Attack]:
        return {"through-the-gate": ThroughTheGate(modalities=tuple(self.modalities))}


@dataclass(frozen=True)
class ThroughTheGate(Ways):
    """Climb the loss of the mixed scores, and lead the gate to an expert that reads what is attacked, and that expert
    astray.

    One ascent for "none odd", one for each expert that leaves another modality out than the only one attacked.
    """

    modalities: tuple[str, ...] = ("audio", "visual")
    weight: float = 1.0  # of the gate's log-probability

    def ways(self, model: Classifier, threat: ThreatModel) -> Sequence[Way]:
        reading = [i for i, left_out in enumerate(self.modalities) if threat.budgets.keys() - {left_out}]
        return [partial(self._towards, model, expert) for expert in [len(self.modalities), *reading]]

    def _towards(self, model: Classifier, expert: int, trace: Trace, labels: Tensor, goal: Goal) -> Tensor:
        count = len(self.modalities) + 1
        features, gate = trace.latent[:, :-count], trace.latent[:, -count:]
        certain = torch.zeros_like(gate).index_fill(1, torch.tensor([expert], device=gate.device), CERTAIN)
        alone = trace._replace(logits=model.classify(torch.cat([features, certain], dim=1)))
        reached = goal.loss(trace, labels) + goal.loss(alone, labels)
        return reached + self.weight * gate.log_softmax(1)[:, expert]


@dataclass(frozen=True)
class OddOneOut(Method):
    """Learn on clean clips and on clips with one perturbed modality, and to tell which it is [Yang K. et al., 2021,
    arXiv:2206.12714].

    Each step crafts one version of the batch for every modality, by ascent through the whole gated model, and learns
    from those and the clean one, in one batch of all: the task's loss (of either kind of label) through the gate, and the gate's
    cross-entropy. With k modalities, `k (steps + 1) + 1` passes of either kind a clip. Made against an adversary of one
    modality; with k = 2 no majority says which input is odd, and against joint attacks it claims nothing.
    """

    budgeted: ClassVar[bool] = True

    weight: float = 1.0  # of the gate's loss
    steps: int = 10
    reach: float = 2.5  # epsilons that all steps make together
    hidden: int = 64  # units of the gate

    def __post_init__(self) -> None:
        positive(self, "weight", "steps", "reach", "hidden")

    def check(self, model: Classifier) -> None:
        widths(model, NAME)

    def check_budgets(self, model: Classifier, budgets: Mapping[str, Budget]) -> None:
        super().check_budgets(model, budgets)
        if missing := sorted(model.specs.keys() - budgets.keys()):
            raise ValueError(
                f"`eps` must cover every modality for {NAME}, which perturbs one after the other, got none for "
                f"{', '.join(missing)}: give eps for all, and attacked=both"
            )

    def wrapped(self, model: Classifier) -> Classifier:
        return GatedFusion(model, self.hidden)

    def begin(self, work: Work) -> None:
        defended(work.model, GatedFusion, NAME)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        model = defended(work.model, GatedFusion, NAME)
        versions = [*(self._perturbed(work, batch, m) for m in model.modalities), batch.inputs]
        # In one batch: alone, each version would be brought to the same statistics by batch norm, and none look odd.
        trace = work.trace({m: torch.cat([version[m] for version in versions]) for m in batch.inputs})
        truth = torch.arange(len(versions), device=trace.logits.device).repeat_interleave(len(batch.rows))
        told = F.cross_entropy(model.odd(trace.latent), truth, reduction="none")
        return work.loss(trace.logits, batch.targets.repeat(len(versions), 1)) + self.weight * told

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        loss = self.losses(work, batch).mean()
        work.update(loss, (len(work.model.specs) + 1) * len(batch.rows))
        return loss.detach()

    def _perturbed(self, work: Work, batch: Batch, modality: str) -> Inputs:
        """The batch with one modality where an ascent leads it."""
        alone = replace(work, budgets={modality: work.budgets[modality]})
        return ascend(alone, batch.inputs, batch.targets, steps=self.steps, step_size=self.reach / self.steps)


METHODS: dict[str, type[Method]] = {NAME: OddOneOut}
