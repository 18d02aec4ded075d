"""Points on their way through the rest of a network, without what need not be computed at every one of them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from torch import Tensor, nn

from robustav.classifier import LabelKind, check_label_kind
from robustav.metrics.pairs import Pairs

Parts = dict[str, Tensor]  # where the network is cut: part name -> [sample, ...]
Finish = Callable[[Parts], Tensor]  # the rest of the network: parts of a batch of points -> logits [point, class]

CHUNK = {"cpu": (2**11, 2**19), "gpu": (2**17, 2**28)}  # points at a time and values that they may hold
PROBES = 32  # pairs on which a shortcut must agree with the plain way
ROUNDING = 128  # of the dtype's epsilons, relative to the largest value: what may be called the same
TABLE_SHARE, TABLE_BYTES = 4, 2**28  # tables may take this many times the mixed parts' memory, or this much


class Shortcuts(NamedTuple):
    """What need not be computed at every point: `tables` hold what layers give for the samples, `last` the logits."""

    tables: dict[nn.Linear, Tensor]
    last: nn.Linear | None


PLAIN = Shortcuts({}, None)


class Stream:
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
        logits = finished(self.finish, given, needed)
        everywhere = torch.arange(len(logits), device=logits.device)
        cls = cls.repeat_interleave(self.weights.shape[1])
        return lead(logits, everywhere, cls, self.label_kind).view(len(rows), -1)

    def points(self, rows: Tensor, weights: Tensor) -> Parts:
        """The parts at points along these pairs; nan, which spoils what looks at it, where tables stand in for them."""
        first, second, given = self.pairs.first[rows], self.pairs.second[rows], {}
        for name, x in self.parts.items():
            if name not in self.mixed:
                given[name] = x[first].repeat_interleave(weights.shape[1], dim=0)
            elif self.shortcuts.tables:
                given[name] = x.new_full((), torch.nan).expand(weights.numel(), *x.shape[1:])
            else:
                given[name] = mix(x[first], x[second], weights)
        return given

    @contextmanager
    def taking(self, shortcuts: Shortcuts) -> Iterator[None]:
        """Take these shortcuts inside; every layer is afterwards as it was."""

        def hoisted(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
            def forward(_: Tensor) -> Tensor:
                table, rows = shortcuts.tables[layer], self.rows
                first, second = table[self.pairs.first[rows]], table[self.pairs.second[rows]]
                if layer is shortcuts.last:
                    first, second = first[:, self.own], second[:, self.own]
                return mix(first, second, self.weights[rows])

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


def shortcuts_of(stream: Stream, module: nn.Module, *, hoist: bool) -> Shortcuts:
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


def _candidates(stream: Stream, module: nn.Module, rows: Tensor, hoist: bool) -> Shortcuts:
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
        return Shortcuts({}, own)
    straight = []
    for layer in mixes.keys() & first.keys() & second.keys():
        a, b, got = first[layer], second[layer], mixes[layer]
        if len(a) == len(b) == len(got) == PROBES:
            scale = (beyond.abs().max() + 1) * torch.maximum(a.abs().max(), b.abs().max())
            if _same(got, mix(a, b, beyond), scale):
                straight.append(layer)
    size = sum(mixes[layer][0].numel() * mixes[layer].element_size() for layer in straight) * samples
    limit = max(
        TABLE_BYTES, TABLE_SHARE * sum(stream.parts[m].numel() * stream.parts[m].element_size() for m in stream.mixed)
    )
    if not straight or size > limit:
        return Shortcuts({}, own)
    step = points_at_a_time(stream.parts)
    seen = [_watch(stream.finish, some(stream.parts, i, i + step), straight)[0] for i in range(0, samples, step)]
    return Shortcuts({layer: torch.cat([outputs[layer] for outputs in seen]) for layer in straight}, own)


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


def mix(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """weight * first + (1 - weight) * second for each pair and point, [pair * point, ...]; the ends are exact."""
    by_point = weights.view(*weights.shape, *[1] * (first.ndim - 1)).to(first.dtype)
    return torch.lerp(second[:, None], first[:, None], by_point).flatten(0, 1)


def _same(got: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether two results differ by rounding at most."""
    return bool((got - expected).abs().max() <= ROUNDING * torch.finfo(got.dtype).eps * scale)


def lead(logits: Tensor, rows: Tensor, cls: Tensor, label_kind: LabelKind) -> Tensor:
    """Of each (row, class), the logit, and for multiclass how far it leads the best other one."""
    check_label_kind(label_kind)
    if label_kind == "multilabel":
        return logits[rows, cls]
    if logits.shape[1] < 2:
        raise ValueError(f"`logits` must have at least two classes to choose from, got {list(logits.shape)}")
    best = logits.topk(2, dim=1)
    is_best = best.indices[rows, 0] == cls
    return logits[rows, cls] - torch.where(is_best, best.values[rows, 1], best.values[rows, 0])


def finished(finish: Finish, parts: Parts, classes: int = 0) -> Tensor:
    """Logits of a batch of points, with at least `classes` columns."""
    logits, points = finish(parts), len(next(iter(parts.values())))
    if logits.ndim != 2 or len(logits) != points or logits.shape[1] < classes:
        raise ValueError(
            f"`finish` must return logits [point, class] for {points} points and at least {classes} classes, "
            f"got {list(logits.shape)}"
        )
    return logits


def some(parts: Parts, start: int, stop: int) -> Parts:
    """These samples, as copies: a network may write into what it is given."""
    return {name: x[start:stop].clone() for name, x in parts.items()}


def points_at_a_time(parts: Parts) -> int:
    """How many points a chunk has by default: few enough for a CPU's cache, enough to fill a GPU."""
    points, values = CHUNK["cpu" if next(iter(parts.values())).device.type == "cpu" else "gpu"]
    return max(1, min(points, values // max(1, sum(x[0].numel() for x in parts.values()))))
