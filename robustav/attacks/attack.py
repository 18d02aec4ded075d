"""What an attack is: frozen settings and one call."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from robustav.classifier import Classifier, Inputs
from robustav.norms import Draws
from robustav.threat import ThreatModel


@runtime_checkable  # so that shape checking in the tests can look at an attack inside an attack
class Attack(Protocol):
    """Settings in a frozen dataclass; calling it returns inputs inside the threat, and nothing else.

    `draws` holds one generator a sample (see `robustav.randomness`), the only randomness an attack may use. The
    harness batches, freezes, counts, audits and judges; an attack that cannot handle a norm raises `ValueError`.

    A class may say more of itself by class attributes: `knowledge` (what it sees of the model: "gradients" unless told,
    "scores", "labels", "universal", or "nothing" for a control), `survivors` (it looks for one success, so clips that a
    cheaper attack broke are not given to it), `roams` (its iterates leave the budget, what it returns does not). A field
    `stop` has it leave a clip alone from its first success on.
    """

    def __call__(
        self, model: Classifier, inputs: Inputs, labels: Tensor, threat: ThreatModel, *, draws: Draws
    ) -> Inputs: ...


def trait(attack: object, name: str, default: Any) -> Any:
    """What an attack's class says of itself, or that of the attack inside it; `default` where neither says anything."""
    inner = getattr(attack, "attack", None)
    return getattr(attack, name) if hasattr(attack, name) else default if inner is None else trait(inner, name, default)


def innermost(attack: object) -> object:
    """The attack inside all that is wrapped around it."""
    inner = getattr(attack, "attack", None)
    return attack if inner is None else innermost(inner)


def brief(attack: object) -> str:
    """An attack by its class and those settings that are not its defaults, as a report's header shows it."""
    if not is_dataclass(attack):
        return repr(attack)
    given = {field.name: getattr(attack, field.name) for field in fields(attack) if field.repr}
    name = type(attack).__name__
    if repr(attack) != f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})":
        return repr(attack)  # it has words of its own
    plain = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(attack)
    }
    shown = [f"{key}={brief(value)}" for key, value in given.items() if value != plain[key]]
    return f"{name}({', '.join(shown)})"
