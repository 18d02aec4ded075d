"""Convexity of 527 classes: ours, class by class, as notebooks do it, and the cost of the head's products alone.

`python benchmarks/convexity.py --write` measures everything (some minutes on two idle cores) and writes its section of
docs/benchmarks.md; `--quick` is a smoke run of seconds. Ends with status 1 if a way gives other shares than the rest.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
from timing import Spread, interleave, machine, ratio, write_section
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustav.metrics.convexity import class_scores, interior, li2022
from robustav.metrics.pairs import Pairs, draw_pairs
from robustav.metrics.segments import margins_along
from robustav.prepare import quick_products

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CLASSES, DIM, TOKENS, WIDTH = 527, 768, 10, 256
TAU, POINTS = 0.1, 10
FEW = 4  # classes that the slowest way is measured on
SAME_SHARE = 1e-3  # two points of the 2000 a class: those within rounding of the threshold
FLOOR, PEER, NOTEBOOK = "floor", "class by class", "point by point"
OURS, UNHELPED = "ours", "ours, no layer skipped"


class Pooled(nn.Module):
    """Tokens [point, token, dim] to logits: two transformer layers, the mean token, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.blocks(tokens).mean(1))


class Problem(NamedTuple):
    """A head, the samples it continues from, and the points to evaluate."""

    name: str
    head: nn.Module
    z: Tensor
    pairs: Pairs
    weights: Tensor  # [pair, point]

    @property
    def points(self) -> int:
        return self.weights.numel()

    def rows(self, cls: int) -> Tensor:
        return (self.pairs.cls == cls).nonzero().squeeze(1)

    def head_flops(self) -> int:
        """Of the products of the head, all points together."""
        with FlopCounterMode(display=False) as counter:  # with gradients, or some layers hide theirs in one kernel
            self.head(self.z[:16].requires_grad_())
        return counter.get_total_flops() * self.points // 16


def make_problem(name: str, head: nn.Module, shape: tuple[int, ...], samples: int, pairs: int, every: int) -> Problem:
    """Random samples and labels; `pairs` pairs of each class whose number `every` divides."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(samples, *shape, generator=generator)
    labels = torch.rand(samples, CLASSES, generator=generator) < 0.05
    labels[:, torch.arange(CLASSES) % every != 0] = False
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():  # about half of the points on either side of the threshold
        last.bias.copy_(0.1 * torch.randn(CLASSES, generator=generator) + torch.tensor(TAU).logit())
    drawn = draw_pairs(labels, pairs, generator)
    return Problem(name, head.eval(), z, drawn, interior(POINTS).expand(len(drawn.cls), -1))


def problems(quick: bool) -> list[Problem]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Dropout(0.1), nn.Linear(DIM, DIM), nn.ReLU(), nn.Dropout(0.1), nn.Linear(DIM, CLASSES))
    samples, pairs, every = (500, 20, 100) if quick else (4000, 200, 8)
    return [
        make_problem("MLP", mlp, (DIM,), samples, pairs, every),
        make_problem("transformer", Pooled(), (TOKENS, WIDTH), samples, pairs, 4 * every),
    ]


def ours(problem: Problem, module: nn.Module | None) -> Tensor:
    """Margins of all points."""
    return margins_along(
        lambda parts: problem.head(parts["z"]),
        {"z": problem.z},
        problem.pairs,
        problem.weights,
        label_kind="multilabel",
        thresholds=TAU,
        module=module,
    )


def class_by_class(problem: Problem) -> Tensor:
    """All points of a class at once, as a careful user writes it."""
    found = []
    with torch.no_grad():
        for cls in problem.pairs.cls.unique().tolist():
            rows = problem.rows(cls)
            first, second = problem.z[problem.pairs.first[rows]], problem.z[problem.pairs.second[rows]]
            w = problem.weights[rows].view(len(rows), POINTS, *[1] * (first.ndim - 1))
            points = (w * first[:, None] + (1 - w) * second[:, None]).flatten(0, 1)
            found.append(problem.head(points)[:, cls].view(len(rows), POINTS))
    return torch.cat(found) - torch.tensor(TAU).logit()


def point_by_point(problem: Problem) -> Tensor:
    """Points made one at a time and stacked, then the head, class by class; the first few classes."""
    found = []
    with torch.no_grad():
        for cls in problem.pairs.cls.unique().tolist()[:FEW]:
            points = []
            for row in problem.rows(cls).tolist():
                first, second = problem.z[problem.pairs.first[row]], problem.z[problem.pairs.second[row]]
                for w in problem.weights[row]:
                    points.append(w * first + (1 - w) * second)
            found.append(problem.head(torch.stack(points))[:, cls].view(-1, POINTS))
    return torch.cat(found) - torch.tensor(TAU).logit()


def products(count: int) -> None:
    """Products of a size that suits every CPU, by its faster kernels where those are exact."""
    left, right = torch.ones(2048, DIM), torch.ones(DIM, DIM)
    with quick_products(), torch.inference_mode():
        for _ in range(count):
            left @ right


class Case(NamedTuple):
    """What was measured with one head: seconds in each round, and how far shares and margins lie apart."""

    problem: Problem
    rounds: int
    seconds: dict[str, list[float]]
    shares_apart: dict[str, float]
    margins_apart: dict[str, float]

    def over(self, name: str, other: str) -> Spread:
        return ratio(self.seconds[name], self.seconds[other])


def measure(problem: Problem, rounds: int) -> Case:
    """Agreement first, which also warms everything up; then the rounds."""
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: partial(ours, problem, problem.head),
        UNHELPED: partial(ours, problem, None),
        PEER: partial(class_by_class, problem),
        NOTEBOOK: partial(point_by_point, problem),
    }
    expected = ways[PEER]()
    margins_apart, shares_apart = {}, {}
    for name, way in ways.items():
        margins = way()
        few = Pairs(*(field[: len(margins)] for field in problem.pairs))
        shares, right = (class_scores(li2022(m), few, CLASSES) for m in (margins, expected[: len(margins)]))
        margins_apart[name] = (margins - expected[: len(margins)]).abs().max().item()
        shares_apart[name] = (shares - right).abs().nan_to_num().max().item()
    flops = problem.head_flops()
    count = max(1, min(100, flops // (2 * 2048 * DIM * DIM)))
    seconds = interleave({FLOOR: partial(products, count), **ways}, rounds, torch.device("cpu"))
    seconds[FLOOR] = [value * flops / (count * 2 * 2048 * DIM * DIM) for value in seconds[FLOOR]]
    scale = max(1, len(problem.pairs.cls.unique()) / FEW)
    seconds[NOTEBOOK] = [value * scale for value in seconds[NOTEBOOK]]
    return Case(problem, rounds, seconds, shares_apart, margins_apart)


class Goal(NamedTuple):
    """A bar, and where a figure lies."""

    what: str
    figure: float
    bar: float

    @property
    def words(self) -> str:
        return "met" if self.figure <= self.bar else f"missed by {self.figure - self.bar:.2f}"


def goals(cases: list[Case]) -> list[Goal]:
    found = []
    for case in cases:
        name = case.problem.name
        found.append(Goal(f"{name}: {UNHELPED}, over {PEER}", case.over(UNHELPED, PEER).median, 0.60))
        bar = 0.15 if name == "MLP" else 0.60
        found.append(Goal(f"{name}: {OURS}, over {PEER}", case.over(OURS, PEER).median, bar))
    return found


ABOUT = """
## Convexity: ours, class by class, and the floor

`python benchmarks/convexity.py --write`. {machine}. CPU time.

Margins of a class at 10 points between each of 200 pairs of its clips, of which the published convexity is the share
above a threshold. Random samples and heads with 527 classes, two kinds: an **MLP** of two layers 768 wide, and a
**transformer** (two layers on {tokens} tokens of {width}, their mean, a linear layer), which spares no point anything
but the other classes. {sizes}

- The **floor** is the head's products, counted, at the rate of float32 products of 2048 x 768 x 768 in the same round,
  by the faster of the CPU's exact kernels. Mixing, biases, non-linearities, normalisation and softmax are not in it.
- **class by class** is a careful user's: all points of a class mixed and scored at once, without gradients.
- **point by point** is a notebook's: points mixed one at a time and stacked, then scored class by class; measured on
  four classes and scaled.
- **ours** is `margins_along`: one stream through all classes, in chunks that fit the cache, by the faster kernels;
  linear layers at the start applied to the samples instead of the points, and only the pair's own class computed at the
  end. With **no layer skipped** it is not told which network it runs through.
"""


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Columns side by side, as Markdown; rows in the order in which they first come up."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column.get(row, "") for column in columns.values())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(cases: list[Case]) -> str:
    """The section of the page."""
    sizes = "; ".join(
        f"{case.problem.name}: {len(case.problem.z)} samples, {len(case.problem.pairs.cls.unique())} of the classes, "
        f"{case.problem.points} points, {case.rounds} rounds"
        for case in cases
    )
    times = {}
    for case in cases:
        for other in (FLOOR, PEER):
            names = (OURS, UNHELPED, PEER, NOTEBOOK) if other == FLOOR else (OURS, UNHELPED, NOTEBOOK)
            times[f"{case.problem.name}, over {other}"] = {name: str(case.over(name, other)) for name in names}
    apart = {}
    for case in cases:
        apart[f"{case.problem.name}, margins"] = {n: f"{x:.0e}" for n, x in case.margins_apart.items() if n != PEER}
        apart[f"{case.problem.name}, shares"] = {n: f"{x:.2g}" for n, x in case.shares_apart.items() if n != PEER}
    found = goals(cases)
    bars = {
        "figure": {goal.what: f"{goal.figure:.2f}" for goal in found},
        "at most": {goal.what: f"{goal.bar:.2f}" for goal in found},
        "goal": {goal.what: goal.words for goal in found},
    }
    parts = [
        ABOUT.format(machine=machine(torch.device("cpu")), sizes=f"{sizes}.", tokens=TOKENS, width=WIDTH),
        f"### Time\n\n{table(times)}",
        f"### Largest differences from {PEER}\n\n{table(apart)}",
        f"### Goals\n\n{table(bars)}",
    ]
    return "\n\n".join(part.strip() for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    cases = [measure(problem, 1 if options.quick else options.rounds) for problem in problems(options.quick)]
    text = report(cases)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "convexity", text)
    wrong = [
        f"{case.problem.name}, {name}: {apart:g}"
        for case in cases
        for name, apart in case.shares_apart.items()
        if not apart <= SAME_SHARE
    ]
    for line in wrong:
        print(f"not the same shares: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
