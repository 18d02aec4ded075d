"""Catastrophic overfitting: single steps no longer find what several would. How it is seen, and what is done then."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from robustav.classifier import Inputs
from robustav.losses import top1_margin
from robustav.training.method import Batch, Work
from robustav.training.processes import averaged

log = logging.getLogger(__name__)

WATCHES = ("off", "warn", "stop", "restore")
COLUMNS = ("step", "single_step_loss", "pgd_loss", "single_step_hit", "pgd_hit")
HISTORY, ROWS, STOPPED = "overfitting/history", "overfitting/rows", "overfitting/stopped"
Craft = Callable[[Work, Batch], Inputs]


def choose(work: Work, clips: int) -> None:
    """Draw the training clips that every look is at, and keep the weights to go back to."""
    count = len(work.data.targets)
    work.memory[ROWS] = torch.randperm(count, generator=work.generator)[: min(clips, count)]
    work.memory[STOPPED] = torch.zeros(())
    _keep(work)


def look(work: Work, single_step: Craft, pgd: Craft, *, fall: float, watch: str) -> bool:
    """Compare both attacks on the clips of `choose`; whether the training overfits to the single step.

    It does when PGD's top-1 hit rate lies more than `fall` below its best so far [early stopping of Wong et al., 2020,
    arXiv:2001.03994] and as far below that of the single step. A row of `COLUMNS` goes to `work.memory[HISTORY]`, its
    rates by themselves to the log. Every pass is counted. With "stop" and "restore" the weights, averaged ones too, go
    back to the last look that found nothing; "stop" also sets `work.memory[STOPPED]`.
    """
    rows = work.memory[ROWS].cpu()
    device = next(work.model.parameters()).device
    inputs = {m: x.to(device) for m, x in work.data.inputs(rows).items()}
    batch = Batch(inputs, work.data.targets[rows].to(device), rows)
    faced = averaged(torch.cat([_faced(work, batch, craft) for craft in (single_step, pgd)])).cpu()
    seen = torch.stack([torch.tensor(float(work.step + 1)), faced[0], faced[2], faced[1], faced[3]])
    history = torch.cat([work.memory.get(HISTORY, seen[:0].reshape(0, len(COLUMNS))).cpu(), seen[None]])
    work.memory[HISTORY] = history
    single_hit, pgd_hit, best = seen[3].item(), seen[4].item(), history[:, 4].max().item()
    work.memory.update({f"overfitting/{name}": value.clone() for name, value in zip(COLUMNS, seen, strict=True)})
    if best - pgd_hit <= fall or single_hit - pgd_hit <= fall:
        _keep(work)
        return False
    undone = watch in ("stop", "restore")
    log.warning(
        "step %d: catastrophic overfitting, top-1 hit %.2f under the single step but %.2f under PGD, whose best was %.2f%s",
        work.step + 1,
        single_hit,
        pgd_hit,
        best,
        "; the weights go back to the last look that found none" if undone else "",
    )
    if undone:
        for key, kept in _kept(work):
            kept.copy_(work.memory[key])
    if watch == "stop":
        work.memory[STOPPED] = torch.ones(())
    return True


def _faced(work: Work, batch: Batch, craft: Craft) -> Tensor:
    """Mean loss and top-1 hit rate at the points of an attack."""
    with work.crafting():
        logits = work.trace(craft(work, batch)).logits.float()
    hits = top1_margin(logits, batch.targets) < 0
    return torch.stack([work.loss(logits, batch.targets).mean(), hits.float().mean()])


def _kept(work: Work) -> Iterator[tuple[str, Tensor]]:
    """Everything that training changes in the model and in its running mean, by the key it has in `work.memory`."""
    models: dict[str, nn.Module] = {"model": work.model, "averaged": work.averaged}
    for name, model in models.items():
        for key, value in model.state_dict().items():
            yield f"overfitting/{name}/{key}", value


def _keep(work: Work) -> None:
    work.memory.update({key: value.clone() for key, value in _kept(work)})
