"""What all bridges share: what is known of a peer's attack, and what is done before and after it runs."""

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustav.attacks.ascent import Pursuit, look, put
from robustav.bridges.single import UnitBox, picture_shape
from robustav.classifier import Classifier, Inputs
from robustav.goals import Targeted, Untargeted
from robustav.norms import Draws, per_sample
from robustav.threat import HALF_ULP, Budget, ThreatModel

Setting = bool | int | float
OURS = {"norm", "seed", "n_classes", "targeted", "batch_size", "verbose", "minimal"}  # decided here, not by settings
SMALLEST = 10  # pixels: below it the peers' first tiles are empty
REALS = {"c", "kappa", "scale", "confidence"}  # whose defaults are written as whole numbers
ROUNDINGS = 8  # float32 roundings a coordinate that mapping a box there and back may cost
RELATIVE = 1e-6  # of the radius, for the peer's own measuring and scaling


class Kind(NamedTuple):
    """What must be known of a peer's attack before it runs."""

    norms: tuple[str, ...]  # of the budgets it can fill, or of what it makes small
    asks: Literal["loss", "scores", "verdicts"]  # "loss": its gradient alone; "scores": a multiclass model's
    epsilon: str | None = "eps"  # its parameter for the radius; None: it knows none, and what it finds is projected
    shares: tuple[str, ...] = ()  # parameters that are lengths: by default in its own proportion to the radius
    random: bool | str = True  # whether it draws, or the setting that decides
    whole: bool = False  # it sends all clips through the model at once, and no clip's path depends on another's
    knowledge: str = "gradients"
    classes: int = 2  # how many the model must have
    square: bool = False  # it needs pictures as high as wide
    tiles: bool = False  # it tries square tiles of the picture
    seeks: bool = False  # it looks for one success, and has nothing to say of a clip where it finds none


@dataclass(frozen=True)
class Bridge(ABC):
    """A peer's attack under our threat: one modality, the others held; the norm and the radius come from the threat.

    `settings` are the peer's own, by their names and with its defaults. Those that are lengths (`alpha`, `eps_step`) are
    shares of the radius: unless told, the share that the peer's defaults are of each other. Where an attack draws at
    random, or decides for a clip by its batch mates, clips are attacked one by one, so that a result does not depend on
    them; `together` gives up on that for attacks that merely draw, which is faster.

    What an attack with a radius returns is handed on as it is, except that rounding is repaired: up to `ROUNDINGS`
    float32 roundings a coordinate and `RELATIVE` of the radius. Anything further out is left for the audit to find. An
    attack without a radius (`roams`) looks for the smallest perturbation; its finding is projected on the budget.
    """

    name: str
    settings: Mapping[str, Setting] | tuple[tuple[str, Setting], ...] = ()
    together: bool = False

    peer: ClassVar[str]  # as on the command line, and the name of our extra
    module: ClassVar[str]  # that holds its attacks
    kinds: ClassVar[Mapping[str, Kind]]
    refused: ClassVar[Mapping[str, str]]  # why not

    def __post_init__(self) -> None:
        known = [name for name in self.kinds if self.made(name) is not None]
        if self.name in self.refused:
            raise ValueError(f"{self.peer}'s {self.name} cannot be judged by a budget: {self.refused[self.name]}")
        if self.name not in known:
            raise ValueError(f"{self.peer} has no attack {self.name!r} that robustav knows, only {', '.join(known)}")
        object.__setattr__(self, "settings", tuple(sorted(dict(self.settings).items())))
        own = {key: p.default for key, p in self.parameters().items() if type(p.default) in (bool, int, float)}
        free = sorted(own.keys() - OURS - {self.kind.epsilon})
        for key, value in dict(self.settings).items():
            if key not in free:
                raise ValueError(f"{self.peer}'s {self.name} has no setting {key!r} that is free, only {free}")
            count = isinstance(own[key], int) and key not in REALS
            if isinstance(value, bool) != isinstance(own[key], bool) or (count and not isinstance(value, int)):
                raise ValueError(f"`{key}` of {self.name} must be like {own[key]!r}, got {value!r}")

    @property
    def kind(self) -> Kind:
        """What is known of it."""
        return self.kinds[self.name]

    @property
    def knowledge(self) -> str:
        """What it sees of the model."""
        return self.kind.knowledge

    @property
    def roams(self) -> bool:
        """Whether what it looks at may lie outside the budget."""
        return self.kind.epsilon is None

    @property
    def survivors(self) -> bool:
        """Whether it looks for one success."""
        return self.kind.seeks or self.roams

    def made(self, name: str) -> type | None:
        """The peer's class of that name; None where the installed peer has none."""
        if find_spec(self.module.partition(".")[0]) is None:
            raise ValueError(f"{self.peer} is not installed: pip install 'robustav[{self.peer}]'")
        return getattr(import_module(self.module), name, None)

    def parameters(self) -> Mapping[str, Parameter]:
        """Of the peer's class."""
        made = self.made(self.name)
        assert made is not None
        return signature(made).parameters

    def check(self, model: Classifier, threat: ThreatModel) -> str:
        """The attacked modality; raises `ValueError` for what this attack cannot do, before anything runs."""
        name, kind = f"{self.peer}'s {self.name}", self.kind
        if len(threat.budgets) != 1:
            raise ValueError(f"{name} attacks one modality at a time, got {sorted(threat.budgets)}")
        ((modality, budget),) = threat.budgets.items()
        spec = UnitBox(model.specs[modality]).spec
        if (budget.low, budget.high) != (spec.low, spec.high):
            raise ValueError(
                f"the budget's range [{budget.low:g}, {budget.high:g}] must be that of {modality!r}, "
                f"[{spec.low:g}, {spec.high:g}]"
            )
        if budget.norm not in kind.norms:
            raise ValueError(f"{name} works in {' and '.join(kind.norms)}, not in {budget.norm}")
        if len(model.classes) < kind.classes:
            raise ValueError(f"{name} needs at least {kind.classes} classes, the model has {len(model.classes)}")
        _, height, width = picture_shape(spec.shape)
        if kind.square and height != width:
            raise ValueError(f"{name} needs pictures as high as wide, {modality!r} makes {height} x {width}")
        if kind.tiles:
            share = self._setting("p_init") if "p_init" in self.parameters() else 0.8
            if min(height, width) < SMALLEST or round(math.sqrt(share * height * width)) >= min(height, width):
                raise ValueError(
                    f"{name} tries tiles of a share of `p_init` = {share:g} of the picture, which must fit into its "
                    f"{height} x {width}, {SMALLEST} at least: choose a smaller one"
                )
        if kind.asks == "scores":
            if model.label_kind != "multiclass":
                raise ValueError(f"{name} knows one class a clip only: it cannot attack a {model.label_kind} model")
            if not isinstance(threat.goal, Untargeted | Targeted):
                raise ValueError(f"{name} cannot pursue the goal: {threat.goal.words(model.classes)}")
        return modality

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        """See `robustav.attacks.Attack`."""
        modality = self.check(model, threat)
        clean, budget = inputs[modality], threat.budgets[modality]
        radius = torch.as_tensor(budget.radius(clean), dtype=torch.float64).cpu().expand(len(clean))
        pursuit, found = Pursuit(model, inputs, labels, threat, draws), inputs
        if self.roams:  # where the goal is reached already, the smallest perturbation is none
            stands = ~look(model, inputs, labels, threat).reached
            radius = radius * stands.cpu()
        for rows in self._groups(radius):
            part = pursuit.at(rows.to(clean.device))
            seed = int(torch.randint(2**31, (), generator=draws[int(rows[0])]))
            with undisturbed(model, seed, clean.device):
                x = self._run(part, modality, radius[rows[0]].item(), seed).detach()
            before, allowed = part.inputs[modality], part.threat.budgets[modality]
            x = allowed.project(before, x) if self.roams else repaired(before, x, allowed)
            found = put(found, rows.to(clean.device), {**part.inputs, modality: x})
        return {**inputs, modality: found[modality]}

    def _groups(self, radius: Tensor) -> list[Tensor]:
        """Which clips are attacked together; those that may not move are left out."""
        rows = radius.nonzero().flatten()
        drawing = self.kind.random if isinstance(self.kind.random, bool) else self._setting(self.kind.random)
        alike = len(radius[rows].unique()) <= 1
        together = self.kind.whole and alike and (self.together or not drawing)
        return list(rows.split(max(len(rows), 1) if together else 1)) if len(rows) else []

    def _setting(self, key: str) -> Any:
        return dict(self.settings).get(key, self.parameters()[key].default)

    def _arguments(self, radius: float, seed: int, classes: int, **ours: Any) -> dict[str, Any]:
        """What the peer's class is made with: the radius, lengths in proportion to it, and what else it asks for."""
        parameters = self.parameters()
        arguments = {**dict(self.settings), **ours, "seed": seed, "n_classes": classes, "verbose": False}
        if self.kind.epsilon is not None:
            arguments[self.kind.epsilon] = radius
            default = parameters[self.kind.epsilon].default
            for key in self.kind.shares:
                arguments[key] = radius * dict(self.settings).get(key, parameters[key].default / default)
        return {key: value for key, value in arguments.items() if key in parameters}

    @abstractmethod
    def _run(self, part: Pursuit, modality: str, radius: float, seed: int) -> Tensor:
        """What the peer makes of these clips, in raw units and shape."""


def repaired(clean: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """`x` with the clips that rounding alone has put outside the budget or its range put back; the rest as it is."""
    step = ROUNDINGS * HALF_ULP * (budget.high - budget.low)
    unit = clean[:1].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[budget.norm]
    allowed = budget.radius(clean) * (1 + RELATIVE) + step * unit
    inside = budget.rules.length(x.double() - clean.double()) <= allowed
    inside &= (x - x.clamp(budget.low, budget.high)).flatten(1).abs().amax(1) <= step
    return torch.where(per_sample(inside, x).bool(), budget.project(clean, x), x)  # type: ignore[union-attr]


@contextmanager
def undisturbed(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded and weights frozen; afterwards they, and every module's mode, are as they were."""
    devices = [device] if device.type == "cuda" else []
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    numbers, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  (the one that peers draw from)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        model.requires_grad_(False)
        try:
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(arrays)  # noqa: NPY002
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


TEXT = re.compile(r"(\w+)(?:\((.*)\))?")


def read(text: str) -> tuple[str, dict[str, Setting]]:
    """`PGD(steps=20, random_start=false)` as a name and its settings."""
    match = TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"an attack of a peer is written as NAME or NAME(key=number, ...), got {text!r}")
    settings: dict[str, Setting] = {}
    for part in (part.strip() for part in (match[2] or "").split(",") if part.strip()):
        key, _, value = (piece.strip() for piece in part.partition("="))
        words = {"true": True, "false": False}
        try:
            whole = value.lstrip("+-").isdecimal()
            settings[key] = words[value.lower()] if value.lower() in words else int(value) if whole else float(value)
        except ValueError:
            raise ValueError(f"a setting is written as key=number (or true, false), got {part!r}") from None
    return match[1], settings
