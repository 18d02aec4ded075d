"""The tables to read first: what each method protects and costs, how much of the gap it closes, and what is shown."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from robustav.experiment.results import UNTOUCHED
from robustav.experiment.sampled import flip_test, gap_closed, shared
from robustav.experiment.tables import Tables, seeds_of, span, words
from robustav.metrics.intervals import holm
from robustav.report.grids import Cell, Grid
from robustav.report.text import NONE, number

ALPHA = 0.05


def protection(tables: Tables) -> Iterator[Grid]:
    """Clean, under each attack mode, and what the training cost."""
    results, columns, scores = tables.results, tables.columns(), tables.scores
    body = []
    for model, method in results.trainings():
        cost, plain = results.costs[model, method], results.costs.get((model, results.experiment.baseline))
        cells = [tables.score("protection", model, method, w, scores.get(model, method, w)) for _, w in columns]
        times = {
            "passes, times": cost.passes / plain.passes if plain else np.nan,
            "seconds, times": cost.seconds / plain.seconds
            if plain and cost.device == plain.device and "+" not in cost.device
            else np.nan,
        }
        for name, value in ({"passes a clip": cost.passes_a_clip, "seconds": cost.seconds} | times).items():
            tables.tell(name, model, method, UNTOUCHED, value)
        ratios = [number(time, digits) for time, digits in zip(times.values(), (2, 1), strict=True)]
        spent = [number(cost.passes_a_clip, 1), number(cost.seconds, 0), *ratios]
        flags = ", ".join(results.flags.get((model, method), ())) or NONE
        found = (scores.get(model, method, where) for _, where in columns)
        body.append([*words(model, method), *cells, *words(seeds_of(found), *spent, flags)])
    head = [
        *(title for title, _ in columns),
        "seeds",
        "passes a clip",
        "seconds",
        "passes, times",
        "seconds, times",
        "flags",
    ]
    yield Grid(
        f"{scores.headline} clean and under attack at epsilon {tables.epsilon} (worst case), and cost of training",
        ["model", "method", *head],
        body,
        words=2,
    )


def gaps(tables: Tables) -> Iterator[Grid]:
    """How much of what the reference gains each method reaches; empty where the reference is not shown to gain."""
    experiment, costs = tables.results.experiment, tables.results.costs
    if experiment.reference is None:
        return
    columns = [(title, where) for title, where in tables.columns() if where != UNTOUCHED]
    body = []
    for model, method in tables.results.trainings():
        if method in (experiment.baseline, experiment.reference):
            continue
        cells: list[Cell] = []
        seeds = set[int]()
        for _, where in columns:
            methods = (method, experiment.baseline, experiment.reference)
            three = shared(*(tables.scores.get(model, m, where) for m in methods))
            if three:
                count = len(three[0].seeds)
                cells.append(tables.tell("gap closed", model, method, where, *gap_closed(*three), seeds=count))
                seeds.add(count)
            else:
                cells.append((NONE, ""))
        price = costs.get((model, experiment.reference))
        share = number(costs[model, method].passes / price.passes, 2) if price else NONE
        body.append([*words(model, method), *cells, *words(span(seeds), share)])
    if body:
        yield Grid(
            f"share of the gap between {experiment.baseline} and {experiment.reference} that is closed "
            f"({tables.scores.headline}, epsilon {tables.epsilon})",
            ["model", "method", *(title for title, _ in columns), "seeds", f"passes, times {experiment.reference}'s"],
            body,
            words=2,
        )


def comparisons(tables: Tables) -> Iterator[Grid]:
    """Each method minus the baseline and minus the reference, tested on the same clips, all tests adjusted together."""
    experiment = tables.results.experiment
    rivals: dict[str, tuple[str, ...]] = {
        experiment.baseline: (experiment.baseline,)
    }  # and the methods that are not held against them
    if experiment.reference is not None:
        rivals[experiment.reference] = (experiment.reference, experiment.baseline)
    tests = [
        test
        for against, left_out in rivals.items()
        for model, method in tables.results.trainings()
        if method not in left_out
        for test in _tests(tables, model, method, against)
    ]
    if not tests:
        return
    adjusted = holm(np.array([test["p"] for test in tests]))
    lines: dict[tuple[str, str, str], dict[str, Cell]] = {}
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for test, p in zip(tests, adjusted, strict=True):
        model, method, against = key = test["key"]
        more = {"p": test["p"], "p_holm": p}
        text, ends = tables.change(f"against {against}", model, method, test["where"], test["change"], **more)
        seeds.setdefault(key, set()).add(len(test["change"].seeds))
        lines.setdefault(key, {})[test["title"]] = (f"{text}*" if p < ALPHA else text, ends)
    titles = [title for title, _ in tables.columns()]
    yield Grid(
        f"difference of {tables.scores.headline} at epsilon {tables.epsilon} on the same clips and seeds (* the top-1 hits "
        f"differ, p < {ALPHA:g} after Holm's adjustment for {len(tests)} tests)",
        ["model", "method", "minus", *titles, "seeds"],
        [
            [*words(*key), *(found.get(title, (NONE, "")) for title in titles), *words(span(seeds[key]))]
            for key, found in lines.items()
        ],
        words=3,
    )


def _tests(tables: Tables, model: str, method: str, against: str) -> Iterator[dict[str, Any]]:
    """One for each column: the difference of the headline score, and the exact test on hits."""
    for title, where in tables.columns():
        if pair := shared(*(tables.scores.get(model, m, where) for m in (method, against))):
            right, others = (tables.scores.right(model, m, where) for m in (method, against))
            net = np.sum([right[seed].astype(int) - others[seed] for seed in pair[0].seeds], axis=0)
            change, p = pair[0].minus(pair[1]), flip_test(net)
            yield {"key": (model, method, against), "title": title, "where": where, "change": change, "p": p}
