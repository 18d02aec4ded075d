"""Segments between samples of one class: which pairs to join, and what a network says of points along them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from robustav.classifier import LabelKind, check_label_kind
from robustav.prepare import quick_products

Parts = dict[str, Tensor]  # where the network is cut: part name -> [sample, ...]
Finish = Callable[[Parts], Tensor]  # the rest of the network: parts of a batch of points -> logits [point, class]

CHUNK = {"cpu": (2**11, 2**19), "gpu": (2**17, 2**28)}  # points at a time and values that they may hold
NOISE_BLOCK = 2**18  # values drawn at a time, whatever the chunk
PROBES = 32  # pairs on which a shortcut must agree with the plain way
ROUNDING = 128  # of the dtype's epsilons, relative to the largest value: what may be called the same
TABLE_SHARE, TABLE_BYTES = 4, 2**28  # tables may take this many times the mixed parts' memory, or this much


class Pairs(NamedTuple):
    """Samples `first` and `second`, and the class in whose name they are joined."""

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cls: Int[Tensor, " pair"]


class Noise(NamedTuple):
    """Gaussian noise for parts of a point: `scales[part]` * N(0, I) / sqrt(values in the part), so of about that norm.

    Drawn on the generator's own device, in blocks whose size does not depend on how the points are cut into chunks.
    """

    scales: Mapping[str, float]
    generator: torch.Generator


def draw_pairs(labels: Bool[Tensor, "sample class"], count: int, generator: torch.Generator) -> Pairs:
    """Of each class, `count` ordered pairs of different members, uniform and with replacement, in order of class.

    A class with fewer than two members gets none.

    >>> labels = torch.tensor([[True, False], [True, True], [True, False]])
    >>> draw_pairs(labels, 4, torch.Generator().manual_seed(0)).cls
    tensor([0, 0, 0, 0])
    """

    def draw(inside: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        if len(inside) < 2:
            return inside[:0], inside[:0]
        first = _randint(len(inside), count, generator)
        second = _randint(len(inside) - 1, count, generator)
        return inside[first], inside[second + (second >= first)]

    return _per_class(labels, count, draw)


def draw_flip_pairs(labels: Bool[Tensor, "sample class"], count: int, generator: torch.Generator) -> Pairs:
    """Of each class, `count` pairs of a member and a sample that is none, uniform and with replacement.

    A class without members, or with no one outside it, gets none.

    >>> draw_flip_pairs(torch.tensor([[True], [False], [True]]), 3, torch.Generator().manual_seed(0)).second
    tensor([1, 1, 1])
    """

    def draw(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
        if not len(inside) or not len(outside):
            return inside[:0], inside[:0]
        return inside[_randint(len(inside), count, generator)], outside[_randint(len(outside), count, generator)]

    return _per_class(labels, count, draw)


def ordered_pairs(labels: Bool[Tensor, "sample class"], count: int) -> Pairs:
    """Of each class, the first `count` ordered pairs in the order of their sample numbers: (0, 1), (0, 2), ..., (1, 0).

    The order of the code released with Li et al. (2022, arXiv:2203.12122), for comparison only: a class of more than
    `count` members is measured from a single sample. A small class gives fewer pairs than `count`.

    >>> ordered_pairs(torch.tensor([[True], [False], [True], [True]]), 4)[:2]
    (tensor([0, 0, 2, 2]), tensor([2, 3, 0, 3]))
    """

    def order(inside: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        others = len(inside) - 1
        number = torch.arange(min(count, len(inside) * others))
        first, second = number // max(others, 1), number % max(others, 1)
        return inside[first], inside[second + (second >= first)]

    return _per_class(labels, count, order)


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
    return _lead(logits, rows, cls, label_kind) - _offsets(thresholds, cls, label_kind).to(logits)


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
    ends = torch.stack([_lead(logits, rows, cls, label_kind) for rows in (first, second)], dim=1)
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
    samples, step = _check_parts(parts), _points_at_a_time(parts)
    with _quickly(parts):
        logits = torch.cat([_finished(finish, _some(parts, i, i + step)) for i in range(0, samples, step)])
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
    step = max(1, (chunk or _points_at_a_time(parts)) // count)
    step = block * math.ceil(step / block) if noise else step
    stream = _Stream(finish, parts, between, pairs, weights, label_kind)
    with _quickly(parts):
        shortcuts = _shortcuts(stream, module, hoist=noise is None) if module is not None else PLAIN
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


class _Shortcuts(NamedTuple):
    """What need not be computed at every point: `tables` hold what layers give for the samples, `last` the logits."""

    tables: dict[nn.Linear, Tensor]
    last: nn.Linear | None


PLAIN = _Shortcuts({}, None)


class _Stream:
    """Points along pairs on their way through the rest of a network, with or without shortcuts."""

    def __init__(
        self, finish: Finish, parts: Parts, mixed: set[str], pairs: Pairs, weights: Tensor, label_kind: LabelKind
    ) -> None:
        self.finish, self.parts, self.mixed, self.label_kind = finish, parts, mixed, label_kind
        self.pairs, self.weights = pairs, weights
        self.classes = int(pairs.cls.max()) + 1
        self.shortcuts = PLAIN
        self.rows = self.own = pairs.cls[:0]  # of the chunk under way: its pairs, and their classes

    def leads(self, rows: Tensor, noise: Parts) -> Tensor:
        """Margins of the points along these pairs, before thresholds."""
        self.rows, cls, needed = rows, self.pairs.cls[rows], self.classes
        if self.shortcuts.last is not None:
            self.own, cls = cls.unique(return_inverse=True)
            needed = len(self.own)
        given = self.points(rows, self.weights[rows])
        for name, x in noise.items():
            given[name] = given[name] + x
        logits = _finished(self.finish, given, needed)
        everywhere = torch.arange(len(logits), device=logits.device)
        cls = cls.repeat_interleave(self.weights.shape[1])
        return _lead(logits, everywhere, cls, self.label_kind).view(len(rows), -1)

    def points(self, rows: Tensor, weights: Tensor) -> Parts:
        """The parts at points along these pairs; nan, which spoils what looks at it, where tables stand in for them."""
        first, second, given = self.pairs.first[rows], self.pairs.second[rows], {}
        for name, x in self.parts.items():
            if name not in self.mixed:
                given[name] = x[first].repeat_interleave(weights.shape[1], dim=0)
            elif self.shortcuts.tables:
                given[name] = x.new_full((), torch.nan).expand(weights.numel(), *x.shape[1:])
            else:
                given[name] = _mix(x[first], x[second], weights)
        return given

    @contextmanager
    def taking(self, shortcuts: _Shortcuts) -> Iterator[None]:
        """Take these shortcuts inside; every layer is afterwards as it was."""

        def hoisted(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
            def forward(_: Tensor) -> Tensor:
                table, rows = shortcuts.tables[layer], self.rows
                first, second = table[self.pairs.first[rows]], table[self.pairs.second[rows]]
                if layer is shortcuts.last:
                    first, second = first[:, self.own], second[:, self.own]
                return _mix(first, second, self.weights[rows])

            return forward

        def own_classes(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
            weight, bias = layer.weight, layer.bias
            return lambda hidden: F.linear(hidden, weight[self.own], None if bias is None else bias[self.own])

        forwards = {layer: hoisted(layer) for layer in shortcuts.tables}
        if shortcuts.last is not None:
            forwards.setdefault(shortcuts.last, own_classes(shortcuts.last))
        before = {layer: layer.__dict__.get("forward") for layer in forwards}
        try:
            self.shortcuts = shortcuts
            for layer, forward in forwards.items():
                layer.forward = forward  # type: ignore[assignment, method-assign]
            yield
        finally:
            self.shortcuts = PLAIN
            for layer, own in before.items():
                layer.__dict__.pop("forward", None)
                if own is not None:
                    layer.forward = own  # type: ignore[method-assign]


def _shortcuts(stream: _Stream, module: nn.Module, *, hoist: bool) -> _Shortcuts:
    """Those that agree with the plain way on pairs spread over all of them."""
    rows = torch.linspace(0, len(stream.weights) - 1, PROBES, device=stream.weights.device).long()
    try:
        plain = stream.leads(rows, {})
        found = _candidates(stream, module, rows, hoist)
    except Exception:  # a network may object to being looked into, and the plain way says what is wrong with the rest
        return PLAIN
    for shortcuts in (found, found._replace(last=None), found._replace(tables={})):
        if shortcuts != PLAIN:
            with stream.taking(shortcuts):
                try:
                    if _same(stream.leads(rows, {}), plain, plain.abs().max()):
                        return shortcuts
                except Exception:  # it looks at the logits' shape, say
                    continue
    return PLAIN


def _candidates(stream: _Stream, module: nn.Module, rows: Tensor, hoist: bool) -> _Shortcuts:
    """The layer that yields the logits, and tables of the layers that mixed parts reach unbent."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    beyond = torch.linspace(-2, 3, PROBES).to(stream.weights)[:, None]  # what bends on a line, bends outside too
    ends = [{name: x[side[rows]] for name, x in stream.parts.items()} for side in stream.pairs[:2]]
    (first, _), (second, _), (mixes, last) = (
        _watch(stream.finish, given, layers) for given in (*ends, stream.points(rows, beyond))
    )
    own = last if stream.label_kind == "multilabel" and last in mixes else None
    samples = len(next(iter(stream.parts.values())))
    if not hoist or stream.weights.numel() < samples:
        return _Shortcuts({}, own)
    straight = []
    for layer in mixes.keys() & first.keys() & second.keys():
        a, b, got = first[layer], second[layer], mixes[layer]
        if len(a) == len(b) == len(got) == PROBES:
            scale = (beyond.abs().max() + 1) * torch.maximum(a.abs().max(), b.abs().max())
            if _same(got, _mix(a, b, beyond), scale):
                straight.append(layer)
    size = sum(mixes[layer][0].numel() * mixes[layer].element_size() for layer in straight) * samples
    limit = max(
        TABLE_BYTES, TABLE_SHARE * sum(stream.parts[m].numel() * stream.parts[m].element_size() for m in stream.mixed)
    )
    if not straight or size > limit:
        return _Shortcuts({}, own)
    step = _points_at_a_time(stream.parts)
    seen = [_watch(stream.finish, _some(stream.parts, i, i + step), straight)[0] for i in range(0, samples, step)]
    return _Shortcuts({layer: torch.cat([outputs[layer] for outputs in seen]) for layer in straight}, own)


def _watch(finish: Finish, parts: Parts, layers: list[nn.Linear]) -> tuple[dict[nn.Linear, Tensor], nn.Linear | None]:
    """What each of the layers that are called once gives, and which of them gives the logits."""
    calls: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {}

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        calls.setdefault(layer, []).append((output, output.clone()))  # type: ignore[arg-type]

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(note).remove)
        logits = finish(parts)
    once = {layer: outputs[0] for layer, outputs in calls.items() if len(outputs) == 1}
    last = next((layer for layer, (output, _) in once.items() if output is logits and output.ndim == 2), None)
    return {layer: copy for layer, (_, copy) in once.items()}, last


def _mix(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """weight * first + (1 - weight) * second for each pair and point, [pair * point, ...]; the ends are exact."""
    by_point = weights.view(*weights.shape, *[1] * (first.ndim - 1)).to(first.dtype)
    return torch.lerp(second[:, None], first[:, None], by_point).flatten(0, 1)


def _same(got: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether two results differ by rounding at most."""
    return bool((got - expected).abs().max() <= ROUNDING * torch.finfo(got.dtype).eps * scale)


def _lead(logits: Tensor, rows: Tensor, cls: Tensor, label_kind: LabelKind) -> Tensor:
    """Of each (row, class), the logit, and for multiclass how far it leads the best other one."""
    check_label_kind(label_kind)
    if label_kind == "multilabel":
        return logits[rows, cls]
    if logits.shape[1] < 2:
        raise ValueError(f"`logits` must have at least two classes to choose from, got {list(logits.shape)}")
    best = logits.topk(2, dim=1)
    is_best = best.indices[rows, 0] == cls
    return logits[rows, cls] - torch.where(is_best, best.values[rows, 1], best.values[rows, 0])


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


def _finished(finish: Finish, parts: Parts, classes: int = 0) -> Tensor:
    """Logits of a batch of points, with at least `classes` columns."""
    logits, points = finish(parts), len(next(iter(parts.values())))
    if logits.ndim != 2 or len(logits) != points or logits.shape[1] < classes:
        raise ValueError(
            f"`finish` must return logits [point, class] for {points} points and at least {classes} classes, "
            f"got {list(logits.shape)}"
        )
    return logits


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


def _per_class(labels: Tensor, count: int, draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Pairs:
    """Pairs of every class, drawn from the samples inside and outside it."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1 pair a class, got {count}")
    found = [Pairs(*torch.zeros(3, 0, dtype=torch.int64))]
    for cls, column in enumerate(labels.cpu().T):
        first, second = draw(column.nonzero().squeeze(1), (~column).nonzero().squeeze(1))
        found.append(Pairs(first, second, torch.full_like(first, cls)))
    return Pairs(*(torch.cat(fields).to(labels.device) for fields in zip(*found, strict=True)))


def _randint(high: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=generator.device).cpu()


def _some(parts: Parts, start: int, stop: int) -> Parts:
    """These samples, as copies: a network may write into what it is given."""
    return {name: x[start:stop].clone() for name, x in parts.items()}


def _points_at_a_time(parts: Parts) -> int:
    """How many points a chunk has by default: few enough for a CPU's cache, enough to fill a GPU."""
    points, values = CHUNK["cpu" if next(iter(parts.values())).device.type == "cpu" else "gpu"]
    return max(1, min(points, values // max(1, sum(x[0].numel() for x in parts.values()))))


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
