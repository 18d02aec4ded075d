"""What the checks of the catalogue work with: attacks that misbehave, a model that remembers, and a ruler of its own."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from robustav.attacks import ATTACKS, Attack
from robustav.classifier import Classifier, Inputs, InputSpec
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import Ledger
from robustav.norms import Draws
from robustav.plan import conditions
from robustav.randomness import draws_for
from robustav.selftest.planted import dense, linear
from robustav.selftest.tiny import SPECS, Clips, last_layer, network
from robustav.suites import with_settings
from robustav.threat import Budget, ThreatModel

GOAL = Untargeted()
P = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}  # of the p-norm
FEW = {"steps": 4, "queries": 20, "aims": 2}  # enough to leave a budget or a box


class KilledError(BaseException):
    """Stands for a kill: no code catches it."""


class Recording(Classifier):
    """Linear in inputs of any shape, and remembers the shapes that it was shown."""

    label_kind = "multilabel"
    classes = ("a", "b", "c", "d", "e")

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.specs = {"audio": InputSpec(shape, -1.0, 1.0, "amplitude")}
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(len(self.classes), torch.Size(shape).numel(), generator=draw)
        self.shown: set[tuple[int, ...]] = set()

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """Values in a row."""
        self.shown.add(tuple(x.shape[1:]))
        return x.reshape(len(x), -1)

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """The only modality's."""
        return features["audio"]

    def classify(self, latent: Tensor) -> Tensor:
        """A product with the weight."""
        return latent @ self.weight.T


@dataclass(frozen=True)
class Straying:
    """An attack that lays its budget around the point where it stands: each step goes one radius further."""

    steps: int

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        """All values up, `steps` times."""
        x = inputs
        for _ in range(self.steps):
            x = threat.project(x, {m: value + 1 for m, value in x.items()})
        return x


@dataclass(frozen=True)
class Mortal:
    """An attack that is killed when its lives, which belong to no settings, are spent."""

    attack: Attack
    lives: list[int] = field(repr=False, compare=False)

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        """One life a batch."""
        self.lives[0] -= 1
        if not self.lives[0]:
            raise KilledError
        return self.attack(model, inputs, labels, threat, draws=draws)


@cache
def attacks_under(norm: str) -> tuple[Attack, ...]:
    """Every attack of the table that takes this norm; others must say that they do not."""
    model, taken = Recording((4,)), []
    for make in ATTACKS.values():
        attack = with_settings(make(), **FEW)
        try:
            run(attack, model, {"audio": torch.zeros(1, 4)}, torch.eye(1, 5), around_audio(norm, 0.1))
        except ValueError as error:
            if norm in str(error):
                continue
            raise AssertionError(f"{attack!r} fails under {norm}: {error}") from error
        taken.append(attack)
    return tuple(taken)


def run(attack: Attack, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel) -> Inputs:
    """The attack on clips called 0, 1, 2 and so on."""
    return attack(model, inputs, labels, threat, draws=draws_for(0, map(str, range(len(labels)))))


def around_audio(norm: str, epsilon: float) -> ThreatModel:
    """The audio of a `Recording` attacked."""
    return ThreatModel({"audio": Budget(norm, epsilon, low=-1.0, high=1.0)}, GOAL)


def around_both(norm: str, epsilon: float) -> ThreatModel:
    """Both modalities attacked, each in a range of its own."""
    return ThreatModel({m: Budget(norm, epsilon, low=s.low, high=s.high) for m, s in SPECS.items()}, GOAL)


def check_inside(what: str, clean: Inputs, x: Inputs, threat: ThreatModel) -> None:
    """Measured here, in input units and float64, by none of the code that projects or audits."""
    for m, budget in threat.budgets.items():
        delta = (x[m].double() - clean[m].double()).flatten(1)
        length, radius = delta.norm(p=P[budget.norm], dim=1).max().item(), float(budget.radius(clean[m]))
        low, high = (end.item() for end in x[m].aminmax())
        assert length <= radius * (1 + 1e-6), f"{what}: {m} moved by {length:.6g} with {budget.norm} radius {radius:g}"
        assert budget.low <= low and high <= budget.high, (
            f"{what}: {m} reaches from {low:g} to {high:g} in a range of [{budget.low:g}, {budget.high:g}]"
        )


def evaluated(folder: Path, attack: Attack, settings: Settings | None = None, clips: int = 10) -> Ledger:
    """A run of `attack` on a small network."""
    rows = conditions({"attack": attack}, [around_both("linf", 0.1).budgets], GOAL, [tuple(SPECS)])
    settings = settings or Settings(device="cpu")
    return evaluate(network(dense()), Clips(count=clips), rows, GOAL, folder / "run", settings=settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its record and its seconds."""
    files = [file for file in folder.rglob("*") if file.is_file() and "seconds" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name != "run.json"}


def linear_and_weight() -> tuple[Classifier, dict[str, Tensor]]:
    """A linear model, and its weight for each modality, [class, value]."""
    model = linear()
    sizes = [torch.Size(SPECS[m].shape).numel() for m in sorted(SPECS)]
    return model, dict(zip(sorted(SPECS), last_layer(model).weight.detach().split(sizes, dim=1), strict=True))
