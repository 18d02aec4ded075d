"""One evaluation from start to end, in the words of the command line: what is asked, and the run that answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustav.attacks import ATTACKS, Attack, Restarts
from robustav.classifier import Classifier
from robustav.data.samples import Progress
from robustav.data.sources import load_samples
from robustav.goals import parse_goal
from robustav.harness import Settings, evaluate
from robustav.ledger import Ledger
from robustav.models.zoo import load_model
from robustav.plan import conditions
from robustav.threat import parse_epsilons


@dataclass(frozen=True)
class Evaluation:
    """A model, data, and an adversary. `run` writes a ledger, from which `robustav.report` makes tables.

    Every field is written as on the command line; `limit` None is a quick look at av-events and all clips of other
    data, 0 is all.
    """

    model: str | Classifier = "av-fusion"
    eps: Sequence[str] = ("0.01",)
    data: str | None = None
    checkpoint: Path | None = None
    trust_pickle: bool = False
    norm: str | None = None  # linf, l2 or l1; linf unless a budget is an SNR, which is l2
    attacks: Sequence[str] = tuple(ATTACKS)
    attacked: Sequence[str] = ()  # as in "audio", "audio+visual"; empty: every set of modalities
    steps: int | None = None
    restarts: int = 1
    goal: str = "untargeted"
    loss: str | None = None
    success: str | None = None
    threshold: float = 0.5
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "attacks", "attacked"):  # one is as good as a list of one, and a number as its text
            given = getattr(self, name)
            many = [given] if isinstance(given, str | float | int) else given
            object.__setattr__(self, name, tuple(str(one) for one in many))
        if not self.eps:
            raise ValueError("`eps` must name at least one epsilon, got none")
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise ValueError(f"no attack {unknown[0]!r}: there are {', '.join(ATTACKS)}")
        if isinstance(self.model, Classifier) and self.checkpoint is not None:
            raise ValueError("`checkpoint` goes with a model by name: load the weights into the model that you pass")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"`limit` must not be negative, got {self.limit}")

    def run(
        self, out: Path | str | None = None, settings: Settings | None = None, progress: Progress | None = None
    ) -> Ledger:
        """Do it, or go on where a killed run stopped; `out` is by default a folder under `runs/` named after the run.

        `progress` hears of data being generated, `settings.progress` of the attacks.
        """
        if isinstance(self.model, Classifier):
            model: Classifier = self.model
            about: dict[str, Any] = {"model": type(self.model).__name__}
        else:
            model, about = load_model(self.model, self.checkpoint, trust_pickle=self.trust_pickle)
        # So that latent metrics can find the same model and clips again; decides no number, hence no part of the identity.
        about["asked"] = {
            "data": _absolute(self.data),
            "checkpoint": _absolute(None if self.checkpoint is None else str(self.checkpoint)),
        }
        goal = parse_goal(
            self.goal, model.classes, model.label_kind, loss=self.loss, success=self.success, threshold=self.threshold
        )
        epsilons = parse_epsilons(list(self.eps), model.specs, self.norm)
        rows = conditions(self.made_attacks(), epsilons, goal, self._sets(sorted(model.specs)))
        samples, quick_look = load_samples(self.data, model, progress)
        limit = quick_look if self.limit is None else self.limit or None
        return evaluate(model, samples, rows, goal, out, seed=self.seed, limit=limit, about=about, settings=settings)

    def made_attacks(self) -> dict[str, Attack]:
        """The attacks by name, with the steps and restarts that were asked for where an attack has them."""
        made: dict[str, Attack] = {}
        for wanted, setting, given in (("steps", "steps", self.steps), ("random_start", "restarts", self.restarts - 1)):
            if given and not any(hasattr(ATTACKS[name](), wanted) for name in self.attacks):
                raise ValueError(f"`{setting}` has no meaning for {', '.join(self.attacks)}: leave it out")
        for name in self.attacks:
            attack = ATTACKS[name]()
            if self.steps is not None and hasattr(attack, "steps"):
                attack = replace(attack, steps=self.steps)  # type: ignore[type-var]
            made[name] = (
                Restarts(attack, self.restarts) if self.restarts > 1 and hasattr(attack, "random_start") else attack
            )
        return made

    def _sets(self, modalities: Sequence[str]) -> list[tuple[str, ...]] | None:
        if not self.attacked:
            return None
        sets = []
        for text in self.attacked:
            names = tuple(sorted(modalities if text == "both" else {part.strip() for part in text.split("+")}))
            if unknown := [name for name in names if name not in modalities]:
                raise ValueError(
                    f"cannot attack {unknown[0]!r}: the model's modalities are {', '.join(modalities)} "
                    "(together: joined by +, or both)"
                )
            sets.append(names)
        return list(dict.fromkeys(sets))


def _absolute(where: str | None) -> str | None:
    """A path in full, a name as it is."""
    return str(Path(where).resolve()) if where is not None and Path(where).exists() else where
