"""What an adversary wants: a loss to climb and a declared rule for when it has been reached."""

import math
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
from robustav.ranking import class_quantiles, class_weights, corpus_ap, stealth, top_k_average, top_k_lost

OWN = "labels"  # in place of classes: those that each clip is labelled with
LEARNT = ("clean", "corpus")  # fields that follow from model and data, and are no settings


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
    clean prediction or latent learns it from `given`, once a batch; one that compares with the scores of all clips
    says so by `needs_corpus` and learns them from `learned`, once a run.
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

    def against(self, labels: Tensor) -> Tensor:
        """What an untargeted loss climbs away from: the labels, or what success is measured against in their place."""
        return labels

    @abstractmethod
    def reached(self, trace: Trace, labels: Tensor) -> Bool[Tensor, " batch"]:
        """Whether each sample is where the adversary wants it."""

    @abstractmethod
    def words(self, classes: tuple[str, ...]) -> str:
        """The goal in a sentence for a report's header."""

    def given(self, clean: Trace) -> "Goal":
        """The same goal, knowing what the model says of this batch's clean inputs."""
        return replace(self, clean=Trace({}, clean.latent.detach(), clean.logits.detach()))

    @property
    def needs_corpus(self) -> bool:
        """Whether `learned` must be called before the goal is pursued."""
        return False

    def learned(self, logits: Logits, labels: Tensor) -> "Goal":
        """The same goal, knowing the clean scores and the labels of all clips of a run; unless told, as it was."""
        return self

    def at(self, rows: Tensor) -> "Goal":
        """The goal for some clips of the batch (indices, repeats allowed)."""
        if self.clean is None:
            return self
        return replace(self, clean=Trace({}, self.clean.latent[rows], self.clean.logits[rows]))

    def settings(self) -> dict[str, object]:
        """Everything that decides a loss or a verdict, as a record keeps it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LEARNT}
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
        known("loss_name", name, [key for key, loss in LOSSES.items() if loss.label_kind == self.label_kind])
        known("success", self.success, SUCCESSES)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return LOSSES[self.loss_name].value(trace.logits, self.against(labels))

    def against(self, labels: Tensor) -> Tensor:
        if self.success != "label-set" or self.clean is None:
            return labels
        said = label_set(self.clean.logits, self.threshold, self.label_kind)
        return said.int().argmax(1) if self.label_kind == "multiclass" else said.to(labels)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return _holds(self, trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return f"untargeted, climbing {self.loss_name}; success: {SUCCESSES[self.success].words}"


@dataclass(frozen=True)
class Around(Goal):
    """A goal pursued by way of another loss: success is still the goal's. For climbing, never for judging."""

    goal: Goal = field(default_factory=lambda: Untargeted())

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return self.goal.reached(trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return self.goal.words(classes)

    def given(self, clean: Trace) -> "Goal":
        return replace(self, goal=self.goal.given(clean))

    @property
    def needs_corpus(self) -> bool:
        return self.goal.needs_corpus

    def learned(self, logits: Logits, labels: Tensor) -> "Goal":
        return replace(self, goal=self.goal.learned(logits, labels))

    def at(self, rows: Tensor) -> "Goal":
        return replace(self, goal=self.goal.at(rows))


@dataclass(frozen=True)
class Steered(Around):
    """A goal pursued by way of another loss of the logits.

    `value(logits, labels)` is the loss, or `value(logits, labels, aim)` where each clip has a class to aim at, [batch].
    Made by `ThreatModel.steered`, for attacks that choose their own loss.
    """

    value: Callable[..., Tensor] = bce
    aim: Tensor | None = None

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        away = self.goal.against(labels)
        return self.value(trace.logits, away) if self.aim is None else self.value(trace.logits, away, self.aim)

    def at(self, rows: Tensor) -> "Goal":
        return replace(super().at(rows), aim=None if self.aim is None else self.aim[rows])  # type: ignore[call-arg]


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
    """Push the chosen classes (indices), or with "labels" each clip's own, below the threshold; multilabel only."""

    chosen: tuple[int, ...] | str = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self)

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        chosen = chosen_classes(self.chosen, labels, trace.logits)
        return F.softplus(-trace.logits).masked_fill(~chosen, 0).sum(1)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return _hidden(self, trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return (
            f"hide {_names(self.chosen, classes)}; success: none of them is predicted "
            f"(probability >= {self.threshold:g}) any more"
        )

    def check_model(self, classes: int, label_kind: LabelKind) -> None:
        super().check_model(classes, label_kind)
        _fits(self.chosen, classes)


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
        names = _names(self.chosen, classes)
        return f"inject {names}; success: all of them are predicted (probability >= {self.threshold:g})"

    def check_model(self, classes: int, label_kind: LabelKind) -> None:
        super().check_model(classes, label_kind)
        _fits(self.chosen, classes)


@dataclass(frozen=True)
class Stealth(Goal):
    """Hide the chosen classes, or with "labels" each clip's own, and let nothing else be seen to change; multilabel
    only [after Sun et al., 2023, arXiv:2309.00007].

    Success asks for both: none of the chosen is predicted, and of the others the same are as on the clean input. mAP is
    blind to it where few clips are hidden or all sink alike: report `robustav.metrics.tagging.hide_rate` beside it.
    `weight` is what a squared logit of the others' movement costs against a logit of the chosen.
    """

    chosen: tuple[int, ...] | str = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"`weight` must be a finite number at or above 0, got {self.weight!r}")

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        chosen = chosen_classes(self.chosen, labels, trace.logits)
        return stealth(trace.logits, self._clean(), chosen, logit(self.threshold), self.weight)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        now = label_set(trace.logits, self.threshold, self.label_kind)
        before = label_set(self._clean(), self.threshold, self.label_kind)
        others = ~chosen_classes(self.chosen, labels, trace.logits)
        return _hidden(self, trace, labels) & ~((now != before) & others).any(1)

    def words(self, classes: tuple[str, ...]) -> str:
        return (
            f"hide {_names(self.chosen, classes)} and move nothing else; success: none of them is predicted "
            f"(probability >= {self.threshold:g}) any more, and the other predicted classes are those of the clean input"
        )

    def check_model(self, classes: int, label_kind: LabelKind) -> None:
        super().check_model(classes, label_kind)
        _fits(self.chosen, classes)

    def _clean(self) -> Tensor:
        if self.clean is None:
            raise ValueError("stealth compares with the clean scores: call `threat.given(clean=trace)` first")
        return self.clean.logits


@dataclass(frozen=True)
class TopK(Goal):
    """Push every label out of the `k` highest scores [Hu et al., 2021, arXiv:2108.00146]; a tie counts as inside."""

    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"`k` must be at least 1, got {self.k}")

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        return top_k_average(trace.logits, multi_hot(labels, trace.logits), self.k)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return top_k_lost(trace.logits, multi_hot(labels, trace.logits), self.k)

    def words(self, classes: tuple[str, ...]) -> str:
        return f"out of the top {self.k}; success: none of the labels is among the {self.k} highest-scoring classes"

    def check_model(self, classes: int, label_kind: LabelKind) -> None:
        super().check_model(classes, label_kind)
        if self.k >= classes:
            raise ValueError(
                f"`k` must be below the model's {classes} classes, got {self.k}: of all classes none can be pushed out"
            )


class Corpus(NamedTuple):
    """What `CorpusAP` learns of a run's clean scores."""

    quantiles: Float[Tensor, "2 class"]
    weights: Float[Tensor, " class"]


@dataclass(frozen=True)
class CorpusAP(Goal):
    """Lower the corpus' mAP: move each clip down the rankings of its labels and up all others; multilabel only.

    Rankings are those of the run's clean clips, learnt from `learned`. Attack every clip: one without labels has
    negatives to lift. `temperature` is in logits: too low, and scores that are far from their place pull no more.
    """

    success: str = "top1"
    temperature: float = 4.0
    corpus: Corpus | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        known("success", self.success, SUCCESSES)
        if self.label_kind != "multilabel":
            raise ValueError("CorpusAP needs a multilabel model: with one class a clip, choose Untargeted")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be a finite number above 0, got {self.temperature!r}")

    @property
    def needs_corpus(self) -> bool:
        return True

    def learned(self, logits: Logits, labels: Tensor) -> "Goal":
        return replace(self, corpus=Corpus(class_quantiles(logits, labels), class_weights(labels)))

    def loss(self, trace: Trace, labels: Tensor) -> Tensor:
        if self.corpus is None:
            raise ValueError(
                "the corpus' rankings are not known: call `goal.learned(logits, labels)` of all clips first"
            )
        quantiles, weights = (part.to(trace.logits) for part in self.corpus)
        return corpus_ap(trace.logits, labels, quantiles, self.temperature, weights)

    def reached(self, trace: Trace, labels: Tensor) -> Tensor:
        return _holds(self, trace, labels)

    def words(self, classes: tuple[str, ...]) -> str:
        return f"down the corpus' rankings, which mAP is made of; success: {SUCCESSES[self.success].words}"


@dataclass(frozen=True)
class PushLatent(Goal):
    """Move the latent away from where the clean input put it, in Euclidean distance; needs no labels to climb."""

    success: str = "top1"

    def __post_init__(self) -> None:
        super().__post_init__()
        known("success", self.success, SUCCESSES)

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
    "top-k": TopK,
    "corpus-ap": CorpusAP,
    "stealth": Stealth,
}


def logit(probability: float) -> float:
    """The score at which a class has this probability."""
    return math.log(probability / (1 - probability))


def chosen_classes(chosen: tuple[int, ...] | str, labels: Tensor, logits: Logits) -> Bool[Tensor, "batch class"]:
    """Which classes of each clip are meant: those indices, or with `OWN` the clip's labels."""
    if chosen == OWN:
        return labels > 0.5
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[:, list(chosen)] = True  # type: ignore[arg-type]  # indices, since `OWN` is the only word that is let in
    return mask


def known(what: str, name: str, known: object) -> None:
    """Raise `ValueError` naming the known ones unless `name` is one of them."""
    if name not in known:  # type: ignore[operator]
        raise ValueError(f"`{what}` must be one of {sorted(known)}, got {name!r}")  # type: ignore[call-overload]


def _holds(goal: Untargeted | PushLatent | CorpusAP, trace: Trace, labels: Tensor) -> Tensor:
    """The declared success rule."""
    clean = goal.clean.logits if goal.clean else None
    return SUCCESSES[goal.success].holds(trace.logits, labels, clean, goal.threshold, goal.label_kind)


def _hidden(goal: Hide | Stealth, trace: Trace, labels: Tensor) -> Tensor:
    """None of the chosen classes is predicted."""
    predicted = label_set(trace.logits, goal.threshold, goal.label_kind)
    return ~(predicted & chosen_classes(goal.chosen, labels, trace.logits)).any(1)


def _choice(goal: Hide | Inject | Stealth) -> None:
    if goal.label_kind != "multilabel":
        raise ValueError(f"{type(goal).__name__} needs a multilabel model; for one class a clip use Targeted")
    if not goal.chosen:
        raise ValueError("`chosen` must name at least one class index, got none")
    if isinstance(goal.chosen, str) and goal.chosen != OWN:
        raise ValueError(f"`chosen` must be class indices, or {OWN!r} for each clip's own, got {goal.chosen!r}")


def _fits(chosen: tuple[int, ...] | str, classes: int) -> None:
    if chosen != OWN and not all(0 <= int(index) < classes for index in chosen):
        raise ValueError(f"`chosen` must lie in 0..{classes - 1}, got {chosen}")


def _names(chosen: tuple[int, ...] | str, classes: tuple[str, ...]) -> str:
    return "each clip's own labels" if isinstance(chosen, str) else ", ".join(classes[c] for c in chosen)
