"""Every training method by its name on the command line."""

from dataclasses import dataclass
from inspect import getdoc

from robustav.training import adversarial, defences, guided, guided_fgsm, mixups, remembered
from robustav.training.method import Method
from robustav.training.settings import parse_call, read_settings, settings_of


@dataclass(frozen=True)
class ERM(Method):
    """Plain training: the mean loss of clips as they are, empirical risk minimisation."""


METHODS: dict[str, type[Method]] = {
    "erm": ERM,
    **mixups.METHODS,
    **guided.METHODS,
    **guided_fgsm.METHODS,
    **adversarial.METHODS,
    **remembered.METHODS,
    **defences.METHODS,
}


def parse_method(text: str) -> Method:
    """A key of `METHODS`, in brackets what differs from its defaults: `pgd-at(steps=7)`.

    Raises `ValueError` listing the methods, or the method's settings.
    """
    name, given = parse_call(text, "method")
    if name not in METHODS:
        raise ValueError(f"no method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name](**read_settings(METHODS[name], given, name))


def described() -> dict[str, tuple[str, str]]:
    """Name -> what the method is, from the head of its docstring, and its settings with their defaults."""
    heads = {name: (getdoc(made) or "").split("\n\n")[0].replace("\n", " ") for name, made in METHODS.items()}
    return {name: (heads[name], settings_of(made)) for name, made in METHODS.items()}
