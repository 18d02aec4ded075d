"""One evaluation from start to end, in the words of the command line: what is asked, and the run that answers it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustav.attacks import ATTACKS, FMN, Attack, MomentumFGSM, Restarts, innermost
from robustav.bridges import Bridge, parse_bridge
from robustav.classifier import Classifier, missing_adaptive
from robustav.data.samples import Progress
from robustav.data.sources import load_samples
from robustav.goal_names import parse_goal
from robustav.goals import Goal
from robustav.harness import Settings, evaluate
from robustav.ledger import Ledger, digest_of_model
from robustav.lessons import UNIVERSAL, universal_rows
from robustav.models.asked import absolute
from robustav.models.zoo import load_model
from robustav.plan import Condition, Member, Score, Source, conditions
from robustav.suites import SUITES, averaging, has_setting, members, with_settings
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
    suite: str = "standard"  # a key of SUITES
    attacks: Sequence[str] = ()  # keys of ATTACKS, torchattacks:NAME, art:NAME, universal; in place of the suite
    attacked: Sequence[str] = ()  # as in "audio", "audio+visual"; empty: every set of modalities
    steps: int | None = None
    restarts: int = 1
    eot: int | None = None  # passes that attacks average; 20 for a model declared stochastic, else 1
    smallest: bool = False  # also look for the smallest budget that breaks each clip
    source: str | Classifier | None = None  # a second model: what breaks it is tried on this one
    source_checkpoint: Path | None = None
    learn_on: str | None = None  # what a universal perturbation is learnt on; av-events/train for av-events
    goal: str = "untargeted"
    loss: str | None = None
    success: str | None = None
    score: Score | None = None  # mAP or hits; unless told, mAP of multi-label models, hits of others
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
        if self.suite not in SUITES:
            raise ValueError(f"no suite {self.suite!r}: there are {', '.join(SUITES)}")
        for name in self.attacks:
            if name not in ATTACKS and name != UNIVERSAL and parse_bridge(name) is None:
                raise ValueError(
                    f"no attack {name!r}: there are {', '.join([*ATTACKS, UNIVERSAL])}, torchattacks:NAME and art:NAME"
                )
        if self.score not in (None, "mAP", "hits"):
            raise ValueError(f"`score` must be 'mAP' or 'hits', got {self.score!r}")
        if isinstance(self.model, Classifier) and self.checkpoint is not None:
            raise ValueError("`checkpoint` goes with a model by name: load the weights into the model that you pass")
        if self.source_checkpoint is not None and not isinstance(self.source, str):
            raise ValueError("`source_checkpoint` goes with a `source` by name, got none")
        if self.eot is not None and self.eot < 1:
            raise ValueError(f"`eot` must be at least 1, got {self.eot}")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"`limit` must not be negative, got {self.limit}")
        if self.learn_on is not None and UNIVERSAL not in self.attacks:
            raise ValueError(f"`learn_on` goes with the attack {UNIVERSAL!r}, which is not asked for")

    def run(
        self, out: Path | str | None = None, settings: Settings | None = None, progress: Progress | None = None
    ) -> Ledger:
        """Do it, or go on where a killed run stopped; `out` is by default a folder under `runs/` named after the run.

        `progress` hears of data being generated, `settings.progress` of the attacks.
        """
        model, about = self._load(self.model, self.checkpoint)
        # So that latent metrics can find the same model and clips again; decides no number, hence no part of the identity.
        about["asked"] = {
            "model": absolute(about["model"]),
            "data": _absolute(self.data),
            "checkpoint": _absolute(None if self.checkpoint is None else str(self.checkpoint)),
        }
        goal = parse_goal(
            self.goal, model.classes, model.label_kind, loss=self.loss, success=self.success, threshold=self.threshold
        )
        score = self.score or ("mAP" if model.label_kind == "multilabel" else "hits")
        epsilons = parse_epsilons(list(self.eps), model.specs, self.norm)
        sets = self._sets(sorted(model.specs))
        samples, quick_look = load_samples(self.data, model, progress)
        limit = quick_look if self.limit is None else self.limit or None
        settings = settings or Settings()

        def wanted(row: Condition) -> bool:
            """A suite leaves out what cannot handle a threat; peers, which attack one modality at a time, where nobody
            asked for several. What was named and cannot is an error."""
            alone = sets is None and isinstance(innermost(row.attack), Bridge)
            return len(row.attacked) < 2 if alone else bool(self.attacks) or row.smallest or row.fits(model)

        rows = conditions(self.members(model, goal, score), epsilons, goal, sets, score, wanted)
        if UNIVERSAL in self.attacks:
            rows += universal_rows(
                model, goal, epsilons, sets, self.data, samples, self.learn_on, settings, self.seed, progress
            )
        return evaluate(model, samples, rows, goal, out, seed=self.seed, limit=limit, about=about, settings=settings)

    def members(self, model: Classifier, goal: Goal, score: Score) -> list[Member]:
        """The attacks of the run in their order, with the settings that were asked for where an attack has them."""
        named = {name: parse_bridge(name) or ATTACKS[name]() for name in self.attacks if name != UNIVERSAL}
        suite, own = SUITES[self.suite](goal, model), model.adaptive_attacks()
        if taken := sorted(suite.keys() & own.keys()):
            raise ValueError(
                f"the model's adaptive attack {taken[0]!r} has the name of one of the suite: give it another"
            )
        chosen = {**(named if self.attacks else suite), **own}  # a defence faces its own attack whatever else is named
        if reason := missing_adaptive(model, chosen):
            raise ValueError(reason)
        made = members(self._as_asked(chosen), model, score, self.eot)
        if self.source is not None:
            other, about = self._load(self.source, self.source_checkpoint)
            attack = averaging(MomentumFGSM(self.steps or 20), other, self.eot)
            made.append(Member("transfer", attack, Source(about["model"], other, digest_of_model(other))))
        if self.smallest:
            made.append(Member("smallest", FMN(self.steps or 100), smallest=True))
        return made

    def _as_asked(self, attacks: dict[str, Attack]) -> dict[str, Attack]:
        """With the steps and restarts that were given."""
        for wanted, setting, given in (("steps", "steps", self.steps), ("random_start", "restarts", self.restarts - 1)):
            if given and not any(has_setting(attack, wanted) for attack in attacks.values()):
                raise ValueError(f"`{setting}` has no meaning for {', '.join(attacks) or UNIVERSAL}: leave it out")
        if self.steps is not None:
            attacks = {name: with_settings(attack, steps=self.steps) for name, attack in attacks.items()}
        if self.restarts > 1:
            attacks = {name: self._restarted(attack) for name, attack in attacks.items()}
        return attacks

    def _restarted(self, attack: Attack) -> Attack:
        if isinstance(attack, Restarts):
            return replace(attack, times=self.restarts)
        return Restarts(attack, self.restarts) if hasattr(attack, "random_start") else attack

    def _load(self, model: str | Classifier, checkpoint: Path | None) -> tuple[Classifier, dict[str, Any]]:
        if isinstance(model, Classifier):
            return model, {"model": type(model).__name__}
        return load_model(model, checkpoint, trust_pickle=self.trust_pickle)

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
