"""Published multi-modal defences, one file a paper: a training, a classifier, and the attack that it must face."""

from robustav.training.defences import crmt, curriculum, dissimilarity, jacobian, odd_one_out
from robustav.training.defences.defended import Defended
from robustav.training.method import Method

METHODS: dict[str, type[Method]] = {
    **dissimilarity.METHODS,
    **odd_one_out.METHODS,
    **crmt.METHODS,
    **jacobian.METHODS,
    **curriculum.METHODS,
}

__all__ = ["METHODS", "Defended"]
