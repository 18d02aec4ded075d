"""What is done to every clip: the conditions of a report's rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

from robustav.attacks import Attack, brief, trait
from robustav.classifier import Classifier, InputSpec
from robustav.goals import Goal
from robustav.threat import Budget, ThreatModel, parse_budget

Score = Literal["mAP", "hits"]


class Source(NamedTuple):
    """A second model, attacked in place of the judged one: what breaks it is tried on the other."""

    name: str
    model: Classifier
    weights: str  # digest


@dataclass(frozen=True)
class Condition:
    """One row of the table: `attack` under `threat`, or the clean inputs where there is neither.

    `level` counts the run's epsilons. `key` names the row in the ledger. `after` holds the keys of cheaper conditions,
    in their order, whose points this threat allows: a clip that one of them broke is left to it. With `smallest` the
    attack looks for the smallest multiple of the threat's radii that breaks each clip, which may exceed 1.
    """

    name: str
    attacked: tuple[str, ...] = ()
    level: int = 0
    attack: Attack | None = None
    threat: ThreatModel | None = None
    after: tuple[str, ...] = ()
    source: Source | None = field(default=None, repr=False)
    smallest: bool = False

    def __post_init__(self) -> None:
        if (self.attack is None) != (self.threat is None):
            raise ValueError(f"condition {self.name!r} needs both an attack and a threat, or neither")
        if self.threat is not None and set(self.attacked) != set(self.threat.budgets):
            raise ValueError(
                f"condition {self.name!r} attacks {list(self.attacked)}, but its threat has {list(self.threat.budgets)}"
            )
        if self.smallest and not hasattr(self.attack, "smallest"):
            raise ValueError(f"condition {self.name!r} looks for the smallest budget, but its attack cannot")

    def check(self, model: Classifier) -> None:
        """Raise `ValueError` where the attack cannot handle the threat or the model: said before anything runs."""
        if self.smallest and model.stochastic:
            raise ValueError(
                "a stochastic model has no smallest budget: its boundary is another at every draw. Attack it at several "
                "epsilons instead"
            )
        check = trait(self.attack, "check", None)
        if check is not None and self.threat is not None:
            check(model, self.threat)

    def fits(self, model: Classifier) -> bool:
        """Whether the attack can handle the threat."""
        try:
            self.check(model)
        except ValueError:
            return False
        return True

    @property
    def key(self) -> str:
        return "-".join([self.name, "+".join(self.attacked), str(self.level)]) if self.attacked else self.name

    @property
    def knowledge(self) -> str:
        """What the adversary sees: gradients, scores, labels, nothing of the judged model (transfer), or nothing at all."""
        return "transfer" if self.source else trait(self.attack, "knowledge", "gradients")

    def describe(self, specs: Mapping[str, InputSpec]) -> dict[str, object]:
        """The condition as a record keeps it."""
        budgets = self.threat.words(specs) if self.threat else {}
        radii = {m: _number(b) for m, b in self.threat.budgets.items()} if self.threat else {}
        return {
            "name": self.name,
            "attacked": list(self.attacked),
            "level": self.level,
            "attack": repr(self.attack) if self.attack else "",
            "brief": brief(self.attack) if self.attack else "",
            "knowledge": self.knowledge if self.attack else "",
            "roams": trait(self.attack, "roams", False),
            "search": trait(self.attack, "survivors", False),
            "after": list(self.after),
            "source": f"{self.source.name} ({self.source.weights[:12]})" if self.source else "",
            "smallest": self.smallest,
            "budgets": budgets,
            "radii": radii,
        }


CLEAN = Condition("clean")


class Member(NamedTuple):
    """An attack of a run, by name; `source` where it attacks a second model, `smallest` where it measures a budget."""

    name: str
    attack: Attack
    source: Source | None = None
    smallest: bool = False


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty set of modalities, single ones first: audio, visual, audio and visual."""
    names = sorted(modalities)
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


def conditions(
    attacks: Mapping[str, Attack] | Sequence[Member],
    epsilons: Sequence[Mapping[str, Budget]],
    goal: Goal,
    attacked: Sequence[tuple[str, ...]] | None = None,
    score: Score = "mAP",
    wanted: Callable[[Condition], bool] = lambda row: True,
) -> list[Condition]:
    """Clean, then every epsilon x set of attacked modalities x attack, cheap ones first.

    In a joint attack every modality has its full budget. Unless told, every set of the modalities that an epsilon has
    budgets for; of the sets in `attacked`, one that an epsilon does not cover is left out there, and one that none covers
    raises `ValueError`. Rows that are not `wanted` are left out, and settle nothing.

    mAP needs a point of each attack on every clip, so under `score` "mAP" attacks that climb a loss run on all clips, and
    only those that look for one success (`survivors`) spare the clips that a cheaper condition broke. Under "hits" all
    attacks but the controls do, and a clip broken at a smaller epsilon is not attacked at a larger one.
    """
    members = [Member(*pair) for pair in attacks.items()] if isinstance(attacks, Mapping) else list(attacks)
    rows = [CLEAN]
    for chosen in attacked or ():
        if not any(set(chosen) <= budgets.keys() for budgets in epsilons):
            raise ValueError(f"no budget for {'+'.join(chosen)}: --eps has {sorted(epsilons[0])}")
    for level, budgets in enumerate(epsilons):
        for chosen in attacked or subsets(sorted(budgets)):
            if not set(chosen) <= budgets.keys():
                continue
            threat = ThreatModel({m: budgets[m] for m in chosen}, goal)
            for member in members:
                row = Condition(member.name, tuple(chosen), level, member.attack, threat, (), *member[2:])
                if wanted(row) and not (row.smallest and _measured(row, rows)):
                    rows.append(_settled(row, rows, score))
    return rows


def _settled(row: Condition, before: Sequence[Condition], score: Score) -> Condition:
    """The row, knowing which earlier ones may settle a clip for it."""
    spares = score == "hits" or trait(row.attack, "survivors", False)
    if row.smallest or row.knowledge == "nothing" or not spares:
        return row
    assert row.threat is not None
    after = [
        b.key
        for b in before
        if b.threat is None
        or (
            (b.knowledge != "nothing" and not b.smallest and (b.level == row.level or score == "hits"))
            and within(b.threat, row.threat)
        )
    ]
    return Condition(row.name, row.attacked, row.level, row.attack, row.threat, tuple(after), row.source)


def _measured(row: Condition, rows: Sequence[Condition]) -> bool:
    """Whether an earlier row looks for the same smallest budgets, under radii that are a multiple of these."""

    def ratios(earlier: Condition) -> set[float]:
        assert earlier.threat is not None and row.threat is not None
        pairs = [(earlier.threat.budgets[m], budget) for m, budget in row.threat.budgets.items()]
        if any(a.norm != b.norm or a.snr_db is not None or b.snr_db is not None for a, b in pairs):
            return {0.0, 1.0}
        return {round(float(a.epsilon) / float(b.epsilon), 9) if b.epsilon else 0.0 for a, b in pairs}  # type: ignore[arg-type]

    return any(e.smallest and e.attacked == row.attacked and len(ratios(e)) == 1 for e in rows)


def is_attack(described: Mapping[str, Any]) -> bool:
    """Whether a recorded condition is an adversary's under a budget: no control, and no measurement of budgets."""
    return bool(described["attacked"]) and described["knowledge"] != "nothing" and not described["smallest"]


def recorded_budgets(described: Mapping[str, Any], specs: Mapping[str, InputSpec]) -> dict[str, Budget]:
    """The budgets of a recorded condition."""
    return {
        m: parse_budget(str(described["radii"][m]), specs[m], described["budgets"][m].partition(",")[0])
        for m in described["attacked"]
    }


def within(smaller: ThreatModel, larger: ThreatModel) -> bool:
    """Whether every point that `smaller` allows is one that `larger` allows, as far as their numbers say."""

    def narrower(a: Budget, b: Budget) -> bool:
        if a.norm != b.norm:
            return False
        if a.snr_db is not None and b.snr_db is not None:
            return a.snr_db >= b.snr_db
        return a.snr_db is None and b.snr_db is None and float(a.epsilon) <= float(b.epsilon)  # type: ignore[arg-type]

    return all(m in larger.budgets and narrower(a, larger.budgets[m]) for m, a in smaller.budgets.items())


def _number(budget: Budget) -> float | str:
    return f"{budget.snr_db:g}dB" if budget.snr_db is not None else float(budget.epsilon)  # type: ignore[arg-type]
