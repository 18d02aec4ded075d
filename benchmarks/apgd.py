"""APGD on audio and on visual models: ours, other libraries, the model alone, and clips that are left alone once broken.

`python benchmarks/apgd.py --write` measures everything (ten minutes of CPU) and writes its section of
docs/benchmarks.md; `--quick` is a smoke run. Libraries that are not installed are left out. Ends with status 1 if
leaving broken clips alone changes which clips break.
"""

import argparse
import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
from peers import Problem
from pgd import FLOOR, OURS, UNPREPARED, Arrangement, Goal, Tokens, arrangements, table, threat_on
from timing import Spread, interleave, machine, ratio, write_section
from torch import Tensor, nn

from robustav.attacks.apgd import APGD
from robustav.audio import LogMel
from robustav.classifier import Classifier, Inputs, LateFusion, waveform
from robustav.data.av_events import AvEvents
from robustav.losses import cross_entropy
from robustav.models.zoo import load_model
from robustav.prepare import prepare, quick_products
from robustav.randomness import draws_for
from robustav.threat import ThreatModel
from robustav.view import AttackView, Tally

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
PUBLISHED = {"torchattacks": "torchattacks", "AutoAttack": "pyautoattack"}  # name -> module
LEVELS = {"0.6": 0.70, "0.2": 0.50, "0": 0.27, "nothing breaks": 1.04}  # robust accuracy -> bar for its time


def audio_vit(batch: int) -> Problem:
    """An audio ViT-tiny (5.5 M parameters, 10 s) with random weights and 527 classes, on noise."""
    torch.manual_seed(0)
    x = (0.1 * torch.randn(batch, 160_000)).clamp(-1, 1)
    model = LateFusion(
        {"audio": Tokens(patches=62 * 8)},
        nn.Linear(192, 527),
        specs={"audio": waveform(10.0)},
        classes=tuple(f"class {number}" for number in range(527)),
        label_kind="multiclass",
        front_ends={"audio": LogMel(window=512, hop=160, mels=128)},
    )
    return problem(model, {"audio": x})


def shipped(name: str, batch: int) -> Problem:
    """A shipped model of one modality on the first clips of av-events; its classes exclude one another here."""
    model, _ = load_model(name)
    model.label_kind = "multiclass"
    audio, pictures, _ = AvEvents("test").tensors()
    inputs = {"audio": audio[:batch].float() / 32768, "visual": pictures[:batch].float() / 255}
    return problem(model, {m: inputs[m] for m in model.specs})


def problem(model: Classifier, inputs: Inputs, steps: int = 20) -> Problem:
    """What the model says of the clean clips counts as the truth, so that nobody begins with fewer clips."""
    model = model.eval()
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    return Problem(model, inputs, labels, threat_on(tuple(inputs), model), steps)


class Pictures(nn.Module):
    """The model as a network of one tensor [batch, ..., ..., ...] in [0, 1], which is all that the others take."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.modality, budget, x = problem.only()
        self.model, self.shape = copy.deepcopy(problem.model), x.shape[1:]
        self.low, self.size = budget.low, budget.high - budget.low
        self.given = ((x - self.low) / self.size).reshape(len(x), 1, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model({self.modality: self.low + self.size * x.reshape(-1, *self.shape)})


def peer(name: str, problem: Problem) -> Callable[[], Tensor]:
    """APGD-CE of another library, one start, as many iterations."""
    network = Pictures(problem).eval()
    eps = problem.reach(problem.attacked[0]) / network.size
    if name == "torchattacks":
        import torchattacks

        attack = torchattacks.APGD(network, "Linf", eps, steps=problem.steps, n_restarts=1, loss="ce")
        return lambda: network.low + network.size * attack(network.given, problem.labels)
    from pyautoattack.autopgd_base import APGDAttack

    other = APGDAttack(network, problem.steps, "Linf", 1, eps, loss="ce", device="cpu")
    return lambda: network.low + network.size * other.perturb(network.given, problem.labels)


def floor(problem: Problem) -> None:
    """Forward and backward to the input alone on frozen weights, and one more forward."""
    model = copy.deepcopy(problem.model).requires_grad_(False)
    for _ in range(problem.steps):
        leaves = {m: x.detach().requires_grad_() for m, x in problem.inputs.items()}
        torch.autograd.grad(cross_entropy(model(leaves), problem.labels).sum(), list(leaves.values()))
    with torch.no_grad():
        model(problem.inputs)


def ours(problem: Problem, arranged: Arrangement) -> Inputs:
    """One batch as the harness attacks it."""
    with quick_products() if arranged.products else nullcontext():
        view = AttackView(arranged.model, problem.attacked, {}, Tally(len(problem.labels), problem.attacked))
        draws = draws_for(0, [str(number) for number in range(len(problem.labels))])
        return APGD(problem.steps)(view, problem.inputs, problem.labels, problem.threat, draws=draws)


class Case(NamedTuple):
    """One model: seconds in each round, and what each attack came to."""

    name: str
    seconds: dict[str, list[float]]
    losses: dict[str, float]  # mean cross-entropy of what was returned, by the untouched model
    robust: dict[str, float]

    def over(self, name: str, other: str = FLOOR) -> Spread:
        return ratio(self.seconds[name], self.seconds[other])


def measure(name: str, problem: Problem, rounds: int) -> Case:
    """What each attack reaches first, which also warms everything up; then the rounds."""
    contestants: dict[str, Callable[[], object]] = {
        who: partial(ours, problem, arranged) for who, arranged in arrangements(problem).items()
    }
    contestants |= {who: peer(who, problem) for who, module in PUBLISHED.items() if importlib.util.find_spec(module)}
    losses, robust = {}, {}
    for who, attack in contestants.items():
        found = attack()
        inputs = found if isinstance(found, dict) else {m: found.reshape(x.shape) for m, x in problem.inputs.items()}
        with torch.no_grad():
            logits = problem.model(inputs)
        losses[who] = cross_entropy(logits, problem.labels).mean().item()
        robust[who] = (logits.argmax(1) == problem.labels).float().mean().item()
    seconds = interleave({FLOOR: partial(floor, problem), **contestants}, rounds, CPU)
    return Case(name, seconds, losses, robust)


class Level(NamedTuple):
    """One budget: what share of the clips withstands it, and the time with and without leaving broken clips alone."""

    robust: float
    same: bool
    over: Spread


def levels(clips: int, batch: int, steps: int, rounds: int) -> dict[str, Level]:
    """The active set on av-fusion, audio + visual attacked, with budgets that leave about so many clips."""
    model, _ = load_model("av-fusion")
    audio, pictures, labels = (x[: 2 * clips] for x in AvEvents("test").tensors())
    inputs, labels = {"audio": audio.float() / 32768, "visual": pictures.float() / 255}, labels.float()
    plain = threat_on(("audio", "visual"), model)
    with torch.no_grad():
        right = ~plain.goal.reached(model.trace(inputs), labels)
    chosen = right.nonzero().flatten()[:clips]
    inputs, labels = {m: x[chosen] for m, x in inputs.items()}, labels[chosen]
    prepared = prepare(model, {m: x[:batch] for m, x in inputs.items()})

    def attacked(threat: ThreatModel, stop: bool) -> Tensor:
        """Which clips break, [clip]."""
        broken = []
        for rows in torch.arange(len(labels)).split(batch):
            view = AttackView(prepared, tuple(inputs), {}, Tally(len(rows), tuple(inputs)))
            part, draws = {m: x[rows] for m, x in inputs.items()}, draws_for(0, [str(i) for i in rows.tolist()])
            with quick_products():
                APGD(steps, stop=stop)(view, part, labels[rows], threat, draws=draws)
            broken.append(view.tally.ever_reached.bool())
        return torch.cat(broken)

    def scaled_to(robust: float) -> ThreatModel:
        """By bisection of the radius: the one that comes closest, and of those the smallest."""
        low, high, tried = 1e-2, 30.0, []
        for _ in range(7):
            middle = (low * high) ** 0.5
            survived = 1 - attacked(plain.scaled(middle), stop=True).float().mean().item()
            tried.append((abs(survived - robust), middle))
            low, high = (middle, high) if survived > robust else (low, middle)
        return plain.scaled(min(tried)[1])

    found = {}
    for name in LEVELS:
        threat = plain.scaled(1e-4) if name == "nothing breaks" else scaled_to(float(name))
        full, quick = attacked(threat, stop=False), attacked(threat, stop=True)
        contestants = {"full": partial(attacked, threat, False), "stop": partial(attacked, threat, True)}
        seconds = interleave(contestants, rounds, CPU)
        over = ratio(seconds["stop"], seconds["full"])
        found[name] = Level(1 - full.float().mean().item(), torch.equal(full, quick), over)
        print(name, found[name], file=sys.stderr, flush=True)
    return found


ABOUT = """
## APGD: ours, other libraries, and clips that are left alone

`python benchmarks/apgd.py --write`. {machine}. CPU time.

APGD with cross-entropy, {steps} steps in linf from a random start, one class a clip (what the model says of the clean one,
so that everybody attacks every clip). The **floor** is {steps} x forward and backward to the input alone on a frozen copy with
torch's default kernels, and one forward pass for the last point.

Three models: **audio ViT**, 5.5 M parameters, 527 classes, random weights, on 10 s of noise, one clip at once;
**audio CNN** and **visual CNN**, the shipped audio-cnn and visual-cnn (0.2 M each) on av-events, {cnn} clips at once.
{rounds} rounds.

- **ours** is what the harness does with a batch: a prepared copy (batch norms folded, channels-last weights, oneDNN
  products where they are as exact). **ours, unprepared** attacks a plain frozen copy.
- **torchattacks** and **AutoAttack** (pyautoattack) get the model in eval mode as a user has it, inputs reshaped to four
  axes and rescaled to [0, 1]. They compute one more gradient, at the last point, and a clean pass.
"""

STOPPING = """
### Broken clips left alone

av-fusion on {clips} clips of av-events that it gets right, {batch} at once, audio and visual attacked, {steps} steps:
`APGD(stop=True)` over `APGD()`, at budgets found by bisection. Ours attacks a prepared copy in both cases.
"""


def goals(cases: list[Case], found: dict[str, Level]) -> list[Goal]:
    """The bars, as far as what was measured lets them be judged."""
    bars = []
    for case in cases:
        for who in PUBLISHED:
            if who in case.seconds:
                bar = 0.98 if case.name == "audio ViT" else 0.85
                bars.append(Goal(f"{case.name}: ours, unprepared over {who}", case.over(UNPREPARED, who).median, bar))
                bars.append(Goal(f"{case.name}: ours over {who}", case.over(OURS, who).median, bar))
    return bars + [
        Goal(f"robust accuracy about {name}: stopping over not", level.over.median, LEVELS[name])
        if name != "nothing breaks"
        else Goal("nothing breaks: stopping over not", level.over.median, LEVELS[name])
        for name, level in found.items()
    ]


def report(cases: list[Case], found: dict[str, Level], sizes: dict[str, int]) -> str:
    """The section of the page."""
    parts = [ABOUT.format(machine=machine(CPU), **sizes)]
    if absent := [name for name, module in PUBLISHED.items() if not importlib.util.find_spec(module)]:
        parts.append(f"Not installed, so left out: {', '.join(absent)}.")
    parts.append("### Time over floor")
    parts.append(table({c.name: {who: str(c.over(who)) for who in c.seconds if who != FLOOR} for c in cases}))
    parts.append("### What they reach\n\nMean cross-entropy of what is returned, and robust accuracy in brackets.")
    parts.append(table({c.name: {w: f"{x:.4f} ({c.robust[w]:.2f})" for w, x in c.losses.items()} for c in cases}))
    parts.append(STOPPING.format(**sizes))
    columns = {
        "robust accuracy": {name: f"{level.robust:.2f}" for name, level in found.items()},
        "the same clips break": {name: "yes" if level.same else "no" for name, level in found.items()},
        "time over the full loop's": {name: str(level.over) for name, level in found.items()},
    }
    parts.append(table(columns))
    bars = goals(cases, found)
    columns = {
        "figure": {bar.what: f"{bar.figure:.2f}" for bar in bars},
        "at most": {bar.what: f"{bar.bar:.2f}" for bar in bars},
        "goal": {bar.what: bar.words for bar in bars},
    }
    parts.append(f"### Goals\n\n{table(columns)}")
    return "\n\n".join(part.strip() for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    sizes = {"rounds": rounds, "cnn": 8, "batch": 8, "clips": 8 if options.quick else 24, "steps": 20}
    problems = {
        "audio ViT": audio_vit(1),
        "audio CNN": shipped("audio-cnn", sizes["cnn"]),
        "visual CNN": shipped("visual-cnn", sizes["cnn"]),
    }
    cases = []
    for name, given in problems.items():
        cases.append(measure(name, given, rounds))
        print(name, {who: str(cases[-1].over(who)) for who in cases[-1].seconds}, file=sys.stderr, flush=True)
    found = levels(sizes["clips"], sizes["batch"], sizes["steps"], rounds)
    text = report(cases, found, sizes)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "apgd", text)
    wrong = [name for name, level in found.items() if not level.same]
    for name in wrong:
        print(f"not the same clips break: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
