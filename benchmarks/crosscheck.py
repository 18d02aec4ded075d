"""How strong our suites are beside other libraries: what stands after ours must not fall to theirs.

`python benchmarks/crosscheck.py --write` measures everything (some minutes of CPU) and writes its section of
docs/benchmarks.md; `--quick` is a smoke run. Libraries that are not installed are left out. Ends with status 1 if a
peer breaks more of the clips that a suite of ours leaves standing than the tolerance allows.
"""

import argparse
import importlib.metadata
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Threads that wait must sleep, or whatever else runs on the machine decides the time; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from pgd import Clips, table
from timing import machine, write_section
from torch import Tensor, nn

from robustav.attacks import FAB, FMN
from robustav.classifier import Classifier, Wrapped, frames
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import Ledger, failures
from robustav.models.small import convolution
from robustav.plan import Member, conditions
from robustav.suites import SUITES, members
from robustav.threat import Budget

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
GOAL = Untargeted("multiclass")
SIDE, CLASSES = 16, 6
STANDING = {"plain": (0.5,), "hardened": (0.7, 0.4)}  # shares of the clips that the budgets are chosen to leave
TRAINING = {"linf": 0.03, "l2": 0.5}  # radii of the hardened model's lessons
SUITES_RUN = ("standard", "thorough")
STEPS, QUERIES = 50, 1000  # of a peer's single attack
LONG_STEPS = 100  # that AutoAttack was published with; its port takes 10 unless told
REACH = 1e-4  # share of the radius by which a peer's point may lie outside and still count


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coloured gratings in noise, [count, 3, side, side] in [0, 1]; the class is one of six directions."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draws)
    phase, period = torch.rand(2, count, 1, 1, generator=draws)
    angle = torch.pi * labels.view(-1, 1, 1) / CLASSES
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    wave = torch.sin(2 * torch.pi * ((rows * angle.sin() + columns * angle.cos()) / (4 + 3 * period) + phase))
    colour = torch.rand(count, 3, 1, 1, generator=draws) * 0.3
    noise = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=draws)
    return (0.5 + colour * wave[:, None] + noise).clamp(0, 1), labels


def network() -> nn.Sequential:
    return nn.Sequential(convolution(3, 16, 2), convolution(16, 32, 2), nn.Flatten(), nn.Linear(512, CLASSES))


def trained(lesson: str | None, epochs: int) -> nn.Sequential:
    """A network that has seen 2 000 pictures `epochs` times; with a norm as `lesson`, attacked by four PGD steps."""
    torch.manual_seed(0)
    model, (x, labels) = network(), pictures(2000, seed=1)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            given = (
                hardened(model, x[rows], labels[rows], Budget(lesson, TRAINING[lesson], low=0)) if lesson else x[rows]
            )
            optimiser.zero_grad()
            F.cross_entropy(model(given), labels[rows]).backward()
            optimiser.step()
    return model.eval()


def hardened(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Four steps of half a radius up the cross-entropy."""
    model.eval()
    found = x
    for _ in range(4):
        leaf = found.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
        found = budget.project(x, budget.step(x, found, gradient, 0.5))
    model.train()
    return found


class Case(NamedTuple):
    """One network, its clips (all classified right), and what may be done to them."""

    name: str
    network: nn.Module  # of [batch, 3, side, side]
    clips: Clips
    norm: str
    eps: float

    @property
    def model(self) -> Classifier:
        return classifier(self.network)

    @property
    def budget(self) -> Budget:
        return Budget(self.norm, self.eps, low=0.0, high=1.0)

    @property
    def x(self) -> Tensor:
        return self.clips.inputs["visual"].squeeze(1)

    @property
    def column(self) -> str:
        return f"{self.name}, {self.norm} {self.eps:.3g}"


def classifier(net: nn.Module) -> Classifier:
    """The network as ours: one frame a clip."""
    made = Wrapped(
        net,
        specs={"visual": frames(1, SIDE)},
        classes=tuple(f"direction {number}" for number in range(CLASSES)),
        label_kind="multiclass",
        call=lambda inner, inputs: inner(inputs["visual"].squeeze(1)),
    )
    return made.eval()


def cases(name: str, net: nn.Module, count: int) -> list[Case]:
    """Both norms, each with the budgets at which our minimum-norm attacks leave what `STANDING` says."""
    x, labels = pictures(4 * count, seed=2)
    with torch.no_grad():
        right = (net(x).argmax(1) == labels).nonzero().flatten()[:count]
    classes = classifier(net).classes
    clips = Clips(f"gratings, {name}", classes, {"visual": x[right][:, None]}, labels[right], "multiclass")
    found = []
    for norm, radius in (("linf", 0.02), ("l2", 0.3)):
        case = Case(name, net, clips, norm, radius)
        smallest = [Member("fmn", FMN(), None, True), Member("fab", FAB(), None, True)]
        rows = conditions(smallest, [{"visual": case.budget}], GOAL)
        with tempfile.TemporaryDirectory() as folder:
            ledger = evaluated(case, rows, 0, Path(folder))
            gauges = np.min([ledger.read(row.key)["gauge"].to_numpy() for row in rows[1:]], axis=0)
        found += [case._replace(eps=radius * float(np.quantile(gauges, 1 - share))) for share in STANDING[name]]
    return found


def evaluated(case: Case, rows: Sequence[Any], seed: int, folder: Path) -> Ledger:
    settings = Settings(device="cpu", batch_size=len(case.clips.labels), probed=0)
    ledger = evaluate(case.model, case.clips, rows, GOAL, folder / "run", seed=seed, settings=settings)
    if wrong := failures(ledger):
        raise RuntimeError(f"the audit found {wrong}")
    return ledger


def ours(suite: str, case: Case, seed: int) -> Tensor:
    """Which clips a suite leaves standing, [clip]."""
    model = case.model
    chosen = members(SUITES[suite](GOAL, model), model, "hits")
    rows = conditions(chosen, [{"visual": case.budget}], GOAL, score="hits")
    with tempfile.TemporaryDirectory() as folder:
        ledger = evaluated(case, rows, seed, Path(folder))
        broken = [ledger.read(row.key)["reached"].to_numpy(bool) for row in rows]
    return torch.from_numpy(~np.any(broken, axis=0))


Attacked = Callable[[Case, int], Tensor]  # the case and a seed, to the points [clip, 3, side, side]


def of_torchattacks(name: str, **given: Any) -> Attacked:
    def attack(case: Case, seed: int) -> Tensor:
        import torchattacks

        own = {"seed": seed} if name not in ("PGD", "PGDL2") else {}
        if name in ("PGD", "PGDL2"):
            own["alpha"] = 2.5 / STEPS * case.eps
        else:
            own["norm"] = {"linf": "Linf", "l2": "L2"}[case.norm]
        if name in ("APGDT", "FAB"):
            own["n_classes"] = CLASSES
        made = getattr(torchattacks, name)(case.network, eps=case.eps, **own, **given)
        return made(case.x, case.clips.labels)

    return attack


def autoattack(case: Case, seed: int) -> Tensor:
    """The port's own sequence, its gradient attacks as long as they were published."""
    import torchattacks

    made = torchattacks.AutoAttack(
        case.network, {"linf": "Linf", "l2": "L2"}[case.norm], case.eps, n_classes=CLASSES, seed=seed
    )
    for part in made._autoattack.attacks:
        if hasattr(part, "steps"):
            part.steps = LONG_STEPS
    return made(case.x, case.clips.labels)


def pyautoattack(case: Case, seed: int) -> Tensor:
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2"}[case.norm]
    made = AutoAttack(case.network, norm=norm, eps=case.eps, version="standard", device="cpu", seed=seed, verbose=False)
    return made.run_standard_evaluation(case.x, case.clips.labels, bs=len(case.x))


def of_foolbox(names: Mapping[str, str], **given: Any) -> Attacked:
    def attack(case: Case, seed: int) -> Tensor:
        import foolbox

        model = foolbox.PyTorchModel(case.network, (0, 1), "cpu")
        made = getattr(foolbox.attacks, names[case.norm])(**given)
        return made(model, case.x, case.clips.labels, epsilons=case.eps)[1]

    return attack


def of_art(name: str, **given: Any) -> Attacked:
    def attack(case: Case, seed: int) -> Tensor:
        import art.attacks.evasion
        from art.estimators.classification import PyTorchClassifier

        estimator = PyTorchClassifier(
            case.network, nn.CrossEntropyLoss(), (3, SIDE, SIDE), CLASSES, clip_values=(0, 1), device_type="cpu"
        )
        step = (2 if name.startswith("Auto") else 2.5 / STEPS) * case.eps
        made = getattr(art.attacks.evasion, name)(
            estimator,
            norm={"linf": np.inf, "l2": 2}[case.norm],
            eps=case.eps,
            eps_step=step,
            max_iter=STEPS,
            batch_size=len(case.x),
            verbose=False,
            **given,
        )
        return torch.from_numpy(made.generate(case.x.numpy(), case.clips.labels.numpy()))

    return attack


class Peer(NamedTuple):
    """A row of `PEERS`: where it comes from, and what it does."""

    module: str
    distribution: str
    attack: Attacked
    norms: tuple[str, ...] = ("linf", "l2")

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


TA, FB, ART = ("torchattacks",) * 2, ("foolbox",) * 2, ("art", "adversarial-robustness-toolbox")
PEERS = {
    "torchattacks PGD": Peer(*TA, of_torchattacks("PGD", steps=STEPS), ("linf",)),
    "torchattacks PGDL2": Peer(*TA, of_torchattacks("PGDL2", steps=STEPS), ("l2",)),
    "torchattacks APGD": Peer(*TA, of_torchattacks("APGD", steps=STEPS)),
    "torchattacks APGDT": Peer(*TA, of_torchattacks("APGDT", steps=STEPS)),
    "torchattacks FAB": Peer(*TA, of_torchattacks("FAB", steps=STEPS)),
    "torchattacks Square": Peer(*TA, of_torchattacks("Square", n_queries=QUERIES)),
    "torchattacks AutoAttack": Peer(*TA, autoattack),
    "AutoAttack (pyautoattack)": Peer("pyautoattack", "pyautoattack", pyautoattack),
    "Foolbox PGD": Peer(
        *FB, of_foolbox({"linf": "LinfPGD", "l2": "L2PGD"}, steps=STEPS, rel_stepsize=2.5 / STEPS, random_start=True)
    ),
    "Foolbox FMN": Peer(*FB, of_foolbox({"linf": "LInfFMNAttack", "l2": "L2FMNAttack"}, steps=2 * STEPS)),
    "ART PGD": Peer(*ART, of_art("ProjectedGradientDescent", num_random_init=1)),
    "ART AutoPGD, cross-entropy": Peer(
        *ART, of_art("AutoProjectedGradientDescent", nb_random_init=1, loss_type="cross_entropy")
    ),
    "ART AutoPGD, logit ratio": Peer(
        *ART, of_art("AutoProjectedGradientDescent", nb_random_init=1, loss_type="difference_logits_ratio")
    ),
}


class Left(NamedTuple):
    """Which clips stand after one attack, and how many wrong answers it owes to points outside the budget."""

    standing: Tensor  # [clip]
    outside: int


def left_by(peer: Peer, case: Case, seed: int) -> Left:
    """Judged by the untouched network, on points that the budget allows."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the one that peers draw from)
    found = peer.attack(case, seed).detach()
    case.network.eval().requires_grad_(True)
    length = case.budget.rules.length(found.double() - case.x.double())
    inside = (length <= case.eps * (1 + REACH)) & (found.flatten(1).amin(1) >= 0) & (found.flatten(1).amax(1) <= 1)
    with torch.no_grad():
        right = case.network(found).argmax(1) == case.clips.labels
    return Left(right | ~inside, int((~right & ~inside).sum()))


class Row(NamedTuple):
    """One attack on one case, a value a seed: robust accuracies, and of each suite the clips it left and this broke."""

    accuracy: list[float]
    more: dict[str, list[int]]  # suite -> clips
    outside: int

    def words(self) -> str:
        own = f"{np.mean(self.accuracy):.3f}"
        return f"{own} ({' / '.join(str(max(alone)) for alone in self.more.values())})" if self.more else own


class Result(NamedTuple):
    """One case, and what every attack made of it."""

    case: Case
    rows: dict[str, Row]

    @property
    def tolerance(self) -> int:
        """Clips that a peer may break beyond a suite of ours with any one seed, since all of them draw at random."""
        return max(1, len(self.case.clips.labels) // 100)

    @property
    def worst(self) -> dict[str, int]:
        """Suite -> the most clips that one peer with one seed broke beyond it."""
        pairs = [pair for row in self.rows.values() for pair in row.more.items()]
        return {suite: max(max(alone) for name, alone in pairs if name == suite) for suite, _ in pairs}


def measure(case: Case, seeds: int, suites: Sequence[str]) -> Result:
    """Every attack with every seed."""
    stood = {suite: [ours(suite, case, seed) for seed in range(seeds)] for suite in suites}
    found = {f"ours, {suite}": Row([s.float().mean().item() for s in left], {}, 0) for suite, left in stood.items()}
    for name, peer in PEERS.items():
        if not peer.installed or case.norm not in peer.norms:
            continue
        runs = [left_by(peer, case, seed) for seed in range(seeds)]
        more = {
            suite: [int((mine & ~run.standing).sum()) for mine, run in zip(left, runs, strict=True)]
            for suite, left in stood.items()
        }
        accuracy = [run.standing.float().mean().item() for run in runs]
        found[name] = Row(accuracy, more, sum(run.outside for run in runs))
    print(case.column, {name: row.words() for name, row in found.items()}, file=sys.stderr, flush=True)
    return Result(case, found)


ABOUT = """
## Strength: our suites and other libraries at the same budgets

`python benchmarks/crosscheck.py --write`. {machine}; {versions}. Not a test of speed.

Two networks of two convolutions, **plain** and **hardened** (four PGD steps a batch in linf {radius:g}), trained by the
script on 2 000 pictures of 3 x {side} x {side} pixels, coloured gratings in {classes} directions; {clips} test pictures
that the network gets right; seeds {seeds}. The budgets are those at which the smaller of what our FMN and FAB need leaves
{standing} of the pictures.

A cell is the robust accuracy, mean over the seeds, and in brackets the most pictures that this attack broke with one
seed and that ours with the same seed left standing, after the suite {suites}. **At most {tolerance} is
allowed**, since all of them draw at random; more ends the script with status 1. Every point is judged by the untouched
network; a peer's counts where it lies in the budget, give or take {reach:g} of the radius{outside}.

- **ours** is `harness.evaluate` with score "hits", as the command line runs it. **standard** climbs 100 steps from one
  start and asks 500 queries, half and a tenth of AutoAttack; **thorough** climbs 100 from five and asks 5 000.
- **torchattacks AutoAttack** is its port of AutoAttack's standard set (APGD, APGD-T, FAB-T, Square). Its gradient attacks
  take 10 steps unless told; here they take the published {long}, and Square its 5 000 queries.
- Single attacks of peers take {steps} steps (Foolbox's FMN {fmn}) or {queries} queries, PGD from a random start with
  steps of 2.5 radii in all.
"""


def report(results: Sequence[Result], seeds: int) -> str:
    """The section of the page."""
    present = {peer.module: peer.distribution for peer in PEERS.values() if peer.installed}
    versions = ", ".join(f"{module} {importlib.metadata.version(name)}" for module, name in present.items())
    outside = sum(row.outside for result in results for row in result.rows.values())
    suites = list(results[0].worst)
    shares = sorted({share for result in results for share in STANDING[result.case.name]}, reverse=True)
    about = ABOUT.format(
        machine=machine(CPU),
        versions=versions,
        radius=TRAINING["linf"],
        side=SIDE,
        classes=CLASSES,
        clips=len(results[0].case.clips.labels),
        seeds=", ".join(map(str, range(seeds))),
        standing=", ".join(f"{share:g}" for share in shares),
        suites=" / ".join(suites),
        tolerance=results[0].tolerance,
        reach=REACH,
        outside=f" ({outside} wrong answers lay further out)" if outside else " (none lay further out)",
        long=LONG_STEPS,
        steps=STEPS,
        fmn=2 * STEPS,
        queries=QUERIES,
    )
    if absent := [name for name, peer in PEERS.items() if not peer.installed]:
        about += f"\nNot installed, so left out: {', '.join(absent)}.\n"
    parts = [about]
    for norm in dict.fromkeys(result.case.norm for result in results):
        columns = {
            f"{result.case.name}, {result.case.eps:.3g}": {name: row.words() for name, row in result.rows.items()}
            for result in results
            if result.case.norm == norm
        }
        parts.append(f"### {norm}\n\n{table(columns)}")
    goals = {
        f"{result.case.column}: beyond {suite}": (most, result.tolerance)
        for result in results
        for suite, most in result.worst.items()
    }
    columns = {
        "pictures, at worst": {what: str(most) for what, (most, _) in goals.items()},
        "at most": {what: str(bar) for what, (_, bar) in goals.items()},
        "goal": {what: "met" if most <= bar else f"missed by {most - bar}" for what, (most, bar) in goals.items()},
    }
    parts.append(f"### Goals\n\n{table(columns)}")
    return "\n\n".join(part.strip() for part in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few clips, one seed, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to share
    logging.getLogger("art").setLevel(logging.WARNING)
    seeds, clips = (1, 8) if options.quick else (options.seeds, options.clips)
    suites = SUITES_RUN[:1] if options.quick else SUITES_RUN
    networks = (
        {"plain": trained(None, 2)} if options.quick else {"plain": trained(None, 5), "hardened": trained("linf", 8)}
    )
    chosen = [case for name, net in networks.items() for case in cases(name, net, clips)]
    results = [measure(case, seeds, suites) for case in chosen]
    text = report(results, seeds)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "crosscheck", text)
    wrong = [
        f"{result.case.column}, {name}, beyond {suite}: {alone}"
        for result in results
        for name, row in result.rows.items()
        for suite, alone in row.more.items()
        if max(alone) > result.tolerance
    ]
    for line in wrong:
        print(f"a peer breaks more: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
