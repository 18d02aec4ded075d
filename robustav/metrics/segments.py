"""Segments between samples: what a network says of points along them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustav.classifier import LabelKind
from robustav.metrics.pairs import Pairs
from robustav.metrics.shortcuts import (
    PLAIN,
    Finish,
    Parts,
    Stream,
    finished,
    lead,
    points_at_a_time,
    shortcuts_of,
    some,
)
from robustav.prepare import quick_products

NOISE_BLOCK = 2**18  # values drawn at a time, whatever the chunk


class Noise(NamedTuple):
    """Gaussian noise for parts of a point: `scales[part]` * N(0, I) / sqrt(values in the part), so of about that norm.

    Drawn on the generator's own device, in blocks whose size does not depend on how the points are cut into chunks.
    """

    scales: Mapping[str, float]
    generator: torch.Generator


def class_margins(
    logits: Float[Tensor, "point class"],
    cls: Int[Tensor, " point"],
    thresholds: Float[Tensor, " class"] | float,
    label_kind: LabelKind,
) -> Float[Tensor, " point"]:
    """How far each point is inside the region where its class `cls` is accepted; accepted from 0 on.

    Multilabel: the class's logit less that of its threshold, a probability. Multiclass: its logit less the largest
    other one, whatever the thresholds.

    >>> class_margins(torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([0, 1]), 0.5, "multilabel")
    tensor([ 2., -3.])
    >>> class_margins(torch.tensor([[2.0, 1.0], [0.0, -3.0]]), torch.tensor([0, 1]), 0.5, "multiclass")
    tensor([ 1., -3.])
    """
    rows = torch.arange(len(logits), device=logits.device)
    return lead(logits, rows, cls, label_kind) - _offsets(thresholds, cls, label_kind).to(logits)


def end_margins(
    logits: Float[Tensor, "sample class"],
    pairs: Pairs,
    *,
    label_kind: LabelKind,
    thresholds: Float[Tensor, " class"] | float = 0.5,
) -> Float[Tensor, "pair 2"]:
    """`class_margins` of both samples of each pair, from the samples' own logits.

    >>> pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    >>> end_margins(torch.tensor([[2.0, 1.0], [0.0, -3.0]]), pairs, label_kind="multilabel")
    tensor([[2., 0.]])
    """
    first, second, cls = (field.to(logits.device) for field in pairs)
    ends = torch.stack([lead(logits, rows, cls, label_kind) for rows in (first, second)], dim=1)
    return ends - _offsets(thresholds, cls, label_kind).to(logits)[:, None]


def at_thresholds(
    margins: Float[Tensor, "pair point"], pairs: Pairs, thresholds: Float[Tensor, " class"] | float
) -> Float[Tensor, "pair point"]:
    """Multilabel margins at other thresholds, from those at 0.5: no point need be evaluated twice.

    >>> pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    >>> at_thresholds(torch.tensor([[0.0, 2.0]]), pairs, 0.1)
    tensor([[2.1972, 4.1972]])
    """
    return margins - _offsets(thresholds, pairs.cls, "multilabel").to(margins)[:, None]


def sample_logits(finish: Finish, parts: Parts) -> Float[Tensor, "sample class"]:
    """What the rest of the network gives for the samples themselves.

    >>> sample_logits(lambda parts: 2 * parts["latent"], {"latent": torch.eye(2)})
    tensor([[2., 0.],
            [0., 2.]])
    """
    samples, step = _check_parts(parts), points_at_a_time(parts)
    with _quickly(parts):
        logits = torch.cat([finished(finish, some(parts, i, i + step)) for i in range(0, samples, step)])
    return logits.clone()  # outside, so that it may enter a gradient


def margins_along(
    finish: Finish,
    parts: Parts,
    pairs: Pairs,
    weights: Float[Tensor, "pair point"],
    *,
    label_kind: LabelKind,
    thresholds: Float[Tensor, " class"] | float = 0.5,
    mixed: Iterable[str] | None = None,
    noise: Noise | None = None,
    module: nn.Module | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "pair point"]:
    """`class_margins` of the points weight * first + (1 - weight) * second of each pair, for the pair's class.

    Only the parts in `mixed` (all unless told) lie between the two samples; the others stay at the first. Weights lie
    in [0, 1]. All classes go through in one stream of about `chunk` points at a time, which bounds memory; it is
    fastest where pairs come in order of class. The network must be in eval mode: no point's score may depend on its
    batch mates.

    With `module`, the network that `finish` runs through, what need not be computed at every point is left out: linear
    layers that mixed parts reach unbent are applied to the samples and mixed after it, and a linear layer that yields
    multilabel logits computes those of the pairs' own classes alone. Both are tried on pairs of the data first and used
    only where they agree to rounding. Layers of `module` are replaced while this runs.
    """
    samples = _check_parts(parts)
    between = _check_names(parts, "mixed", parts if mixed is None else mixed)
    noisy = _check_names(parts, "noise", noise.scales if noise else ())
    _check_pairs(pairs, samples)
    if len(weights) != len(pairs.cls):
        raise ValueError(f"`weights` must have a row for each of the {len(pairs.cls)} pairs, got {len(weights)}")
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"`weights` must lie in [0, 1], got {weights.min():g} to {weights.max():g}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"`chunk` must be at least 1 point, got {chunk}")
    like = next(iter(parts.values()))
    pairs, weights = Pairs(*(field.to(like.device) for field in pairs)), weights.to(like)
    if not weights.numel():
        return weights
    count = weights.shape[1]
    block = max(1, NOISE_BLOCK // (count * max(1, sum(parts[name][0].numel() for name in noisy))))
    step = max(1, (chunk or points_at_a_time(parts)) // count)
    step = block * math.ceil(step / block) if noise else step
    stream = Stream(finish, parts, between, pairs, weights, label_kind)
    with _quickly(parts):
        shortcuts = shortcuts_of(stream, module, hoist=noise is None) if module is not None else PLAIN
        with stream.taking(shortcuts):
            found = []
            for rows in torch.arange(len(weights), device=like.device).split(step):
                drawn = _draw(noise, parts, len(rows), count, block) if noise else {}
                found.append(stream.leads(rows, drawn))
            margins = torch.cat(found)
    if margins.isnan().any():
        raise ValueError("`finish` must give numbers for points between samples, got nan: are its logits finite?")
    return margins - _offsets(thresholds, pairs.cls, label_kind).to(margins)[:, None]


def swapped_margins(
    finish: Finish,
    parts: Parts,
    pairs: Pairs,
    swapped: Iterable[str],
    *,
    label_kind: LabelKind,
    thresholds: Float[Tensor, " class"] | float = 0.5,
    chunk: int | None = None,
) -> Float[Tensor, " pair"]:
    """Margins of the first sample with its parts `swapped` for the second's: one clip's sound with another's picture.

    >>> parts = {"audio": torch.tensor([[1.0], [2.0]]), "visual": torch.tensor([[10.0], [20.0]])}
    >>> pairs = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    >>> swapped_margins(lambda p: p["audio"] + p["visual"], parts, pairs, ["visual"], label_kind="multilabel")
    tensor([21.])
    """
    second = torch.zeros(len(pairs.cls), 1)
    return margins_along(
        finish, parts, pairs, second, label_kind=label_kind, thresholds=thresholds, mixed=swapped, chunk=chunk
    ).squeeze(1)


def _offsets(thresholds: Tensor | float, cls: Tensor, label_kind: LabelKind) -> Tensor:
    """Logits of the classes' thresholds, where those matter."""
    if label_kind == "multiclass":
        return torch.zeros(len(cls), device=cls.device)
    values = torch.as_tensor(thresholds).to(cls.device, torch.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError(f"`thresholds` must be probabilities in [0, 1], got {values.min():g} to {values.max():g}")
    if values.ndim and len(cls) and len(values) <= cls.max():
        raise ValueError(f"`thresholds` must have one entry a class, got {len(values)} for class {cls.max()}")
    return torch.logit(values[cls] if values.ndim else values.expand(len(cls)))


def _draw(noise: Noise, parts: Parts, pairs: int, count: int, block: int) -> Parts:
    """Noise for the points of these pairs; a block of pairs at a time, so that chunks do not matter."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in sorted(noise.scales)}
    for start in range(0, pairs, block):
        points = min(block, pairs - start) * count
        for name, pieces in drawn.items():
            shape, dtype = (points, *parts[name].shape[1:]), parts[name].dtype
            pieces.append(torch.randn(shape, generator=noise.generator, device=noise.generator.device, dtype=dtype))
    scales = {name: noise.scales[name] / math.sqrt(max(1, parts[name][0].numel())) for name in drawn}
    return {name: scales[name] * torch.cat(pieces).to(parts[name].device) for name, pieces in drawn.items()}


@contextmanager
def _quickly(parts: Parts) -> Iterator[None]:
    """Without gradients, with the faster of the exact products."""
    with torch.inference_mode(), quick_products() if next(iter(parts.values())).device.type == "cpu" else nullcontext():
        yield


def _check_parts(parts: Parts) -> int:
    """How many samples there are; raise `ValueError` unless all parts have as many, and numbers."""
    sizes = {name: len(x) for name, x in parts.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"`parts` must have the same samples in each part, and at least one, got {sizes}")
    for name, x in parts.items():
        if not x.is_floating_point():
            raise ValueError(f"`parts[{name!r}]` must be floating point, got {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"`parts[{name!r}]` must be finite, got nan or inf in {(~x.isfinite()).sum()} places")
    return next(iter(sizes.values()))


def _check_names(parts: Parts, argument: str, names: Iterable[str]) -> set[str]:
    found = {names} if isinstance(names, str) else set(names)
    if unknown := sorted(found - parts.keys()):
        raise ValueError(f"`{argument}` must name parts among {sorted(parts)}, got {unknown}")
    return found


def _check_pairs(pairs: Pairs, samples: int) -> None:
    if len({len(field) for field in pairs}) != 1:
        raise ValueError(f"`pairs` must have fields of one length, got {[len(field) for field in pairs]}")
    for name, field in zip(("first", "second"), pairs[:2], strict=True):
        if len(field) and not 0 <= field.min() <= field.max() < samples:
            raise ValueError(f"`pairs.{name}` must number samples below {samples}, got {field.min()} to {field.max()}")
