"""Ascent towards one wrong class after another."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robustav.attacks.apgd import APGD
from robustav.attacks.ascent import Pursuit, look, merged
from robustav.classifier import Classifier, Inputs
from robustav.goals import Untargeted
from robustav.losses import aimed_margin, multi_hot, targeted_dlr
from robustav.norms import Draws
from robustav.threat import ThreatModel


@dataclass(frozen=True)
class Aimed:
    """APGD-T: towards each of the wrong classes that score highest on the clean input, until one is reached [Croce and
    Hein, 2020, arXiv:2003.01690].

    For an untargeted goal, whose loss may lead nowhere while a way to one of the classes is open. A search for a
    success: clips that have one are left alone, others that are out of wrong classes too. What is returned reaches the
    goal, or has the largest of the goal's own loss among the ends of all tries. Multilabel classes are aimed at by their
    margin over the best label (`robustav.losses.aimed_margin`).
    """

    attack: APGD = field(default_factory=lambda: APGD(stop=True))
    aims: int = 9

    survivors: ClassVar[bool] = True  # there is nothing to look for on a clip that is broken already

    def __post_init__(self) -> None:
        if self.attack.loss:
            raise ValueError(f"`attack` is given its loss by the aim, got loss={self.attack.loss!r}: leave it out")
        if self.aims < 1:
            raise ValueError(f"`aims` must be at least 1, got {self.aims}")

    def check(self, model: Classifier, threat: ThreatModel) -> None:
        """Raise `ValueError` for a goal that is not any mistake."""
        if not isinstance(threat.goal, Untargeted):
            raise ValueError(
                f"`threat.goal` must be Untargeted for an attack that chooses its own aims, got "
                f"{type(threat.goal).__name__}: use APGD, which climbs that goal's loss"
            )

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs:
        self.check(model, threat)
        loss = targeted_dlr if threat.goal.label_kind == "multiclass" else aimed_margin
        with torch.no_grad():
            scores = model.trace(inputs).logits
        right = multi_hot(labels, scores) > 0.5
        ranked = scores.masked_fill(right, float("-inf")).argsort(dim=1, descending=True)
        wrong = (~right).sum(1).clamp(min=1)  # where every class is a label, the aim is one of them
        clips, best = Pursuit(model, inputs, labels, threat, draws), None
        for aim in range(self.aims):
            going = (wrong > aim) if best is None else (wrong > aim) & ~best.reached
            rows = going.nonzero().flatten()
            if not len(rows):
                break
            part = clips.at(rows)
            steered = part.threat.steered(loss, ranked[rows, aim])
            tried = self.attack(part.model, part.inputs, part.labels, steered, draws=part.draws)
            here = look(part.model, tried, part.labels, part.threat)
            best = here if best is None else merged(best, rows, here)
        assert best is not None
        return best.inputs
