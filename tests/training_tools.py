"""A training in progress over a tiny model and random clips, for tests of methods."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from conftest import CLASSES, batch_of, tiny_fusion, tiny_specs
from torch import Tensor

from robustav.classifier import Classifier, Inputs, InputSpec, LabelKind
from robustav.threat import Budget
from robustav.training.method import Batch, Work

LEARNING_RATE = 0.05


class TinyClips:
    """Random clips whose labels follow from the row; some multi-label clips have one label, some two, one in six none."""

    def __init__(
        self,
        count: int = 24,
        label_kind: LabelKind = "multilabel",
        specs: Mapping[str, InputSpec] | None = None,
        classes: tuple[str, ...] = CLASSES,
    ) -> None:
        self.name, self.digest, self.classes, self.label_kind = "tiny", f"{count}".rjust(64, "0"), classes, label_kind
        self.specs = dict(specs or tiny_specs())
        self.ids = tuple(f"clip {row}" for row in range(count))
        self._inputs = batch_of(self.specs, count, seed=11)
        rows = torch.arange(count)
        self.targets = F.one_hot(rows % len(classes), len(classes)).float()
        if label_kind == "multilabel":
            also = F.one_hot((rows // 2) % len(classes), len(classes)).float()
            self.targets = self.targets.maximum(also) * (rows % 6 != 5)[:, None]

    def inputs(self, rows: Tensor) -> Inputs:
        return {m: x[rows] for m, x in self._inputs.items()}


def budgets(model: Classifier, epsilon: float = 0.05) -> dict[str, Budget]:
    """The same radius in every modality."""
    return {m: Budget("linf", epsilon, low=spec.low, high=spec.high) for m, spec in model.specs.items()}


def tiny_work(model: Classifier | None = None, label_kind: LabelKind = "multilabel", **changes: Any) -> Work:
    """SGD over 24 random clips, two epochs of four steps of six clips; `changes` replaces fields of `Work`."""
    model = tiny_fusion(label_kind) if model is None else model
    model.train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def apply(loss: Tensor, before_step: Callable[[], None] | None) -> None:
        optimizer.zero_grad()
        loss.backward()
        if before_step:
            before_step()
        optimizer.step()

    fields: dict[str, Any] = {
        "model": model,
        "averaged": averaged,
        "data": TinyClips(24, model.label_kind, model.specs, tuple(model.classes)),
        "budgets": budgets(model),
        "generator": torch.Generator().manual_seed(7),
        "epochs": 2,
        "steps": 8,
        "apply": apply,
    }
    return Work(**{**fields, **changes})


def batch(work: Work, *rows: int) -> Batch:
    """Some clips of the training's data, the first six unless told."""
    chosen = torch.tensor(rows or range(6))
    return Batch(work.data.inputs(chosen), work.data.targets[chosen], chosen)
