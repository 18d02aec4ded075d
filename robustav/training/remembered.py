"""Adversarial training for the price of plain training: each clip is attacked with what its last passes taught."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, distributed

from robustav.classifier import Inputs
from robustav.threat import Budget
from robustav.training.adversarial import attacked, positive, within
from robustav.training.guided import GuidedMixup
from robustav.training.method import Batch, Method, Work

SIGNS, LATEST = "remembered/signs/{}", "remembered/latest"
MOVED = 2**24  # bytes that processes exchange at once


def packed(signs: Float[Tensor, " clip *shape"]) -> UInt8[Tensor, "clip 2 byte"]:
    """Which numbers are above 0, and which below, a bit each.

    >>> packed(torch.tensor([[1.0, -1.0, 0.0, 1.0]])).tolist()
    [[[144], [64]]]
    """
    flat = signs.flatten(1).cpu().numpy()
    return torch.from_numpy(np.packbits(np.stack([flat > 0, flat < 0], axis=1), axis=-1))


def unpacked(bits: UInt8[Tensor, "clip 2 byte"], shape: torch.Size) -> Float[Tensor, " clip *shape"]:
    """1, -1 or 0 for each number of clips of this shape.

    >>> unpacked(torch.tensor([[[144], [64]]], dtype=torch.uint8), torch.Size([4]))
    tensor([[ 1., -1.,  0.,  1.]])
    """
    above, below = np.unpackbits(bits.numpy(), axis=-1, count=math.prod(shape)).astype(np.float32).swapaxes(0, 1)
    return torch.from_numpy(above - below).reshape(-1, *shape)


@dataclass(frozen=True)
class Remembered(Method):
    """Plain training on clips that are moved along the sign of the gradients which their own last passes had.

    The pass that a step learns from also says where the loss rises at each clip's input; that is kept until the clip
    comes again, an epoch later: each number of it moves by `reach` epsilons up or down, and takes
    two passes that agree to change sides. So an attack costs no pass of its own: 1 of either kind a clip, of which
    the backward pass goes down to the inputs. Of the kind of free adversarial training [Shafahi et al., 2019,
    arXiv:1904.12843] and of attacks carried from epoch to epoch [Zheng et al., 2020, arXiv:1912.11969]; this form, with
    no ascent of its own, is ours. An old gradient makes a weaker attack than a fresh one: a longer `reach` may make up
    for that.

    Clips are moved before they are augmented, so that what is remembered fits them when they are augmented otherwise;
    at their first visit they are not moved. Keeps 2 bits for each number of the training set. Budgets must be linf.
    """

    loads: ClassVar[bool] = False

    reach: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "reach")

    def begin(self, work: Work) -> None:
        super().begin(work)
        for m, budget in attacked(work).items():
            if budget.norm != "linf":
                raise ValueError(
                    f"`norm` must be linf, since signs are what is remembered of a gradient, got {budget.norm} for {m}"
                )
            size = math.prod(work.data.specs[m].shape)
            work.memory[SIGNS.format(m)] = torch.zeros(len(work.data.ids), 2, -(-size // 8), dtype=torch.uint8)
        work.memory[LATEST] = torch.zeros(len(work.data.ids), dtype=torch.bool)

    def begin_epoch(self, work: Work) -> None:
        super().begin_epoch(work)
        latest = work.memory[LATEST] = work.memory[LATEST].cpu()
        for key in [SIGNS.format(m) for m in attacked(work)]:
            work.memory[key] = shared(work.memory[key].cpu(), latest, work)
        latest.zero_()

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        return super().losses(work, work.batch(batch.rows))

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        points: list[tuple[Inputs, Int[Tensor, " clip"]]] = []

        def moved(inputs: Inputs, rows: Int[Tensor, " clip"]) -> Inputs:
            leaves = {m: self._moved(work, m, budget, inputs[m], rows) for m, budget in attacked(work).items()}
            points.append((leaves, rows))
            return {**inputs, **leaves}

        loss = super().train_step(replace(work, moved=moved), batch)
        for leaves, rows in points:
            for m, x in leaves.items():
                if x.grad is not None:
                    work.memory[SIGNS.format(m)][rows] = packed(self._signs(work, m, x, rows) + x.grad.sign())
            work.memory[LATEST][rows] = True
        return loss

    def _moved(self, work: Work, modality: str, budget: Budget, x: Tensor, rows: Tensor) -> Tensor:
        wide = budget.scaled(self.reach)
        step = float(wide.radius(x)) * self._signs(work, modality, x, rows)
        return within(wide, x, x + step).detach().requires_grad_()

    def _signs(self, work: Work, modality: str, x: Tensor, rows: Tensor) -> Tensor:
        return unpacked(work.memory[SIGNS.format(modality)][rows], x.shape[1:]).to(x)


@dataclass(frozen=True)
class GuidedRemembered(Remembered, GuidedMixup):
    """Guided mix-up of clips that are moved as `remembered` moves them: attacked at each clip's own input, then mixed.

    Costs 1 pass of either kind a clip, and the looks of guided mix-up.
    """

    place: str = "latent"

    def __post_init__(self) -> None:
        GuidedMixup.__post_init__(self)
        Remembered.__post_init__(self)

    losses = GuidedMixup.losses


def shared(kept: UInt8[Tensor, "clip 2 byte"], latest: Tensor, work: Work) -> UInt8[Tensor, "clip 2 byte"]:
    """What all processes remember: of each clip, what the process has that saw it in the last epoch (the last such)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return kept
    device = next(work.model.parameters()).device
    rank = distributed.get_rank()
    owner = torch.where(latest, rank, -1).to(device)
    distributed.all_reduce(owner, op=distributed.ReduceOp.MAX)
    # Of clips that nobody saw, all remember the same.
    mine = (owner == rank) if rank else (owner <= 0)
    for part, own in _chunks(kept, mine):
        sent = torch.where(own[:, None, None], part.to(device), 0)
        distributed.all_reduce(sent)
        part.copy_(sent)
    return kept


def _chunks(kept: Tensor, mine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, MOVED // kept[0].numel())
    return zip(kept.split(rows), mine.split(rows), strict=True)


METHODS: dict[str, type[Method]] = {"remembered": Remembered, "guided-remembered": GuidedRemembered}
