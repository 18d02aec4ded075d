"""Tables of models with several modalities: are they safer than one, by which modality do they fall, do attacks add up?"""

from collections.abc import Iterator

import numpy as np

from robustav.experiment.results import UNTOUCHED, Where
from robustav.experiment.sampled import NOTHING, Matched, Sampled, matched_share, shared
from robustav.experiment.tables import Tables, span, words
from robustav.metrics.intervals import Interval, centred_interval
from robustav.report.grids import Cell, Grid
from robustav.report.text import NONE
from robustav.threat import parse_number


def against_single(tables: Tables) -> Iterator[Grid]:
    """Models of several modalities minus those of one, trained alike, each under the attack on what it has."""
    body = []
    for model, method in tables.results.trainings():
        singles = single_models(tables, model)
        cells: list[Cell] = []
        seeds = set[int]()
        for _, where in tables.columns() if singles else []:
            rivals = [singles[where.attacked]] if where.attacked in singles else list(singles.values())
            found = shared(
                tables.scores.get(model, method, where),
                *(tables.scores.get(r, method, UNTOUCHED if where == UNTOUCHED else tables.all_of(r)) for r in rivals),
            )
            change = found[0].minus(max(found[1:], key=lambda one: one.mean)) if found else None
            cells.append(tables.change("against one modality", model, method, where, change))
            seeds |= {len(change.seeds)} if change else set()
        if cells:
            body.append([*words(model, method), *cells, *words(span(seeds))])
    if body:
        yield Grid(
            f"several modalities minus one: {tables.scores.headline} of the fused model minus that of the model which has "
            f"the attacked modality alone (clean and both: the better of those), epsilon {tables.epsilon}",
            ["model", "method", *(title for title, _ in tables.columns()), "seeds"],
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
        point, ends, seeds = _share(tables, model, method, parts)
        at = ", ".join(f"{m} {budget:.2g}" for m, budget in zip(parts, point.budgets, strict=False))
        where = Where(parts[0], at)
        told = tables.tell("vulnerability", model, method, where, point.share, ends, seeds=seeds) if at else (NONE, "")
        counts = {seeds, len(found[0].seeds) if found else 0} - {0}
        body.append([*words(model, method, parts[0]), told, *words(at or NONE), synergy, *words(span(counts))])
    if body:
        yield Grid(
            f"vulnerability index of a modality, and synergy of attacks ({tables.scores.headline}, epsilon {tables.epsilon})",
            ["model", "method", "modality", "its share of the drop", "at matched budgets", "synergy", "seeds"],
            body,
            words=3,
        )


def _share(tables: Tables, model: str, method: str, parts: list[str]) -> tuple[Matched, Interval, int]:
    """`matched_share` at the headline epsilon, its interval, budgets matched anew on every resample, and the seeds."""
    nothing = Matched(np.nan, ()), NOTHING, 0
    singles = single_models(tables, model)
    if not singles:
        return nothing
    curves = [_curve(tables, singles[part], method, part) for part in parts]
    curves += [_curve(tables, model, method, part) for part in parts]
    at = [number_of(tables.epsilon, part) for part in parts]
    if any(headline not in curve for curve, headline in zip(curves, at * 2, strict=True)):
        return nothing
    if not (found := shared(*(score for curve in curves for score in curve.values()))):
        return nothing
    rest = iter(found)
    told = [{epsilon: next(rest) for epsilon in curve} for curve in curves]

    def of(drops: list[dict[float, float]]) -> Matched:
        return matched_share(drops[:2], drops[2:], at)

    drawn = [{epsilon: score.drawn for epsilon, score in curve.items()} for curve in told]
    resamples = len(drawn[0][at[0]])
    shares = [of([{e: float(x[i]) for e, x in curve.items()} for curve in drawn]).share for i in range(resamples)]
    point = of([{epsilon: score.mean for epsilon, score in curve.items()} for curve in told])
    return point, centred_interval(point.share, np.array(shares)), len(told[0][at[0]].seeds)


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
