"""Flags of a model's own passes: train mode, chance, gradients taken inside, probabilities, few classes."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustav.classifier import Classifier, Inputs, LabelKind, Trace
from robustav.flags.flag import Flag, raised
from robustav.goals import Goal, top1_lost
from robustav.norms import TINY

AGREE = 1e-4  # of a clip's largest logit: far above rounding, far below what changes a verdict
SUMS_TO_ONE = 1e-3
MARGINS = ("dlr",)  # in the names of losses that compare several classes; a plain margin needs only two
FEW = 3  # classes


def scores(model: Classifier, inputs: Inputs, batch_size: int) -> Trace:
    """Latents and logits of all clips, no gradient."""
    size = len(next(iter(inputs.values())))
    with torch.no_grad():
        traces = [
            model.trace({m: x[i : i + batch_size] for m, x in inputs.items()}) for i in range(0, size, batch_size)
        ]
    return Trace({}, torch.cat([t.latent for t in traces]), torch.cat([t.logits for t in traces]))


@contextmanager
def undisturbed(model: nn.Module, inputs: Inputs, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Whatever happens inside, the model ends as it began, and so do torch's generators; gives the model's state.

    Modes, parameters, buffers and gradients kept on parameters are restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    slopes = [(parameter, parameter.grad) for parameter in model.parameters()]
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    devices = sorted({x.device.index for x in inputs.values() if x.is_cuda})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        for parameter, _ in slopes:
            parameter.grad = None
        try:
            yield state
        finally:
            for module, training in modes:
                module.training = training
            for parameter, slope in slopes:
                parameter.grad = slope
            for name, tensor in _tensors(model):
                if name in state and not _same(tensor, state[name]):
                    tensor.data = state[name]


def in_train_mode(model: nn.Module) -> list[Flag]:
    """MODE, for modules that are in train mode now."""
    names = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    shown = ", ".join(repr(name) for name in names[:3]) + ", ..." * (len(names) > 3)
    return [raised("MODE", f"{len(names)} of the model's modules are in train mode: {shown}.")] if names else []


def changed(model: nn.Module, state: Mapping[str, Tensor]) -> list[Flag]:
    """MODE, for parameters and buffers that are not what they were."""
    names = [name for name, tensor in _tensors(model) if name not in state or not _same(tensor, state[name])]
    shown = ", ".join(repr(name) for name in names[:3]) + ", ..." * (len(names) > 3)
    words = f"{len(names)} parameters or buffers changed while clean clips were scored in eval mode: {shown}."
    return [raised("MODE", words)] if names else []


@contextmanager
def autograd_calls() -> Iterator[list[str]]:
    """Names of torch's gradient functions called by this thread inside; no trace function is set or removed."""
    found: list[str] = []
    # The last is what the others end in, also where a model imported `grad` by name. It is torch's own: may be absent.
    names = [name for name in ("grad", "backward", "_engine_run_backward") if hasattr(torch.autograd, name)]
    before = {name: getattr(torch.autograd, name) for name in names}
    thread = threading.get_ident()

    def watched(name: str) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            if threading.get_ident() == thread:
                found.append(name)
            return before[name](*arguments, **settings)

        return call

    for name in names:
        setattr(torch.autograd, name, watched(name))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(torch.autograd, name, function)


def dynamic(calls: Sequence[str]) -> list[Flag]:
    """DYNAMIC."""
    words = "The model computes gradients of its own while it scores clean clips, though none were asked for."
    return [raised("DYNAMIC", words)] if calls else []


def randomised(passes: Sequence[Trace], labels: Tensor, goal: Goal, *, declared: bool) -> list[Flag]:
    """RANDOMISED."""
    logits = torch.stack([trace.logits for trace in passes])
    normalised = logits / logits[0].abs().amax(1, keepdim=True).clamp(min=TINY)
    spread = (normalised - normalised[0]).abs().max().item()
    right = [int((~top1_lost(x, labels, None, goal.threshold, goal.label_kind)).sum()) for x in logits]
    if spread <= AGREE and len(set(right)) == 1:
        return []
    seen = (
        f"over {len(passes)} passes on the same {len(labels)} clips logits differ by up to {spread:.2g} of the largest, "
        f"and {_span(right)} clips are right"
    )
    if declared:
        advice = "Attack the average over at least 20 draws (EOT), and judge by the average too."
        return [raised("RANDOMISED", f"The model is declared stochastic: {seen}.", advice=advice)]
    return [raised("RANDOMISED", f"The model is not deterministic: {seen}.")]


def probabilities(logits: Tensor, label_kind: LabelKind) -> list[Flag]:
    """PROBABILITIES; `logits` should hold extreme inputs too, where honest logits leave [0, 1]."""
    if not ((logits >= 0) & (logits <= 1)).all():
        return []
    if label_kind == "multiclass" and (logits.sum(1) - 1).abs().max() > SUMS_TO_ONE:
        return []
    sums = " and sum to 1" if label_kind == "multiclass" else ""
    words = (
        f"All {logits.numel()} scores, also of extreme inputs, lie between {logits.min():.3g} and {logits.max():.3g}{sums}: "
        "they seem to be probabilities, so thresholds are wrong."
    )
    return [raised("PROBABILITIES", words)]


def few_classes(goal: Goal, classes: int) -> list[Flag]:
    """FEW-CLASSES, for the loss of the goal."""
    loss = str(goal.settings().get("loss_name", ""))
    words = f"The model has {classes} classes, too few for a loss that compares several: the goal climbs {loss!r}."
    return [raised("FEW-CLASSES", words)] if any(name in loss for name in MARGINS) and classes <= FEW else []


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().nan_to_num(), other.nan_to_num())


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
