"""The noun that everything attacks: a classifier in stages, what its inputs must look like, and views of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Inputs = dict[str, Tensor]  # modality -> raw batch
LabelKind = Literal["multilabel", "multiclass"]
FEATURE = "feature"  # the unit of inputs that no adversary can touch


@dataclass(frozen=True)
class InputSpec:
    """What one modality's input looks like after the batch axis, in the unit that an adversary can touch.

    `shape` is `(time,)` for a waveform and `(frame, channel, height, width)` for a picture. `low` and `high` bound
    every value; `unit` is printed beside every budget. `sample_rate` in Hz belongs to audio and is None elsewhere.
    """

    shape: tuple[int, ...]
    low: float
    high: float
    unit: str
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`, got low={self.low:g} and high={self.high:g}")
        if not all(size > 0 for size in self.shape):
            raise ValueError(f"`shape` must have positive sizes, got {self.shape}")

    def check(self, modality: str, x: Tensor) -> None:
        """Raise `ValueError` unless `x` is a batch of this shape whose values lie in [low, high]."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"`inputs[{modality!r}]` must have shape [batch, {', '.join(map(str, self.shape))}], "
                f"got {list(x.shape)}: cut, pad or resize the clips to the model's size"
            )
        if not x.is_floating_point():
            raise TypeError(f"`inputs[{modality!r}]` must be floating point, got {x.dtype}: scale it to raw units")
        low, high = (bound.item() for bound in x.aminmax()) if x.numel() else (self.low, self.high)
        if not (self.low <= low and high <= self.high):  # also catches NaN
            raise ValueError(
                f"`inputs[{modality!r}]` must lie in [{self.low:g}, {self.high:g}] ({self.unit}), "
                f"got values from {low:g} to {high:g}: rescale the inputs"
            )


def waveform(seconds: float, sample_rate: int = 16_000) -> InputSpec:
    """A mono waveform of `seconds` at `sample_rate` Hz, amplitude in [-1, 1]."""
    return InputSpec((round(seconds * sample_rate),), -1.0, 1.0, "amplitude", sample_rate)


def frames(count: int, height: int, width: int | None = None) -> InputSpec:
    """`count` RGB frames of `height` x `width` pixels (square unless told), values in [0, 1]."""
    return InputSpec((count, 3, height, width or height), 0.0, 1.0, "pixel value")


class Trace(NamedTuple):
    """What one pass through a classifier leaves behind."""

    features: dict[str, Tensor]  # modality -> [batch, *feature]; tokens and maps are fine
    latent: Float[Tensor, "batch dim"]
    logits: Float[Tensor, "batch class"]


class Classifier(nn.Module, ABC):
    """A classifier of one or more modalities in four stages: front_end -> encode -> fuse -> classify.

    Inputs are raw (waveform amplitude in [-1, 1], RGB in [0, 1]); filter banks, normalisation and resizing belong to
    the front end, so that gradients and budgets speak of what an adversary can touch. `classify` returns logits, not
    probabilities. A subclass sets `specs`, `classes` and `label_kind`, and writes `encode`, `fuse` and `classify`.
    """

    specs: Mapping[str, InputSpec]
    classes: tuple[str, ...]
    label_kind: LabelKind
    needs_adaptive: bool = False  # declared: a defence, whose scores mean nothing without an attack that knows it
    stochastic: bool = False  # declared: scores are drawn at random, so verdicts and attacks must average over draws

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        """From raw input to what the encoder reads (a spectrogram, normalised pixels); unless told, the same."""
        return raw

    @abstractmethod
    def encode(self, modality: str, x: Tensor) -> Tensor:
        """From a front end's output to that modality's features, [batch, *feature]."""

    @abstractmethod
    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        """From all modalities' features to one latent vector a clip."""

    @abstractmethod
    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        """From latent to logits."""

    def features(self, inputs: Inputs) -> dict[str, Tensor]:
        """Each modality on its own, up to where they meet."""
        return {modality: self.encode(modality, self.front_end(modality, x)) for modality, x in inputs.items()}

    def finish(self, features: dict[str, Tensor]) -> Trace:
        """From every modality's features to the logits. A missing or unknown modality raises `ValueError`."""
        check_modalities(features, self.specs)
        latent = self.fuse(features)
        return Trace(features, latent, self.classify(latent))

    def trace(self, inputs: Inputs) -> Trace:
        """Features, latent and logits of a batch; nothing is kept on the model."""
        check_modalities(inputs, self.specs)
        return self.finish(self.features(inputs))

    def forward(self, inputs: Inputs) -> Float[Tensor, "batch class"]:
        return self.trace(inputs).logits

    def surrogate(self) -> "Classifier":
        """What attacks see in this model's place; unless told, the model itself.

        A defence with a stage that has no useful gradient returns itself with a differentiable stand-in for that stage
        (BPDA [Athalye et al., 2018, arXiv:1802.00420]); verdicts still come from the model.
        """
        return self

    def adaptive_attacks(self) -> Mapping[str, Any]:
        """Attacks (`robustav.attacks.Attack`) that know how this model defends itself, by name; every suite runs them.

        [Tramer et al., 2020, arXiv:2002.08347].
        """
        return {}

    def at(self, rows: Tensor) -> "Classifier":
        """This classifier for some clips of a batch (indices, repeats allowed): itself, unless it holds part of one."""
        return self

    def note(self, loss: Tensor, reached: Tensor) -> None:
        """Hear what an attack makes of its last pass, [batch] each; nobody listens unless a view does."""


def missing_adaptive(model: Classifier, ran: Collection[str]) -> str:
    """Why the robust scores of a run with the attacks `ran` (names) are not to be printed; empty if they are.

    A defence is believed only under an attack that knows it [Tramer et al., 2020, arXiv:2002.08347]: one of those that
    its class declares must be among them. Other models need none.
    """
    if not model.needs_adaptive:
        return ""
    name, own = type(model).__name__, sorted(model.adaptive_attacks())
    if not own:
        return (
            f"{name} is a defence and declares no attack that knows it: return one from `adaptive_attacks()`, or its robust "
            "scores are not printed"
        )
    if not set(own) & set(ran):
        return (
            f"{name} is a defence and was not attacked by {' or '.join(own)}, which knows it: run a suite, which adds it, or "
            "its robust scores are not printed"
        )
    return ""


def check_modalities(given: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Raise `ValueError` naming both sets unless `given` and `wanted` have the same keys."""
    if given.keys() != wanted.keys():
        raise ValueError(f"`inputs` must have the modalities {sorted(wanted)}, got {sorted(given)}")


def check_label_kind(label_kind: str) -> None:
    """Raise `ValueError` unless it is one of the two."""
    if label_kind not in ("multilabel", "multiclass"):
        raise ValueError(f"`label_kind` must be 'multilabel' or 'multiclass', got {label_kind!r}")


class LateFusion(Classifier):
    """One encoder a modality, features side by side (in the order of their names), one head on top.

    `encoders` and `front_ends` map modality to a module; encoders return [batch, dim]; a modality without a front end
    is encoded raw.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        head: nn.Module,
        *,
        specs: Mapping[str, InputSpec],
        classes: tuple[str, ...],
        label_kind: LabelKind = "multilabel",
        front_ends: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        front_ends = front_ends or {}
        check_label_kind(label_kind)
        check_modalities(encoders, specs)
        if unknown := sorted(front_ends.keys() - encoders.keys()):
            raise ValueError(f"`front_ends` must name modalities among {sorted(encoders)}, got also {unknown}")
        self.specs, self.classes, self.label_kind = dict(specs), tuple(classes), label_kind
        self.front_ends = nn.ModuleDict(front_ends)
        self.encoders = nn.ModuleDict(encoders)
        self.head = head

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.front_ends[modality](raw) if modality in self.front_ends else raw

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.encoders[modality](x)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return torch.cat([features[modality].flatten(1) for modality in sorted(features)], dim=1)

    def classify(self, latent: Tensor) -> Tensor:
        return self.head(latent)


class AtFeatures(Classifier):
    """A view of a classifier whose inputs are its front ends' outputs.

    Attacks on features are for diagnosis and for reproducing published protocols: many perturbed spectrograms belong
    to no waveform. `low` and `high` are unbounded unless given, and the unit says "feature"; what is one already
    keeps its range. What the classifier declares of itself, as a defence or as drawn at random, holds for the view.
    """

    def __init__(self, model: Classifier, *, low: float = float("-inf"), high: float = float("inf")) -> None:
        super().__init__()
        self.model, self.range = model, (low, high)
        self.classes, self.label_kind = model.classes, model.label_kind
        self.needs_adaptive, self.stochastic = model.needs_adaptive, model.stochastic
        parameter = next(model.parameters(), torch.zeros(()))
        with torch.no_grad():
            empty = {m: parameter.new_zeros(1, *spec.shape) for m, spec in model.specs.items()}
            shapes = {m: tuple(x.shape[1:]) for m, x in self.front_ends(empty).items()}
        self.specs = {
            m: model.specs[m] if model.specs[m].unit == FEATURE else InputSpec(shape, low, high, FEATURE)
            for m, shape in shapes.items()
        }

    def front_ends(self, raw: Inputs) -> Inputs:
        """From the viewed model's raw inputs to this view's inputs."""
        return {m: self.model.front_end(m, x) for m, x in raw.items()}

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model.encode(modality, x)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.fuse(features)

    def classify(self, latent: Tensor) -> Tensor:
        return self.model.classify(latent)

    def surrogate(self) -> Classifier:
        return self._of(self.model.surrogate())

    def adaptive_attacks(self) -> Mapping[str, Any]:
        return self.model.adaptive_attacks()

    def at(self, rows: Tensor) -> Classifier:
        return self._of(self.model.at(rows))

    def note(self, loss: Tensor, reached: Tensor) -> None:
        self.model.note(loss, reached)

    def _of(self, model: Classifier) -> Classifier:
        """The same view of what stands in the model's place."""
        if model is self.model:
            return self
        low, high = self.range
        return AtFeatures(model, low=low, high=high).train(self.training)


class Wrapped(Classifier):
    """A user's own network, seen as a classifier. It is called with the inputs dict unless `call` says otherwise.

    `call(network, inputs)` returns logits [batch, class]. `latent` names the network's last module (as
    `named_modules` does): its input is the latent, and what it returns must be the logits. Without it the logits
    themselves stand in for the latent, which is enough for every attack but not for latent metrics.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        specs: Mapping[str, InputSpec],
        classes: tuple[str, ...],
        label_kind: LabelKind,
        call: Callable[[nn.Module, Inputs], Tensor] = lambda network, inputs: network(inputs),
        latent: str | None = None,
    ) -> None:
        super().__init__()
        check_label_kind(label_kind)
        self.network, self.call, self.head_name = network, call, latent
        self.specs, self.classes, self.label_kind = dict(specs), tuple(classes), label_kind
        names = [name for name, _ in network.named_modules() if name]
        if latent is not None and latent not in names:
            raise ValueError(f"`latent` must name a module of the network, got {latent!r}; its last are {names[-20:]}")

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        if self.head_name is None:
            return self.call(self.network, features)
        caught: list[tuple[Tensor, Tensor]] = []
        head = self.network.get_submodule(self.head_name)
        handle = head.register_forward_hook(lambda _, arguments, output: caught.append((arguments[0], output)))
        try:
            logits = self.call(self.network, features)
        finally:
            handle.remove()
        latent, output = caught[0] if len(caught) == 1 else (logits, None)
        if (
            output is None
            or latent.ndim != 2
            or output.shape != logits.shape
            or not torch.equal(output.nan_to_num(), logits.nan_to_num())
        ):
            raise ValueError(
                f"`latent` must name the last module, called once with [batch, dim] and returning the logits, got "
                f"{self.head_name!r}, called {len(caught)} times"
                + (f" with {list(latent.shape)} and returning {list(output.shape)}" if output is not None else "")
            )
        return latent

    def classify(self, latent: Tensor) -> Tensor:
        return latent if self.head_name is None else self.network.get_submodule(self.head_name)(latent)
