"""Which attacks an evaluation is made of: from a first look to what it takes to believe a number."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from robustav.attacks import APGD, EOT, FAB, FGSM, FMN, MLALP, PGD, Aimed, Attack, Noise, RayS, Restarts, Square, trait
from robustav.classifier import Classifier
from robustav.goals import CorpusAP, Goal, Untargeted
from robustav.plan import Member, Score

FEW = 3  # classes: a spread of scores needs a fourth
DRAWS = 20  # passes that attacks on a stochastic model average [Carlini et al., 2019, arXiv:1902.06705]


def quick(goal: Goal, model: Classifier) -> dict[str, Attack]:
    """The control, one step, and two APGD: whether there is anything to defend."""
    return {"noise": Noise(), "fgsm": FGSM(), **_ascents(goal, model, 25)}


def standard(goal: Goal, model: Classifier) -> dict[str, Attack]:
    """What AutoAttack's standard set [Croce and Hein, 2020, arXiv:2003.01690] is for pictures, for any modality and kind
    of labels: ascents on two losses, then on the clips that are left an aimed ascent, a minimum-norm attack and a search
    without gradients."""
    return {
        "noise": Noise(),
        "fgsm": FGSM(),
        **_ascents(goal, model, 100),
        **_aimed(goal, model, 50, 3),
        "fmn": FMN(steps=50),
        "square": Square(queries=500),
    }


def thorough(goal: Goal, model: Classifier) -> dict[str, Attack]:
    """The published lengths and more: restarts, nine aims, both minimum-norm attacks, 5 000 queries, labels only."""
    ascents = {name: Restarts(attack, 5) for name, attack in _ascents(goal, model, 100).items()}
    few = {"mla-lp": MLALP()} if goal.label_kind == "multilabel" and len(model.classes) <= MLALP().rows else {}
    return {
        "noise": Noise(),
        "fgsm": FGSM(),
        "pgd": Restarts(PGD(steps=100), 5),
        **ascents,
        **_aimed(goal, model, 100, 9),
        **few,
        "fmn": FMN(steps=100),
        "fab": FAB(steps=100, aims=min(9, len(model.classes) - 1) or None),
        "square": Square(queries=5000),
        "rays": RayS(queries=2000),
    }


SUITES: dict[str, Callable[[Goal, Classifier], dict[str, Attack]]] = {
    "quick": quick,
    "standard": standard,
    "thorough": thorough,
}


def members(attacks: Mapping[str, Attack], model: Classifier, score: Score, draws: int | None = None) -> list[Member]:
    """Attacks as they are run: those that only look for a success stop at it, under "hits" all do; against a model that
    is declared stochastic those that follow gradients or scores average over `draws` passes (20 unless told)."""
    made = []
    for name, attack in attacks.items():
        if score == "hits" or trait(attack, "survivors", False):
            attack = stopping(attack)
        made.append(Member(name, averaging(attack, model, draws)))
    return made


def averaging(attack: Attack, model: Classifier, draws: int | None) -> Attack:
    """The attack, seeing the mean of `draws` passes (20 unless told) if the model it attacks is stochastic, or if told."""
    knows = trait(attack, "knowledge", "gradients")
    if (model.stochastic or draws) and knows in ("gradients", "scores") and not isinstance(attack, EOT):
        return EOT(attack, draws or DRAWS)
    return attack


def stopping(attack: Attack) -> Attack:
    """The attack, leaving each clip alone from its first success on, where it can."""
    return with_settings(attack, stop=True)


def with_settings(attack: Attack, **given: Any) -> Attack:
    """The attack with these settings, in itself and in the attacks that it is made of, wherever there are such."""
    changed: dict[str, Any] = {}
    for name, value in _settings(attack).items():
        if name in given:
            changed[name] = given[name]
        elif isinstance(value, Attack):
            changed[name] = with_settings(value, **given)
    return replace(attack, **changed) if changed else attack  # type: ignore[type-var]


def has_setting(attack: Attack, name: str) -> bool:
    """Whether `with_settings` would change anything."""
    inner = _settings(attack).values()
    return hasattr(attack, name) or any(isinstance(one, Attack) and has_setting(one, name) for one in inner)


def _settings(attack: Attack) -> dict[str, Any]:
    """An attack's fields; none of one that is no dataclass, as a defence's own may be."""
    return {field.name: getattr(attack, field.name) for field in fields(attack)} if is_dataclass(attack) else {}


def _ascents(goal: Goal, model: Classifier, steps: int) -> dict[str, Attack]:
    """Adaptive ascents: on the goal's own loss, and where any mistake will do on the margin that decides.

    The margin is divided by the spread of the scores, so that no scale of logits can hide it, where there are classes
    enough to have one.
    """
    ascents: dict[str, Attack] = {"apgd": APGD(steps)}
    if isinstance(goal, Untargeted | CorpusAP):
        many = len(model.classes) > FEW
        if goal.label_kind == "multiclass":
            loss = "dlr" if many else "margin"
        elif goal.success == "top1":
            loss = "top1-dlr" if many else "top1"
        else:
            loss = "ml-dlr" if many else "ranking"
        ascents["apgd-dlr" if many else "apgd-margin"] = APGD(steps, loss=loss)
    return ascents


def _aimed(goal: Goal, model: Classifier, steps: int, aims: int) -> dict[str, Attack]:
    """An ascent towards one wrong class after another, where there are any."""
    aims = min(aims, len(model.classes) - 1)
    return {"aimed": Aimed(APGD(steps), aims)} if isinstance(goal, Untargeted) and aims else {}
