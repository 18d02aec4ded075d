"""Tables to look things up in: latent metrics, every epsilon, every attack, and second opinions."""

from collections.abc import Iterator

import numpy as np

from robustav.experiment.results import LATENT, UNTOUCHED, Where
from robustav.experiment.tables import Tables, called, seeds_of, signed, span, words
from robustav.geometry.measure import where_of
from robustav.report.grids import Cell, Grid
from robustav.report.text import NONE
from robustav.report.words import WORST

SHOWN = ("relative density", "purity gain", "hardened convexity, area", "soft convexity", "graph convexity")


def latents(tables: Tables) -> Iterator[Grid]:
    """Density and convexity of every trained model, and their change from the baseline."""
    rows, experiment = tables.results.latents, tables.results.experiment
    if rows.empty:
        return
    rows = rows[rows["metric"].isin(SHOWN) & rows["space"].isin(["", "raw"]) & rows["value"].notna()]
    rows = rows[rows.groupby(["metric", "layer", "part"])["setting"].transform("first") == rows["setting"]]
    keys = sorted(dict.fromkeys(rows[list(LATENT)].itertuples(index=False, name=None)), key=lambda k: SHOWN.index(k[0]))
    values = rows.set_index(["model", "method", "seed", *LATENT])["value"].to_dict()
    body = []
    for model, method in tables.results.trainings():
        cells: list[Cell] = []
        counts = set[int]()
        for key in keys:
            own, plain = (
                {s: values[at] for s in experiment.seeds if (at := (model, one, s, *key)) in values}
                for one in (method, experiment.baseline)
            )
            paired = own.keys() & plain.keys()
            if not own:
                cells.append((NONE, ""))
                continue
            counts |= {len(own), len(paired)} - {0}
            mean = float(np.mean(list(own.values())))
            change = float(np.mean([own[s] - plain[s] for s in paired])) if paired else np.nan
            more = {**dict(zip(LATENT, key, strict=True)), "seeds": len(own), "change": change}
            text, _ = tables.tell("latents", model, method, UNTOUCHED, mean, **more)
            cells.append((text, "" if np.isnan(change) or method == experiment.baseline else signed(change)))
        if counts:
            body.append([*words(model, method), *cells, *words(span(counts))])
    if body:
        yield Grid(
            f"density and convexity, macro means over the classes (in brackets: change from {experiment.baseline})",
            ["model", "method", *(f"{key[0]}, {where_of(key[1], key[2])}" for key in keys), "seeds"],
            body,
            words=2,
        )


def every_epsilon(tables: Tables) -> Iterator[Grid]:
    """The worst case at every epsilon: the headline score, and top-1 hits, whose worst case is exact."""
    models = tables.results.experiment.models
    epsilons = list(dict.fromkeys(w.epsilon for m in models for w in tables.scores.places(m) if w != UNTOUCHED))
    for score in dict.fromkeys([tables.scores.headline, "top1"]):
        body = []
        for model, method in tables.results.trainings():
            sets = dict.fromkeys(where.attacked for where in tables.scores.places(model) if where != UNTOUCHED)
            for attacked in sets:
                places = [UNTOUCHED, *(Where(attacked, epsilon) for epsilon in epsilons)]
                found = {where: tables.scores.get(model, method, where, score=score) for where in places}
                table = f"{score}, every epsilon"
                cells = [tables.score(table, model, method, where, one) for where, one in found.items()]
                body.append([*words(model, method, called(attacked)), *cells, *words(seeds_of(found.values()))])
        head = ["model", "method", "attacked", "clean", *epsilons, "seeds"]
        yield Grid(f"{score} at every epsilon, worst case", head, body, words=3, brief=False)


def every_attack(tables: Tables) -> Iterator[Grid]:
    """Top-1 hits under each attack on all modalities."""
    names = dict.fromkeys(row for _, _, row, where in tables.scores.hits if where != UNTOUCHED and row != WORST)
    body = []
    for model, method in tables.results.trainings():
        where = tables.all_of(model)
        found = {name: tables.scores.get(model, method, where, row=name, score="top1") for name in (*names, WORST)}
        cells = [tables.score(f"top1 under {name}", model, method, where, score) for name, score in found.items()]
        body.append([*words(model, method), *cells, *words(seeds_of(found.values()))])
    yield Grid(
        f"top-1 hit rate under each attack on all modalities, epsilon {tables.epsilon}",
        ["model", "method", *names, WORST, "seeds"],
        body,
        words=2,
        brief=False,
    )


def second_opinions(tables: Tables) -> Iterator[Grid]:
    """Where a further evaluation looked at some of the same clips: what it breaks that the first one did not."""
    first = tables.scores
    for name, other in list(tables.results.scores.items())[1:]:
        place = {clip: i for i, clip in enumerate(first.ids)}
        pairs = [(place[clip], i) for i, clip in enumerate(other.ids) if clip in place]
        here, there = np.array(pairs, dtype=int).reshape(-1, 2).T
        body = []
        for model, method in tables.results.trainings():
            for where in other.places(model):
                one, two = first.right(model, method, where), other.right(model, method, where)
                seeds = sorted(one.keys() & two.keys())
                if where == UNTOUCHED or not seeds or not pairs:
                    continue
                held = np.array([one[s][here] for s in seeds]), np.array([two[s][there] for s in seeds])
                rates = {first.name: held[0].mean(), name: held[1].mean(), "together": (held[0] & held[1]).mean()}
                cells = [
                    tables.tell(f"top1 beside {name}: {what}", model, method, where, float(rate), seeds=len(seeds))
                    for what, rate in rates.items()
                ]
                told = words(str(len(seeds)))
                body.append([*words(model, method, called(where.attacked), where.epsilon), *cells, *told])
        if body:
            head = ["model", "method", "attacked", "epsilon", first.name, name, "both together", "seeds"]
            yield Grid(f"top-1 hit rate on the {len(pairs)} clips that {name} looked at too", head, body, words=4)
