"""A row of the table of models: how to build it, what it is, and where it comes from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from torch import Tensor, nn

from robustav.classifier import LabelKind, check_label_kind
from robustav.data.audioset import CLASSES

SHORTEST = 0.1  # s of audio
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Task:
    """What checkpoints of one architecture differ in: what it was tuned to tell apart, and how much it reads of a clip.

    `seconds` of audio at 16 kHz, `frames` pictures spread over the clip, each of `size` x `size` pixels.
    """

    classes: tuple[str, ...] = CLASSES
    label_kind: LabelKind = "multilabel"
    seconds: float = 10.0
    frames: int = 10
    size: int = 224

    def __post_init__(self) -> None:
        check_label_kind(self.label_kind)
        if len(set(self.classes)) != len(self.classes) or not self.classes:
            raise ValueError(f"`classes` must be different names, at least one, got {len(self.classes)} with repeats")
        for name in ("seconds", "frames", "size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}")
        if self.seconds < SHORTEST:
            raise ValueError(f"`seconds` must be at least {SHORTEST:g}, got {self.seconds:g}")


@dataclass(frozen=True)
class Entry:
    """A model by name. Pre-training models have no classes and cannot be attacked: they are here to be told apart.

    `takes` names the fields of `Task` that may differ from `task`. `head` is the tensor of a checkpoint whose first axis
    counts the classes.
    """

    make: Callable[[Task], nn.Module]
    summary: str
    source: str  # who made it
    weights: str = ""  # file under `WEIGHTS`, if they ship with the package
    paper: str = ""  # authors, year, arXiv
    licence: str = ""  # of the official code and weights, as far as it is stated
    published: str = ""  # where official checkpoints are, if there are any
    task: Task = field(default=Task())
    takes: tuple[str, ...] = ()
    head: str = ""

    @property
    def path(self) -> Path:
        return WEIGHTS / self.weights

    def build(self, task: Task | None = None) -> nn.Module:
        """The model with random weights, for its usual task unless told."""
        task = task or self.task
        other = [f.name for f in fields(Task) if getattr(task, f.name) != getattr(self.task, f.name)]
        if fixed := [name for name in other if name not in self.takes]:
            raise ValueError(
                f"`{fixed[0]}` of this model is {getattr(self.task, fixed[0])!r} and cannot be {getattr(task, fixed[0])!r}; "
                f"what can be set: {', '.join(self.takes) or 'nothing'}"
            )
        return self.make(task)

    def tuned(self, **changes: object) -> "Entry":
        """The same row for another usual task."""
        return replace(self, task=replace(self.task, **changes))  # type: ignore[arg-type]


class Published(nn.Module):
    """A model whose `state_dict` has the official names; front ends keep theirs out of it."""

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict with this model's names and sizes: aliases dropped, position tables resampled.

        What it does not understand it leaves as it is, so that loading can name the differences.
        """
        return dict(state)
