"""Bridges: attacks of torchattacks and ART on our classifiers, and our classifiers as theirs."""

from robustav.attacks import Attack
from robustav.bridges.art import Art, as_art_estimator
from robustav.bridges.bridge import Bridge, read
from robustav.bridges.single import SingleInput, UnitBox
from robustav.bridges.torchattacks import TorchAttacks, as_torchattacks_model

BRIDGES: dict[str, type[Bridge]] = {"torchattacks": TorchAttacks, "art": Art}


def parse_bridge(text: str) -> Attack | None:
    """The attack that a command line names, as `torchattacks:PGD` or `art:HopSkipJump(max_iter=10)`.

    None where the text names no peer, so that it may be an attack of our own. Settings are `key=number`, or `true` and
    `false`. Raises `ValueError` where the peer is not installed, has no such attack, or the attack no such setting.
    """
    peer, colon, rest = text.partition(":")
    if not colon or peer not in BRIDGES:
        return None
    name, settings = read(rest)
    return BRIDGES[peer](name, settings)


__all__ = ["BRIDGES", "Art", "Bridge", "SingleInput", "TorchAttacks", "UnitBox"]
__all__ += ["as_art_estimator", "as_torchattacks_model", "parse_bridge"]
