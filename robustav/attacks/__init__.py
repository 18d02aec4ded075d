"""Attacks, one file a paper. A new attack is a new file and a new row of `ATTACKS`."""

from robustav.attacks.attack import Attack
from robustav.attacks.fgsm import FGSM
from robustav.attacks.momentum import MomentumFGSM
from robustav.attacks.noise import Noise
from robustav.attacks.pgd import PGD
from robustav.attacks.restarts import Restarts

ATTACKS: dict[str, type[Attack]] = {
    "noise": Noise,
    "fgsm": FGSM,
    "pgd": PGD,
    "momentum": MomentumFGSM,
}

__all__ = ["ATTACKS", "FGSM", "PGD", "Attack", "MomentumFGSM", "Noise", "Restarts"]
