"""What a training is, in the words of the command line: everything that decides its weights, beside code and device."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import numpy as np
from torch import Tensor

from robustav.classifier import Classifier, LabelKind
from robustav.ledger import digest_of
from robustav.metrics.tagging import mean_average_precision, top1_hit
from robustav.threat import Budget, parse_epsilons
from robustav.training.augment import parse_augmentation
from robustav.training.methods import parse_method

AV_EVENTS = "av-events/"
SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # of logits and zeros and ones, [sample, class]
    "mAP": lambda logits, targets: float(mean_average_precision(logits, targets)),
    "top1": lambda logits, targets: float(top1_hit(logits, targets)[targets.any(axis=1)].mean()),  # of labelled clips
}
DECLARED: dict[LabelKind, tuple[str, ...]] = {"multilabel": ("mAP", "top1"), "multiclass": ("top1",)}  # usual one first
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("32", "bf16")  # half precision would lose the gradients of inputs


@dataclass(frozen=True)
class Recipe:
    """One training. The defaults are for the embedded models on av-events: a minute or two on two cores.

    Learning rates rise linearly over the share `warmup` of all steps and then follow half a cosine down to 0, unless
    `cosine` is False. What does not fill a batch at the end of an epoch sits that epoch out.
    """

    model: str = (
        "av-fusion"  # as for `robustav.models.zoo.load_model`; trained from random weights without `checkpoint`
    )
    method: str = "erm"  # a key of METHODS, settings in brackets
    data: str = "av-events/train"
    validation: str | None = None  # unless told, av-events/validation for av-events/train, and none for other data
    checkpoint: str | None = None  # weights to start from
    eps: str = "0.003"  # of the adversary in training, as in `robustav attack`; of methods that have one
    norm: str | None = None
    ramp: float = 0.0  # share of all steps over which that budget grows from nothing to the whole
    attacked: str = ""  # "audio", "audio+visual", "both"; empty: every modality that `eps` covers
    epochs: int = 14
    batch_size: int = 32  # of all processes together
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.05  # of weights with two axes or more
    momentum: float = 0.9  # of sgd
    warmup: float = 0.3
    cosine: bool = True
    ema: float = 0.99  # decay of the running mean of the weights, which is what is kept; 0: the last weights themselves
    clip_norm: float = 0.0  # longest gradient; 0: as long as it is
    augment: str = "light"  # a key of AUGMENTATIONS, settings in brackets
    balanced: bool = False  # draw clips so that rare classes are seen as often as common ones
    limit: int | None = None  # clips to train on, drawn by seed
    seed: int = 0
    precision: str = "32"
    score: str | None = None  # on validation clips: mAP (multi-label, the usual) or top1 (the usual of others)
    patience: int = 0  # epochs without a better score after which to stop; 0: never
    keep: str = "last"  # "last" weights, or the "best" by the score; neither looks at epochs whose budget still grows

    def __post_init__(self) -> None:
        method = parse_method(self.method)
        parse_augmentation(self.augment)
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("precision", PRECISIONS)
        self._one_of("keep", ("last", "best"))
        self._one_of("score", (None, *SCORES))
        for name in ("epochs", "batch_size", "learning_rate"):
            self._within(name, 0, math.inf, low_too=False)
        for name in ("weight_decay", "clip_norm", "patience"):
            self._within(name, 0, math.inf)
        for name in ("warmup", "ramp", "ema", "momentum"):
            self._within(name, 0, 1)
        if self.optimizer != "sgd" and self.momentum != Recipe.momentum:
            raise ValueError(f"`momentum` is of sgd, got {self.momentum} with {self.optimizer}: leave one of them out")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}: leave it out for all clips")
        for name, usual in (("data", "train"), ("validation", "validation")):
            if (clips := getattr(self, name)) in ("av-events", f"{AV_EVENTS}test"):
                raise ValueError(
                    f"`{name}` must be clips that no attack is judged on, {AV_EVENTS}{usual}, got {clips!r}"
                )
        if self.validation == self.data:
            raise ValueError(f"`validation` must be other clips than `data`, got {self.data!r} for both")
        method.check_plan(self.epochs, self.balanced)
        if self.validates is None and (self.patience or self.keep == "best" or self.score):
            name = "patience" if self.patience else "score" if self.score else "keep"
            raise ValueError(f"`{name}` needs a score on clips not trained on: name them with `validation`")

    @property
    def name(self) -> str:
        """For a folder: model and method in short, and a digest of everything."""
        short = re.sub(r"[^\w.-]+", "_", f"{self.model}-{self.method}").strip("._")
        return f"{short}-{digest_of(asdict(self))[:8]}"

    @property
    def validates(self) -> str | None:
        """The clips that the score is taken on, if any."""
        usual = f"{AV_EVENTS}validation"
        return self.validation or (usual if self.data.startswith(AV_EVENTS) and self.data != usual else None)

    def budgets(self, model: Classifier) -> dict[str, Budget]:
        """What the adversary in training may do to the model's inputs."""
        found = parse_epsilons([self.eps], model.specs, self.norm)
        if len(found) != 1:
            raise ValueError(f"`eps` must be one epsilon (0.01, or audio=0.01,visual=4/255), got {self.eps!r}")
        budgets = found[0]
        if not self.attacked:
            return budgets
        names = set(model.specs) if self.attacked == "both" else {part.strip() for part in self.attacked.split("+")}
        if unknown := sorted(names - budgets.keys()):
            raise ValueError(
                f"`attacked` must name modalities that the model has and `eps` covers, {' or '.join(sorted(budgets))} "
                f"(together: joined by +, or both), got {unknown[0]!r}"
            )
        return {m: budget for m, budget in budgets.items() if m in names}

    def declared_score(self, label_kind: LabelKind) -> str:
        """The score for labels of this kind; raises `ValueError` if the one asked for is for the other kind."""
        known = DECLARED[label_kind]
        if self.score is not None and self.score not in known:
            raise ValueError(f"`score` of a {label_kind} model must be {' or '.join(known)}, got {self.score!r}")
        return self.score or known[0]

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of `steps` in all."""
        rising = self.warmup * steps
        if step < rising:
            return self.learning_rate * (step + 1) / (math.floor(rising) + 1)
        falling = (step - rising) / max(1.0, steps - rising)
        return self.learning_rate * ((1 + math.cos(math.pi * falling)) / 2 if self.cosine else 1)

    def share(self, step: int, steps: int) -> float:
        """How much of the adversary's budget a step has, counted from 0, of `steps` in all."""
        rising = self.ramp * steps
        return (step + 1) / (math.floor(rising) + 1) if step < rising else 1.0

    def differences(self, other: dict[str, object]) -> list[str]:
        """In words, what another recipe's fields say that these do not."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            f"{name} ({other.get(name)!r} there, {own.get(name)!r} now)"
            for name in {**own, **other}
            if own.get(name) != other.get(name)
        ]

    def _one_of(self, name: str, known: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in known:
            named = ", ".join(filter(None, known))
            raise ValueError(f"`{name}` must be one of {named}, got {getattr(self, name)!r}")

    def _within(self, name: str, low: float, high: float, low_too: bool = True) -> None:
        value = getattr(self, name)
        if not ((low <= value if low_too else low < value) and value < high):
            words = f"{'at least' if low_too else 'above'} {low:g}" + (
                f" and below {high:g}" if math.isfinite(high) else ""
            )
            raise ValueError(f"`{name}` must be {words}, got {value!r}")


def scores_of(logits: Tensor, targets: Tensor, label_kind: LabelKind) -> dict[str, float]:
    """Every score that is declared for labels of this kind."""
    return {name: SCORES[name](logits.double().numpy(), targets.numpy()) for name in DECLARED[label_kind]}
