"""What the tables of an experiment's report are made with: scores, the words for them, and a record of each number."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robustav.experiment.results import UNTOUCHED, Results, Scores, Where
from robustav.experiment.sampled import NOTHING, Sampled
from robustav.metrics.intervals import FEW_CLIPS, Interval
from robustav.report.grids import Cell
from robustav.report.text import NONE, between, number


@dataclass
class Tables:
    """Results, the scores of the first evaluation, and every number that a table has told."""

    results: Results
    scores: Scores
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epsilon(self) -> str:
        """The one that the main tables are at."""
        return self.results.experiment.epsilon

    def columns(self) -> list[tuple[str, Where]]:
        """Clean, and each attacked set at the headline epsilon, single modalities first."""
        found = {w.attacked for model in self.results.experiment.models for w in self.scores.places(model)} - {""}
        sets = sorted(found, key=lambda text: (text.count("+"), text))
        return [("clean", UNTOUCHED), *((called(text), Where(text, self.epsilon)) for text in sets)]

    def all_of(self, model: str) -> Where:
        """All modalities of a model, at the headline epsilon."""
        return Where(self.results.widest(model), self.epsilon)

    def tell(
        self, table: str, model: str, method: str, where: Where, value: float, ends: Interval = NOTHING, **more: Any
    ) -> Cell:
        """Keep a number for the CSV; returns it as a cell. Too few clips to draw from have no interval."""
        ends = ends if self.scores.clips >= FEW_CLIPS else NOTHING
        row = {"table": table, "model": model, "method": method, **where._asdict(), "value": value}
        self.rows.append({**row, "low": ends.low, "high": ends.high, **more})
        return number(value), "" if np.isnan(ends.low) else between(float(ends.low), float(ends.high))

    def score(self, table: str, model: str, method: str, where: Where, score: Sampled | None) -> Cell:
        """A score: mean and spread over seeds, and the interval of the mean, in [0, 1]."""
        if score is None:
            return NONE, ""
        ends = Interval(*(float(np.clip(end, 0, 1)) for end in score.interval))
        seeds = {"spread": score.spread, "seeds": len(score.seeds)}
        text, between_ends = self.tell(table, model, method, where, score.mean, ends, **seeds)
        return (f"{text} ± {number(score.spread)}" if len(score.seeds) > 1 else text), between_ends

    def change(self, table: str, model: str, method: str, where: Where, change: Sampled | None, **more: Any) -> Cell:
        """A difference: signed, with the interval of its mean."""
        if change is None:
            return NONE, ""
        more |= {"spread": change.spread, "seeds": len(change.seeds)}
        return signed(change.mean), self.tell(table, model, method, where, change.mean, change.interval, **more)[1]


def called(attacked: str) -> str:
    """A set of modalities in a word."""
    return "both" if attacked == "audio+visual" else attacked or "clean"


def span(counts: Collection[int]) -> str:
    """Counts in a word, `3` or `2-3`."""
    return "-".join(map(str, sorted({min(counts), max(counts)}))) if counts else NONE


def seeds_of(scores: Iterable[Sampled | None]) -> str:
    """How many seeds scores rest on, in a word."""
    return span({len(score.seeds) for score in scores if score is not None})


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.3f}"


def words(*texts: str) -> list[Cell]:
    """Cells that are text."""
    return [(text, "") for text in texts]
