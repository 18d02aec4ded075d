"""One run beside the latents of its model: what was measured to be robust, and what might have predicted it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from robustav.classifier import Classifier
from robustav.data.samples import Progress
from robustav.geometry.measure import Measure, Score, gather, score
from robustav.geometry.survey import Survey, View, silent
from robustav.geometry.targets import (
    MULTIPLES,
    TARGETS,
    ClassScores,
    Measured,
    Scored,
    budgets_of,
    first_order_margins,
    label_margins,
    measured,
    noisy,
)
from robustav.ledger import Ledger
from robustav.metrics.intervals import bootstrap_weights
from robustav.plan import CLEAN, is_attack
from robustav.randomness import draws_for
from robustav.record import check_model
from robustav.report.table import usable

CLIPS = ("auto", "other", "same")
Metrics = Callable[[View, Progress], list[Measure]]


@dataclass(frozen=True)
class Joined:
    """One run beside the measures of its model: on clips that the run did not attack, or else on the same."""

    name: str
    view: View
    measured: Measured
    measures: Sequence[Measure]
    attacked: str
    same_clips: bool
    goal: str
    threat: str  # modalities and budgets: what must be the same for models to be compared


def join(
    ledger: Ledger,
    metrics: Metrics,
    survey: Survey,
    *,
    targets: Sequence[str],
    attacked: str | None = None,
    clips: str = "auto",
    model: str | Classifier | None = None,
    data: str | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Joined]:
    """Survey a run's model once, and read every target from its ledger.

    Metric and target of the same clips share their noise, which alone can correlate them; so with `clips` "other" the
    survey looks at clips of the run's data that the run did not attack, with "same" at those it did, and with "auto" at
    others if there are half as many. `survey` says how; model, data and checkpoint are the run's own, where it knows
    them, unless they are given. `attacked` is a set of modalities as in "audio+visual"; None is the largest that the run
    attacked. Raises `ValueError` where model or data are not those of the run.
    """
    if clips not in CLIPS:
        raise ValueError(f"`clips` must be one of {', '.join(CLIPS)}, got {clips!r}")
    record = ledger.record()
    identity, asked = record["identity"], record["about"].get("asked", {})
    name = str(identity["model"])
    if attacked is not None:
        attacked = "+".join(sorted(identity["specs"] if attacked == "both" else attacked.split("+")))
    chosen = attacked or _widest(identity["conditions"], ledger)
    others = record["clips_in_all"] - record["clips"]
    same = clips == "same" or (clips == "auto" and others < record["clips"] / 2)
    survey = replace(
        survey,
        model=model or asked.get("model", name),
        data=data or asked.get("data"),
        checkpoint=checkpoint or asked.get("checkpoint"),
        limit=None,
        threshold=float(identity["goal"].get("threshold", 0.5)),
    )
    if same:
        survey = replace(survey, seed=identity["seed"], limit=record["clips"])
    else:
        survey = replace(survey, leave_out=frozenset(ledger.read(CLEAN.key)["sample"]))
    with survey.opened(progress) as view:
        check_model(ledger, view.model)
        if identity["data"] != view.samples.digest:
            raise ValueError(f"the data of {ledger.folder} are not those found now: give the run's own with --data")
        if same:
            weights = _of_the_same(ledger, view)
        else:
            weights = bootstrap_weights(_usable_clips(ledger), len(view.weights), seed=view.survey.seed + 1)
        scored = {target: measured(ledger, chosen, target, weights, survey.threshold) for target in targets}
        baselines = _baselines(view, ledger, chosen, targets, progress)
        measures = metrics(view, progress)
    goal = identity["goal"]["words"]
    threat = repr([goal, [d["budgets"] for d in identity["conditions"].values() if "+".join(d["attacked"]) == chosen]])
    return {t: Joined(name, view, scored[t], [*baselines[t], *measures], chosen, same, goal, threat) for t in targets}


def _usable_clips(ledger: Ledger) -> int:
    return len(usable(ledger, CLEAN.key, ledger.record()["clips"]))


def _of_the_same(ledger: Ledger, view: View) -> Int[np.ndarray, "resample sample"]:
    """The survey's own resamples, after a check that its clips are those of the run."""
    if list(usable(ledger, CLEAN.key, ledger.record()["clips"])["sample"]) != list(view.latents.ids):
        raise ValueError(f"the clips of {ledger.folder} are not those found now: give the run's own with --data")
    return view.weights


def _baselines(
    view: View, ledger: Ledger, attacked: str, targets: Sequence[str], progress: Progress
) -> dict[str, list[Measure]]:
    """The simple scores that a latent metric must beat: clean, both margins, and the score under Gaussian noise."""
    latents, classes = view.latents, view.latents.classes
    threshold = view.survey.threshold
    budgets = budgets_of(ledger, attacked, view.model)
    goes = np.arange(len(latents))
    first, noisy_logits = [], {multiple: [] for multiple in MULTIPLES}  # type: ignore[var-annotated]
    done = 0
    for start in range(0, len(view.chosen), view.reader.batch_size):
        progress("margins and noise", start, len(view.chosen))
        for batch in view.reader.read(view.chosen[start : start + view.reader.batch_size])[0]:
            labels = latents.labels[done : done + len(batch.ids)]
            done += len(batch.ids)
            here = {m: replace(b, writable=batch.writable.get(m)) for m, b in budgets.items()}
            first.append(first_order_margins(view.model, batch.inputs, labels, here, threshold))
            for multiple, kept in noisy_logits.items():
                draws = draws_for(view.survey.seed, batch.ids, "noise", str(multiple))
                moved = noisy(batch.inputs, here, multiple, draws)
                kept.append(view.reader.score(moved, batch.ids, f"noise {multiple}").logits.float().cpu())
    progress("margins and noise", len(view.chosen), len(view.chosen))

    def mean(metric: str, values: Tensor, setting: str = "") -> Measure:
        scores: list[Score | str] = []
        for c in range(len(classes)):
            column = values[:, c].numpy()
            scores.append(score(column, np.ones(len(column)), goes[:, None], view.weights))
        return gather(classes, scores, len(view.weights), metric=metric, layer="logits", part="", setting=setting)

    def given(metric: str, scores: ClassScores, setting: str = "") -> Measure:
        counts = latents.labels.sum(0).numpy()
        return Measure(metric, "logits", "", "", setting, classes, scores.values, scores.resampled, counts, counts)

    own = latents.logits.numpy()

    def scored(target: str, logits: np.ndarray, by: Callable[[Scored], ClassScores] | None = None) -> ClassScores:
        multilabel = latents.label_kind == "multilabel"
        return (by or TARGETS[target].score)(
            Scored(logits, own, latents.labels.numpy(), view.weights, threshold, multilabel)
        )

    margins = [
        mean("logit margin", label_margins(latents.logits, latents.labels, threshold, latents.label_kind)),
        mean("first-order margin", torch.cat(first)),
    ]
    under_noise = {multiple: torch.cat(kept).numpy() for multiple, kept in noisy_logits.items()}
    return {
        target: [
            given("clean score", scored(target, own, TARGETS[target].clean)),
            *margins,
            *(given(f"noise score x{multiple}", scored(target, logits)) for multiple, logits in under_noise.items()),
        ]
        for target in targets
    }


def _widest(conditions: Mapping[str, Mapping[str, Any]], ledger: Ledger) -> str:
    """The attacked set with the most modalities."""
    sets = ["+".join(d["attacked"]) for d in conditions.values() if is_attack(d)]
    if not sets:
        raise ValueError(f"{ledger.folder} attacks nothing (noise is no attack): run robustav attack with pgd first")
    return max(sets, key=lambda text: text.count("+"))
