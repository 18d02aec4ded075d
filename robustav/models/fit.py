"""Which published model a checkpoint belongs to."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustav.models.checkpoints import Differences, differences
from robustav.models.entry import Entry, Published, Task


class Fit(NamedTuple):
    """How well a checkpoint fits a row of the table of models; `shared` of all their names and shapes they have in common."""

    name: str
    differs: Differences
    shared: float
    classes: int | None  # the classes that the checkpoint tells apart, where that is not the row's usual number
    resampled: tuple[str, ...]  # position tables of another length or size, which loading resamples

    @property
    def exact(self) -> bool:
        """Whether every tensor has its place."""
        return not self.differs.total


@cache
def weightless(entry: Entry, task: Task | None = None) -> nn.Module:
    """The model without memory for its weights: for its names, shapes and counts. One for all who ask."""
    with torch.device("meta"):
        return entry.build(task).eval()


def resampled_tables(state: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Tensors that got another shape when a checkpoint was adapted."""
    return tuple(sorted(name for name in state.keys() & adapted.keys() if state[name].shape != adapted[name].shape))


def classes_in(state: Mapping[str, Tensor], entry: Entry) -> int | None:
    """How many classes a checkpoint tells apart, or None where it lacks the model's last layer."""
    head = state.get(entry.head)
    return len(head) if head is not None and head.ndim and len(head) else None


def fits(state: Mapping[str, Tensor], models: Mapping[str, Entry]) -> list[Fit]:
    """Every model, the best fit first."""
    found = []
    for name, entry in models.items():
        count = classes_in(state, entry)
        other = count if count != len(entry.task.classes) and "classes" in entry.takes else None
        task = None if other is None else replace(entry.task, classes=tuple(f"class {i}" for i in range(other)))
        model = weightless(entry, task)
        adapted = model.adapted(state) if isinstance(model, Published) else dict(state)
        differs = differences(model.state_dict(), adapted)
        own = {id(tensor) for tensor in state.values()}  # and not what adapting filled in
        told = [key for key in adapted.keys() & model.state_dict().keys() if key in state or id(adapted[key]) in own]
        common = len(told) - len(differs.shapes)
        shared = common / max(1, common + differs.total)
        found.append(Fit(name, differs, shared, other, resampled_tables(state, adapted)))
    return sorted(found, key=lambda fit: (-fit.shared, fit.classes is not None, len(fit.resampled)))
