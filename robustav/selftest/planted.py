"""Ten broken defences that must be found out, and ten honest models that must not be accused."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustav.classifier import Classifier, LabelKind, LateFusion
from robustav.selftest.tiny import MIDDLE, SPECS, last_layer, network, patterns

EPSILON = 0.15  # linf, in each modality's unit: breaks every undefended network here


class Case(NamedTuple):
    """A model, and what must be found of it at `epsilon`: every one of `flags`; of an honest model, nothing."""

    make: Callable[[], Classifier]
    flags: frozenset[str] = frozenset()
    epsilon: float = EPSILON


def dense(activation: type[nn.Module] = nn.ReLU) -> dict[str, nn.Module]:
    """One hidden layer a modality."""
    return {m: nn.Sequential(nn.Flatten(), nn.LazyLinear(32), activation()) for m in SPECS}


def convolutions(norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()) -> dict[str, nn.Module]:
    """One convolution a modality, both along one axis so that the same kind of `norm` fits after either."""
    return {
        "audio": nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 6, 8, 4), norm(6), nn.ReLU(), nn.Flatten()),
        "visual": nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 8, 6, 3), norm(8), nn.ReLU(), nn.Flatten()),
    }


def both(module: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """The same kind of module for either modality."""
    return {m: module() for m in SPECS}


def behind(model: LateFusion, last: nn.Module) -> LateFusion:
    """The model with one more step after its logits."""
    model.head = nn.Sequential(model.head, last)
    return model.eval()


class Step(nn.Module):
    """A function of one tensor as a module, without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.function(x)


def rounded(x: Tensor) -> Tensor:
    """Values in steps of 1/16."""
    return (16 * x).round() / 16


def jagged(x: Tensor) -> Tensor:
    """The input under a small and very fast wave: right to one per cent, with a slope that says nothing."""
    return x + 0.01 * (5000 * x).sin()


def masked(x: Tensor) -> Tensor:
    """A fifth of the values set to zero, other ones at every pass."""
    return x * (torch.rand_like(x) < 0.8)


def bits(x: Tensor, low: float) -> Tensor:
    """Each value as the row of thresholds between `low` and 1 that it exceeds."""
    thresholds = torch.linspace(low, 1, 18)[1:-1].to(x)
    return (x[..., None] > thresholds).to(x)


def numpy_spectrum(x: Tensor) -> Tensor:
    """Magnitudes of the Fourier transform, computed where autograd does not look."""
    return torch.from_numpy(np.abs(np.fft.rfft(x.detach().cpu().flatten(1).numpy()))).to(x)


def noisy(x: Tensor) -> Tensor:
    """Gaussian noise on top, other at every pass."""
    return x + 0.1 * torch.randn_like(x)


def clamped_probability(x: Tensor) -> Tensor:
    """Probabilities kept off 0 and 1, beyond which no gradient comes back."""
    return x.sigmoid().clamp(1e-7, 1 - 1e-7)


def input_quantiser() -> Classifier:
    """Inputs are rounded first: the gradient of a staircase is zero, so ZERO-GRAD and UNBOUNDED-FAILS, while a search
    without gradients gets through, so BLACK-BOX-WINS.
    """
    return network(dense(), front_ends=both(lambda: Step(rounded)))


def saturated_logits() -> Classifier:
    """Logits a thousand times too large: softmax rounds to 0 and 1 and the cross-entropy is flat, so ZERO-GRAD, and
    LOGIT-SCALE because the same logits made smaller are broken [Carlini and Wagner, 2016, arXiv:1607.04311].
    """
    model = network(dense(), label_kind="multiclass")
    return behind(model, Step(lambda logits: 1000 * logits))


def shattered_gradients() -> Classifier:
    """Gradients exist, are right, and point anywhere, so UNSTABLE [Athalye et al., 2018, arXiv:1802.00420]."""
    return network(convolutions(), front_ends=both(lambda: Step(jagged)))


def randomised_input() -> Classifier:
    """A random part of the input is left out at every pass and the model does not declare it, so RANDOMISED
    [Xie et al., 2018, arXiv:1711.01991].
    """
    model = network(dense())
    model.front_ends = nn.ModuleDict(both(lambda: Step(masked)))
    return model.eval()


def thermometer_code() -> Classifier:
    """Values become bits first, so ZERO-GRAD [Buckman et al., 2018]."""
    return network(
        dense(), front_ends={m: Step(partial(bits, low=spec.low)) for m, spec in SPECS.items()}, label_kind="multiclass"
    )


def front_end_outside_autograd() -> Classifier:
    """A front end in NumPy: no gradient comes back, and no error either, so ZERO-GRAD."""
    return network(dense(), front_ends=both(lambda: Step(numpy_spectrum)))


def noise_at_test_time() -> Classifier:
    """Noise on the latent at every pass, not declared, so RANDOMISED."""
    model = network(dense(), label_kind="multiclass")
    model.head = nn.Sequential(Step(noisy), model.head)
    return model.eval()


def clamped_probabilities() -> Classifier:
    """Probabilities in place of logits, so PROBABILITIES; clamped, so ZERO-GRAD."""
    model = network(dense(), scale=40)
    return behind(model, Step(clamped_probability))


def batch_norm_in_train_mode() -> Classifier:
    """Norms that take their statistics from the batch: every score depends on batch mates, so RESCORE."""
    return network(convolutions(lambda channels: nn.BatchNorm1d(channels, track_running_stats=False)))


def detached_branch() -> Classifier:
    """One modality is cut off from the gradient, the other hides it: ZERO-GRAD counts by modality."""
    encoders = dense()
    return network({**encoders, "audio": nn.Sequential(encoders["audio"], Step(Tensor.detach))})


def linear(label_kind: LabelKind = "multilabel") -> LateFusion:
    """Nothing but the last layer."""
    return network(both(nn.Flatten), label_kind=label_kind)


def with_a_margin() -> Classifier:
    """The classes' own patterns as weights: small perturbations honestly fail."""
    model = linear("multiclass")
    names = sorted(SPECS)
    weight = 0.1 * torch.cat([patterns()[m].flatten(1) for m in names], 1)
    middle = torch.cat([torch.full((torch.Size(SPECS[m].shape).numel(),), MIDDLE[m]) for m in names])
    last = last_layer(model)
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(-weight @ middle)
    return model


PLANTED: dict[str, Case] = {
    "input quantiser": Case(input_quantiser, frozenset({"ZERO-GRAD", "UNBOUNDED-FAILS", "BLACK-BOX-WINS"})),
    "saturated logits": Case(saturated_logits, frozenset({"ZERO-GRAD", "LOGIT-SCALE"})),
    "shattered gradients": Case(shattered_gradients, frozenset({"UNSTABLE"})),
    "randomised input": Case(randomised_input, frozenset({"RANDOMISED"})),
    "thermometer code": Case(thermometer_code, frozenset({"ZERO-GRAD"})),
    "front end outside autograd": Case(front_end_outside_autograd, frozenset({"ZERO-GRAD"})),
    "noise at test time": Case(noise_at_test_time, frozenset({"RANDOMISED"})),
    "clamped probabilities": Case(clamped_probabilities, frozenset({"PROBABILITIES", "ZERO-GRAD"})),
    "batch norm in train mode": Case(batch_norm_in_train_mode, frozenset({"RESCORE"})),
    "detached branch": Case(detached_branch, frozenset({"ZERO-GRAD"})),
}

HONEST: dict[str, Case] = {
    "linear, multi-label": Case(linear),
    "linear, multi-class": Case(lambda: linear("multiclass")),
    "late fusion of hidden layers": Case(lambda: network(dense())),
    "tanh": Case(lambda: network(dense(nn.Tanh), label_kind="multiclass")),
    "convolutions": Case(lambda: network(convolutions())),
    "batch norm": Case(lambda: network(convolutions(nn.BatchNorm1d), label_kind="multiclass")),
    "early fusion": Case(lambda: network(both(nn.Flatten), nn.LazyLinear(64), nn.ReLU())),
    "small logits": Case(lambda: network(dense(), scale=0.2)),
    "large logits": Case(lambda: network(dense(), label_kind="multiclass", scale=15)),
    "a margin": Case(with_a_margin, epsilon=0.01),
}
