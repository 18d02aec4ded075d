"""Learning a universal perturbation: one tensor a modality that raises the loss of clips not yet seen."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as as_bytes
from torch import Tensor

from robustav.attacks.ascent import climb
from robustav.attacks.universal import digest_of_perturbation, rolled, rolled_back, time_shares
from robustav.classifier import Classifier, Inputs, check_modalities
from robustav.data.samples import Progress
from robustav.ledger import write_atomically
from robustav.norms import per_sample
from robustav.prepare import prepare, quick_products
from robustav.randomness import draw_for, seeded
from robustav.threat import SPARE, Budget, ThreatModel
from robustav.view import AttackView, Tally

RECORD = "robustav"  # key of a saved perturbation's metadata


class Lesson(NamedTuple):
    """A batch to learn from: every modality of the model, labels, and for padded clips where there is signal."""

    inputs: Inputs
    labels: Tensor
    writable: Mapping[str, Tensor] = {}


Batches = Callable[
    [], Iterable[tuple[Any, ...]]
]  # every call goes through the learning split anew, `Lesson` by `Lesson`


class Learnt(NamedTuple):
    """A perturbation to give to `robustav.attacks.Universal`, and how it was learnt, one number a pass."""

    perturbation: Inputs  # modality -> tensor of one clip's shape
    largest: dict[str, float]  # modality -> largest length in the budget's norm after any update, in float64
    losses: tuple[float, ...]  # mean of the goal's loss over the clips, as the perturbation was when each came by
    capped: tuple[float, ...]  # share of clips at or above the cap, whose gradient did not count
    zero_gradients: tuple[float, ...]  # share of clips without a gradient in some attacked modality


def learn(
    model: Classifier,
    batches: Batches,
    threat: ThreatModel,
    *,
    passes: int = 5,
    relative_step: float = 0.1,
    cap: float = math.inf,
    shift: bool = True,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Learnt:
    """A universal perturbation by projected stochastic gradient ascent [Shafahi et al., 2020, arXiv:1811.11304].

    `delta <- Project(delta + step * steepest(sum over a batch of the gradient of min(loss, cap)))`: all attacked
    modalities at once, each with its own step (`relative_step` radii) and projected on its own budget after every
    update. `batches()` yields `(inputs, labels)`, or `(inputs, labels, writable)`, of the learning split. `cap` keeps
    clips that are long since broken from outvoting the rest: the paper takes 9 for the cross-entropy of 1000 classes; a
    cap below the clean loss silences a clip. With `shift` the perturbation is rolled as `Universal` rolls it.

    Raises `ValueError` for a radius that depends on the clip, and for too few updates to reach the budget's edge.
    """
    _check_threat(model, threat)
    if not callable(batches):
        raise TypeError(f"`batches` must be a function that starts the batches anew, got {type(batches).__name__}")
    if passes < 1:
        raise ValueError(f"`passes` must be at least 1, got {passes}")
    if not 0 < relative_step <= 2:
        raise ValueError(f"`relative_step` must be above 0 and at most 2 radii, got {relative_step}")
    delta: Inputs = {}
    largest = dict.fromkeys(threat.budgets, 0.0)
    draw, student, first, history = draw_for(seed, "universal"), None, 0, []
    for done in range(passes):
        heard: list[Tensor] = []
        for lesson in (Lesson(*batch) for batch in batches()):
            _check_lesson(model, lesson, threat)
            student = student or prepare(model.surrogate(), lesson.inputs)
            delta = delta or {m: torch.zeros_like(lesson.inputs[m][0]) for m in threat.budgets}
            shares = time_shares([draw] * len(lesson.labels), shift)
            with seeded(seed, "universal", str(done), str(len(heard))):
                loss, zero, gradients = _gradients(student, lesson, delta, shares, threat)
            counts = (loss < cap).to(loss)
            for m, budget in threat.budgets.items():
                gradient = rolled_back(gradients[m] * per_sample(counts, gradients[m]), shares)
                step = relative_step * budget.radius(gradient) * budget.rules.steepest(gradient[None])[0]
                delta[m] = _into_ball(delta[m] + step, budget)
                largest[m] = max(largest[m], budget.rules.length(delta[m].double()[None]).item())
            heard.append(torch.stack([loss, 1 - counts, zero]).double().cpu())
        first = first or len(heard)
        _check_count(len(heard), first, passes, relative_step)
        history.append(torch.cat(heard, 1).mean(1).tolist())
        progress("learning a universal perturbation", done + 1, passes)
    losses, capped, zeros = zip(*history, strict=True)
    return Learnt(delta, largest, losses, capped, zeros)


def _gradients(
    student: Classifier, lesson: Lesson, delta: Inputs, shares: list[float], threat: ThreatModel
) -> tuple[Tensor, Tensor, Inputs]:
    """Each clip's loss, whether a gradient failed to come, and its gradient by its own copy of the perturbation."""
    inputs, labels, writable = lesson
    with quick_products() if labels.device.type == "cpu" else nullcontext():
        with torch.no_grad():
            features = student.features(inputs)
            clean = student.finish({m: x.clone() for m, x in features.items()})
        held = {m: x for m, x in (inputs if student.stochastic else features).items() if m not in threat.budgets}
        view = AttackView(
            student, tuple(threat.budgets), held, Tally(len(labels), tuple(threat.budgets), labels.device)
        )
        here = threat.given(clean=clean, writable=writable)
        attacked = {m: inputs[m] for m in threat.budgets}
        aimed = {m: x + rolled(delta[m], shares) for m, x in attacked.items()}
        point, gradients = climb(view, here.project(attacked, aimed), labels, here)
    followed = {m: _followed(gradients[m], aimed[m], budget) for m, budget in here.budgets.items()}
    return point.loss, view.tally.zero_gradients().to(point.loss), followed


def _followed(gradient: Tensor, aimed: Tensor, budget: Budget) -> Tensor:
    """The gradient where the clip follows the perturbation: not beyond its range, and not in its padding."""
    outward = (aimed >= budget.high) & (gradient > 0) | (aimed <= budget.low) & (gradient < 0)
    cut = (aimed > budget.high) | (aimed < budget.low) | outward
    return gradient.masked_fill(cut if budget.writable is None else cut | ~budget.writable, 0)


def _into_ball(delta: Tensor, budget: Budget) -> Tensor:
    """The nearest perturbation of the budget's length; a hair shorter, so that float32 never measures more."""
    return budget.rules.shorten(delta[None], budget.radius(delta) * (1 - SPARE))[0]


def _check_threat(model: Classifier, threat: ThreatModel) -> None:
    threat.goal.check_model(len(model.classes), model.label_kind)
    if unknown := sorted(threat.budgets.keys() - model.specs.keys()):
        raise ValueError(f"`threat` has budgets for {unknown}, but the model's modalities are {sorted(model.specs)}")
    for m, budget in threat.budgets.items():
        if budget.snr_db is not None or (isinstance(budget.epsilon, Tensor) and budget.epsilon.ndim):
            raise ValueError(
                f"the budget of {m!r} must be a plain `epsilon`, got {budget.words(model.specs[m].unit)}: one "
                "perturbation for every clip has one length, so choose an `epsilon` (such as the radius that the SNR "
                "allows a typical clip)"
            )


def _check_lesson(model: Classifier, lesson: Lesson, threat: ThreatModel) -> None:
    check_modalities(lesson.inputs, model.specs)
    for m, x in lesson.inputs.items():
        model.specs[m].check(m, x)
    threat.goal.check(lesson.labels, len(model.classes))


def _check_count(count: int, first: int, passes: int, relative_step: float) -> None:
    if count != first or not count:
        raise ValueError(
            f"`batches` must give the same batches at every call, got {first} in the first pass and {count} in a later "
            "one: make it a function that starts anew, not one that returns the same iterator"
            if first
            else "`batches` gave no batch: there is nothing to learn from"
        )
    if count * passes * relative_step < 1:
        raise ValueError(
            f"{count} batches x {passes} passes x `relative_step` {relative_step:g} cannot reach the edge of the "
            "budget: take more passes, smaller batches or larger steps"
        )


class Saved(NamedTuple):
    """A universal perturbation as it lies on disk."""

    perturbation: Inputs
    about: dict[str, Any]  # budgets and goal in words, seed, digests of data and perturbation, what was measured


def save(path: Path, learnt: Learnt, *, model: Classifier, threat: ThreatModel, seed: int, data: str) -> None:
    """Write a perturbation as safetensors with its record; `data` is the digest of the learning split."""
    about = {
        "budgets": threat.words(model.specs),
        "goal": threat.goal.words(model.classes),
        "seed": seed,
        "data": data,
        "digest": digest_of_perturbation(learnt.perturbation),
        "largest": learnt.largest,
        "losses": learnt.losses,
        "capped": learnt.capped,
        "zero_gradients": learnt.zero_gradients,
    }
    tensors = {m: delta.detach().cpu().contiguous() for m, delta in learnt.perturbation.items()}
    write_atomically(path, as_bytes(tensors, {RECORD: json.dumps(about)}))


def load(path: Path) -> Saved:
    """What `save` wrote. Raises `ValueError` for another file, and for one whose tensors are not those of its record."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[RECORD])
            perturbation = {m: file.get_tensor(m) for m in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no universal perturbation that robustav saved") from error
    if digest_of_perturbation(perturbation) != about["digest"]:
        raise ValueError(f"{path} is damaged: its tensors are not those of its record; learn the perturbation again")
    return Saved(perturbation, about)
