"""The mix-up family of methods, and Gaussian noise, the control that asks for no partner."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustav.classifier import Classifier
from robustav.norms import per_sample
from robustav.threat import Budget
from robustav.training.method import Batch, Method, Work
from robustav.training.mixing import (
    ANY,
    Mixed,
    between,
    check_alpha,
    check_place,
    check_setting,
    draw_place,
    draw_ratios,
    in_range,
    mixed_at,
    mixed_losses,
    mixed_targets,
    permuted,
)

SILENCE = 1e-3  # root mean square amplitude (-60 dBFS) below which a waveform has no loudness to speak of


@dataclass(frozen=True)
class GaussianNoise(Method):
    """Gaussian noise in the input, as large as the training budget; cut to the valid range, not to the budget.

    Of norm linf, the standard deviation is `radii` times epsilon; of l2 and l1, that which gives the whole noise a length
    of about `radii` times the radius. A modality without a budget is left alone. `sigma`, in every modality's own unit,
    takes the place of the budget where it is above 0.
    """

    budgeted: ClassVar[bool] = True

    radii: float = 1.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and self.radii > 0):
            raise ValueError(
                f"`sigma` must not be negative and `radii` must be above 0, got {self.sigma:g} and {self.radii:g}"
            )
        if self.sigma and self.radii != 1:
            raise ValueError(
                f"`sigma` {self.sigma:g} sets the noise, so `radii` {self.radii:g} would do nothing: give one"
            )

    def check_budgets(self, model: Classifier, budgets: Mapping[str, Budget]) -> None:
        if not self.sigma:
            super().check_budgets(model, budgets)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        noisy = {m: self._noisy(m, x, work) for m, x in batch.inputs.items()}
        return work.loss(work.trace(noisy).logits, batch.targets)

    def _noisy(self, modality: str, x: Tensor, work: Work) -> Tensor:
        budget, spec = work.budgets.get(modality), work.model.specs[modality]
        if budget is None and not self.sigma:
            return x
        noise = torch.randn(x.shape, generator=work.generator).to(x)
        scale = self.sigma if self.sigma or budget is None else self._scale(budget, x)
        return (x + noise * per_sample(scale, x)).clamp(spec.low, spec.high)

    def _scale(self, budget: Budget, x: Tensor) -> float | Tensor:
        size = x[0].numel()
        usual = {"linf": 1.0, "l2": math.sqrt(size), "l1": size * math.sqrt(2 / math.pi)}[budget.norm]
        return self.radii * budget.radius(x) / usual


@dataclass(frozen=True)
class Mixup(Method):
    """Clips mixed with one another, and their labels [Zhang H. et al., 2018, arXiv:1710.09412].

    Ratios are Beta(alpha, alpha), one for each clip, or one a batch as in the authors' code.
    """

    alpha: float = 0.4
    per_clip: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        partner = permuted(len(batch.rows), work.generator)
        ratio = draw_ratios(self.alpha, len(partner), work.generator, self.per_clip)
        return mixed_losses(work, mixed_at(work, batch, "input", partner, ratio))


@dataclass(frozen=True)
class BetweenClass(Method):
    """Waveforms mixed so that each is heard as loud as its share of the label [Tokozume et al., 2018, arXiv:1711.10282].

    `(p x + (1 - p) y) / sqrt(p^2 + (1 - p)^2)`, where p makes up for one being louder; r is uniform in [0, 1], and the
    label's. Loudness is the root mean square of the clip (the paper weighs frequencies and takes the loudest window).
    Where either is silent, p is r. A sum that leaves the valid range is turned down, not cut. Pictures are mixed by r.
    """

    per_clip: bool = True

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        partner = permuted(len(batch.rows), work.generator)
        ratio = draw_ratios(1.0, len(partner), work.generator, self.per_clip)
        inputs = {}
        for modality, x in batch.inputs.items():
            spec, y = work.model.specs[modality], x[partner]
            inputs[modality] = between(x, y, ratio) if spec.sample_rate is None else heard(x, y, ratio.to(x), spec.high)
        targets = mixed_targets(batch.targets, partner, ratio)
        return mixed_losses(work, Mixed("input", in_range(inputs, work.model.specs), targets))


def heard(
    x: Float[Tensor, "clip time"], y: Float[Tensor, "clip time"], ratio: Float[Tensor, " clip"], peak: float = 1.0
) -> Float[Tensor, "clip time"]:
    """`BetweenClass`'s mix of waveforms, no louder than `peak`.

    >>> heard(torch.tensor([[0.1, -0.1]]), torch.tensor([[0.3, 0.3]]), torch.tensor([0.5]))
    tensor([[0.1897, 0.0000]])
    """
    level_x, level_y = (clips.square().mean(1).sqrt() for clips in (x, y))
    audible = (level_x > SILENCE) & (level_y > SILENCE)
    quietened, other = ratio * level_y, (1 - ratio) * level_x
    share = torch.where(audible, quietened / torch.where(audible, quietened + other, 1), ratio)[:, None]
    mix = (share * x + (1 - share) * y) / (share.square() + (1 - share).square()).sqrt()
    return mix * (peak / mix.abs().amax(1, keepdim=True).clamp(min=peak))


@dataclass(frozen=True)
class ManifoldMixup(Method):
    """Clips mixed at the input, at every modality's features or at the latent [Verma et al., 2019, arXiv:1806.05236].

    The place is drawn anew for each batch unless one is named.
    """

    alpha: float = 2.0
    place: str = ANY
    per_clip: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_setting(self.place)

    def check(self, model: Classifier) -> None:
        check_place(model, self.place)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        place = draw_place(work.model, self.place, work.generator)
        partner = permuted(len(batch.rows), work.generator)
        ratio = draw_ratios(self.alpha, len(partner), work.generator, self.per_clip)
        return mixed_losses(work, mixed_at(work, batch, place, partner, ratio))


@dataclass(frozen=True)
class NoisyFeatureMixup(Method):
    """Manifold mix-up, then noise that adds and noise that multiplies [Lim et al., 2021, arXiv:2110.02180].

    `added` is in standard deviations of the part over the batch: the paper's pictures have a deviation of 1, waveforms
    do not. Mixed inputs are cut to their valid range.
    """

    alpha: float = 1.0
    place: str = ANY
    added: float = 0.4
    multiplied: float = 0.2
    per_clip: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_setting(self.place)
        if not (self.added >= 0 and self.multiplied >= 0):
            raise ValueError(
                f"`added` and `multiplied` must not be negative, got {self.added:g} and {self.multiplied:g}"
            )

    def check(self, model: Classifier) -> None:
        check_place(model, self.place)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        place = draw_place(work.model, self.place, work.generator)
        partner = permuted(len(batch.rows), work.generator)
        ratio = draw_ratios(self.alpha, len(partner), work.generator, self.per_clip)
        mixed = mixed_at(work, batch, place, partner, ratio)
        parts = {name: self._noisy(x, work.generator) for name, x in mixed.parts.items()}
        if place == "input":
            parts = in_range(parts, work.model.specs)
        return mixed_losses(work, mixed._replace(parts=parts))

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        adding, multiplying = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
        deviation = x.detach().std(correction=0)
        return x * (1 + self.multiplied * multiplying) + self.added * deviation * adding


@dataclass(frozen=True)
class CutMix(Method):
    """A stretch of a waveform, and a box of a picture, from another clip [Yun et al., 2019, arXiv:1905.04899].

    Stretch and box have the share 1 - lambda, lambda of Beta(alpha, alpha), around a point drawn uniformly, and are cut
    at the edges; the box is the same in all frames. Labels go by what is left, on average over the modalities.
    """

    alpha: float = 1.0
    per_clip: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        clips = len(batch.rows)
        partner = permuted(clips, work.generator)
        ratio = draw_ratios(self.alpha, clips, work.generator, self.per_clip)
        inputs, kept = {}, []
        for modality, x in sorted(batch.inputs.items()):
            centres = torch.rand(clips, 2, generator=work.generator)
            pasted = box(x.shape[1:], 1 - ratio, centres)
            inputs[modality] = torch.where(pasted.to(x.device), x[partner], x)
            kept.append(1 - pasted.float().flatten(1).mean(1))
        targets = mixed_targets(batch.targets, partner, torch.stack(kept).mean(0))
        return mixed_losses(work, Mixed("input", inputs, targets))


def box(shape: torch.Size, share: Float[Tensor, " clip"], centres: Float[Tensor, "clip 2"]) -> Tensor:
    """Where a clip of this shape, [time] or [..., height, width], lies in a stretch or box; broadcasts against clips.

    `share` of the clip before it is cut at the edges, around `centres` in [0, 1].
    """
    spans = shape[-2:]  # one axis of time, or height and width
    inside: Tensor = torch.ones(len(share), *[1] * len(shape), dtype=torch.bool)
    for axis, span in enumerate(spans):
        length = (share ** (1 / len(spans)) * span).round()
        start = (centres[:, axis] * span - length / 2).round()
        position = torch.arange(span)
        hit = (position >= start[:, None]) & (position < (start + length)[:, None])
        view = [len(share), *[1] * len(shape)]
        view[len(shape) - len(spans) + axis + 1] = span
        inside = inside & hit.reshape(view)
    return inside


@dataclass(frozen=True)
class IntraClass(Method):
    """Clips mixed with others of their class: more of each class, no new labels [cf. SMOTE, Chawla et al., 2002,
    arXiv:1106.1813].

    The partner is any of the batch that shares a label, all as likely; a clip without one is left as it is. The label is
    kept; of clips with several, the labels that they share are, and the others are mixed by share as in `Mixup`.
    """

    alpha: float = 1.0
    per_clip: bool = True

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        partner = class_mates(batch.targets.cpu(), work.generator)
        ratio = draw_ratios(self.alpha, len(partner), work.generator, self.per_clip)
        return mixed_losses(work, mixed_at(work, batch, "input", partner, ratio))


def class_mates(targets: Float[Tensor, "clip class"], generator: torch.Generator) -> Int[Tensor, " clip"]:
    """For each clip another that shares a label with it, all as likely; itself where there is none.

    >>> class_mates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.Generator())[:2]
    tensor([2, 2])
    """
    shared = (targets @ targets.T > 0).fill_diagonal_(False)
    drawn = torch.rand(shared.shape, generator=generator).masked_fill(~shared, -1).argmax(1)
    return torch.where(shared.any(1), drawn, torch.arange(len(targets)))


METHODS: dict[str, type[Method]] = {
    "gaussian-noise": GaussianNoise,
    "mixup": Mixup,
    "between-class": BetweenClass,
    "manifold-mixup": ManifoldMixup,
    "cutmix": CutMix,
    "intra-class": IntraClass,
    "noisy-feature-mixup": NoisyFeatureMixup,
}
