"""Tables of models with several modalities: are they safer than one, by which modality do they fall, do attacks add up?"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from robustav.experiment.results import UNTOUCHED, Where
from robustav.experiment.sampled import Sampled, budget_of_drop, interpolated, ratio, shared
from robustav.experiment.tables import Tables, words
from robustav.metrics.intervals import Interval
from robustav.report.grids import Cell, Grid
from robustav.report.text import NONE
from robustav.threat import parse_number


def against_single(tables: Tables) -> Iterator[Grid]:
    """Models of several modalities minus those of one, trained alike, each under the attack on what it has."""
    body = []
    for model, method in tables.results.trainings():
        singles = single_models(tables, model)
        cells: list[Cell] = []
        for _, where in tables.columns() if singles else []:
            rivals = [singles[where.attacked]] if where.attacked in singles else list(singles.values())
            found = shared(
                tables.scores.get(model, method, where),
                *(tables.scores.get(r, method, UNTOUCHED if where == UNTOUCHED else tables.all_of(r)) for r in rivals),
            )
            change = found[0].minus(max(found[1:], key=lambda one: one.mean)) if found else None
            cells.append(tables.change("against one modality", model, method, where, change))
        if cells:
            body.append([*words(model, method), *cells])
    if body:
        yield Grid(
            f"several modalities minus one: {tables.scores.headline} of the fused model minus that of the model which has "
            f"the attacked modality alone (clean and both: the better of those), epsilon {tables.epsilon}",
            ["model", "method", *(title for title, _ in tables.columns())],
            body,
            words=2,
        )


def vulnerability(tables: Tables) -> Iterator[Grid]:
    """Which modality a fused model falls by, and whether a joint attack does more than the worse of the single ones."""
    body = []
    for model, method in tables.results.trainings():
        parts = sorted(tables.results.experiment.models[model])
        if len(parts) != 2:
            continue
        joint = drop(tables, model, method, tables.all_of(model))
        singly = [drop(tables, model, method, Where(part, tables.epsilon)) for part in parts]
        found = shared(joint, *singly)
        excess = found[0].minus(max(found[1:], key=lambda one: one.mean)) if found else None
        synergy = tables.change("synergy", model, method, tables.all_of(model), excess)
        share, budgets = _share(tables, model, method, parts)
        at = ", ".join(f"{m} {budget:.2g}" for m, budget in budgets.items())
        told = tables.tell("vulnerability", model, method, Where(parts[0], at), *share) if budgets else (NONE, "")
        body.append([*words(model, method, parts[0]), told, *words(at or NONE), synergy])
    if body:
        yield Grid(
            f"vulnerability index of a modality, and synergy of attacks ({tables.scores.headline}, epsilon {tables.epsilon})",
            ["model", "method", "modality", "its share of the drop", "at matched budgets", "synergy"],
            body,
            words=3,
        )


def _share(
    tables: Tables, model: str, method: str, parts: list[str]
) -> tuple[tuple[float, Interval], dict[str, float]]:
    """The first modality's share of both single drops, at budgets that cost the models of one modality the same.

    Of these, the one that loses more at the headline epsilon has its budget lowered until it loses as little as the
    other. No budgets: it cannot be told.
    """
    nothing = (np.nan, Interval(np.nan, np.nan)), dict[str, float]()
    singles = single_models(tables, model)
    own = {part: _curve(tables, model, method, part) for part in parts}
    alone = {part: _curve(tables, singles[part], method, part) for part in parts} if singles else {}
    headline = {part: number_of(tables.epsilon, part) for part in parts}
    if not alone or any(headline[part] not in curves[part] for curves in (own, alone) for part in parts):
        return nothing
    matched = min(alone[part][headline[part]].mean for part in parts)
    if matched <= 0:
        return nothing
    budgets = {
        part: headline[part]
        if curve[headline[part]].mean == matched
        else budget_of_drop({epsilon: one.mean for epsilon, one in curve.items()}, matched)
        for part, curve in alone.items()
    }
    first, second = (interpolated({0.0: _none_of(own[p][headline[p]]), **own[p]}, budgets[p]) for p in parts)
    return ratio(first.mean, first.mean + second.mean, first.drawn, first.drawn + second.drawn), budgets


def _curve(tables: Tables, model: str, method: str, part: str) -> dict[float, Sampled]:
    """The modality's epsilon -> drop of the score, of the epsilons that are numbers."""
    places = [where for where in tables.scores.places(model) if where.attacked == part]
    drops = {number_of(where.epsilon, part): drop(tables, model, method, where) for where in places}
    return {epsilon: one for epsilon, one in drops.items() if one is not None and not np.isnan(epsilon)}


def drop(tables: Tables, model: str, method: str, where: Where) -> Sampled | None:
    """What an attack takes from the clean score."""
    found = shared(*(tables.scores.get(model, method, place) for place in (UNTOUCHED, where)))
    return found[0].minus(found[1]) if found else None


def single_models(tables: Tables, model: str) -> dict[str, str]:
    """Modality -> the experiment's only model of it alone; empty where one of a fused model's modalities has none."""
    models = tables.results.experiment.models
    alone = {m: [name for name, specs in models.items() if list(specs) == [m]] for m in models[model]}
    if len(models[model]) < 2 or any(len(names) != 1 for names in alone.values()):
        return {}
    return {m: names[0] for m, names in alone.items()}


def number_of(epsilon: str, part: str = "") -> float:
    """An epsilon as a number, `0.01` or `4/255`, or what `audio=0.0025,visual=0.004` has for a part; nan where it is none.

    >>> number_of("0.01", "audio"), number_of("audio=0.0025,visual=1/250", "visual"), number_of("snr=30dB")
    (0.01, 0.004, nan)
    """
    by_part = dict(one.split("=", 1) for one in epsilon.split(",") if "=" in one)
    try:
        return float(parse_number(by_part.get(part, epsilon)))
    except ValueError:
        return np.nan


def _none_of(like: Sampled) -> Sampled:
    return replace(like, points=0 * like.points, resampled=0 * like.resampled)
