"""The model as an attack sees it: a frozen, faster copy that holds what it need not compute again, and counts."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustav.classifier import Classifier, Inputs

log = logging.getLogger(__name__)

AGREEMENT = 1e-3  # largest difference from the untouched model's logits, relative to the largest logit


def prepare(model: Classifier, sample: Inputs) -> Classifier:
    """A frozen copy in eval mode with batch norms folded into convolutions and channels-last weights.

    The arithmetic is the same but for rounding; that is checked on `sample`, and where it does not hold (or the model
    cannot be copied) an unchanged frozen copy (or the model itself) is returned. Verdicts must come from `model`.
    """
    try:
        plain = copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:  # a user's module may hold anything, and none of it concerns the evaluation
        log.warning("the model cannot be copied (%s): attacking it as it is, without folding", error)
        return model
    if model.stochastic:  # two passes could not be compared
        return plain
    try:
        quick = copy.deepcopy(plain)
        fold_batch_norms(quick)
        channels_last(quick)
        leaves = {m: x.detach().requires_grad_() for m, x in sample.items()}
        with torch.enable_grad():
            got = quick(leaves)
            torch.autograd.grad(got.sum(), list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            expected = plain(sample)
    except Exception as error:  # some code in the model does not take the other memory layout
        log.info("the faster arrangement does not run (%s): attacking a plain copy", error)
        return plain
    if (got - expected).abs().max() <= AGREEMENT * expected.abs().max():
        return quick
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plain.modules()):
        log.warning("folding batch norms changes the model's scores: attacking it unfolded")
    return plain


def channels_last(model: nn.Module) -> None:
    """Lay the weights of two-dimensional convolutions out as processors like them; their values stay."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch norm that directly follows a convolution inside an `nn.Sequential`, where order is data flow."""
    for child in module.children():
        fold_batch_norms(child)
    if isinstance(module, nn.Sequential):
        for name, following in zip(list(module._modules), list(module._modules)[1:], strict=False):
            convolution, norm = module._modules[name], module._modules[following]
            pairs = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))
            if any(type(convolution) is c and type(norm) is n and norm.track_running_stats for c, n in pairs):
                module._modules[name] = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var, arg-type]
                module._modules[following] = nn.Identity()


@contextmanager
def quick_products() -> Iterator[None]:
    """Let float32 matrix products take the CPU's faster kernels where those are as exact."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if medium_is_exact() else before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def medium_is_exact() -> bool:
    """Whether torch's "medium" precision still computes in float32 on this CPU.

    On some it selects a float32 kernel twice as fast as the default, on others it rounds to bfloat16. Decided by error
    alone, not by time, so that the same machine always decides alike.
    """
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    try:
        torch.set_float32_matmul_precision("medium")
        return bool(((left @ right).double() - exact).norm() / exact.norm() < 1e-6)
    finally:
        torch.set_float32_matmul_precision(before)
