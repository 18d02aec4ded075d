"""Every training method by its name on the command line."""

from dataclasses import dataclass
from inspect import getdoc

from robustav.models.checkpoints import digest_of_file
from robustav.training import adversarial, defences, guided, guided_fgsm, mixups, remembered
from robustav.training.method import Method
from robustav.training.settings import parse_call, read_settings, settings_of
from robustav.user_code import file_of, imported


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
    """A key of `METHODS`, in brackets what differs from its defaults: `pgd-at(steps=7)`; or a class of the user's own.

    Such a class is named by its place, `file.py:Class(setting=1)` or `package.module:Class`, and is a frozen dataclass
    made from `Method`. Raises `ValueError` listing the methods, or the method's settings.
    """
    name, given = parse_call(text, "method")
    if name not in METHODS and ":" not in name:
        raise ValueError(f"no method {name!r}: there are {', '.join(METHODS)}, or file.py:Class for your own")
    made = METHODS[name] if name in METHODS else _own(name)
    return made(**read_settings(made, given, name))


def _own(name: str) -> type[Method]:
    made = imported(name, "method")
    if not (isinstance(made, type) and issubclass(made, Method)):
        raise ValueError(f"method {name!r} must be a class made from robustav.training.method.Method, got {made!r}")
    return made


def code_of(text: str) -> dict[str, str]:
    """What tells apart two versions of a user's own method, beside its settings: the sha256 of its file; empty for ours."""
    name, _ = parse_call(text, "method")
    return {} if name in METHODS else {"method_code": digest_of_file(file_of(name))}


def described() -> dict[str, tuple[str, str]]:
    """Name -> what the method is, from the head of its docstring, and its settings with their defaults."""
    heads = {name: (getdoc(made) or "").split("\n\n")[0].replace("\n", " ") for name, made in METHODS.items()}
    return {name: (heads[name], settings_of(made)) for name, made in METHODS.items()}
