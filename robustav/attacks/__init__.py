"""Attacks, one file a paper. A new attack is a new file and a new row of `ATTACKS`."""

from robustav.attacks.aimed import Aimed
from robustav.attacks.apgd import APGD
from robustav.attacks.attack import Attack, brief, innermost, trait
from robustav.attacks.eot import EOT
from robustav.attacks.fab import FAB
from robustav.attacks.fgsm import FGSM
from robustav.attacks.fmn import FMN
from robustav.attacks.mla_lp import MLALP
from robustav.attacks.momentum import MomentumFGSM
from robustav.attacks.noise import Noise
from robustav.attacks.pgd import PGD
from robustav.attacks.rays import RayS
from robustav.attacks.restarts import Restarts
from robustav.attacks.square import Square

ATTACKS: dict[str, type[Attack]] = {
    "noise": Noise,
    "fgsm": FGSM,
    "pgd": PGD,
    "momentum": MomentumFGSM,
    "apgd": APGD,
    "aimed": Aimed,
    "mla-lp": MLALP,
    "fmn": FMN,
    "fab": FAB,
    "square": Square,
    "rays": RayS,
}

__all__ = ["APGD", "ATTACKS", "EOT", "FAB", "FGSM", "FMN", "MLALP", "PGD", "Aimed", "Attack", "MomentumFGSM", "Noise"]
__all__ += ["RayS", "Restarts", "Square", "brief", "innermost", "trait"]
