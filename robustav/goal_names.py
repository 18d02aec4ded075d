"""Goals as command lines and records name them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from robustav.classifier import LabelKind
from robustav.goals import GOALS, OWN, Goal, Hide, Stealth, known


def parse_goal(
    text: str,
    classes: tuple[str, ...],
    label_kind: LabelKind,
    *,
    loss: str | None = None,
    success: str | None = None,
    threshold: float = 0.5,
) -> Goal:
    """The goal that a command line names: `untargeted`, `targeted:CLASS`, `hide:A,B`, `inject:A,B`, `push-latent`,
    `top-k:5`, `corpus-ap`, `stealth:A,B`.

    Classes are names or, where a name holds a comma, indices; `hide:labels` and `stealth:labels` choose each clip's
    own. Settings that the goal does not have are refused.
    """
    name, _, chosen = text.partition(":")
    known("goal", name, GOALS)
    goal = GOALS[name]
    settings: dict[str, object] = {"label_kind": label_kind, "threshold": threshold}
    for setting, value in (("loss_name", loss), ("success", success)):
        if value is not None:
            if setting not in goal.__dataclass_fields__:
                raise ValueError(f"goal {name!r} has its own {setting.removesuffix('_name')}: leave {value!r} out")
            settings[setting] = value
    wanted = next((field for field in ("target", "chosen", "k") if field in goal.__dataclass_fields__), None)
    if wanted is None and chosen:
        raise ValueError(f"goal {name!r} takes no classes, got {chosen!r}")
    if wanted == "k":
        if not (chosen.isdecimal() and 1 <= int(chosen) < len(classes)):
            raise ValueError(
                f"goal {name!r} needs a number from 1 to {len(classes) - 1}, below the number of classes, "
                f"as in '{name}:1', got {chosen!r}"
            )
        settings[wanted] = int(chosen)
    elif wanted is not None:
        if chosen == OWN and OWN not in classes and goal in (Hide, Stealth):
            return goal(**settings, chosen=OWN)  # type: ignore[arg-type,call-arg]
        indices = _class_indices(chosen, classes, name)
        if wanted == "target" and len(indices) != 1:
            raise ValueError(f"goal 'targeted' takes one class, got {chosen!r}")
        settings[wanted] = indices[0] if wanted == "target" else indices
    return goal(**settings)  # type: ignore[arg-type]  # the fields are checked by each goal


def recorded_goal(settings: Mapping[str, Any]) -> Goal:
    """The goal that a record describes."""
    kinds = {kind.__name__: kind for kind in GOALS.values()}
    kind = kinds[settings["goal"]]
    known = {f.name for f in fields(kind)}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in known}
    return kind(**given)


def _class_indices(text: str, classes: tuple[str, ...], goal: str) -> tuple[int, ...]:
    if not text:
        raise ValueError(
            f"goal {goal!r} needs a class, as in '{goal}:{classes[0]}'; there are {', '.join(classes[:20])}"
        )
    if text in classes:
        return (classes.index(text),)
    lookup = {name.casefold(): index for index, name in enumerate(classes)}
    indices = []
    for part in (part.strip() for part in text.split(",")):
        if part in classes:  # a name comes before an index, and as it is spelt before another case
            indices.append(classes.index(part))
        elif part.casefold() in lookup:
            indices.append(lookup[part.casefold()])
        elif part.isdecimal() and int(part) < len(classes):
            indices.append(int(part))
        else:
            shown = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise ValueError(f"goal {goal!r}: no class {part!r}; the model has {shown} (or give an index)")
    return tuple(dict.fromkeys(indices))
