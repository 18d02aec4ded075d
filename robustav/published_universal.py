"""The published protocol of a "global PGD" perturbation, kept to the letter: for comparison, not for evaluation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from torch import Tensor

from robustav.classifier import Inputs

Batches = Callable[[], Iterable[tuple[Inputs, Tensor]]]  # every call goes through the clips anew
RANGES = {"audio": (-2.0, 2.0), "visual": (-0.51, 1.51)}  # of version 1; narrower than the published video features
SPARE = {1: 0.0, 2: 1e-7}  # added to the denominator of the rescaling, by version


class Reach(NamedTuple):
    """How large a perturbation truly is."""

    max_abs: float
    frame_l2: float  # largest Euclidean norm of a frame (last axis)


class Followed(NamedTuple):
    """What the published protocol leads to; to be shown with `label`, since the nominal epsilon is not what it is."""

    protocol: "PublishedUniversal"
    deltas: tuple[Inputs, ...]  # after every epoch
    losses: tuple[float, ...]  # as printed by the source: the sum over batches of the mean BCE while an epoch ran
    reached: tuple[dict[str, Reach], ...]  # after every epoch, by modality

    @property
    def label(self) -> str:
        """The words for every table and figure that shows this perturbation."""
        sizes = "; ".join(
            f"{m} reaches max |delta| {size.max_abs:.4g}, largest frame l2 {size.frame_l2:.4g}"
            for m, size in self.reached[-1].items()
        )
        nominal = f"nominal {self.protocol.norm} epsilon {self.protocol.epsilon:g}, never projected"
        return f"published protocol, version {self.protocol.version} ({nominal}): {sizes}"

    def on(self, inputs: Inputs) -> Inputs:
        """Inputs as the source scores them: the perturbation added, cut to no range and no budget."""
        return {m: x + self.deltas[-1][m].to(x) if m in self.deltas[-1] else x for m, x in inputs.items()}


@dataclass(frozen=True)
class PublishedUniversal:
    """The universal perturbation of AudioSetDoneRight's notebooks [Li et al., 2022, arXiv:2203.12122], to the letter.

    It is no attack of a report: the running perturbation is never projected on the nominal `epsilon` (with a steady
    gradient it grows by up to epsilon an epoch), clips outside the range move whatever the gradient says, and it is
    learnt and tried on the same clips. `robustav.universal.learn` is what to evaluate with.

    Norms are "linf" or "l2", of a frame. Version 1 cuts inputs to `ranges` (`RANGES` unless given). Version 2 cuts
    them to the values that the clips have, and the perturbation to what keeps every clip there.
    """

    version: int = 1
    step: float = 0.1
    step_norm: str = "linf"
    epsilon: float = 0.1
    norm: str = "linf"
    epochs: int = 20
    ranges: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        if self.version not in SPARE:
            raise ValueError(f"`version` must be one of {sorted(SPARE)}, got {self.version!r}")
        for name in ("step_norm", "norm"):
            if getattr(self, name) not in ("linf", "l2"):
                raise ValueError(f"`{name}` must be 'linf' or 'l2', got {getattr(self, name)!r}")
        if not (self.step > 0 and self.epsilon > 0):
            raise ValueError(f"`step` and `epsilon` must be above 0, got {self.step} and {self.epsilon}")
        if self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1, got {self.epochs}")
        if self.version == 2 and self.ranges is not None:
            raise ValueError("`ranges` belong to version 1: version 2 takes them from the clips, leave them out")

    def follow(
        self, probabilities: Callable[[Inputs], Tensor], batches: Batches, attacked: tuple[str, ...]
    ) -> Followed:
        """Go through the clips once to count and measure them, then `epochs` times to perturb `attacked`.

        `probabilities(inputs)` are a frozen model's clip probabilities [batch, class], such as
        `lambda x: model(x).sigmoid()`; `batches()` yields `(inputs, multi-hot labels)`. Gradients that vanish make a
        step of norm "l2" NaN, as they did in the source.
        """
        extent = _Extent.of(batches(), attacked)
        room = {m: self._room(m, extent) for m in attacked}
        delta = {m: torch.zeros_like(low) for m, low in extent.low.items()}
        deltas, losses = [], []
        for _ in range(self.epochs):
            total = 0.0
            for x, labels in batches():
                loss, moved = self._step(probabilities, x, labels, delta, room)
                total += loss
                for m in attacked:
                    d = self._rescaled(moved[m] - x[m])
                    delta[m] = delta[m] + d.mean(0) * len(d) / extent.clips
                    if self.version == 2:
                        low, high = extent.low[m], extent.high[m]
                        delta[m] = torch.clamp(delta[m], low.min() - low, high.max() - high)
            deltas.append(dict(delta))
            losses.append(total)
        return Followed(self, tuple(deltas), tuple(losses), tuple(_reach(delta) for delta in deltas))

    def _room(self, modality: str, extent: "_Extent") -> tuple[float, float]:
        if self.version == 2:
            return extent.low[modality].min().item(), extent.high[modality].max().item()
        ranges = self.ranges or RANGES
        if modality not in ranges:
            raise ValueError(f"`ranges` must say what {modality!r} is cut to, got {sorted(ranges)}")
        return ranges[modality]

    def _step(
        self,
        probabilities: Callable[[Inputs], Tensor],
        x: Inputs,
        labels: Tensor,
        delta: Inputs,
        room: Mapping[str, tuple[float, float]],
    ) -> tuple[float, Inputs]:
        """The loss, and each clip's point after one step and, in linf, the clipping around the clip."""
        here = {m: (x[m] + delta[m]).clamp(*room[m]).detach().requires_grad_() for m in delta}
        with torch.enable_grad():
            loss = F.binary_cross_entropy(probabilities({**x, **here}), labels)
        gradients = torch.autograd.grad(loss, list(here.values()))
        moved = {}
        for m, gradient in zip(here, gradients, strict=True):
            direction = gradient.sign() if self.step_norm == "linf" else gradient / _frame_norm(gradient, "l2")
            moved[m] = here[m].detach() + self.step * direction
            if self.norm == "linf":
                moved[m] = torch.clamp(moved[m], x[m] - self.epsilon, x[m] + self.epsilon)
        return loss.item(), moved

    def _rescaled(self, d: Tensor) -> Tensor:
        """Clips longer than epsilon as a whole get every frame at length epsilon, shorter ones too; others stay."""
        whole = _frame_norm(d.flatten(1), self.norm).reshape(-1, *[1] * (d.ndim - 1))
        frames = self.epsilon / (_frame_norm(d, self.norm) + SPARE[self.version])
        return torch.where(whole > self.epsilon, d * frames, d)


class _Extent(NamedTuple):
    """How many clips there are, and the least and greatest value of every coordinate."""

    clips: int
    low: Inputs
    high: Inputs

    @classmethod
    def of(cls, batches: Iterable[tuple[Inputs, Tensor]], attacked: tuple[str, ...]) -> "_Extent":
        clips = 0
        low: Inputs = {}
        high: Inputs = {}
        for x, _ in batches:
            for m in attacked:
                least, greatest = x[m].amin(0), x[m].amax(0)
                low[m] = torch.minimum(low[m], least) if clips else least
                high[m] = torch.maximum(high[m], greatest) if clips else greatest
            clips += len(next(iter(x.values())))
        if not clips or not attacked:
            raise ValueError(f"`batches` and `attacked` must not be empty, got {clips} clips and {list(attacked)}")
        return cls(clips, low, high)


def _frame_norm(x: Tensor, norm: str) -> Tensor:
    """The norm along the last axis, kept as an axis of size 1."""
    return x.abs().amax(-1, keepdim=True) if norm == "linf" else x.norm(dim=-1, keepdim=True)


def _reach(delta: Inputs) -> dict[str, Reach]:
    return {m: Reach(d.abs().max().item(), d.norm(dim=-1).max().item()) for m, d in delta.items()}
