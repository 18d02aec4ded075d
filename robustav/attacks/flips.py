"""When a goal is reached, as linear inequalities between scores: for attacks that solve instead of climbing."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.goals import (
    CorpusAP,
    Goal,
    Hide,
    Inject,
    PushLatent,
    Stealth,
    Steered,
    Targeted,
    TopK,
    Untargeted,
    chosen_classes,
    logit,
)
from robustav.losses import multi_hot

Scores = Float[np.ndarray, " class"]


class Way(NamedTuple):
    """Enough to reach a goal: every row of `weights @ scores[classes] + offset` above 0."""

    weights: Float[np.ndarray, "row chosen"]
    offset: Float[np.ndarray, " row"]


class Flips(NamedTuple):
    """The classes whose scores decide, and the ways in which they may: one is enough."""

    classes: list[int]
    ways: list[Way]

    def slack(self, scores: Scores) -> float:
        """The least row of the best way: positive where the goal is reached; 0 where it asks for nothing."""
        if not self.classes:
            return 0.0
        return max(float((way.weights @ scores[self.classes] + way.offset).min()) for way in self.ways)


class Clip(NamedTuple):
    """One clip as a goal sees it."""

    scores: Scores
    labels: Bool[np.ndarray, " class"]
    clean: Scores | None


def clips(goal: Goal, logits: Tensor, labels: Tensor) -> list[Clip]:
    """The clips of a batch, one by one."""
    scores = logits.detach().double().cpu().numpy()
    hot = (multi_hot(labels, logits) > 0.5).cpu().numpy()
    clean = None if goal.clean is None else goal.clean.logits.double().cpu().numpy()
    return [Clip(s, y, None if clean is None else clean[i]) for i, (s, y) in enumerate(zip(scores, hot, strict=True))]


def flips(goal: Goal, logits: Tensor, labels: Tensor, rivals: int, most: int) -> list[Flips]:
    """For each clip what `goal` asks of the scores, near these `logits`; their number of classes hangs on labels only.

    Where any of many classes would do, the `rivals` that need least are ways of their own; where all of many must, the
    `most` classes that are furthest from it stand for the rest, which later logits may bring in. Raises `ValueError`
    for a goal that is not in `FLIPS`, and where one way alone needs more than `most` classes.
    """
    check_goal(goal)
    found = [FLIPS[type(goal)](goal, clip, rivals, most) for clip in clips(_inner(goal), logits, labels)]
    if (widest := max((len(one.classes) for one in found), default=0)) > most:
        raise ValueError(
            f"`rows` must be at least {widest}, the number of scores that decide for one of these clips, got {most}: "
            "raise it at the price of a backward pass each, or choose an attack that climbs a loss"
        )
    return found


def check_goal(goal: Goal) -> None:
    """Raise `ValueError` for a goal that is not in `FLIPS`."""
    if type(goal) not in FLIPS:
        raise ValueError(f"goal {type(goal).__name__} is no set of linear inequalities that this attack knows")


def _inner(goal: Goal) -> Goal:
    return _inner(goal.goal) if isinstance(goal, Steered) else goal


def _strongest(scores: Scores, among: Bool[np.ndarray, " class"], count: int) -> list[int]:
    """The classes of the highest scores, highest first."""
    order = np.argsort(-scores, kind="stable")
    return [int(c) for c in order[among[order]][:count]]


def _outranked(scores: Scores, right: Bool[np.ndarray, " class"], count: int, most: int, together: bool) -> Flips:
    """Every class of `right` below one of the `count` strongest others, or (`together`) below all of these.

    Where one side is empty 0 stands in for it, as in `top1_margin`.
    """
    held = [int(c) for c in np.flatnonzero(right)]
    room = count if together else min(count, max(1, most - len(held)))
    rivals = _strongest(scores, ~right, room)
    if together and len(rivals) < count:
        rivals = []
    classes = held + rivals
    unit = np.eye(len(classes))
    lower = unit[: len(held)] if held else np.zeros((1, len(classes)))
    upper = unit[len(held) :] if rivals else np.zeros((1, len(classes)))
    parts = [up - lower for up in upper]
    rows = [np.concatenate(parts)] if together else parts
    return Flips(classes, [Way(row, np.zeros(len(row))) for row in rows])


def _crossed(scores: Scores, under: Bool[np.ndarray, " class"], over: Bool[np.ndarray, " class"], cut: float) -> Way:
    """All of `under` below the cut and all of `over` above it; the classes are those of either, in order."""
    sign = np.where(over, 1.0, -1.0)[under | over]
    return Way(np.diag(sign), -sign * cut)


def _any_crossed(scores: Scores, inside: Bool[np.ndarray, " class"], cut: float, rivals: int) -> Flips:
    """One class on the other side of the cut than `inside` has it: those that need least, each a way of its own."""
    sign = np.where(inside, -1.0, 1.0)
    classes = _strongest(sign * (scores - cut), np.ones(len(scores), dtype=bool), rivals)
    unit = np.eye(len(classes))
    return Flips(classes, [Way(sign[c] * unit[i : i + 1], -sign[c : c + 1] * cut) for i, c in enumerate(classes)])


def _mistake(goal: Goal, clip: Clip, rivals: int, most: int) -> Flips:
    success = goal.success  # type: ignore[attr-defined]  # the goals of this row have one
    against = _known_clean(clip) if success == "label-set" else None
    if goal.label_kind == "multiclass":
        right = clip.labels if against is None else np.arange(len(against)) == against.argmax()
        return _outranked(clip.scores, right, rivals, most, together=False)
    if success == "top1":
        return _outranked(clip.scores, clip.labels, rivals, most, together=False)
    cut = logit(goal.threshold)
    inside = clip.labels if against is None else against >= cut
    return _any_crossed(clip.scores, inside, cut, min(rivals, most))


def _targeted(goal: Targeted, clip: Clip, rivals: int, most: int) -> Flips:
    others = np.arange(len(clip.scores)) != goal.target
    classes = [goal.target, *_strongest(clip.scores, others, most - 1)]
    weights = np.eye(len(classes))[:1] - np.eye(len(classes))[1:]
    return Flips(classes, [Way(weights, np.zeros(len(weights)))])


def _top_k(goal: TopK, clip: Clip, rivals: int, most: int) -> Flips:
    return _outranked(clip.scores, clip.labels, goal.k, most, together=True)


def _chosen(goal: Hide | Inject | Stealth, clip: Clip) -> Bool[np.ndarray, " class"]:
    scores, labels = torch.as_tensor(clip.scores)[None], torch.as_tensor(clip.labels)[None].double()
    return chosen_classes(goal.chosen, labels, scores)[0].numpy()


def _hide(goal: Hide, clip: Clip, rivals: int, most: int) -> Flips:
    under = _chosen(goal, clip)
    way = _crossed(clip.scores, under, np.zeros_like(under), logit(goal.threshold))
    return Flips([int(c) for c in np.flatnonzero(under)], [way])


def _inject(goal: Inject, clip: Clip, rivals: int, most: int) -> Flips:
    over = _chosen(goal, clip)
    way = _crossed(clip.scores, np.zeros_like(over), over, logit(goal.threshold))
    return Flips([int(c) for c in np.flatnonzero(over)], [way])


def _stealth(goal: Stealth, clip: Clip, rivals: int, most: int) -> Flips:
    chosen, cut = _chosen(goal, clip), logit(goal.threshold)
    inside = _known_clean(clip) >= cut
    sign = np.where(inside, 1.0, -1.0)
    kept = np.zeros_like(chosen)
    kept[_strongest(-sign * (clip.scores - cut), ~chosen, max(0, most - int(chosen.sum())))] = True
    way = _crossed(clip.scores, chosen | (kept & ~inside), kept & inside, cut)
    return Flips([int(c) for c in np.flatnonzero(chosen | kept)], [way])


def _known_clean(clip: Clip) -> Scores:
    if clip.clean is None:
        raise ValueError("this goal compares with the clean prediction: call `threat.given(clean=trace)` first")
    return clip.clean


FLIPS: dict[type[Goal], Callable[..., Flips]] = {
    Untargeted: _mistake,
    PushLatent: _mistake,
    CorpusAP: _mistake,
    Targeted: _targeted,
    Hide: _hide,
    Inject: _inject,
    Stealth: _stealth,
    TopK: _top_k,
    Steered: lambda goal, clip, rivals, most: FLIPS[type(goal.goal)](goal.goal, clip, rivals, most),
}
