"""What an adversary may do: a budget per attacked modality, and a goal."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from robustav.classifier import Inputs, InputSpec, Trace
from robustav.goals import Goal, Steered, Untargeted
from robustav.norms import NORMS, TINY, Draws, Norm, Radius, l2_length, linf_length, per_sample

LARGEST = 1e18  # radius; beyond it squares leave float32
HALF_ULP = 2.0**-24  # largest rounding error of a float32 near 1
SPARE = 2.0**-20  # of a radius: what float32 can lose in measuring and scaling a perturbation


@dataclass(frozen=True)
class Budget:
    """How far one modality's input may move: a norm, a radius, the valid range, and where it may be written.

    The radius is `epsilon` in the input's own unit, a number, a fraction such as `"4/255"`, or a tensor [batch]; or it
    follows from `snr_db`, the signal-to-noise ratio in dB that must remain, `20 log10(||x|| / ||delta||)` in l2.
    `writable` ([batch, ...] booleans that broadcast against the input) keeps the perturbation out of padding.
    """

    norm: str = "linf"
    epsilon: float | Fraction | str | Tensor | None = None
    snr_db: float | None = None
    low: float = -1.0
    high: float = 1.0
    factor: float | Tensor = 1.0  # times which the radius of an SNR is allowed; an epsilon is multiplied itself
    writable: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"`norm` must be one of {sorted(NORMS)}, got {self.norm!r}")
        if (self.epsilon is None) == (self.snr_db is None):
            raise ValueError(
                f"a budget needs either `epsilon` or `snr_db`, got epsilon={self.epsilon!r} and snr_db={self.snr_db!r}"
            )
        if self.snr_db is not None and (self.norm != "l2" or not math.isfinite(self.snr_db)):
            raise ValueError(
                f"`snr_db` is a finite ratio of powers and goes with norm 'l2', got {self.snr_db!r} with {self.norm!r}"
            )
        if isinstance(self.epsilon, str):
            object.__setattr__(self, "epsilon", parse_number(self.epsilon))
        epsilon = self.epsilon
        smallest = epsilon.min().item() if isinstance(epsilon, Tensor) else epsilon
        if smallest is not None and not (0 <= float(smallest) < LARGEST):
            raise ValueError(f"`epsilon` must be a finite number at or above 0 (and below {LARGEST:g}), got {smallest}")
        if isinstance(epsilon, Tensor) and epsilon.ndim > 1:
            raise ValueError(f"`epsilon` must be a number or [batch], got shape {list(epsilon.shape)}")
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`, got low={self.low:g} and high={self.high:g}")

    @property
    def rules(self) -> Norm:
        return NORMS[self.norm]

    def radius(self, clean: Tensor) -> Radius:
        """The largest allowed length of a perturbation of `clean`: a float, or [batch]."""
        if self.snr_db is not None:
            return l2_length(clean) * (self.factor * 10 ** (-self.snr_db / 20))
        return self.epsilon if isinstance(self.epsilon, Tensor) else float(self.epsilon)  # type: ignore[arg-type]

    def scaled(self, factor: float | Tensor) -> "Budget":
        """The same budget with its radius times `factor` (a number, or [batch])."""
        if self.snr_db is not None:
            if isinstance(factor, Tensor) or factor <= 0:
                return replace(self, factor=self.factor * factor)
            return replace(self, snr_db=self.snr_db - 20 * math.log10(factor))
        return replace(self, epsilon=self.radius(torch.zeros(0)) * factor)

    def at(self, rows: Tensor) -> "Budget":
        """The budget of some clips of the batch."""
        chosen: dict[str, Any] = {
            name: value[rows]
            for name in ("epsilon", "factor", "writable")
            if isinstance(value := getattr(self, name), Tensor) and value.ndim
        }
        return replace(self, **chosen) if chosen else self

    def project(self, clean: Tensor, x: Tensor) -> Tensor:
        """The point nearest to `x` (exactly so inside the valid range) that the budget allows."""
        delta = self._masked(x - clean)
        radius = self.radius(clean)
        if self.rules.shared:
            # How much rounding adds depends on how many coordinates move: measure, and take back what is too much.
            target: Radius = radius * (1 - SPARE)
            for _ in range(3):
                moved = self._moved(clean, delta, target)
                excess = self.rules.length(moved.double() - clean.double()) - radius
                if not (excess > 0).any():
                    return moved
                target = (target - 2 * excess.clamp(min=0)).clamp(min=0).to(clean.dtype)
        return self._moved(clean, delta, self._representable_radius(clean))

    def _moved(self, clean: Tensor, delta: Tensor, radius: Radius) -> Tensor:
        # Range last: `clean` lies in it, so clamping can only shorten `delta`.
        return (clean + self.rules.shorten(delta, radius)).clamp(self.low, self.high)

    def step(self, clean: Tensor, x: Tensor, gradient: Tensor, relative: float) -> Tensor:
        """From `x` by `relative` radii along the norm's steepest ascent; may leave the budget, so project after it."""
        gradient = self._masked(gradient)
        if self.rules.shared:
            blocked = ((x >= self.high) & (gradient > 0)) | ((x <= self.low) & (gradient < 0))
            gradient = gradient.masked_fill(blocked, 0)
        return x + self.rules.steepest(gradient) * per_sample(relative * self.radius(clean), x)

    def start(self, clean: Tensor, draws: Draws) -> Tensor:
        """A point drawn uniformly from the ball, then cut to the valid range."""
        delta = self.rules.random(clean, draws) * per_sample(self.radius(clean), clean)
        return self.project(clean, clean + delta)

    def gauge(self, clean: Tensor, x: Tensor) -> Float[Tensor, " batch"]:
        """Length over radius, in float64: at most 1 inside the budget; 0 for no change, whatever the radius."""
        length = self.rules.length(x.double() - clean.double())
        radius = torch.as_tensor(self.radius(clean.double()), dtype=torch.float64, device=length.device)
        return torch.where(length == 0, 0.0, length / radius)

    def words(self, unit: str) -> str:
        """The budget as a report prints it, with the unit and, where it is one, the fraction."""
        if self.snr_db is not None:
            return f"{self.norm}, SNR at least {self.snr_db:g} dB"
        if isinstance(self.epsilon, Tensor):
            return f"{self.norm}, a radius of its own for each clip"
        value = float(self.epsilon)  # type: ignore[arg-type]
        fraction = f"{self.epsilon} = " if isinstance(self.epsilon, Fraction) else ""
        level = f" ({20 * math.log10(value):.1f} dBFS)" if unit == "amplitude" and self.norm == "linf" and value else ""
        return f"{self.norm}, {fraction}{value:.6g} {unit}{level}"

    def _masked(self, delta: Tensor) -> Tensor:
        return delta if self.writable is None else torch.where(self.writable, delta, 0)

    def _representable_radius(self, clean: Tensor) -> Radius:
        """The radius less what float32 can add in measuring, scaling and `clean + delta`: the audit needs no excuse."""
        radius = self.radius(clean)
        unbounded = math.isinf(self.low) or math.isinf(self.high)
        size: Radius = linf_length(clean) + radius if unbounded else max(abs(self.low), abs(self.high))
        unit = clean[:1].numel() ** {"linf": 0.0, "l2": 0.5, "l1": 1.0}[self.norm]
        inner = radius * (1 - SPARE) - HALF_ULP * unit * size
        return inner.clamp(min=0) if isinstance(inner, Tensor) else max(inner, 0.0)


@dataclass(frozen=True)
class ThreatModel:
    """The modalities an adversary may touch, each with a budget of its own, and the adversary's goal.

    Every verb takes the clean inputs first. Modalities without a budget are handed through as they are, the very same
    tensors.
    """

    budgets: Mapping[str, Budget]
    goal: Goal = field(default_factory=Untargeted)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError("`budgets` must name at least one modality, got none")

    def project(self, clean: Inputs, inputs: Inputs) -> Inputs:
        """Every attacked modality moved back into its budget and range."""
        return {**clean, **{m: budget.project(clean[m], inputs[m]) for m, budget in self.budgets.items()}}

    def step(
        self, clean: Inputs, inputs: Inputs, gradients: Inputs, relative: float | Mapping[str, float] = 1.0
    ) -> Inputs:
        """One step of steepest ascent, `relative` radii long (one number, or one a modality); not yet projected."""
        size = relative if isinstance(relative, Mapping) else dict.fromkeys(self.budgets, relative)
        moved = {m: b.step(clean[m], inputs[m], gradients[m], size[m]) for m, b in self.budgets.items()}
        return {**clean, **moved}

    def start(self, clean: Inputs, draws: Draws) -> Inputs:
        """A random point of the budget, uniform before it is cut to the valid range."""
        return {**clean, **{m: budget.start(clean[m], draws) for m, budget in self.budgets.items()}}

    def gauge(self, clean: Inputs, inputs: Inputs) -> Float[Tensor, " batch"]:
        """Largest length over radius of all attacked modalities; at most 1 inside the threat."""
        return torch.stack([budget.gauge(clean[m], inputs[m]) for m, budget in self.budgets.items()]).amax(0)

    def scaled(self, factor: float | Tensor) -> "ThreatModel":
        """The same threat with every radius times `factor` (a number, or [batch])."""
        return replace(self, budgets={m: budget.scaled(factor) for m, budget in self.budgets.items()})

    def given(self, *, clean: Trace | None = None, writable: Mapping[str, Tensor] | None = None) -> "ThreatModel":
        """The same threat for one batch: the goal learns the clean trace, the budgets where padding is."""
        writable = writable or {}
        budgets = {m: replace(b, writable=writable[m]) if m in writable else b for m, b in self.budgets.items()}
        return ThreatModel(budgets, self.goal.given(clean) if clean is not None else self.goal)

    def at(self, rows: Tensor) -> "ThreatModel":
        """The threat to some clips of the batch (indices, repeats allowed)."""
        return ThreatModel({m: budget.at(rows) for m, budget in self.budgets.items()}, self.goal.at(rows))

    def steered(self, loss: Callable[..., Tensor], aim: Tensor | None = None) -> "ThreatModel":
        """The same threat, whose goal is pursued by way of another loss; see `robustav.goals.Steered`."""
        return replace(self, goal=Steered(self.goal.label_kind, self.goal.threshold, None, self.goal, loss, aim))

    def words(self, specs: Mapping[str, InputSpec]) -> dict[str, str]:
        """Modality -> budget, as a report prints it."""
        return {m: budget.words(specs[m].unit) for m, budget in self.budgets.items()}


def snr_db(clean: Tensor, x: Tensor) -> Float[Tensor, " batch"]:
    """Achieved signal-to-noise ratio in dB, `20 log10(||clean||_2 / ||x - clean||_2)`: a ratio of powers.

    Infinite for an untouched sample, minus infinity for silence that was touched.
    """
    signal, noise = l2_length(clean.double()), l2_length(x.double() - clean.double())
    ratio = signal / noise.clamp(min=TINY)
    return torch.where(noise == 0, math.inf, 20 * ratio.log10())


def parse_number(text: str) -> float | Fraction:
    """A radius as people write it: `0.01`, `1e-3`, or a fraction such as `4/255`, which stays a fraction."""
    try:
        return Fraction(text) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"epsilon must be a number or a fraction such as 4/255, got {text!r}") from None


DECIBELS = re.compile(r"(?:snr=)?([-+]?\d+(?:\.\d+)?)\s*dB|snr=([-+]?\d+(?:\.\d+)?)", re.IGNORECASE)


def parse_budget(text: str, spec: InputSpec, norm: str | None = None) -> Budget:
    """One modality's budget as a command line writes it: a number, a fraction, or an SNR such as `30dB`.

    The norm is linf unless told, and l2 for an SNR; the valid range is the model's.
    """
    if match := DECIBELS.fullmatch(text.strip()):
        return Budget(norm or "l2", snr_db=float(match[1] or match[2]), low=spec.low, high=spec.high)
    return Budget(norm or "linf", parse_number(text.strip()), low=spec.low, high=spec.high)


def parse_epsilons(
    texts: list[str], specs: Mapping[str, InputSpec], norm: str | None = None
) -> list[dict[str, Budget]]:
    """Budgets for every modality of a model, one dict an epsilon.

    `0.01` means that number in each modality's own unit; `0.001,0.01` is two epsilons; `audio=0.002,visual=4/255` is
    one, written out, and a modality it leaves out is not attacked; `snr=30dB` or `audio=30dB` is a ratio of powers.
    """
    epsilons: list[dict[str, Budget]] = []
    for text in texts:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        keyed = [part.partition("=") for part in parts]
        named = {key.strip(): value for key, _, value in keyed if value and key.strip().lower() != "snr"}
        if unknown := sorted(named.keys() - specs.keys()):
            raise ValueError(f"--eps {text!r} names {unknown}, but the model's modalities are {sorted(specs)}")
        if not parts or 0 < len(named) < len(parts):
            raise ValueError(
                f"--eps must be numbers ('0.001,0.01') or one value a modality ('audio=0.002,visual=4/255'), got {text!r}"
            )
        if not named and len({bool(DECIBELS.fullmatch(part)) for part in parts}) > 1:
            raise ValueError(f"--eps {text!r} mixes ratios in dB with radii: give each an --eps of its own")
        if named:
            epsilons.append({m: parse_budget(named[m], spec, norm) for m, spec in specs.items() if m in named})
        else:
            epsilons.extend({m: parse_budget(part, spec, norm) for m, spec in specs.items()} for part in parts)
    return epsilons
