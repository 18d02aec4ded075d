"""Late fusion that damps, clip by clip, the directions in which a modality's scores are steep [Gao Z. et al., 2022,
arXiv:2204.02485]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustav.attacks import Attack
from robustav.classifier import Classifier, LabelKind, Trace
from robustav.goals import Goal
from robustav.models.small import head
from robustav.norms import TINY
from robustav.threat import ThreatModel
from robustav.training.defences.adaptive import Way, Ways
from robustav.training.defences.defended import Defended, defended, freeze_unread, widths
from robustav.training.method import Batch, Method, Work

NAME = "jacobian-fusion"
EVERY = "every"  # in place of a modality: each is corrected in its turn
BY = ("input", "features")  # what Jacobians are taken by


class _Correction(torch.autograd.Function):
    """W with `W + A W B = I`; the gradient solves the same equation, so no eigenvector is differentiated."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        (a, u), (b, v) = (torch.linalg.eigh(x) for x in (left, right))
        weight = 1 / (1 + a.clamp(min=0)[:, :, None] * b.clamp(min=0)[:, None, :])
        solution = u @ (weight * (u.mT @ v)) @ v.mT
        ctx.save_for_backward(left, right, u, v, weight, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        left, right, u, v, weight, solution = ctx.saved_tensors
        adjoint = u @ (weight * (u.mT @ slopes[0] @ v)) @ v.mT
        return -adjoint @ right @ solution.mT, -solution.mT @ left @ adjoint


def correction(
    left: Float[Tensor, "batch class class"], right: Float[Tensor, "batch class class"]
) -> Float[Tensor, "batch class class"]:
    """W with `W + left W right = I`, the Sylvester equation of `left` and the inverse of `right`; both symmetric and
    positive semi-definite. Differentiable once."""
    return _Correction.apply(left, right)


def damping(
    logits: Float[Tensor, "batch class"], gram: Float[Tensor, "batch class class"], gamma: float, label_kind: LabelKind
) -> Float[Tensor, "batch class class"]:
    """The W that minimises `(1 - gamma) ||W - I||^2 + gamma ||G W J||^2` (Frobenius) for each clip.

    J is the Jacobian of one modality's scores by its raw input, `gram` is J J^T, brought to a mean diagonal of 1 so that
    `gamma` has no unit. G is the slope of the fused posterior by its `logits`, taken before any correction, which makes
    the problem linear: `diag(p) - p p^T` of the softmax, `diag(p (1 - p))` of independent classes.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, gram = logits.float(), gram.float()
        if label_kind == "multilabel":
            slope = torch.diag_embed(logits.sigmoid() * (-logits).sigmoid())
        else:
            p = logits.softmax(1)
            slope = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=TINY)
        return correction(gamma / (1 - gamma) * slope @ slope, gram / mean[:, None, None])


class RegularisedFusion(Defended):
    """Uni-modal heads whose posteriors are multiplied as if modalities were independent given the class, each corrected
    first by its `damping`.

    `log p(y | x) = sum_m log p(y | x_m) - (modalities - 1) log p(y)` up to a constant; multi-label the same of each
    class's odds. In eval mode an encoder gives scores and the Gram matrix of their Jacobian, which `by` the raw input
    costs a backward pass for each class, and by the features nothing; in train mode nothing is corrected. The latent is
    the corrected scores of all modalities, then the plain ones.
    """

    prior: Tensor

    def __init__(self, model: Classifier, gamma: float, modality: str = EVERY, by: str = "input") -> None:
        super().__init__(model)
        self.gamma, self.by = gamma, by
        self.corrected = [m for m in self.modalities if modality in (m, EVERY)]
        self.heads = nn.ModuleDict({m: head(size, len(self.classes)) for m, size in widths(model, NAME).items()})
        self.register_buffer("prior", torch.zeros(len(self.classes)))
        freeze_unread(model)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return raw  # the Jacobian is by the raw input, so the front end belongs to the encoder

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if self.training or modality not in self.corrected:
            scores = self._scores(modality, x)
            return torch.cat([scores, scores.new_zeros(len(scores), len(self.classes) ** 2)], dim=1)
        if self.by == "features":
            scores, weight = self._scores(modality, x), self.heads[modality][-1].weight  # type: ignore[index]
            return torch.cat([scores, (weight @ weight.T).flatten().expand(len(scores), -1)], dim=1)
        return self._with_gram(modality, x)

    def _with_gram(self, modality: str, x: Tensor) -> Tensor:
        """Scores, and the Gram matrix of their Jacobian by the raw input."""
        follow = torch.is_grad_enabled()
        with torch.enable_grad():
            # A copy, so that whoever watches the gradient by the input sees that of the scores alone.
            point = x.clone() if follow and x.requires_grad else x.detach().clone().requires_grad_()
            scores = self._scores(modality, point)
            rows = [
                torch.autograd.grad(one.sum(), point, retain_graph=True, create_graph=follow and x.requires_grad)[0]
                for one in scores.unbind(1)
            ]
            jacobian = torch.stack([row.flatten(1) for row in rows], dim=1)
            features = torch.cat([scores, (jacobian @ jacobian.mT).flatten(1)], dim=1)
        return features if follow else features.detach()

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        count = len(self.classes)
        plain = {m: features[m][:, :count] for m in self.modalities}
        logits = self.joined(torch.stack(list(plain.values()), dim=1))
        damped = dict(plain)
        for m in () if self.training else self.corrected:
            gram = features[m][:, count:].unflatten(1, (count, count))
            weight = damping(logits, gram, self.gamma, self.label_kind)
            damped[m] = (weight.to(plain[m]) @ plain[m][:, :, None]).squeeze(2)
        return torch.cat([*damped.values(), *plain.values()], dim=1)

    def classify(self, latent: Tensor) -> Tensor:
        return self.joined(latent.unflatten(1, (2, len(self.specs), -1))[:, 0])

    def joined(self, scores: Float[Tensor, "batch modality class"]) -> Float[Tensor, "batch class"]:
        """Posteriors multiplied, the prior counted once."""
        return scores.sum(1) - (scores.shape[1] - 1) * self.prior

    def uni_modal(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch modality class"]:
        """Each modality's plain scores."""
        return latent.unflatten(1, (2, len(self.specs), -1))[:, 1]

    def adaptive_attacks(self) -> Mapping[str, Attack]:
        return {"around-the-solve": AroundTheSolve()}

    def _scores(self, modality: str, raw: Tensor) -> Tensor:
        return self.heads[modality](self.model.encode(modality, self.model.front_end(modality, raw)))


@dataclass(frozen=True)
class AroundTheSolve(Ways):
    """Climb through the solve, with the gradient of Jacobian and solution, then around it, as if nothing were corrected
    (BPDA with the identity), then both at once."""

    def ways(self, model: Classifier, threat: ThreatModel) -> Sequence[Way]:
        return [partial(self._around, model, through) for through in (0.0, 1.0)]

    def _around(self, model: Classifier, through: float, trace: Trace, labels: Tensor, goal: Goal) -> Tensor:
        plain = trace.latent.chunk(2, dim=1)[1]
        uncorrected = trace._replace(logits=model.classify(torch.cat([plain, plain], dim=1)))
        return through * goal.loss(trace, labels) + goal.loss(uncorrected, labels)


@dataclass(frozen=True)
class JacobianFusion(Method):
    """Train each modality by itself; the defence is in how they are fused, without training [Gao Z. et al., 2022,
    arXiv:2204.02485].

    `gamma` weighs a small Jacobian against staying as it is; 0 is plain fusion of independent posteriors. `modality` is
    the one that is corrected, or "every". The paper's problem in our notation (see `damping`): its Jacobian by the raw
    input, its relaxation to a Sylvester equation; fit, scale of the Jacobian and the multi-label form are ours. Costs
    what plain training costs; in evaluation a backward pass for each class and corrected modality, which an attack goes
    back through once more. `by="features"` takes the Jacobian by each modality's features, the weights of its head, at no
    cost: no more than a stand-in where the other is out of reach.
    """

    gamma: float = 0.5
    modality: str = EVERY
    by: str = "input"

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"`by` must be one of {list(BY)}, got {self.by!r}")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"`gamma` must be at or above 0 and below 1, got {self.gamma}")

    def check(self, model: Classifier) -> None:
        widths(model, NAME)
        if self.modality not in (EVERY, *model.specs):
            raise ValueError(f"`modality` must be one of {[EVERY, *sorted(model.specs)]}, got {self.modality!r}")

    def wrapped(self, model: Classifier) -> Classifier:
        self.check(model)
        return RegularisedFusion(model, self.gamma, self.modality, self.by)

    def begin(self, work: Work) -> None:
        targets, weights = work.data.targets, work.weights
        seen = targets.sum(0) if weights is None else weights @ targets * (len(targets) / weights.sum())
        share = (seen + 1) / (len(targets) + 2)
        prior = share.logit() if work.model.label_kind == "multilabel" else share.log() - share.sum().log()
        for model in (work.model, work.averaged):
            defended(model, RegularisedFusion, NAME).prior.copy_(prior)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        model = defended(work.model, RegularisedFusion, NAME)
        alone = model.uni_modal(work.trace(batch.inputs).latent)
        return torch.stack([work.loss(one, batch.targets) for one in alone.unbind(1)]).sum(0)


METHODS: dict[str, type[Method]] = {NAME: JacobianFusion}
