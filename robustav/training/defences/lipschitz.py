"""Upper bounds of Lipschitz constants (l2 to l2) of small networks in eval mode, as products over their layers.

Valid, not tight: layers rarely stretch the same direction. Exact but for float64 rounding where a layer's norm is.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustav.audio import LogMel
from robustav.classifier import LateFusion
from robustav.models.small import AudioEncoder, FramePairs, VisualEncoder

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Affine = Convolution | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
GRID = 16  # frequencies an axis, at least


def lipschitz_bounds(model: LateFusion) -> dict[str, float]:
    """For each modality, how much longer than a perturbation of the raw input the features' movement can be, at most.

    Raises `ValueError` for a layer that no bound is known of.
    """
    fronts = {m: model.front_ends[m] if m in model.front_ends else nn.Identity() for m in model.encoders}
    return {m: upper_bound(fronts[m]) * upper_bound(encoder) for m, encoder in model.encoders.items()}


def upper_bound(module: nn.Module) -> float:
    """Of one module in eval mode."""
    if type(module) not in RULES:
        names = sorted(kind.__name__ for kind in RULES)
        raise ValueError(f"`module` must be made of {', '.join(names)} for a bound, got {type(module).__name__}")
    return RULES[type(module)](module)


def sequential(module: nn.Sequential) -> float:
    """The product; a batch norm is taken together with the layer that it directly follows."""
    return math.prod(upper_bound(one) if before is None else affine(before, one) for before, one in _paired(module))


def _paired(module: nn.Sequential) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Layers in their order; a batch norm with what it follows."""
    waiting: nn.Module | None = None
    for one in module:
        if isinstance(one, Norm) and waiting is not None:
            yield waiting, one
            waiting = None
            continue
        if waiting is not None:
            yield None, waiting
        waiting = one if isinstance(one, Affine) else None
        if waiting is None:
            yield None, one
    if waiting is not None:
        yield None, waiting


def affine(layer: nn.Module, norm: nn.Module | None = None) -> float:
    """A linear layer or convolution, with the batch norm behind it."""
    weight = layer.weight.detach().double()  # type: ignore[operator, union-attr]
    if norm is not None:
        weight = weight * _gain(norm).reshape(-1, *[1] * (weight.ndim - 1))
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(weight, 2))
    assert isinstance(layer, Convolution)
    if layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        raise ValueError(f"`module` must have plain convolutions, padded with zeros, for a bound, got {layer}")
    return convolution_norm(weight, layer.stride)


def _gain(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies each channel by."""
    assert isinstance(norm, Norm)
    if norm.running_var is None:
        raise ValueError("`module` must have batch norms with running statistics for a bound, got one without")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach().double().abs()


def convolution_norm(weight: Float[Tensor, "out into ..."], stride: tuple[int, ...]) -> float:
    """Upper bound of a zero-padded convolution's largest singular value, on signals of any size.

    A stride s is a convolution of stride 1 over s times as many channels for each axis. Its norm is the largest of the
    symbol's singular values over all frequencies. Between the frequencies of a grid that largest one cannot hide: along a
    line a bilinear form of the symbol is of exponential type (taps - 1) / 2 an axis, so that near its maximum M it stays
    above M cos(type x distance) [Duffin and Schaeffer, 1938]. At most a tenth above the true value for three taps.
    """
    for axis, step in enumerate(stride):
        dim = 2 + 2 * axis
        missing = -weight.shape[dim] % step
        padded = torch.cat([weight, weight.new_zeros(*weight.shape[:dim], missing, *weight.shape[dim + 1 :])], dim=dim)
        weight = padded.unflatten(dim, (-1, step))
    axes = len(stride)
    taps, phases = [2 + 2 * axis for axis in range(axes)], [3 + 2 * axis for axis in range(axes)]
    weight = weight.permute(0, 1, *phases, *taps).flatten(1, 1 + axes)
    grid = max(GRID, 4 * max(weight.shape[2:]))
    symbol = torch.fft.rfftn(weight, s=[grid] * axes, dim=list(range(2, 2 + axes))).flatten(2).permute(2, 0, 1)
    gram = [s @ s.mH if s.shape[1] <= s.shape[2] else s.mH @ s for s in symbol.split(GRID)]
    largest = max(float(torch.linalg.eigvalsh(g)[:, -1].max()) for g in gram)
    angle = sum((size - 1) / 2 for size in weight.shape[2:]) * math.pi / grid
    return math.sqrt(max(largest, 0.0)) / math.cos(angle)


def log_mel(module: LogMel) -> float:
    """From amplitude to the log-mel spectrogram.

    With p = sum_k w_k |S_k|^2, Cauchy-Schwarz gives |d log(p + f)| <= 2 sqrt(p) / (p + f) sqrt(sum_k w_k |dS_k|^2), and
    2 sqrt(p) / (p + f) <= 1 / sqrt(f). Summed over mels each bin counts as often as filters cover it, inner bins of a real
    spectrum half (Parseval), and over frames each sample as often as windows do.
    """
    cover = module.filters.double().sum(1)
    cover[1:-1] /= 2
    power = module.hann.double().square()
    windows = torch.cat([power, power.new_zeros(-len(power) % module.hop)]).unflatten(0, (-1, module.hop)).sum(0)
    energy = cover.max() * module.window * windows.max()
    return float((energy / module.floor).sqrt()) / abs(module.scale)


RULES: dict[type[nn.Module], Callable[..., float]] = {
    **dict.fromkeys([nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.ReLU, nn.Tanh], lambda module: 1.0),
    **dict.fromkeys([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d], affine),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], lambda module: float(_gain(module).max())),
    nn.Sequential: sequential,
    LogMel: log_mel,
    FramePairs: lambda module: 2 * math.sqrt(1 + 2**2),  # pixels doubled, beside differences of neighbours
    # Mean and maximum of one map: a mean shrinks, a maximum does not stretch.
    AudioEncoder: lambda module: math.sqrt(2) * upper_bound(module.layers),
    VisualEncoder: lambda module: math.sqrt(2) * upper_bound(module.layers),
}
