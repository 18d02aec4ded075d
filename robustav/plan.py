"""What is done to every clip: the conditions of a report's rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from robustav.attacks import Attack
from robustav.classifier import InputSpec
from robustav.goals import Goal
from robustav.threat import Budget, ThreatModel


@dataclass(frozen=True)
class Condition:
    """One row of the table: `attack` under `threat`, or the clean inputs where there is neither.

    `level` counts the run's epsilons. `key` names the row in the ledger.
    """

    name: str
    attacked: tuple[str, ...] = ()
    level: int = 0
    attack: Attack | None = None
    threat: ThreatModel | None = None

    def __post_init__(self) -> None:
        if (self.attack is None) != (self.threat is None):
            raise ValueError(f"condition {self.name!r} needs both an attack and a threat, or neither")
        if self.threat is not None and set(self.attacked) != set(self.threat.budgets):
            raise ValueError(
                f"condition {self.name!r} attacks {list(self.attacked)}, but its threat has {list(self.threat.budgets)}"
            )

    @property
    def key(self) -> str:
        return "-".join([self.name, "+".join(self.attacked), str(self.level)]) if self.attacked else self.name

    def describe(self, specs: Mapping[str, InputSpec]) -> dict[str, object]:
        """The condition as a record keeps it."""
        budgets = self.threat.words(specs) if self.threat else {}
        radii = {m: _number(b) for m, b in self.threat.budgets.items()} if self.threat else {}
        return {
            "name": self.name,
            "attacked": list(self.attacked),
            "level": self.level,
            "attack": repr(self.attack) if self.attack else "",
            "budgets": budgets,
            "radii": radii,
        }


CLEAN = Condition("clean")


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty set of modalities, single ones first: audio, visual, audio and visual."""
    names = sorted(modalities)
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


def conditions(
    attacks: Mapping[str, Attack],
    epsilons: Sequence[Mapping[str, Budget]],
    goal: Goal,
    attacked: Sequence[tuple[str, ...]] | None = None,
) -> list[Condition]:
    """Clean, then every epsilon x set of attacked modalities x attack.

    In a joint attack every modality has its full budget. Unless told, every set of the modalities that an epsilon has
    budgets for; of the sets in `attacked`, one that an epsilon does not cover is left out there, and one that none covers
    raises `ValueError`.
    """
    rows = [CLEAN]
    for chosen in attacked or ():
        if not any(set(chosen) <= budgets.keys() for budgets in epsilons):
            raise ValueError(f"no budget for {'+'.join(chosen)}: --eps has {sorted(epsilons[0])}")
    for level, budgets in enumerate(epsilons):
        for chosen in attacked or subsets(sorted(budgets)):
            if set(chosen) <= budgets.keys():
                threat = ThreatModel({m: budgets[m] for m in chosen}, goal)
                rows += [Condition(name, tuple(chosen), level, attack, threat) for name, attack in attacks.items()]
    return rows


def _number(budget: Budget) -> float | str:
    return f"{budget.snr_db:g}dB" if budget.snr_db is not None else float(budget.epsilon)  # type: ignore[arg-type]
