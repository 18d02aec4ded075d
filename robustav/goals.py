"""What an adversary wants: a loss to climb and a declared rule for when it has been reached."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.classifier import LabelKind, Trace
from robustav.losses import DEFAULT_LOSS, LOSSES, Logits, bce, margin, multi_hot


def label_set(logits: Logits, threshold: float | Tensor, label_kind: LabelKind) -> Bool[Tensor, "batch class"]:
    """The predicted classes: probability at or above `threshold` (multilabel), the arg max (multiclass)."""
    if label_kind == "multiclass":
        return F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    return logits.sigmoid() >= torch.as_tensor(threshold, device=logits.device)


def top1_lost(now: Tensor, labels: Tensor, clean: Tensor | None, threshold: float, kind: LabelKind) -> Tensor:
    """The arg-max class is none of the labels."""
    return ~multi_hot(labels, now).gather(1, now.argmax(1, keepdim=True)).squeeze(1).bool()


def label_set_changed(now: Tensor, labels: Tensor, clean: Tensor | None, threshold: float, kind: LabelKind) -> Tensor:
    """The set of predicted classes is not the one predicted on the clean input."""
    if clean is None:
        raise ValueError(
            "success 'label-set' compares with the clean prediction: call `threat.given(clean=trace)` first"
        )
    return (label_set(now, threshold, kind) != label_set(clean, threshold, kind)).any(1)


def misclassified(now: Tensor, labels: Tensor, clean: Tensor | None, threshold: float, kind: LabelKind) -> Tensor:
    """The set of predicted classes is not the set of labels (multiclass: the arg max is not the label)."""
    return (label_set(now, threshold, kind) != multi_hot(labels, now).bool()).any(1)


class Success(NamedTuple):
    """A rule for when an untargeted goal is reached, and the words for it in a report."""

    holds: Callable[[Tensor, Tensor, Tensor | None, float, LabelKind], Tensor]
    words: str


SUCCESSES: dict[str, Success] = {
    "top1": Success(top1_lost, "top-1 hit lost (the highest-scoring class is none of the labels)"),
    "label-set": Success(label_set_changed, "predicted label set differs from the clean prediction"),
    "misclassified": Success(misclassified, "predicted label set differs from the labels"),
}


@dataclass(frozen=True)
class Goal(ABC):
    """`loss` is what an attack climbs; `reached` is the declared rule by which success is counted.

    `threshold` is the probability at which a class counts as predicted (multilabel). A goal that compares with the
    clean prediction or latent learns it from `given`, once a batch.
    """

    label_kind: LabelKind = "multilabel"
    threshold: float = 0.5
    clean: Trace | None = None

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"`threshold` must be a probability between 0 and 1, got {self.threshold!r}")

    @abstractmethod
    def loss(self, trace: Trace, labels: Tensor) -> Float[Tensor, " batch"]:
        """One value a sample, larger where the adversary is better off."""

    @abstractmethod
    def reached(self, trace: Trace, labels: Tensor) -> Bool[Tensor, " batch"]:
        """Whether each sample is where the adversary wants it."""

    @abstractmethod
    def words(self, classes: tuple[str, ...]) -> str:
        """The goal in a sentence for a report's header."""

    def given(self, clean: Trace) -> "Goal":
        """The same goal, knowing what the model says of this batch's clean inputs."""
        return replace(self, clean=Trace({}, clean.latent.detach(), clean.logits.detach()))

    def at(self, rows: Tensor) -> "Goal":
        """The goal for some clips of the batch (indices, repeats allowed)."""
        if self.clean is None:
            return self
        return replace(self, clean=Trace({}, self.clean.latent[rows], self.clean.logits[rows]))

    def settings(self) -> dict[str, object]:
        """Everything that decides a loss or a verdict, as a record keeps it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "clean"}
        return {"goal": type(self).__name__, **chosen}

    def check_model(self, classes: int, label_kind: LabelKind) -> None:
        """Raise `ValueError` unless the goal makes sense for a model of so many classes and that kind of labels."""
        if label_kind != self.label_kind:
            raise ValueError(f"the goal is made for {self.label_kind} labels, but the model is {label_kind}")
        if classes == 1 and (label_kind == "multiclass" or getattr(self, "success", "") == "top1"):
            raise ValueError(
                "with one class the highest-scoring class is always that one, so no attack could ever succeed: declare "
                "label_kind='multilabel' and choose success 'label-set' or 'misclassified'"
            )

    def check(self, labels: Tensor, classes: int) -> None:
        """Raise `ValueError` unless `labels` are of the declared kind."""
        if self.label_kind == "multilabel":
            if labels.ndim != 2 or labels.shape[1] != classes or not labels.is_floating_point():
                raise ValueError(
                    f"`labels` of a multilabel model must be floats [batch, {classes}], got {labels.dtype} "
                    f"{list(labels.shape)}: declare `label_kind='multiclass'` if each clip has one class index"
                )
            if not ((labels == 0) | (labels == 1)).all():
                raise ValueError(f"`labels` must be zeros and ones, got values up to {labels.max().item():g}")
        else:
            if labels.ndim != 1 or labels.is_floating_point():
                raise ValueError(
                    f"`labels` of a multiclass model must be class indices [batch], got {labels.dtype} "
                    f"{list(labels.shape)}: declare `label_kind='multilabel'` if a clip may have several classes"
                )
            if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
                raise ValueError(f"`labels` must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


@dataclass(frozen=True)
class Untargeted(Goal):
    """Any mistake: climb the model's own loss. `loss_name` is a key of `LOSSES`, by default BCE or cross-entropy."""

    loss_name: str = ""
    success: str = "top1"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.loss_name or DEFAULT_LOSS[self.label_kind]
        object.__setattr__(self, "loss_name", name)
        _known("loss_name", name, [key for key, loss in LOSSES.items() if loss.label_kind == self.label_kind])
        _known("success", self.success, SUCCESSES)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return LOSSES[self.loss_name].value(trace.logits, labels)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return _holds(self, trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return f"untargeted, climbing {self.loss_name}; success: {SUCCESSES[self.success].words}"


@dataclass(frozen=True)
class Steered(Goal):
    """A goal pursued by way of another loss: success is still the goal's.

    `value(logits, labels)` is the loss, or `value(logits, labels, aim)` where each clip has a class to aim at, [batch].
    Made by `ThreatModel.steered`; for attacks that choose their own loss, never for judging.
    """

    goal: Goal = field(default_factory=lambda: Untargeted())
    value: Callable[..., Tensor] = bce
    aim: Tensor | None = None

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return self.value(trace.logits, labels) if self.aim is None else self.value(trace.logits, labels, self.aim)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return self.goal.reached(trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return self.goal.words(classes)

    def given(self, clean: Trace) -> "Goal":
        return replace(self, goal=self.goal.given(clean))

    def at(self, rows: Tensor) -> "Goal":
        return replace(self, goal=self.goal.at(rows), aim=None if self.aim is None else self.aim[rows])


@dataclass(frozen=True)
class Targeted(Goal):
    """Make `target` (a class index) the highest-scoring class."""

    target: int = 0

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return -margin(trace.logits, self._target(trace))

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return trace.logits.argmax(1) == self.target

    def words(self, classes: tuple[str, ...]) -> str:
        return f"targeted; success: the highest-scoring class is {classes[self.target]!r}"

    def _target(self, trace: Trace) -> Tensor:
        return torch.full((len(trace.logits),), self.target, device=trace.logits.device)


@dataclass(frozen=True)
class Hide(Goal):
    """Push the chosen classes below the threshold; multilabel only."""

    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return F.softplus(-trace.logits[:, list(self.chosen)]).sum(1)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return ~label_set(trace.logits, self.threshold, self.label_kind)[:, list(self.chosen)].any(1)

    def words(self, classes: tuple[str, ...]) -> str:
        names = ", ".join(classes[c] for c in self.chosen)
        return f"hide {names}; success: none of them is predicted (probability >= {self.threshold:g}) any more"


@dataclass(frozen=True)
class Inject(Goal):
    """Push the chosen classes above the threshold; multilabel only."""

    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return -F.softplus(-trace.logits[:, list(self.chosen)]).sum(1)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return label_set(trace.logits, self.threshold, self.label_kind)[:, list(self.chosen)].all(1)

    def words(self, classes: tuple[str, ...]) -> str:
        names = ", ".join(classes[c] for c in self.chosen)
        return f"inject {names}; success: all of them are predicted (probability >= {self.threshold:g})"


@dataclass(frozen=True)
class PushLatent(Goal):
    """Move the latent away from where the clean input put it, in Euclidean distance; needs no labels to climb."""

    success: str = "top1"

    def __post_init__(self) -> None:
        super().__post_init__()
        _known("success", self.success, SUCCESSES)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        if self.clean is None:
            raise ValueError("pushing the latent needs the clean latent: call `threat.given(clean=trace)` first")
        # From a point a hair beside the clean latent: at the clean latent itself the gradient is zero, and an attack
        # without a random start would stay there.
        return (trace.latent - 0.99 * self.clean.latent).norm(dim=1)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return _holds(self, trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return f"push the latent away from its clean place; success: {SUCCESSES[self.success].words}"


GOALS: dict[str, type[Goal]] = {
    "untargeted": Untargeted,
    "targeted": Targeted,
    "hide": Hide,
    "inject": Inject,
    "push-latent": PushLatent,
}


def parse_goal(
    text: str,
    classes: tuple[str, ...],
    label_kind: LabelKind,
    *,
    loss: str | None = None,
    success: str | None = None,
    threshold: float = 0.5,
) -> Goal:
    """The goal that a command line names: `untargeted`, `targeted:CLASS`, `hide:A,B`, `inject:A,B`, `push-latent`.

    Classes are names or, where a name holds a comma, indices. Settings that the goal does not have are refused.
    """
    name, _, chosen = text.partition(":")
    _known("goal", name, GOALS)
    goal = GOALS[name]
    settings: dict[str, object] = {"label_kind": label_kind, "threshold": threshold}
    for setting, value in (("loss_name", loss), ("success", success)):
        if value is not None:
            if setting not in goal.__dataclass_fields__:
                raise ValueError(f"goal {name!r} has its own {setting.removesuffix('_name')}: leave {value!r} out")
            settings[setting] = value
    wanted = next((field for field in ("target", "chosen") if field in goal.__dataclass_fields__), None)
    if wanted is None and chosen:
        raise ValueError(f"goal {name!r} takes no classes, got {chosen!r}")
    if wanted is not None:
        indices = _class_indices(chosen, classes, name)
        if wanted == "target" and len(indices) != 1:
            raise ValueError(f"goal 'targeted' takes one class, got {chosen!r}")
        settings[wanted] = indices[0] if wanted == "target" else indices
    return goal(**settings)  # type: ignore[arg-type]  # the fields are checked by each goal


def _class_indices(text: str, classes: tuple[str, ...], goal: str) -> tuple[int, ...]:
    if not text:
        raise ValueError(
            f"goal {goal!r} needs a class, as in '{goal}:{classes[0]}'; there are {', '.join(classes[:20])}"
        )
    if text in classes:
        return (classes.index(text),)
    lookup = {name.casefold(): index for index, name in enumerate(classes)}
    indices = []
    for part in (part.strip() for part in text.split(",")):
        if part in classes:  # a name comes before an index, and as it is spelt before another case
            indices.append(classes.index(part))
        elif part.casefold() in lookup:
            indices.append(lookup[part.casefold()])
        elif part.isdecimal() and int(part) < len(classes):
            indices.append(int(part))
        else:
            shown = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise ValueError(f"goal {goal!r}: no class {part!r}; the model has {shown} (or give an index)")
    return tuple(dict.fromkeys(indices))


def _known(what: str, name: str, known: object) -> None:
    if name not in known:  # type: ignore[operator]
        raise ValueError(f"`{what}` must be one of {sorted(known)}, got {name!r}")  # type: ignore[call-overload]


def _holds(goal: Untargeted | PushLatent, trace: Trace, labels: Tensor) -> Tensor:
    """The declared success rule."""
    clean = goal.clean.logits if goal.clean else None
    return SUCCESSES[goal.success].holds(trace.logits, labels, clean, goal.threshold, goal.label_kind)


def _choice(goal: Hide | Inject) -> None:
    if goal.label_kind != "multilabel":
        raise ValueError(f"{type(goal).__name__} needs a multilabel model; for one class a clip use Targeted")
    if not goal.chosen:
        raise ValueError("`chosen` must name at least one class index, got none")
