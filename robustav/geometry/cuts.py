"""Where a network is cut: the representation there, and the rest of the network that goes on from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustav.classifier import Classifier, Inputs, Trace, Wrapped

Parts = dict[str, Tensor]  # name of a part -> [sample, ...]: a modality, FUSED, or a module
FUSED = "fused"
CUTS = ("input", "front end", "features", "latent")


@dataclass(frozen=True)
class Cut:
    """One place in the network. `take` reads its parts, `finish` goes on from them (mixed or not) to the logits.

    `mixable` are the parts that convexity mixes; a module inside a network also carries the raw inputs, since other
    paths may go round it. `pool` makes the one vector a clip that density looks at.
    """

    name: str
    take: Callable[[Inputs, Trace], Parts]
    finish: Callable[[Parts], Tensor]
    mixable: tuple[str, ...]
    pool: Callable[[Tensor], Tensor] = lambda part: part.flatten(1)  # to one vector a clip


def cuts_of(model: Classifier, names: Sequence[str], sample: Inputs) -> list[Cut]:
    """The cuts named: "input", "front end", "features", "latent", or a module as `named_modules` has it.

    A stage that gives what another one named gives (a front end that returns its input, the features of a single
    modality that are the latent) is left out. `sample` is a small batch, on which that is tried. Raises `ValueError` for
    an unknown name, for features that are the raw input, and for the latent of a wrapped network whose last module is
    not known.
    """
    with torch.no_grad():
        trace = model.trace(sample)
        fronts = {m: model.front_end(m, x) for m, x in sample.items()}
    stages = dict(zip(CUTS, (sample, fronts, trace.features, {FUSED: trace.latent}), strict=True))
    modules = [name for name, _ in model.named_modules() if name]
    found: list[Cut] = []
    for name in dict.fromkeys(names):
        if name in CUTS:
            if name == "latent" and isinstance(model, Wrapped) and model.head_name is None:
                raise ValueError(
                    "this wrapped network's latent is not known: name its last module with --latent MODULE "
                    f"(or Wrapped(..., latent=...)); its modules are {', '.join(_short(modules))}"
                )
            if name == "features" and not {"input", "front end"} & set(names) and _same(sample, stages[name]):
                raise ValueError(
                    "layer 'features' is the input itself here (a wrapped network has no stages): name 'input' or one of "
                    f"its modules, {', '.join(_short(modules))}"
                )
            if not _repeats(name, names, stages):
                found.append(_stage(model, name))
        elif name in modules or f"network.{name}" in modules:
            found.append(_module(model, name if name in modules else f"network.{name}", name))
        else:
            raise ValueError(
                f"no layer {name!r}: there are {', '.join(CUTS)} and the modules {', '.join(_short(modules))}"
            )
    return found


def _repeats(name: str, names: Sequence[str], stages: Mapping[str, Parts]) -> bool:
    """Whether a stage has a twin among those named that stands for it: the latent, or else the first."""
    twins = [stage for stage in CUTS if stage in names and stage != name and _same(stages[stage], stages[name])]
    return name != "latent" and bool(twins) and ("latent" in twins or CUTS.index(twins[0]) < CUTS.index(name))


def _stage(model: Classifier, name: str) -> Cut:
    modalities = tuple(sorted(model.specs))
    if name == "input":
        return Cut(name, lambda inputs, trace: dict(inputs), model.forward, modalities)
    if name == "front end":

        def from_front(parts: Parts) -> Tensor:
            return model.finish({m: model.encode(m, x) for m, x in parts.items()}).logits

        return Cut(
            name, lambda inputs, trace: {m: model.front_end(m, x) for m, x in inputs.items()}, from_front, modalities
        )
    if name == "features":
        return Cut(
            name,
            lambda inputs, trace: trace.features,
            lambda parts: model.finish(parts).logits,
            modalities,
            pool,
        )
    return Cut(name, lambda inputs, trace: {FUSED: trace.latent}, lambda parts: model.classify(parts[FUSED]), (FUSED,))


def _module(model: Classifier, name: str, shown: str) -> Cut:
    """A module's output, [sample, ...], caught and replaced on its way."""
    module: nn.Module = model.get_submodule(name)
    raw = {m: f"raw {m}" for m in model.specs}  # a module may be called like a modality

    def take(inputs: Inputs, trace: Trace) -> Parts:
        caught: list[object] = []

        def note(_: nn.Module, __: object, output: object) -> None:
            # A copy: what comes next may write into it, as an in-place ReLU or a sum with a residual does.
            caught.append(output.clone() if isinstance(output, Tensor) else output)

        handle = module.register_forward_hook(note)
        try:
            model.trace(inputs)
        finally:
            handle.remove()
        size = len(next(iter(inputs.values())))
        output = caught[0] if len(caught) == 1 else None
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != size:
            got = f"called {len(caught)} times"
            if len(caught) == 1:
                kind = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                got = f"called once, returning {kind} for {size} clips"
            raise ValueError(
                f"layer {shown!r} must be called once a pass and return one tensor [batch, dim, ...], was {got}"
            )
        return {shown: output, **{raw[m]: x for m, x in inputs.items()}}

    def finish(parts: Parts) -> Tensor:
        handle = module.register_forward_hook(lambda _, __, ___: parts[shown])
        try:
            return model.forward({m: parts[name] for m, name in raw.items()})
        finally:
            handle.remove()

    return Cut(shown, take, finish, (shown,), partial(pool, channels_first=_channels_first(module)))


def pool(part: Tensor, channels_first: bool | None = None) -> Tensor:
    """Averaged over tokens or places, [sample, dim].

    Where nothing says which axis is which, three axes are tokens [sample, token, dim], and more are maps
    [sample, channel, ...].
    """
    if part.ndim <= 2:
        return part.flatten(1)
    first = part.ndim > 3 if channels_first is None else channels_first
    return part.flatten(2).mean(2) if first else part.flatten(1, -2).mean(1)


def _channels_first(module: nn.Module) -> bool | None:
    """Whether a module's output has its channels before places: what the last of its layers to say so says."""
    for layer in reversed(list(module.modules())):
        name = type(layer).__name__
        if name.startswith(("Conv", "BatchNorm", "InstanceNorm", "GroupNorm", "MaxPool", "AvgPool", "Adaptive")):
            return True
        if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Embedding | nn.MultiheadAttention):
            return False
    return None


def _same(one: Parts, other: Parts) -> bool:
    """Whether the tensors are equal, part by part; what a single part is called does not matter."""
    if len(one) == len(other) == 1:
        one, other = {"": next(iter(one.values()))}, {"": next(iter(other.values()))}
    return one.keys() == other.keys() and all(
        x.shape == other[name].shape and bool((x == other[name]).all()) for name, x in one.items()
    )


def _short(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 20 else [*names[:3], "...", *names[-16:]]
