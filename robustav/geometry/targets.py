"""How robust each class was measured to be, from a run's ledger, and the simple scores that a latent metric must beat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from robustav.classifier import Classifier, Inputs, LabelKind
from robustav.ledger import Ledger
from robustav.metrics.intervals import resample_classes
from robustav.metrics.segments import class_margins
from robustav.metrics.tagging import average_precision
from robustav.norms import Draws
from robustav.plan import CLEAN, is_attack, recorded_budgets
from robustav.report.table import usable, worst_case
from robustav.threat import Budget

Logits = Float[np.ndarray, "sample class"]
Labels = Bool[np.ndarray, "sample class"]
Weights = Int[np.ndarray, "resample sample"]
MULTIPLES = (1, 4, 16)  # of the attack's size, at which Gaussian noise is tried


class ClassScores(NamedTuple):
    """A score of every class, on the clips themselves and on every resample of them."""

    values: Float[np.ndarray, " class"]
    resampled: Float[np.ndarray, "resample class"]


class Scored(NamedTuple):
    """Logits of one condition beside what is needed to score them."""

    logits: Logits
    clean: Logits
    labels: Labels
    weights: Weights
    threshold: float
    multilabel: bool


def precision(given: Scored) -> ClassScores:
    """Average precision of each class."""
    scores, labels = given.logits.astype(np.float64), given.labels.astype(np.int8)
    return ClassScores(
        average_precision(scores, labels), resample_classes(scores, labels, given.weights).average_precision
    )


def hit(given: Scored) -> ClassScores:
    """Share of each class's clips whose highest-scoring class is one of their labels."""
    right = given.labels[np.arange(len(given.labels)), given.logits.argmax(1)]
    return _shares(np.repeat(right[:, None], given.labels.shape[1], axis=1), given.labels, given.weights)


def kept(given: Scored) -> ClassScores:
    """Share still accepted among each class's clips that were accepted clean: one minus the attack's success."""
    before, after = accepted(given.clean, given), accepted(given.logits, given)
    return _shares(after, given.labels & before, given.weights)


def recalled(given: Scored) -> ClassScores:
    """Share of each class's clips that are accepted."""
    return _shares(accepted(given.logits, given), given.labels, given.weights)


@dataclass(frozen=True)
class Target:
    """A way to score a class, larger is better, its name in a report, and the clean score that goes with it.

    What is kept of the clips accepted clean is 1 without an attack, so there the clean score is the share accepted.
    """

    score: Callable[[Scored], ClassScores]
    words: str
    clean: Callable[[Scored], ClassScores]


TARGETS: dict[str, Target] = {
    "ap": Target(precision, "average precision", precision),
    "hit": Target(hit, "top-1 hit rate of the class's clips", hit),
    "kept": Target(
        kept, "share still accepted of the class's clips accepted clean (one minus attack success)", recalled
    ),
}


class Measured(NamedTuple):
    """What a run says of each class: its score under attack (mean over the budgets), and what it was clean."""

    robust: ClassScores
    success: ClassScores  # of the attack: one minus `kept`, mean over the budgets
    clean: ClassScores
    margin: ClassScores  # mean margin of the class's clean clips
    frequency: ClassScores  # log of how many clips have it
    clips: int
    unlabelled: int  # of them: the model's own clean prediction stood in
    levels: int  # budgets that the mean is over


def accepted(logits: Logits, given: Scored) -> Labels:
    """Which classes are accepted: probability at or above the threshold, or the arg max."""
    if not given.multilabel:
        return np.eye(logits.shape[1], dtype=bool)[logits.argmax(1)]
    return logits >= np.log(given.threshold / (1 - given.threshold))


def measured(ledger: Ledger, attacked: str, target: str, weights: Weights, threshold: float) -> Measured:
    """Scores of every class under the worst attack of each clip, mean over the run's budgets.

    `attacked` is a set of modalities as in "audio+visual". The mean over budgets is the area under the curve of score
    against budget with the budgets equally spaced. Raises `ValueError` if the run has no attack but noise on that set,
    or failed its audit there.
    """
    record = ledger.record()
    identity = record["identity"]
    clean = usable(ledger, CLEAN.key, record["clips"])
    labels = np.zeros((len(clean), len(identity["classes"])), dtype=bool)
    for row, classes in enumerate(clean["labels"]):
        labels[row, np.asarray(classes, dtype=int)] = True
    untouched = np.stack(clean["logits"].to_list())
    conditions: Mapping[str, dict[str, Any]] = identity["conditions"]
    rows = {key: d for key, d in conditions.items() if is_attack(d) and set(d["attacked"]) <= set(attacked.split("+"))}
    levels = sorted({d["level"] for d in rows.values() if "+".join(d["attacked"]) == attacked})
    if not levels:
        sets = sorted({"+".join(d["attacked"]) for d in conditions.values() if is_attack(d)})
        raise ValueError(
            f"{ledger.folder} has no attack (noise is none) on {attacked!r}; it has {', '.join(sets) or 'none at all'}"
        )

    if target == "ap" and all(d["after"] for d in rows.values()):
        raise ValueError(
            f"{ledger.folder} was run for hits and spared clips that were broken: average precision needs every clip "
            "attacked, so run it again with --score mAP, or choose the target 'kept'"
        )

    def scored(logits: Logits) -> Scored:
        return Scored(logits, untouched, labels, weights, threshold, identity["label_kind"] == "multilabel")

    robust, success = [], []
    for level in levels:
        frames = [clean, *(usable(ledger, key, record["clips"]) for key, d in rows.items() if d["level"] == level)]
        worst = worst_case(frames)
        if (worst["violation"] != "").any():
            raise ValueError(f"{ledger.folder} failed its audit: its scores cannot be a target")
        given = scored(np.stack(worst["logits"].to_list()))
        robust.append(TARGETS[target].score(given))
        share = kept(given)
        success.append(ClassScores(1 - share.values, 1 - share.resampled))
    given = scored(untouched)
    # A class that a resample lacks counts as half a clip there: rare, and not minus infinity.
    counts = np.maximum(labels.sum(0), 0.5), np.maximum(weights @ labels.astype(float), 0.5)
    return Measured(
        mean_of(robust),
        mean_of(success),
        TARGETS[target].clean(given),
        _margins(given, identity["label_kind"]),
        ClassScores(np.log(counts[0]), np.log(counts[1])),
        len(clean),
        int((~clean["labelled"].astype(bool)).sum()),
        len(levels),
    )


def mean_of(scores: Sequence[ClassScores]) -> ClassScores:
    """The mean over several conditions, class by class and resample by resample."""
    return ClassScores(
        np.mean([score.values for score in scores], axis=0), np.mean([score.resampled for score in scores], axis=0)
    )


def budgets_of(ledger: Ledger, attacked: str, model: Classifier) -> dict[str, Budget]:
    """The largest budget that a run gave each modality of `attacked`."""
    conditions = ledger.record()["identity"]["conditions"].values()
    level = max((d for d in conditions if "+".join(d["attacked"]) == attacked), key=size_of_budgets)
    return recorded_budgets(level, model.specs)


def size_of_budgets(condition: Mapping[str, Any]) -> float:
    """A number that grows with the budgets of one norm: radii, or the ratios of amplitudes that decibels mean."""
    radii = condition["radii"].values()
    return sum(10 ** (-float(r.removesuffix("dB")) / 20) if isinstance(r, str) else float(r) for r in radii)


def noisy(inputs: Inputs, budgets: Mapping[str, Budget], multiple: float, draws: Draws) -> Inputs:
    """Inputs with Gaussian noise whose expected length is about `multiple` budgets, cut to the valid range.

    In linf the standard deviation is epsilon; in l2 and l1 that which gives the whole perturbation the length.
    """
    moved = dict(inputs)
    for m, budget in budgets.items():
        clean = inputs[m]
        size = clean[0].numel()
        spread = {"linf": 1.0, "l2": size**-0.5, "l1": 1 / (size * (2 / torch.pi) ** 0.5)}[budget.norm]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(clean)
        radius = torch.as_tensor(budget.radius(clean)).to(clean).reshape(-1, *[1] * (clean.ndim - 1))
        if budget.writable is not None:
            noise = torch.where(budget.writable, noise, 0)
        moved[m] = (clean + multiple * spread * radius * noise).clamp(budget.low, budget.high)
    return moved


def first_order_margins(
    model: Classifier,
    inputs: Inputs,
    labels: Bool[Tensor, "sample class"],
    budgets: Mapping[str, Budget],
    threshold: float,
) -> Float[Tensor, "sample class"]:
    """Margin over the fall of the margin that the gradient promises for one budget: below 1, a full step should do.

    `M / sum_m epsilon_m ||grad_m M||_q` with q dual to the budget's norm [methods of Hein and Andriushchenko, 2017,
    arXiv:1705.08475; Lyu et al., 2015, arXiv:1511.06385]; nan for classes that are no label of the clip, infinite where the
    gradient is zero, which a mean over clips leaves out.
    """
    margins = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    thresholds = torch.full((labels.shape[1],), threshold)
    for c in labels.any(0).nonzero().flatten().tolist():
        rows = labels[:, c].nonzero().flatten().to(next(iter(inputs.values())).device)
        leaves = {m: x[rows].detach().requires_grad_(m in budgets) for m, x in inputs.items()}
        with torch.enable_grad():
            logits = model(leaves)
            classes = torch.full((len(rows),), c, device=logits.device)
            margin = class_margins(logits, classes, thresholds.to(logits), model.label_kind)
            gradients = torch.autograd.grad(margin.sum(), [leaves[m] for m in budgets], allow_unused=True)
        fall = torch.zeros(len(rows), dtype=torch.float64, device=margin.device)
        for (m, budget), gradient in zip(budgets.items(), gradients, strict=True):
            if gradient is not None:
                if budget.writable is not None:
                    gradient = torch.where(budget.writable[rows], gradient, 0)
                radius = torch.as_tensor(budget.radius(inputs[m][rows]), dtype=torch.float64, device=fall.device)
                fall += radius * _dual_length(gradient, budget.norm)
        margins[rows.cpu(), c] = (margin.detach().double() / fall).cpu()
    return margins


def _dual_length(gradient: Tensor, norm: str) -> Float[Tensor, " sample"]:
    order = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
    return torch.linalg.vector_norm(gradient.flatten(1), ord=order, dim=1, dtype=torch.float64)


def label_margins(
    logits: Float[Tensor, "sample class"], labels: Bool[Tensor, "sample class"], threshold: float, label_kind: LabelKind
) -> Float[Tensor, "sample class"]:
    """The margin of each of a clip's classes, nan for those that are no label of it."""
    margins = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    thresholds = torch.full((labels.shape[1],), threshold)
    rows, classes = labels.nonzero(as_tuple=True)
    margins[rows, classes] = class_margins(logits[rows], classes, thresholds, label_kind).double()
    return margins


def _margins(given: Scored, label_kind: LabelKind) -> ClassScores:
    """Mean margin of each class's clips."""
    labels = given.labels.astype(float)
    values = label_margins(torch.from_numpy(given.logits), torch.from_numpy(given.labels), given.threshold, label_kind)
    margins = values.nan_to_num().numpy()
    with np.errstate(invalid="ignore"):
        return ClassScores(margins.sum(0) / labels.sum(0), (given.weights @ margins) / (given.weights @ labels))


def _shares(true: Labels, counted: Labels, weights: Weights) -> ClassScores:
    """Share of `true` among `counted`, class by class; nan where nothing is counted."""
    hits, total = (true & counted).astype(np.float64), counted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        value: NDArray[np.float64] = hits.sum(0) / total.sum(0)
        return ClassScores(value, (weights @ hits) / (weights @ total))
