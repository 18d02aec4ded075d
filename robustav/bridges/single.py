"""One tensor in, scores out: how a peer sees one modality of a classifier, the rest held."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustav.attacks.ascent import Pursuit
from robustav.classifier import Classifier, Inputs, InputSpec, Trace, check_modalities
from robustav.view import AttackView, Tally


def picture_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The (channel, height, width) that holds an input of this shape in its own order.

    A waveform becomes the most nearly square picture with as many pixels; frames become channels.
    """
    if len(shape) == 1:
        height = max(h for h in range(1, math.isqrt(shape[0]) + 1) if shape[0] % h == 0)
        return 1, height, shape[0] // height
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@dataclass(frozen=True)
class UnitBox:
    """One modality between its own unit and all that image libraries know: [batch, channel, height, width] in [0, 1]."""

    spec: InputSpec

    def __post_init__(self) -> None:
        if not math.isfinite(self.span):
            raise ValueError(
                f"the peers need a bounded range, got [{self.spec.low:g}, {self.spec.high:g}] ({self.spec.unit}): "
                "give the model's inputs finite bounds, or use an attack of robustav"
            )

    @property
    def span(self) -> float:
        """Units of the modality in one of the box."""
        return self.spec.high - self.spec.low

    def length(self, radius: float) -> float:
        """A radius, in whatever norm, from the modality's own unit to that of the box."""
        return radius / self.span

    def pack(self, raw: Tensor) -> Tensor:
        """[batch, *shape] in raw units to [batch, channel, height, width] in [0, 1]."""
        return ((raw - self.spec.low) / self.span).clamp(0, 1).reshape(len(raw), *picture_shape(self.spec.shape))

    def unpack(self, unit: Tensor, near: Tensor | None = None) -> Tensor:
        """And back. `near` is the raw batch that was packed: what has not moved since comes back bit for bit."""
        if near is None:
            return self.spec.low + self.span * unit.reshape(len(unit), *self.spec.shape)
        return near + self.span * (unit - self.pack(near)).reshape(near.shape)


class SingleInput(nn.Module):
    """One modality of a classifier as a module from one tensor to logits [batch, class].

    The other modalities are held at `held`, raw inputs of one clip or of as many as will be sent, in that order. With
    `box` the tensor is a batch of pictures in [0, 1], else raw. Passes are counted in `tally` (of one held clip, all
    as its own).
    """

    def __init__(
        self, model: Classifier, modality: str, held: Inputs | None = None, box: UnitBox | None = None
    ) -> None:
        super().__init__()
        if modality not in model.specs:
            raise ValueError(f"`modality` must be one of {sorted(model.specs)}, got {modality!r}")
        if any(module.training for module in model.modules()):
            raise ValueError("`model` must be in eval mode: call `model.eval()` first")
        held = held or {}
        check_modalities({modality: None, **held}, model.specs)
        for m, x in held.items():
            model.specs[m].check(m, x)
        if len(sizes := {len(x) for x in held.values()}) > 1:
            raise ValueError(f"`held` must have as many clips in every modality, got {sorted(sizes)}")
        with torch.no_grad():  # of a random model the view encodes what is held anew at every pass
            features = held if model.stochastic else model.features(held)
        tensors = [x for x in [*model.parameters(), *features.values()] if x.is_floating_point()]
        self.like = next(iter(tensors), torch.zeros(())).detach().new_empty(0)  # peers send float64 as well
        self.tally = Tally(max(sizes, default=1), (modality,), self.like.device)
        self.view, self.modality, self.box = AttackView(model, (modality,), features, self.tally), modality, box
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class]."""
        x = x.to(self.like)
        raw = x if self.box is None else self.box.unpack(x)
        return self.view.at(clips_of(len(x), self.tally.size, self.tally.device))({self.modality: raw})


class Clips(nn.Module):
    """The clips of an attack as the peer sees them: one tensor in, and what `present` makes of the logits out.

    `box` maps from the peer's pictures in [0, 1]; without it they are in raw units. Padding is no input: it is put back.
    Every pass is counted by the model that the attack was given, and noted for the reliability checks.
    """

    def __init__(
        self,
        pursuit: Pursuit,
        modality: str,
        box: UnitBox | None,
        present: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.pursuit, self.modality, self.box, self.present = pursuit, modality, box, present
        # Peers ask the first parameter where to compute, and a model may have none.
        self.place = nn.Parameter(pursuit.inputs[modality].new_empty(0), requires_grad=False)
        self.training = False

    def train(self, mode: bool = True) -> "Clips":
        """Nothing: no attack has a say in the mode of the model."""
        return self

    def at(self, x: Tensor) -> Pursuit:
        """The clips that the rows of `x` belong to, with `x` as their inputs in raw units."""
        rows = clips_of(len(x), len(self.pursuit.labels), self.place.device)
        whole = self.pursuit if len(x) == len(self.pursuit.labels) else self.pursuit.at(rows)
        return whole._replace(inputs={**whole.inputs, self.modality: self.raw(x, whole)})

    def raw(self, x: Tensor, whole: Pursuit) -> Tensor:
        """What the peer made of the clips of `whole`."""
        clean = whole.inputs[self.modality]
        raw = x.to(clean).reshape(clean.shape) if self.box is None else self.box.unpack(x.to(clean), clean)
        writable = whole.threat.budgets[self.modality].writable
        return raw if writable is None else torch.where(writable, raw, clean)

    def note(self, here: Pursuit, trace: Trace) -> tuple[Tensor, Tensor]:
        """Loss and verdict of the goal, which the model hears."""
        with torch.no_grad():
            loss, reached = here.threat.goal.loss(trace, here.labels), here.threat.goal.reached(trace, here.labels)
            here.model.note(loss, reached)
        return loss, reached

    def forward(self, x: Tensor) -> Tensor:
        """What is presented of the logits."""
        here = self.at(x)
        trace = here.model.trace(here.inputs)
        self.note(here, trace)
        return self.present(trace.logits)


def clips_of(count: int, size: int, device: torch.device | str) -> Tensor:
    """The clip that each of `count` rows belongs to: the same for all of one clip, of several each its own.

    Raises `ValueError` for any other number: a peer that sends some clips of a batch does not say which.
    """
    if size == 1:
        return torch.zeros(count, dtype=torch.long, device=device)
    if count != size:
        raise ValueError(f"expected all {size} clips in their order, got {count}: hold one clip and attack one by one")
    return torch.arange(size, device=device)
