"""PGD in other libraries, each with the adapter that two inputs and several labels a clip need."""

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustav.classifier import Classifier, Inputs
from robustav.losses import bce
from robustav.threat import Budget, ThreatModel

Run = Callable[[], Inputs]  # one whole attack on one batch, returning the inputs it ends with


@dataclass(frozen=True)
class Problem:
    """What is asked of every contestant: the same model, batch, budgets (linf) and steps from the clean input."""

    model: Classifier  # in eval mode, weights asking for gradients, as a user has it
    inputs: Inputs
    labels: Tensor
    threat: ThreatModel
    steps: int

    @property
    def attacked(self) -> tuple[str, ...]:
        return tuple(sorted(self.threat.budgets))

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def double(self) -> "Problem":
        """The same in float64."""
        inputs = {m: x.double() for m, x in self.inputs.items()}
        return replace(self, model=copy.deepcopy(self.model).double(), inputs=inputs, labels=self.labels.double())

    def step(self, modality: str) -> float:
        """Length of a step, as our PGD takes it unless told."""
        return 2.5 / self.steps * float(self.threat.budgets[modality].epsilon)  # type: ignore[arg-type]

    def reach(self, modality: str) -> float:
        """The largest distance from the clean input that our budget uses: what rounding may add is kept free."""
        budget, zero = self.threat.budgets[modality], self.labels.new_zeros(1, 1)
        return budget.project(zero, zero + budget.high).item()

    def only(self) -> tuple[str, Budget, Tensor]:
        """The one attacked modality, its budget and its input."""
        (modality,) = self.attacked
        return modality, self.threat.budgets[modality], self.inputs[modality]


class ClosedOver(nn.Module):
    """The model as a network of one tensor; the other modalities' inputs are fixed and encoded in every call."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = copy.deepcopy(problem.model)
        self.modality, *_ = problem.only()
        self.others = {m: x for m, x in problem.inputs.items() if m != self.modality}

    def forward(self, x: Tensor) -> Tensor:
        return self.model({**self.others, self.modality: x})


class TakenApart(nn.Module):
    """The same network as someone who knows the model would write it: frozen, the other modalities encoded once."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = copy.deepcopy(problem.model).requires_grad_(False)
        self.modality, *_ = problem.only()
        with torch.no_grad():
            self.held = self.model.features({m: x for m, x in problem.inputs.items() if m != self.modality})

    def forward(self, x: Tensor) -> Tensor:
        return self.model.finish({**self.held, **self.model.features({self.modality: x})}).logits


class SideBySide(nn.Module):
    """All attacked modalities flattened into one vector, [batch, sum of sizes]; the others are fixed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = copy.deepcopy(problem.model)
        self.shapes = {m: problem.inputs[m].shape[1:] for m in problem.attacked}
        self.others = {m: x for m, x in problem.inputs.items() if m not in self.shapes}

    def join(self, inputs: Inputs) -> Tensor:
        return torch.cat([inputs[m].flatten(1) for m in self.shapes], dim=1)

    def split(self, x: Tensor) -> Inputs:
        parts = x.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {m: part.unflatten(1, shape) for (m, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        return self.model({**self.others, **self.split(x)})


class TwoColumns(nn.Module):
    """Inputs in [0, 1]; for each class the logits (0, z), whose cross-entropy is BCE. [batch, 2, class]"""

    def __init__(self, network: nn.Module, budget: Budget) -> None:
        super().__init__()
        self.network, self.low, self.size = network, budget.low, budget.high - budget.low

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(self.low + self.size * x)
        return torch.stack([torch.zeros_like(logits), logits], dim=1)


def torchattacks_pgd(problem: Problem, network: nn.Module | None = None) -> Run:
    """Cross-entropy and the range [0, 1] are wired in: two columns a class, and the input, eps and step rescaled."""
    from torchattacks import PGD

    modality, budget, x = problem.only()
    size = budget.high - budget.low
    network = TwoColumns(network or ClosedOver(problem), budget).eval()
    eps, step = problem.reach(modality) / size, problem.step(modality) / size
    attack = PGD(network, eps=eps, alpha=step, steps=problem.steps, random_start=False)

    def run() -> Inputs:
        found = attack((x - budget.low) / size, problem.labels.long())
        return {**problem.inputs, modality: budget.low + size * found}

    return run


def foolbox_pgd(problem: Problem) -> Run:
    """The loss is a method to override; `run` goes around a criterion that knows one class a clip."""
    import eagerpy
    import foolbox

    class LinfPGD(foolbox.attacks.LinfProjectedGradientDescentAttack):
        def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
            return lambda x: eagerpy.astensor(bce(model(x).raw, labels.raw).sum())

    modality, budget, x = problem.only()
    model = foolbox.PyTorchModel(ClosedOver(problem).eval(), (budget.low, budget.high), problem.device)
    attack = LinfPGD(abs_stepsize=problem.step(modality), steps=problem.steps, random_start=False)
    eps = problem.reach(modality)
    return lambda: {**problem.inputs, modality: attack.run(model, x, problem.labels, epsilon=eps)}


def art_pgd(problem: Problem) -> Run:
    """The loss is a bare function, because its own BCE handling takes the arg max of the labels.

    Several modalities become one vector, with arrays for eps, step and valid range. Inputs and outputs are NumPy's.
    """
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    budgets, joined = problem.threat.budgets, len(problem.attacked) > 1
    side_by_side = SideBySide(problem).eval()

    def each(of: Callable[[str], float]) -> Any:
        """A number a modality, in the shape that ART takes: one number, or one an entry of the vector."""
        if not joined:
            return of(problem.attacked[0])
        return np.concatenate([np.full(shape.numel(), of(m), np.float32) for m, shape in side_by_side.shapes.items()])

    network = side_by_side if joined else ClosedOver(problem).eval()
    x = side_by_side.join(problem.inputs) if joined else problem.only()[-1]
    estimator = PyTorchClassifier(
        network,
        loss=lambda logits, labels: bce(logits, labels).sum(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=len(problem.model.classes),
        clip_values=(each(lambda m: budgets[m].low), each(lambda m: budgets[m].high)),
        device_type="gpu" if problem.device.type == "cuda" else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        estimator,
        norm=np.inf,
        eps=each(problem.reach),
        eps_step=each(problem.step),
        max_iter=problem.steps,
        num_random_init=0,
        batch_size=len(x),
        verbose=False,
    )
    given, labels = x.cpu().numpy(), problem.labels.cpu().numpy()

    def run() -> Inputs:
        found = torch.from_numpy(attack.generate(given, labels)).to(problem.device)
        return {**problem.inputs, **(side_by_side.split(found) if joined else {problem.attacked[0]: found})}

    return run


class Peer(NamedTuple):
    """A row of `PEERS`: where it comes from, whether it can attack two modalities at once, how to set it up."""

    module: str
    distribution: str
    joint: bool
    make: Callable[[Problem], Run]
    double: bool = True  # whether it works in float64 too

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def can(self, problem: Problem) -> bool:
        """Whether the library is there and can be asked this."""
        single, plain = len(problem.attacked) == 1, problem.labels.dtype == torch.float32
        return self.installed and (self.joint or single) and (self.double or plain)

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.distribution)


PEERS: dict[str, Peer] = {
    "torchattacks": Peer("torchattacks", "torchattacks", False, torchattacks_pgd),
    "torchattacks, by hand": Peer(
        "torchattacks", "torchattacks", False, lambda problem: torchattacks_pgd(problem, TakenApart(problem))
    ),
    "Foolbox": Peer("foolbox", "foolbox", False, foolbox_pgd),
    "ART": Peer("art", "adversarial-robustness-toolbox", True, art_pgd, double=False),
}
