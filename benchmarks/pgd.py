"""PGD-20 on audio-visual models: ours, three other libraries, and the cost of the model alone.

`python benchmarks/pgd.py --write` measures everything (half an hour on two idle cores) and writes its section of
docs/benchmarks.md; `--quick` is a smoke run in less than a minute. Libraries that are not installed are left out. Ends
with status 1 if a method that should reach the same loss as the others does not.
"""

import argparse
import copy
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
from peers import PEERS, Problem, Run
from timing import Spread, interleave, machine, ratio, write_section
from torch import Tensor, nn

from robustav.attacks import FGSM, PGD
from robustav.audio import LogMel
from robustav.classifier import Classifier, Inputs, LabelKind, LateFusion, Trace, frames, waveform
from robustav.data.av_events import AvEvents
from robustav.data.samples import Sample
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.losses import bce
from robustav.models.small import convolution
from robustav.models.zoo import load_model
from robustav.plan import CLEAN, Condition, conditions, subsets
from robustav.prepare import prepare, quick_products
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RADII: dict[str, float] = {"audio": 0.002, "visual": 4 / 255}  # linf
SAME_LOSS = 1e-4  # relative
FLOOR, TEXTBOOK = "floor", "textbook loop"
OURS, UNPREPARED, WHOLE, BEST = "ours", "ours, unprepared", "ours, whole evaluation", "ours, best iterate"


class Tokens(nn.Module):
    """Spectrogram [batch, 1, frame, mel] to a vector: ViT-tiny, patches of 16 x 16, mean of the tokens."""

    def __init__(self, patches: int, dim: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 16, 16)
        self.position = nn.Parameter(0.02 * torch.randn(patches, dim))
        block = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.blocks(self.patch(spectrogram).flatten(2).transpose(1, 2) + self.position).mean(1)


class Frames(nn.Module):
    """Frames [batch, frame, 3, height, width] to a vector: nine convolutions, mean over place and frame."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 32, 2), (32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
        self.layers = nn.Sequential(
            *(convolution(*width) for width in widths), convolution(256, 256, 1), convolution(256, 512, 2)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.layers(2 * pictures.flatten(0, 1) - 1)
        return maps.mean((2, 3)).unflatten(0, pictures.shape[:2]).mean(1)


def vit_cnn_fusion(clips: Inputs) -> LateFusion:
    """An audio ViT-tiny (5.5 M parameters, 10 s) beside a visual CNN (2.9 M, 10 x 112 x 112), 527 classes.

    Random weights. The batch norms have seen `clips` once, as they would have in training.
    """
    model = LateFusion(
        {"audio": Tokens(patches=62 * 8), "visual": Frames()},
        nn.Linear(192 + 512, 527),
        specs={"audio": waveform(10.0), "visual": frames(10, 112)},
        classes=tuple(f"class {number}" for number in range(527)),
        front_ends={"audio": LogMel(window=512, hop=160, mels=128)},
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a cumulative average: after one batch, that batch's
    with torch.no_grad():
        model.train()(clips)
    return model.eval()


@dataclass
class Clips:
    """Labelled clips in memory."""

    name: str
    classes: tuple[str, ...]
    inputs: Inputs
    labels: Tensor
    label_kind: LabelKind = "multilabel"

    def __post_init__(self) -> None:
        self.ids = [f"{self.name}/{number}" for number in range(len(self.labels))]
        self.digest = self.name

    def load(self, index: int) -> Sample:
        return Sample(self.ids[index], {m: x[index] for m, x in self.inputs.items()}, self.labels[index])

    def first(self, count: int, device: torch.device) -> tuple[Inputs, Tensor]:
        """The first `count` clips as a batch, with their labels."""
        return {m: x[:count].to(device) for m, x in self.inputs.items()}, self.labels[:count].to(device)


class Setup(NamedTuple):
    """A model and its clips: one `batch` of them for an attack, all of them for a whole evaluation."""

    name: str
    model: Classifier
    clips: Clips
    batch: int


def av_fusion(clips: int, batch: int) -> Setup:
    """The shipped model on the first clips of av-events."""
    model, _ = load_model("av-fusion")
    audio, pictures, labels = AvEvents("test").tensors()
    inputs = {"audio": audio[:clips].float() / 32768, "visual": pictures[:clips].float() / 255}
    return Setup("av-fusion", model, Clips("av-events", model.classes, inputs, labels[:clips].float()), batch)


def vit_cnn(clips: int, batch: int) -> Setup:
    """The larger fusion with random weights on random clips."""
    torch.manual_seed(0)
    shape = {"audio": (clips, 160_000), "visual": (clips, 10, 3, 112, 112)}
    inputs = {"audio": (0.1 * torch.randn(shape["audio"])).clamp(-1, 1), "visual": torch.rand(shape["visual"])}
    model = vit_cnn_fusion({m: x[:2] for m, x in inputs.items()})
    labels = (torch.rand(clips, len(model.classes)) < 0.01).float()
    return Setup("ViT + CNN", model, Clips("random", model.classes, inputs, labels), batch)


def threat_on(attacked: tuple[str, ...], model: Classifier) -> ThreatModel:
    budgets = {m: Budget("linf", RADII[m], low=model.specs[m].low, high=model.specs[m].high) for m in attacked}
    return ThreatModel(budgets, Untargeted(model.label_kind))


def loop(problem: Problem, *, move: bool) -> Run:
    """Steps of forward and backward to the input alone on frozen weights, the other modalities' features held.

    Without `move` this is the floor: what the model costs and nothing else. With it, PGD as a textbook has it.
    """
    model = copy.deepcopy(problem.model).requires_grad_(False)
    clean = {m: problem.inputs[m] for m in problem.attacked}
    with torch.no_grad():
        held = model.features({m: x for m, x in problem.inputs.items() if m not in clean})

    def run() -> Inputs:
        x = clean
        for _ in range(problem.steps):
            leaves = {m: value.detach().requires_grad_() for m, value in x.items()}
            logits = model.finish({**held, **model.features(leaves)}).logits
            gradients = torch.autograd.grad(bce(logits, problem.labels).sum(), list(leaves.values()))
            if move:
                for m, gradient in zip(problem.attacked, gradients, strict=True):
                    budget, reach = problem.threat.budgets[m], problem.reach(m)
                    moved = x[m] + problem.step(m) * gradient.sign()
                    moved = clean[m] + (moved - clean[m]).clamp(-reach, reach)
                    x = {**x, m: moved.clamp(budget.low, budget.high)}
        return {**problem.inputs, **x}

    return run


class LastLook(AttackView):
    """An attack view that remembers what it was last shown: PGD scores its final iterate before it chooses the best."""

    last: Inputs

    def trace(self, inputs: Inputs) -> Trace:
        self.last = inputs
        return super().trace(inputs)


class Arrangement(NamedTuple):
    """A frozen copy of the model, and whether matrix products may take the CPU's faster kernels."""

    model: Classifier
    products: bool


def arrangements(problem: Problem) -> dict[str, Arrangement]:
    """What the harness attacks, and the plain copy that shows what of it is arithmetic."""
    return {
        OURS: Arrangement(prepare(problem.model, problem.inputs), problem.device.type == "cpu"),
        UNPREPARED: Arrangement(copy.deepcopy(problem.model).requires_grad_(False), False),
    }


def ours(problem: Problem, arranged: Arrangement, view: type[AttackView] = AttackView) -> tuple[Inputs, AttackView]:
    """One batch as the harness attacks it; encoding the held modalities is part of it.

    Not counted: preparing the model, once a run, and the clean pass; the whole evaluation counts both.
    """
    attacked = problem.attacked
    with quick_products() if arranged.products else nullcontext():
        with torch.no_grad():
            held = arranged.model.features({m: x for m, x in problem.inputs.items() if m not in attacked})
        seen = view(arranged.model, attacked, held, Tally(len(problem.labels), attacked, problem.device))
        given = {m: problem.inputs[m].clone() for m in attacked}
        draws = draws_for(0, [str(number) for number in range(len(problem.labels))], "pgd", *attacked)
        attack = PGD(problem.steps, random_start=False)
        found = attack(seen, given, problem.labels, problem.threat, draws=draws)
    return {**problem.inputs, **found}, seen


def losses(problem: Problem) -> dict[str, float]:
    """BCE that the untouched model gives to where each method ends, summed over the clips."""

    def loss(inputs: Inputs) -> float:
        with torch.no_grad():
            return bce(problem.model(inputs), problem.labels).double().sum().item()

    reached = {TEXTBOOK: loss(loop(problem, move=True)())}
    best = {}
    for name, arranged in arrangements(problem).items():
        returned, view = ours(problem, arranged, LastLook)
        assert isinstance(view, LastLook)
        reached[name], best[name] = loss({**problem.inputs, **view.last}), loss(returned)
    reached |= {name: loss(peer.make(problem)()) for name, peer in PEERS.items() if peer.can(problem)}
    return reached | {BEST: best[OURS]}


class Case(NamedTuple):
    """One model with one set of modalities attacked: losses reached, and seconds a batch in each round."""

    model: str
    attacked: tuple[str, ...]
    size: str
    single: dict[str, float]  # losses in float32
    double: dict[str, float]  # losses in float64, where those in float32 differ
    seconds: dict[str, list[float]]

    def over(self, name: str, other: str = FLOOR) -> Spread:
        return ratio(self.seconds[name], self.seconds[other])


def differences(reached: Mapping[str, float]) -> dict[str, float]:
    """Of each final iterate's loss from the textbook loop's, relative."""
    return {name: loss / reached[TEXTBOOK] - 1 for name, loss in reached.items() if name not in (TEXTBOOK, BEST)}


def unequal(case: Case) -> list[str]:
    """The methods that end elsewhere than the textbook loop, and not by rounding alone."""
    apart = [name for name, difference in differences(case.single).items() if not abs(difference) <= SAME_LOSS]
    exact = differences(case.double) if apart else {}
    return [name for name in apart if not abs(exact.get(name, math.inf)) <= SAME_LOSS]


def measure(setup: Setup, attacked: tuple[str, ...], steps: int, rounds: int, device: torch.device) -> Case:
    """Losses first, which also warms everything up; then the rounds."""
    model = copy.deepcopy(setup.model).to(device)
    threat = threat_on(attacked, model)
    inputs, labels = setup.clips.first(setup.batch, device)
    problem = Problem(model, inputs, labels, threat, steps)
    single = losses(problem)
    apart = any(not abs(difference) <= SAME_LOSS for difference in differences(single).values())
    double = losses(problem.double()) if apart else {}

    rows = [CLEAN, Condition("pgd", attacked, 0, PGD(steps, random_start=False), threat)]
    settings = Settings(device=device.type, batch_size=setup.batch)

    def evaluation() -> None:
        with tempfile.TemporaryDirectory() as folder:
            evaluate(model, setup.clips, rows, threat.goal, Path(folder) / "run", settings=settings)

    contestants: dict[str, Callable[[], object]] = {FLOOR: loop(problem, move=False)}
    contestants |= {name: partial(ours, problem, arranged) for name, arranged in arrangements(problem).items()}
    contestants |= {name: peer.make(problem) for name, peer in PEERS.items() if peer.can(problem)}
    contestants[WHOLE] = evaluation
    contestants[FLOOR](), contestants[WHOLE]()
    seconds = interleave(contestants, rounds, device)
    batches = len(setup.clips.labels) / setup.batch
    seconds[WHOLE] = [value / batches for value in seconds[WHOLE]]
    size = f"{setup.batch} clips at once, {len(setup.clips.labels)} in the whole evaluation; {rounds} rounds"
    return Case(setup.name, attacked, size, single, double, seconds)


def peak_memory(clips: int) -> float:
    """Peak resident MiB of this process after FGSM on every set of modalities of `clips` clips of av-events."""
    model, _ = load_model("av-fusion")
    threat = threat_on(tuple(model.specs), model)
    rows = conditions({"fgsm": FGSM()}, [dict(threat.budgets)], threat.goal)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(device="cpu")
        evaluate(model, AvEvents("test"), rows, threat.goal, Path(folder) / "run", limit=clips, settings=settings)
    if Path("/proc/self/status").exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def peak_memory_alone(clips: int) -> float:
    """`peak_memory` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--peak", str(clips)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


class Goal(NamedTuple):
    """A bar, and where a figure lies."""

    what: str
    figure: float
    bar: float

    @property
    def words(self) -> str:
        return "met" if self.figure <= self.bar else f"missed by {self.figure - self.bar:.2f}"


def goals(cases: list[Case]) -> list[Goal]:
    """The bars, as far as what was measured lets them be judged."""
    found = []
    for case in cases:
        where = f"{case.model}, {' + '.join(case.attacked)} attacked"
        found.append(Goal(f"{where}: ours over floor", case.over(OURS).median, 1.10))
        found.append(Goal(f"{where}: whole evaluation over floor", case.over(WHOLE).median, 1.12))
        if len(case.attacked) == 1 and "torchattacks" in case.seconds:
            costs = [sum(c.seconds[FLOOR]) for c in cases if c.model == case.model and len(c.attacked) == 1]
            dear_attacked = sum(case.seconds[FLOOR]) == max(costs)
            held, bar = ("cheap", 0.9) if dear_attacked else ("dear", 0.6)
            figure = case.over(OURS, "torchattacks").median
            found.append(Goal(f"{where}, {held} branch held: ours over torchattacks", figure, bar))
    return found


ABOUT = """
## PGD: ours, other libraries, and the floor

`python benchmarks/pgd.py --write`. {machine}. {unit} over the floor's.

The **floor** is {steps} x forward and backward to the input alone (BCE summed over classes and clips) through the
attacked branch and the head, on a frozen copy with torch's default float32 kernels. The held branch's features were
computed beforehand and cost nothing; no step is taken, so there is no sign, no projection and no bookkeeping.

Two models: **av-fusion**, 0.5 M parameters, as shipped, on 2 s and 4 x 48 x 48 pixels of av-events; **ViT + CNN**, a
late fusion of an audio ViT-tiny (5.5 M parameters, log-mel of 10 s) and a visual CNN (2.9 M, 10 x 112 x 112 pixels), 527
classes, random weights, on noise.

Everyone starts at the clean clip and takes {steps} steps of {share:g} of the radius, in linf: {audio:g} amplitude,
{visual:.4g} pixel value. Ours stay inside by what rounding could add; the others are given the radius that is left.

- **ours** is what the harness does with a batch: encode the held modality once, climb, score the last step (one more
  forward pass), return the best iterate. It attacks a prepared copy of the model: batch norms folded, channels-last
  weights, oneDNN products where they are as exact.
- **ours, unprepared** does the same on a plain frozen copy: what remains is the arrangement.
- **ours, whole evaluation** is `harness.evaluate`: both digests of the model, preparation, clean pass, attack, audit, two
  verdicts a clip on the untouched model, and the ledger on disk. The floor is that of the attack alone.
- **torchattacks, Foolbox, ART** ({versions}) get the model in eval mode as a user has it, the other modality closed
  over. torchattacks has cross-entropy and the range [0, 1] wired in: two columns (0, z) a class, whose cross-entropy is
  BCE, and input, radius and step rescaled. In Foolbox the loss is overridden and `run` called. In ART the loss is a bare
  function. Two modalities at once with a budget each can be said to ART alone (one vector, arrays for radius, step and
  range).
- **torchattacks, by hand** attacks a frozen copy that someone took apart, the held branch encoded beforehand.
"""

LOSSES = """
Loss reached: BCE of the final iterate by the untouched model, on that batch; the textbook loop's, and relative
differences from it. Our PGD returns the best iterate instead of the last: for each clip one that reaches the goal, and
of those the one with the largest loss. Sign steps on a trained network turn rounding into differences of this size (two
methods that differ only in rescaling the input show it); where a difference is above {same:g}, the same is run in
float64.
"""


def times(case: Case) -> dict[str, str]:
    """A column of the table of times."""
    return {name: str(case.over(name)) for name in case.seconds if name != FLOOR}


def reached(case: Case) -> dict[str, str]:
    """A column of the table of losses."""
    column = {TEXTBOOK: f"{case.single[TEXTBOOK]:.4f}"}
    column |= {name: f"{difference:+.0e}" for name, difference in differences(case.single).items()}
    column[BEST] = f"{case.single[BEST] / case.single[TEXTBOOK] - 1:+.0e}"
    if case.double:
        column |= {f"{name}, float64": f"{difference:+.0e}" for name, difference in differences(case.double).items()}
    return column


def table(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Columns side by side, as Markdown; rows in the order in which they first come up."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(column.get(row, "") for column in columns.values())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(cases: list[Case], memory: Mapping[int, float], device: torch.device, steps: int) -> str:
    """The section of the page, for one device."""
    about = ABOUT.format(
        machine=machine(device),
        unit="CPU time" if device.type == "cpu" else "Wall time, the GPU waited for,",
        steps=steps,
        share=2.5 / steps,
        audio=RADII["audio"],
        visual=RADII["visual"],
        versions=", ".join(sorted({f"{p.module} {p.version}" for p in PEERS.values() if p.installed})) or "none here",
    )
    if absent := [name for name, peer in PEERS.items() if not peer.installed]:
        about += f"\nNot installed, so left out: {'; '.join(absent)}.\n"
    parts = [about]
    for model in dict.fromkeys(case.model for case in cases):
        columns = {" + ".join(c.attacked) + " attacked": c for c in cases if c.model == model}
        parts.append(f"### {model}, {device.type}: time over floor\n\n{next(iter(columns.values())).size}.")
        parts.append(table({name: times(case) for name, case in columns.items()}))
        parts.append(LOSSES.format(same=SAME_LOSS))
        parts.append(table({name: reached(case) for name, case in columns.items()}))
    if memory:
        figures = ", ".join(f"{size:.0f} MiB for {clips} clips" for clips, size in memory.items())
        growth = max(memory.values()) / min(memory.values()) - 1
        parts.append(
            "### Memory\n\nPeak resident memory of fresh processes that evaluate FGSM on audio, visual and both (av-fusion, "
            f"av-events): {figures}, a difference of {growth:.1%}."
        )
    found = goals(cases)
    columns_of_goals = {
        "figure": {goal.what: f"{goal.figure:.2f}" for goal in found},
        "at most": {goal.what: f"{goal.bar:.2f}" for goal in found},
        "goal": {goal.what: goal.words for goal in found},
    }
    parts.append(f"### Goals, {device.type}\n\n{table(columns_of_goals)}")
    return "\n\n".join(part.strip() for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of the large model; twice as many of the small")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one step, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # what a fresh process is asked for its memory
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options.peak))
        return 0
    every = subsets(("audio", "visual"))
    if options.quick:
        steps, plan = 1, [(av_fusion(4, 4), every, 1), (vit_cnn(1, 1), [("visual",)], 1)]
    else:  # the small model's rounds are short
        steps = 20
        singles = [attacked for attacked in every if len(attacked) == 1]
        plan = [(av_fusion(64, 8), every, 2 * options.rounds), (vit_cnn(2, 1), singles, options.rounds)]
    sections, wrong = [], []
    for device in [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available():
        cases = []
        for setup, sets, rounds in plan:
            for attacked in sets:
                case = measure(setup, attacked, steps, rounds, device)
                cases.append(case)
                for name in unequal(case):
                    wrong.append(f"{case.model}, {' + '.join(attacked)}: {name}, {case.single} {case.double}")
                print(device, setup.name, attacked, times(case), reached(case), file=sys.stderr, flush=True)
        counts = () if device.type != "cpu" else (8,) if options.quick else (64, 512)
        memory = {clips: peak_memory_alone(clips) for clips in counts}
        sections.append(report(cases, memory, device, steps))
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + "\n\n".join(sections))
    if options.write and not options.quick:
        write_section(PAGE, "pgd", "\n\n".join(sections))
    for line in wrong:
        print(f"not the same loss: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
