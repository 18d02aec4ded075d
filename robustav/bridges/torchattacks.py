"""torchattacks: its attacks on our classifiers, and our classifiers as its models [Kim, 2020, arXiv:2010.01950]."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustav.attacks.ascent import Pursuit
from robustav.bridges.bridge import Bridge, Kind
from robustav.bridges.single import Clips, SingleInput, UnitBox, picture_shape
from robustav.classifier import Classifier, Inputs
from robustav.goals import Goal, Hide, Inject, Targeted, Untargeted
from robustav.threat import ThreatModel

LINF, L2, BOTH = ("linf",), ("l2",), ("linf", "l2")
NAMES = {"linf": "Linf", "l2": "L2"}
PIXELS = "it counts changed values (l0), which no budget here bounds"
COLOURS = "its filters are made for pictures of three channels"

KINDS = {
    "FGSM": Kind(LINF, "loss", random=False, whole=True),
    "BIM": Kind(LINF, "loss", shares=("alpha",), random=False, whole=True),
    "RFGSM": Kind(LINF, "loss", shares=("alpha",), whole=True),
    "PGD": Kind(LINF, "loss", shares=("alpha",), random="random_start", whole=True),
    "EOTPGD": Kind(LINF, "loss", shares=("alpha",), random="random_start", whole=True),
    "FFGSM": Kind(LINF, "loss", shares=("alpha",), whole=True),
    "TPGD": Kind(LINF, "scores", shares=("alpha",), whole=True),
    "MIFGSM": Kind(LINF, "loss", shares=("alpha",), random=False, whole=True),
    "NIFGSM": Kind(LINF, "loss", shares=("alpha",), random=False, whole=True),
    "SINIFGSM": Kind(LINF, "loss", shares=("alpha",), random=False, whole=True),
    "VMIFGSM": Kind(LINF, "loss", shares=("alpha",), whole=True),
    "VNIFGSM": Kind(LINF, "loss", shares=("alpha",), whole=True),
    "DIFGSM": Kind(LINF, "loss", shares=("alpha",), whole=True, square=True),
    "UPGD": Kind(LINF, "scores", shares=("alpha",), random="random_start", whole=True),
    "Jitter": Kind(LINF, "scores", shares=("alpha",), whole=True),
    "PGDL2": Kind(L2, "loss", shares=("alpha",), random="random_start", whole=True),
    "APGD": Kind(BOTH, "scores", seeks=True),
    "APGDT": Kind(BOTH, "scores", seeks=True, classes=4),
    "FAB": Kind(BOTH, "scores", seeks=True),
    "AutoAttack": Kind(BOTH, "scores", seeks=True, classes=4, tiles=True),
    "Square": Kind(BOTH, "scores", seeks=True, knowledge="scores", tiles=True),
    "SPSA": Kind(LINF, "scores", shares=("delta", "lr"), knowledge="scores"),
    "CW": Kind(L2, "scores", epsilon=None, random=False),
    "DeepFool": Kind(L2, "scores", epsilon=None, random=False),
    "EADL1": Kind(("l1",), "scores", epsilon=None, random=False),
    "EADEN": Kind(("l1",), "scores", epsilon=None, random=False),
}
REFUSED = {
    "VANILA": "it returns its input",
    "GN": "its noise has a standard deviation, not a radius; `noise` is the control here",
    "PGDRS": "it is made for models that are smoothed by noise",
    "PGDRSL2": "it is made for models that are smoothed by noise",
    "TIFGSM": COLOURS,
    "PIFGSM": COLOURS,
    "PIFGSMPP": COLOURS,
    "JSMA": PIXELS,
    "OnePixel": PIXELS,
    "Pixle": PIXELS,
    "SparseFool": PIXELS,
    "MultiAttack": "it is made of other attacks; name several",
    "LGV": "it trains models of its own",
}
UNTARGETED_ONLY = ("TPGD", "APGD", "APGDT", "FAB", "AutoAttack", "DeepFool", "SPSA")


class Question(NamedTuple):
    """A goal in the peer's words: cross-entropy on `labels`, climbed, or descended where it is `targeted`."""

    columns: tuple[int, ...] | None  # of the logits, two scores a label; None: the logits of a multiclass model
    labels: Tensor
    targeted: bool = False

    def present(self, logits: Tensor) -> Tensor:
        """The scores whose cross-entropy is meant: of (0, z), that is the binary cross-entropy of z."""
        if self.columns is None:
            return logits
        chosen = logits[:, list(self.columns)]
        return torch.stack([torch.zeros_like(chosen), chosen], dim=1)


@dataclass(frozen=True)
class TorchAttacks(Bridge):
    """An attack of torchattacks, by its name there, on one modality mapped to pictures in [0, 1].

    The loss is the attack's own. For multilabel models that is the mean binary cross-entropy, put to the attacks that
    climb a cross-entropy and look at nothing else; others refuse such models.
    """

    peer: ClassVar[str] = "torchattacks"
    module: ClassVar[str] = "torchattacks"
    kinds: ClassVar[Mapping[str, Kind]] = KINDS
    refused: ClassVar[Mapping[str, str]] = REFUSED

    def check(self, model: Classifier, threat: ThreatModel) -> str:
        """Also that the goal can be put in the peer's words."""
        modality = super().check(model, threat)
        asked = question(threat.goal, torch.zeros(1, len(model.classes)))
        if asked is None or (asked.targeted and self.name in UNTARGETED_ONLY):
            raise ValueError(f"torchattacks's {self.name} cannot pursue the goal: {threat.goal.words(model.classes)}")
        if self.kind.tiles and threat.budgets[modality].norm == "l2":
            _, height, width = picture_shape(model.specs[modality].shape)
            tile = height // 5  # five of them from top to bottom, and what is left over on both sides
            if any((height % 5) // 2 + side // tile * tile > side for side in (height, width)):
                raise ValueError(
                    f"torchattacks's {self.name} in l2 lays tiles that leave a picture of {height} x {width}"
                )
        return modality

    def _run(self, part: Pursuit, modality: str, radius: float, seed: int) -> Tensor:
        box, clean = UnitBox(part.model.specs[modality]), part.inputs[modality]
        asked = question(part.threat.goal, part.labels)
        assert asked is not None
        clips = Clips(part, modality, box, asked.present)
        norm = NAMES.get(part.threat.budgets[modality].norm)
        make = self.made(self.name)
        assert make is not None
        attack = make(clips, **self._arguments(box.length(radius), seed, len(part.model.classes), norm=norm))
        if asked.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        with torch.enable_grad():
            return clips.raw(attack(box.pack(clean), asked.labels), part)


def question(goal: Goal, labels: Tensor) -> Question | None:
    """How torchattacks is asked to pursue a goal; None where it has no words for it."""
    match goal:
        case Untargeted(label_kind="multiclass"):
            return Question(None, labels)
        case Targeted(label_kind="multiclass"):
            return Question(None, torch.full((len(labels),), goal.target, device=labels.device), targeted=True)
        case Untargeted():
            return Question(tuple(range(labels.shape[1])), labels.long())
        case Hide(chosen=tuple(chosen)) | Inject(chosen=tuple(chosen)):
            ones = labels.new_ones(len(labels), len(chosen)).long()
            return Question(chosen, ones, targeted=isinstance(goal, Inject))
    return None


def as_torchattacks_model(model: Classifier, modality: str, held: Inputs | None = None) -> SingleInput:
    """A classifier as torchattacks wants one: pictures [batch, channel, height, width] in [0, 1] to logits.

    `held` are the raw inputs of the other modalities, of one clip or of the whole batch. The module's `box` maps to and
    from its pictures: `attack(view.box.pack(waveforms), labels)`, `eps=view.box.length(0.001)`, `view.box.unpack(found)`.
    The last two are the same distance; `robustav.audit.violations` checks it.
    """
    return SingleInput(model, modality, held, UnitBox(model.specs[modality]) if modality in model.specs else None)
