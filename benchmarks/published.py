"""PGD on the published models at their published size, and what their forward and backward passes alone cost.

`python benchmarks/published.py --write` measures every family (about ten minutes on two idle cores) and writes its
section of docs/benchmarks.md, one for a CPU and one for a GPU; `--quick` is a smoke run of the smaller ones. What is
measured is kept in `--folder`, a file for each family: a run that was killed goes on there, and a file that is deleted
is measured again. Ends with status 1 if an attacked model does not score as the untouched one.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from peers import Problem
from pgd import Arrangement, Goal, ours, table
from timing import Spread, interleave, machine, ratio, write_section
from torch import Tensor, nn

from robustav.classifier import FEATURE, Classifier, Inputs
from robustav.goals import Untargeted
from robustav.harness import pick_device
from robustav.losses import bce, top1_margin
from robustav.models.entry import Task
from robustav.models.published import MODELS
from robustav.prepare import AGREEMENT, prepare, quick_products
from robustav.threat import Budget, ThreatModel

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BAR = 1.10
FACTORS = (4, 64, 256)
WIDEST = 0.1  # largest radius
FLOOR, FRONT_END = "floor", "front end alone"
OURS, BF16, COMPILED = "ours", "ours, bf16", "ours, compiled"


class Family(NamedTuple):
    """A published model, what of it is attacked, and how much it reads."""

    model: str
    attacked: tuple[str, ...] = ("audio",)
    task: Task = Task()

    @property
    def name(self) -> str:
        return f"{self.model}, {' + '.join(self.attacked)}"


FRAME = Task(frames=1)
FAMILIES = (
    Family("talnet"),
    Family("tal-trans"),
    Family("audio-resnet50"),
    Family("psla-b2"),
    Family("ast"),
    Family("audio-mae"),
    Family("msm-mae-208"),
    Family("cav-mae", task=FRAME),
    Family("cav-mae", ("visual",), FRAME),
    Family("cav-mae", ("audio", "visual"), FRAME),
    Family("mmt-late"),
    Family("vit-base", ("visual",), FRAME),
)
SMALL = ("talnet", "tal-trans", "psla-b2", "mmt-late")  # of a smoke run
COMPILE = ("tal-trans", "audio-resnet50", "vit-base")  # unless told: each takes about a minute


@dataclass(frozen=True)
class Settings:
    """How much is measured; a figure that was kept is used again if these are the same."""

    device: str
    batch: int
    steps: int
    rounds: int
    compiled: bool


@dataclass
class Case:
    """A family, measured."""

    name: str
    settings: Settings
    seconds: dict[str, list[float]] = field(default_factory=dict)  # a batch, in each round
    compiling: float = 0.0  # seconds until the first attack on the compiled model was over
    broken: int = 0  # clips, by ours
    verdicts: dict[str, int] = field(default_factory=dict)  # clips that end with another verdict than after ours
    own: dict[str, int] = field(default_factory=dict)  # where ours ends: clips that the attacked model judges otherwise
    apart: dict[str, float] = field(default_factory=dict)  # there: largest difference in logits over the largest logit
    memory: dict[str, float] = field(default_factory=dict)  # of a GPU, at the peak beyond the weights, MiB
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return self.settings.batch * self.settings.rounds

    def over(self, name: str) -> Spread:
        return ratio(self.seconds[name], self.seconds[FLOOR])


def raw(shape: tuple[int, ...], unit: str) -> Tensor:
    """Noise of amplitude 0.1, of any brightness, or as a layer of ReLUs gives it."""
    if unit == "amplitude":
        return (0.1 * torch.randn(shape)).clamp(-1, 1)
    return torch.randn(shape).relu() if unit == FEATURE else torch.rand(shape)


def built(family: Family, batch: int) -> Classifier:
    """With random weights, frozen; batch norms have seen noise once, as they would have in training."""
    torch.manual_seed(0)
    model = MODELS[family.model].build(family.task)
    assert isinstance(model, Classifier)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a cumulative average: after one batch, that batch's
    if norms:
        with torch.no_grad():
            model.train()({m: raw((batch, *spec.shape), spec.unit) for m, spec in model.specs.items()})
    return model.eval().requires_grad_(False)


def problems(family: Family, model: Classifier, settings: Settings, device: torch.device) -> list[Problem]:
    """A batch for each round, labelled with what the model says, at radii that break some clips and leave some."""
    found: list[Problem] = []
    for number in range(settings.rounds):
        torch.manual_seed(1 + number)
        inputs = {m: raw((settings.batch, *s.shape), s.unit).to(device) for m, s in model.specs.items()}
        with torch.no_grad():
            logits = model(inputs)
        labels = F.one_hot(logits.argmax(1), logits.shape[1]).float()
        nearest = first_radius(model, inputs, labels, family.attacked) if not found else nearest
        radius = min(WIDEST, FACTORS[number % len(FACTORS)] * nearest)
        ranges = {m: (model.specs[m].low, model.specs[m].high) for m in family.attacked}
        budgets = {m: Budget("linf", radius, low=low, high=high) for m, (low, high) in ranges.items()}
        threat = ThreatModel(budgets, Untargeted(model.label_kind))
        found.append(Problem(model, inputs, labels, threat, settings.steps))
    return found


def first_radius(model: Classifier, inputs: Inputs, labels: Tensor, attacked: tuple[str, ...]) -> float:
    """The radius (linf) at which a linear model with these margins and slopes would lose its hits."""
    leaves = {m: inputs[m].clone().requires_grad_() for m in attacked}
    margins = top1_margin(model({**inputs, **leaves}), labels)
    slopes = torch.autograd.grad(margins.sum(), list(leaves.values()))
    lengths = torch.stack([slope.flatten(1).abs().sum(1) for slope in slopes]).sum(0)
    return (margins.detach().abs() / lengths).mean().item()


def floor(problem: Problem) -> None:
    """Steps of forward and backward to the input alone, a last forward; held modalities are encoded once."""
    model, clean = problem.model, {m: problem.inputs[m] for m in problem.attacked}
    with torch.no_grad():
        held = model.features({m: x for m, x in problem.inputs.items() if m not in clean})
    for _ in range(problem.steps):
        leaves = {m: x.detach().requires_grad_() for m, x in clean.items()}
        logits = model.finish({**held, **model.features(leaves)}).logits
        torch.autograd.grad(bce(logits, problem.labels).sum(), list(leaves.values()))
    with torch.no_grad():
        model.finish({**held, **model.features(clean)})


def front_ends(problem: Problem, back: Inputs) -> None:
    """The part of the floor that lies before the network; `back` stands in for the gradients that come from there."""
    model = problem.model
    for m, x in problem.inputs.items():
        for _ in range(problem.steps if m in problem.attacked else 0):
            leaf = x.detach().requires_grad_()
            read = model.front_end(m, leaf)
            torch.autograd.grad(read, leaf, back[m])
        with torch.no_grad():
            model.front_end(m, x)


class Halved(Classifier):
    """A frozen classifier whose network runs under autocast to bfloat16, and whose front ends do not.

    Weights that autocast would cast in every pass are cast once.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = model.specs, model.classes, model.label_kind
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.model.front_end(modality, raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encode(modality, x)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        with self.autocast():
            return self.model.fuse(features)

    def classify(self, latent: Tensor) -> Tensor:
        with self.autocast():
            return self.model.classify(latent).float()


def compiled(model: Classifier) -> Classifier:
    """A copy whose stages after the front end are compiled: for an FFT no code can be generated."""
    quick = copy.deepcopy(model)
    for stage in ("encode", "fuse", "classify"):
        setattr(quick, stage, torch.compile(getattr(quick, stage)))
    return quick


def arrangements(first: Problem, case: Case) -> dict[str, Arrangement]:
    """What is attacked, warmed up; what does not run is entered into `failed`."""
    prepared = prepare(first.model, first.inputs)
    made: dict[str, Callable[[], Classifier]] = {OURS: lambda: prepared, BF16: lambda: Halved(prepared)}
    if case.settings.compiled:
        made[COMPILED] = lambda: compiled(prepared)
    found = {}
    for name, make in made.items():
        began = time.perf_counter()
        try:
            arranged = Arrangement(make(), first.device.type == "cpu")
            ours(first, arranged)
        except Exception as error:  # no compiler, or an operation that bfloat16 has not
            if name == OURS:
                raise
            case.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        else:
            found[name] = arranged
            case.compiling = time.perf_counter() - began if name == COMPILED else case.compiling
    return found


def measure(family: Family, settings: Settings) -> Case:
    """Every round has clips of its own, and every contestant once."""
    device = torch.device(settings.device)
    case = Case(family.name, settings)
    model = built(family, settings.batch).to(device)
    rounds = problems(family, model, settings, device)
    arranged = arrangements(rounds[0], case)
    case.seconds = {name: [] for name in (FLOOR, FRONT_END, *arranged)}
    case.verdicts, case.own = dict.fromkeys(arranged, 0), dict.fromkeys(arranged, 0)
    case.apart = dict.fromkeys(arranged, 0.0)
    for number, problem in enumerate(rounds):
        ended: dict[str, Inputs] = {}

        def attack(name: str, problem: Problem = problem, ended: dict[str, Inputs] = ended) -> None:
            ended[name], _ = ours(problem, arranged[name])

        with torch.no_grad():
            back = {m: model.front_end(m, x) for m, x in problem.inputs.items()}
        contestants: dict[str, Callable[[], object]] = {
            FLOOR: partial(floor, problem),
            FRONT_END: partial(front_ends, problem, back),
            **{name: partial(attack, name) for name in arranged},
        }
        if not number:
            contestants[FRONT_END]()  # the others are warm
        for name, seconds in interleave(contestants, 1, device, seed=number).items():
            case.seconds[name] += seconds
        judge(case, problem, arranged, ended)
        if device.type == "cuda" and not number:
            case.memory = {name: peak(contestant, device) for name, contestant in contestants.items()}
    return case


def judge(case: Case, problem: Problem, arranged: dict[str, Arrangement], ended: dict[str, Inputs]) -> None:
    """What the untouched model says of where each attack ended, and the attacked ones of where ours did."""

    def lost(logits: Tensor) -> Tensor:
        return logits.argmax(1) != problem.labels.argmax(1)

    with torch.no_grad():
        after = {name: problem.model(inputs) for name, inputs in ended.items()}
        broken = lost(after[OURS])
        case.broken += int(broken.sum())
        for name, logits in after.items():
            with quick_products() if arranged[name].products else nullcontext():
                said = arranged[name].model(ended[OURS])
            difference = (said - after[OURS]).abs().max() / after[OURS].abs().max()
            case.apart[name] = max(case.apart[name], difference.item())
            case.verdicts[name] += int((lost(logits) != broken).sum())
            case.own[name] += int((lost(said) != broken).sum())


def peak(run: Callable[[], object], device: torch.device) -> float:
    """What a contestant takes of a GPU's memory beyond what is there before, MiB."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measured(family: Family, settings: Settings, folder: Path) -> Case:
    """What was kept of an earlier run with these settings, or a new measurement, which is kept."""
    path = folder / f"{settings.device}-{family.name.replace(', ', '-').replace(' + ', '-')}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == asdict(settings):
            return Case(**{**kept, "settings": settings})
    case = measure(family, settings)
    path.write_text(json.dumps(asdict(case), indent=1))
    return case


ABOUT = """
## Published models: PGD and the floor

`python benchmarks/published.py --write{device}`. {machine}. {unit} over the floor's.

One model of each family at its published size with random weights, 527 classes, on noise: clips of 10 s and, where there
are pictures, one of 224 x 224. {batch} clips at once, {steps} steps, {rounds} rounds with clips of their own. Each clip's
label is what the model says of it. Radii (linf) are in turn {factors} times that at which a linear model would lose the
hit, so that some clips break and some do not.

- The **floor** is {steps} x forward and backward to the raw input alone (BCE summed over classes and clips) and a last
  forward, on the plain frozen model in eval mode, front end included. What is not attacked is encoded once. No step is
  taken.
- **front end alone** is the part of it before the network (filter bank, normalised pixels), measured alone; the rest is the
  network's.
- **ours** is PGD with {steps} steps as the harness runs it, which encodes what is held once and scores the last step: on a
  prepared copy (batch norms folded, channels-last weights), on a CPU with oneDNN products where they are as exact.
- **bf16** is the same with the network under `torch.autocast` to bfloat16, its weights cast once; front end and
  verdicts stay in float32.
- **compiled** is ours with everything behind the front end through `torch.compile`, for which there is no code for an
  FFT; compiling is not in the time.
"""

DECISIONS = """
### Decisions, {device}

**Verdict**: clips of which the untouched model in float32 says otherwise where this attack ends than where ours does. **Own
verdict**: clips, where ours ends, that the attacked model itself judges otherwise than the untouched one. **Logits**:
their largest difference there, over the largest logit. With random weights the best classes are closer than with
trained ones.
"""


def report(cases: list[Case], device: torch.device, most: Settings) -> str:
    """The section of the page."""
    about = ABOUT.format(
        device=" --device cuda" if device.type == "cuda" else "",
        machine=machine(device),
        unit="CPU time" if device.type == "cpu" else "Wall time, the GPU waited for,",
        batch=most.batch,
        steps=most.steps,
        rounds=most.rounds,
        factors=", ".join(map(str, FACTORS)),
    )
    names = (FRONT_END, OURS, BF16, COMPILED)
    times: dict[str, dict[str, str]] = {"floor, ms a clip and step": {c.name: per_step(c) for c in cases}}
    times |= {n: {c.name: str(c.over(n)) for c in cases if n in c.seconds} for n in names}
    decisions: dict[str, dict[str, str]] = {"broken by ours": {c.name: f"{c.broken} of {c.clips}" for c in cases}}
    decisions |= {f"{n}: verdict": {c.name: str(c.verdicts[n]) for c in cases if n in c.verdicts} for n in names[2:]}
    decisions |= {f"{n}: own verdict": {c.name: str(c.own[n]) for c in cases if n in c.own} for n in names[1:]}
    decisions |= {f"{n}: logits": {c.name: f"{c.apart[n]:.0e}" for c in cases if n in c.apart} for n in names[1:]}
    parts = [about, f"### Time over floor, {device.type}", table(times)]
    compiling = [f"{case.name} {case.compiling:.0f} s" for case in cases if case.compiling]
    if compiling:
        parts.append(f"Until the first attack on a compiled model is over: {'; '.join(compiling)}.")
    failed = [f"- {case.name}: {name}: `{why}`" for case in cases for name, why in case.failed.items()]
    if failed:
        parts.append("Did not run:\n\n" + "\n".join(failed))
    parts += [DECISIONS.format(device=device.type), table(decisions)]
    if device.type == "cuda":
        memory = {n: {c.name: f"{c.memory[n]:.0f}" for c in cases if n in c.memory} for n in (FLOOR, *names)}
        parts += ["### Peak memory beyond the weights, MiB", table(memory)]
    found = goals(cases)
    columns = {
        "figure": {goal.what: f"{goal.figure:.2f}" for goal in found},
        "at most": {goal.what: f"{goal.bar:.2f}" for goal in found},
        "goal": {goal.what: goal.words for goal in found},
    }
    parts += [f"### Goals, {device.type}", table(columns)]
    return "\n\n".join(part.strip() for part in parts)


def per_step(case: Case) -> str:
    """The floor over the clips of a batch and the steps, its last forward pass included."""
    middle = sorted(case.seconds[FLOOR])[len(case.seconds[FLOOR]) // 2]
    return f"{1000 * middle / case.settings.batch / case.settings.steps:.0f}"


def goals(cases: list[Case]) -> list[Goal]:
    """The bars."""
    found = [Goal(f"{case.name}: ours over floor", case.over(OURS).median, BAR) for case in cases]
    for name in (BF16, COMPILED):
        tried = [case for case in cases if name in case.verdicts]
        if tried:
            found.append(Goal(f"{name}: clips with another verdict", sum(case.verdicts[name] for case in tried), 0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(family.model for family in FAMILIES))
    parser.add_argument("--families", default=",".join(known), help="names of models, with commas")
    parser.add_argument("--compiled", default=",".join(COMPILE), help="those that are also compiled; '' for none")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, help="clips at once; 2 on a CPU, 32 on a GPU unless told")
    parser.add_argument("--steps", type=int, help="2 on a CPU, 10 on a GPU unless told")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where measurements are kept; unless told, nowhere")
    parser.add_argument("--quick", action="store_true", help="a smoke run of the small models, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    chosen, quick = options.families.split(","), options.compiled.split(",") if options.compiled else []
    if unknown := sorted({*chosen, *quick} - {*known}):
        parser.error(f"--families and --compiled must be of {', '.join(known)}, got {', '.join(unknown)}")
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    most = Settings(
        device.type, options.batch or (32 if gpu else 2), options.steps or (10 if gpu else 2), options.rounds, False
    )
    if options.quick:
        chosen, quick, most = [*SMALL], [], Settings(device.type, 2, 1, 1, False)
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for family in FAMILIES:
            if family.model in chosen:
                case = measured(family, replace(most, compiled=family.model in quick), folder)
                cases.append(case)
                over = {name: str(case.over(name)) for name in case.seconds if name != FLOOR}
                print(case.name, over, case.verdicts, case.own, case.failed, file=sys.stderr, flush=True)
    text = report(cases, device, most)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "published-cuda" if gpu else "published", text)
    wrong = [case.name for case in cases if not case.apart[OURS] <= AGREEMENT]
    for name in wrong:
        print(f"the attacked model does not score as the untouched one: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
