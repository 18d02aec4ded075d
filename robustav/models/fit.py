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
    """How well a checkpoint fits a row of the table of models."""

    name: str
    differs: Differences
    classes: int | None  # the classes that the checkpoint tells apart, where that is not the row's usual number
    resampled: tuple[str, ...]  # position tables of another length or size, which loading resamples

    @property
    def exact(self) -> bool:
        """Whether every tensor has its place."""
        return not self.differs.total

    @property
    def as_it_is(self) -> bool:
        """Whether nothing need be named or resampled either."""
        return self.exact and self.classes is None and not self.resampled


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
    return len(state[entry.head]) if entry.head in state else None


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
        found.append(Fit(name, differs, other, resampled_tables(state, adapted)))
    return sorted(found, key=lambda fit: (fit.differs.total, fit.classes is not None, len(fit.resampled)))
