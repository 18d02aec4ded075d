"""What a whole evaluation saves by its order: a ladder of budgets in one run, and clips left alone once broken.

`python benchmarks/suite.py --write` measures everything (some minutes of CPU) and writes its section of
docs/benchmarks.md; `--quick` is a smoke run. Ends with status 1 if saving changes which clips break.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import numpy as np
import torch
from pgd import Clips, Goal, table
from timing import Spread, interleave, machine, ratio, write_section

from robustav.classifier import Classifier
from robustav.data.av_events import AvEvents
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import failures
from robustav.models.zoo import load_model
from robustav.plan import Member, conditions
from robustav.suites import members, standard, with_settings
from robustav.threat import Budget

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
MODEL, MODALITY = "visual-cnn", "visual"
LADDER = ("0.5/255", "1/255", "1.5/255", "2/255", "3/255", "4/255")
RUNGS = ("1/255", "2/255", "4/255")  # that sparing is measured at
LADDER_BAR = 0.60
SPARED, UNSPARED, FULL = "spared", "all clips", "all clips, full loops"


class Setup(NamedTuple):
    """The model, its clips, and how long the suite's attacks are."""

    model: Classifier
    clips: Clips
    steps: int
    queries: int

    def broken(self, epsilons: Sequence[str], *, stop: bool = True, spare: bool = True) -> np.ndarray:
        """Which clips the standard suite breaks at each epsilon, [epsilon, clip], in one run under score "hits".

        Without `stop` the loops go on after the first success; without `spare` every attack gets every clip.
        """
        goal, spec = Untargeted(self.model.label_kind), self.model.specs[MODALITY]
        plain = {
            name: with_settings(attack, steps=self.steps, queries=self.queries)
            for name, attack in standard(goal, self.model).items()
        }
        chosen = members(plain, self.model, "hits") if stop else [Member(*pair) for pair in plain.items()]
        budgets = [{MODALITY: Budget("linf", number(eps), low=spec.low, high=spec.high)} for eps in epsilons]
        rows = conditions(chosen, budgets, goal, score="hits")
        settings = Settings(device="cpu", probed=0, spare=spare)
        with tempfile.TemporaryDirectory() as folder:
            ledger = evaluate(self.model, self.clips, rows, goal, Path(folder) / "run", settings=settings)
            if wrong := failures(ledger):
                raise RuntimeError(f"the audit found {wrong}")
            reached = {row.key: ledger.read(row.key)["reached"].to_numpy(bool) for row in rows}
        levels = [[row.key for row in rows if not row.attacked or row.level == n] for n in range(len(epsilons))]
        return np.array([np.any([reached[key] for key in keys], axis=0) for keys in levels])

    def one_by_one(self, *, stop: bool = True, spare: bool = True) -> np.ndarray:
        """The ladder's epsilons in a run each, [epsilon, clip]."""
        return np.concatenate([self.broken([eps], stop=stop, spare=spare) for eps in LADDER])


def number(text: str) -> Fraction:
    above, _, below = text.partition("/")
    return Fraction(above) / int(below)


def setup(clips: int, steps: int, queries: int) -> Setup:
    """The shipped model on the first clips of av-events."""
    model, _ = load_model(MODEL)
    _, pictures, labels = (x[:clips] for x in AvEvents("test").tensors())
    found = Clips("av-events", model.classes, {MODALITY: pictures.float() / 255}, labels.float())
    return Setup(model, found, steps, queries)


class Saving(NamedTuple):
    """What an arrangement costs over others that answer the same question, and whether they did."""

    robust: list[float]  # a value an epsilon
    same: dict[str, int]  # other arrangement -> decisions that differ
    over: dict[str, Spread]

    @property
    def differing(self) -> int:
        return sum(self.same.values())


def ladder(given: Setup, rounds: int) -> tuple[Saving, int]:
    """One run over six; and how many decisions six runs alone take back at a larger budget."""
    ways: dict[str, Callable[[], np.ndarray]] = {
        "one run": partial(given.broken, LADDER),
        "six runs": given.one_by_one,
        "six runs, all clips, full loops": partial(given.one_by_one, stop=False, spare=False),
    }
    first = "one run"
    alone = {name: way() for name, way in ways.items()}
    # What breaks at a budget breaks at a larger one: a single run does not know, the ladder does.
    curves = {name: np.logical_or.accumulate(found, axis=0) for name, found in alone.items()}
    saving = _saving(ways, curves, first, rounds)
    return saving, max(int((curves[name] != alone[name]).sum()) for name in alone)


def survivors(given: Setup, eps: str, rounds: int) -> Saving:
    """One epsilon, sparing broken clips or not."""
    ways: dict[str, Callable[[], np.ndarray]] = {
        SPARED: partial(given.broken, [eps]),
        UNSPARED: partial(given.broken, [eps], spare=False),
        FULL: partial(given.broken, [eps], stop=False, spare=False),
    }
    return _saving(ways, {name: way() for name, way in ways.items()}, SPARED, rounds)


def _saving(
    ways: Mapping[str, Callable[[], np.ndarray]], curves: Mapping[str, np.ndarray], first: str, rounds: int
) -> Saving:
    seconds = interleave(ways, rounds, CPU)
    others = [name for name in ways if name != first]
    same = {name: int((curves[name] != curves[first]).sum()) for name in others}
    robust = (1 - curves[first].mean(axis=1)).tolist()
    found = Saving(robust, same, {name: ratio(seconds[first], seconds[name]) for name in others})
    print(found, file=sys.stderr, flush=True)
    return found


ABOUT = """
## Whole evaluations: one ladder of budgets, and clips left alone once broken

`python benchmarks/suite.py --write`. {machine}. CPU time of `harness.evaluate`, everything in it.

The standard suite with score "hits" on the shipped {model} and {clips} clips of av-events (multi-label, linf), 8 at once;
ascents, aims and FMN with {steps} steps, Square with {queries} queries, so that minutes are enough.
{rounds} rounds.

- **six runs** are separate evaluations, one an epsilon, each of which stops at first successes and leaves a clip alone
  that one of its cheaper attacks broke. The ladder also leaves it alone at all larger epsilons.
- **all clips** is `Settings(spare=False)`: every attack gets every clip, and stops at its first success.
- **all clips, full loops** gets the suite's attacks without `stop`: what a script costs that runs them all to the end.
"""


def report(climbed: Saving, taken_back: int, spared: Mapping[str, Saving], given: Setup, rounds: int) -> str:
    """The section of the page."""
    parts = [
        ABOUT.format(
            machine=machine(CPU),
            model=MODEL,
            clips=len(given.clips.labels),
            steps=given.steps,
            queries=given.queries,
            rounds=rounds,
        )
    ]
    curve = ", ".join(f"{value:.2f} at {eps}" for eps, value in zip(LADDER, climbed.robust, strict=True))
    parts.append(
        f"### Six epsilons\n\nRobust accuracy {curve}. Decisions (clip and epsilon) at which the ladder's curve differs "
        f"from that of six runs, what broke at a smaller epsilon counted as broken: {climbed.differing}. Decisions that a "
        f"run alone takes back at a larger epsilon, since it searches anew: {taken_back}."
    )
    parts.append(table({"time of the ladder over": {name: str(over) for name, over in climbed.over.items()}}))
    parts.append("### Broken clips left alone\n\nTime of a run at one epsilon over that of the same run with:")
    columns = {"robust accuracy": {eps: f"{saving.robust[0]:.2f}" for eps, saving in spared.items()}}
    columns |= {name: {eps: str(s.over[name]) for eps, s in spared.items()} for name in (UNSPARED, FULL)}
    columns["decisions that differ"] = {eps: str(saving.differing) for eps, saving in spared.items()}
    parts.append(table(columns))
    bars = [Goal(f"the ladder over {name}", over.median, LADDER_BAR) for name, over in climbed.over.items()]
    parts.append(
        "### Goals\n\n"
        + table(
            {
                "figure": {bar.what: f"{bar.figure:.2f}" for bar in bars},
                "at most": {bar.what: f"{bar.bar:.2f}" for bar in bars},
                "goal": {bar.what: bar.words for bar in bars},
            }
        )
    )
    return "\n\n".join(part.strip() for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few clips, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    rounds, given = (1, setup(3, 2, 5)) if options.quick else (options.rounds, setup(options.clips, 10, 50))
    climbed, taken_back = ladder(given, rounds)
    spared = {eps: survivors(given, eps, rounds) for eps in RUNGS}
    text = report(climbed, taken_back, spared, given, rounds)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "suite", text)
    wrong = {"the ladder": climbed.differing, **{eps: saving.differing for eps, saving in spared.items()}}
    for name, count in wrong.items():
        if count:
            print(f"not the same clips break: {name}, {count} decisions", file=sys.stderr)
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
