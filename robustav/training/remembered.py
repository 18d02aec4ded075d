"""Adversarial training with as many passes as plain training: each clip is attacked with what its last passes taught."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, distributed

from robustav.classifier import Classifier, Inputs
from robustav.threat import Budget
from robustav.training.ascent import attacked, within
from robustav.training.guided import GuidedMixup
from robustav.training.method import Batch, Method, Work
from robustav.training.settings import positive

SIGNS, LATEST, SHARE = "remembered/signs/{}", "remembered/latest", "remembered/moved"
EXCHANGED = 2**24  # bytes that processes exchange at once


def bits_of(signs: Float[Tensor, " clip *shape"]) -> UInt8[Tensor, "clip 2 byte"]:
    """Which numbers are above 0, and which below, a bit each.

    >>> bits_of(torch.tensor([[1.0, -1.0, 0.0, 1.0]])).tolist()
    [[[144], [64]]]
    """
    flat = signs.flatten(1).cpu().numpy()
    return torch.from_numpy(np.packbits(np.stack([flat > 0, flat < 0], axis=1), axis=-1))


def signs_of(bits: UInt8[Tensor, "clip 2 byte"], shape: torch.Size) -> Float[Tensor, " clip *shape"]:
    """1, -1 or 0 for each number of clips of this shape.

    >>> signs_of(torch.tensor([[[144], [64]]], dtype=torch.uint8), torch.Size([4]))
    tensor([[ 1., -1.,  0.,  1.]])
    """
    above, below = np.unpackbits(bits.numpy(), axis=-1, count=math.prod(shape)).astype(np.float32).swapaxes(0, 1)
    return torch.from_numpy(above - below).reshape(-1, *shape)


def begin_to_remember(work: Work) -> None:
    """Nothing yet, of any clip."""
    for m in attacked(work):
        size = math.prod(work.data.specs[m].shape)
        work.memory[SIGNS.format(m)] = torch.zeros(len(work.data.ids), 2, -(-size // 8), dtype=torch.uint8)
    work.memory[LATEST] = torch.zeros(len(work.data.ids), dtype=torch.bool)


def check_signs(budgets: Mapping[str, Budget]) -> None:
    """Raise `ValueError` for a norm whose steepest way is not one of signs."""
    for m, budget in budgets.items():
        if budget.norm != "linf":
            raise ValueError(
                f"`norm` must be linf, since signs are what is remembered of a gradient, got {budget.norm} for {m}"
            )


@contextmanager
def remembering(work: Work, reach: float) -> Iterator[Work]:
    """The training with clips moved by what is remembered of them; afterwards, what their gradients say is added.

    For the forward and backward pass of one update. Of a clip that occurs several times in a batch the signs of all its
    gradients are added.
    """
    seen: list[tuple[Int[Tensor, " clip"], Int[Tensor, " row"], Inputs, Inputs]] = []

    def moved(inputs: Inputs, rows: Int[Tensor, " row"]) -> Inputs:
        clips, place = rows.unique(return_inverse=True)
        signs, leaves = {}, {}
        for m, budget in attacked(work).items():
            x, wide = inputs[m], budget.scaled(reach)
            signs[m] = signs_of(work.memory[SIGNS.format(m)][clips], x.shape[1:])
            step = float(wide.radius(x)) * signs[m][place].to(x)
            leaves[m] = within(wide, x, x + step).detach().requires_grad_()
        seen.append((clips, place, signs, leaves))
        return {**inputs, **leaves}

    yield replace(work, moved=moved)
    for clips, place, signs, leaves in seen:
        for m, x in leaves.items():
            if x.grad is not None:
                votes = torch.zeros_like(signs[m]).index_add_(0, place, x.grad.sign().float().cpu())
                work.memory[SIGNS.format(m)][clips] = bits_of(signs[m] + votes.sign())
        work.memory[LATEST][clips] = True
        work.memory[SHARE] = torch.stack([each.abs().mean() for each in signs.values()]).mean()


def exchange(work: Work) -> None:
    """Between epochs: all processes remember what the one has that saw a clip in the last (of several: the highest)."""
    latest = work.memory[LATEST] = work.memory[LATEST].cpu()
    for key in [SIGNS.format(m) for m in attacked(work)]:
        work.memory[key] = work.memory[key].cpu()
        if distributed.is_available() and distributed.is_initialized():
            _exchange(work.memory[key], latest, next(work.model.parameters()).device)
    latest.zero_()


def _exchange(kept: UInt8[Tensor, "clip 2 byte"], latest: Tensor, device: torch.device) -> None:
    rank = distributed.get_rank()
    owner = torch.where(latest, rank, -1).to(device)
    distributed.all_reduce(owner, op=distributed.ReduceOp.MAX)
    mine = (owner == rank) if rank else (owner <= 0)  # of clips that nobody saw, all remember the same
    rows = max(1, EXCHANGED // kept[0].numel())
    for part, own in zip(kept.split(rows), mine.split(rows), strict=True):
        sent = torch.where(own[:, None, None], part.to(device), 0)
        distributed.all_reduce(sent)
        part.copy_(sent)


@dataclass(frozen=True)
class Remembered(Method):
    """Plain training on clips that are moved along the signs of the gradients which their own last passes had.

    The pass that a step learns from also says where the loss rises at each clip's input. That is kept until the clip
    comes again, usually an epoch later: each number of it is moved by `reach` epsilons up or down, or not at all where
    its last two gradients disagreed. So an attack costs no pass of its own, and passes are those of plain training: 1 of
    either kind a clip, of which the backward pass goes down to the inputs. Of the kind of free adversarial training
    [Shafahi et al., 2019, arXiv:1904.12843] and of attacks carried from epoch to epoch [Zheng et al., 2020,
    arXiv:1912.11969]; this form, with no ascent of its own, is ours. An old gradient makes a weaker attack than a fresh
    one, for which a longer `reach` may make up. As in free training, gradients are those of train mode.

    Clips are moved before they are augmented, so that what is remembered fits them however they are augmented next; one
    that is then made louder is moved as much further. At their first visit clips are not moved. Every process keeps 2
    bits for each number of the training set. Budgets must be linf. The log has the share of numbers that are moved.
    """

    loads: ClassVar[bool] = False
    budgeted: ClassVar[bool] = True

    reach: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "reach")

    def check_budgets(self, model: Classifier, budgets: Mapping[str, Budget]) -> None:
        super().check_budgets(model, budgets)
        check_signs(budgets)

    def begin(self, work: Work) -> None:
        begin_to_remember(work)

    def begin_epoch(self, work: Work) -> None:
        exchange(work)

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        with remembering(work, self.reach) as moved:
            return super().train_step(moved, moved.batch(batch.rows))


@dataclass(frozen=True)
class GuidedRemembered(GuidedMixup):
    """Guided mix-up of clips that are moved as `remembered` moves them: attacked at each clip's own input, then mixed.

    Costs 1 pass of either kind a clip, and the looks of guided mix-up.
    """

    budgeted: ClassVar[bool] = True

    place: str = "latent"
    reach: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reach")

    def check_budgets(self, model: Classifier, budgets: Mapping[str, Budget]) -> None:
        super().check_budgets(model, budgets)
        check_signs(budgets)

    def begin(self, work: Work) -> None:
        super().begin(work)
        begin_to_remember(work)

    def begin_epoch(self, work: Work) -> None:
        super().begin_epoch(work)
        exchange(work)

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        with remembering(work, self.reach) as moved:
            return super().train_step(moved, batch)


METHODS: dict[str, type[Method]] = {"remembered": Remembered, "guided-remembered": GuidedRemembered}
