"""torchattacks' APGD as oracle: one picture and one class a clip, in [0, 1], which is all it takes."""

import pytest
import torch
from torch import nn

from robustav.attacks.aimed import Aimed
from robustav.attacks.apgd import APGD
from robustav.attacks.ascent import look
from robustav.classifier import InputSpec, Wrapped
from robustav.goals import Untargeted
from robustav.losses import dlr
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("torchattacks")

BATCH = 16
CLASSES = ("bell", "clap", "kick", "hiss")
NORMS = pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.02), ("l2", 0.25)])


class Duel:
    """One batch of pictures and one curved model, attacked by both sides."""

    def __init__(self, norm, epsilon, seed=0, margin=0.0):
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, len(CLASSES))).double()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(3)
        self.plain, self.seed = plain.eval().requires_grad_(False), seed
        self.model = Wrapped(
            self.plain,
            specs={"visual": InputSpec((3, 8, 8), 0.0, 1.0, "pixel value")},
            classes=CLASSES,
            label_kind="multiclass",
            call=lambda network, inputs: network(inputs["visual"]),
        )
        self.images = margin + (1 - 2 * margin) * torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
        self.labels = self.plain(self.images).argmax(1)
        self.threat = ThreatModel({"visual": Budget(norm, epsilon, low=0.0)}, Untargeted("multiclass"))
        self.norm = {"linf": "Linf", "l2": "L2"}[norm]

    def ours(self, attack):
        draws = draws_for(self.seed, [f"clip {i}" for i in range(BATCH)])
        return attack(self.model, {"visual": self.images}, self.labels, self.threat, draws=draws)["visual"]

    def oracle(self, loss):
        import torchattacks

        return torchattacks.APGD(
            self.plain, self.norm, self.reach(), steps=100, n_restarts=1, loss=loss, seed=self.seed
        )

    def reach(self):
        """The largest distance that our budget uses: what rounding may add is kept free."""
        budget, centre = self.threat.budgets["visual"], torch.full_like(self.images[:1], 0.5)
        return budget.rules.length(budget.project(centre, centre + self.images[:1]) - centre).item()

    def judge(self, images):
        return look(self.model, {"visual": images}, self.labels, self.threat)


@NORMS
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("seed", range(3))
def test_leaves_no_clip_robust_that_theirs_breaks(norm, epsilon, loss, seed):
    duel = Duel(norm, epsilon, seed)
    theirs = duel.judge(duel.oracle(loss)(duel.images, duel.labels)).reached
    ours = duel.judge(duel.ours(APGD(loss=loss))).reached
    assert 0 < theirs.sum() < BATCH
    assert (ours | ~theirs).all()
    if loss == "dlr":
        assert (duel.judge(duel.ours(Aimed())).reached | ~theirs).all()


@NORMS
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_goes_the_same_way_from_the_same_start(norm, epsilon, loss, monkeypatch):
    """Point by point up to the first check. There the release differs from the paper, and from us: it begins with a loss
    of 0, and compares the first step after a restart with the point given up. The range is far away, because our steps
    in l2 spend nothing on coordinates that it blocks.
    """
    duel = Duel(norm, epsilon / 4, margin=0.4)
    seen = []
    handle = duel.plain.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    torch.manual_seed(duel.seed)
    best, _, highest, _ = duel.oracle(loss).attack_single_run(duel.images, duel.labels)
    theirs = seen[:23]
    monkeypatch.setattr(ThreatModel, "start", lambda *_: {"visual": theirs[0]})
    seen.clear()
    found = duel.ours(APGD(loss=loss))
    handle.remove()
    led = torch.ones(BATCH, dtype=torch.bool)  # by a gradient: where the label ranks third DLR is flat
    for x, y in zip(seen[:23], theirs, strict=True):
        torch.testing.assert_close(x[led], y[led], rtol=0, atol=1e-6)
        led &= (duel.plain(y).argsort(1, descending=True)[:, 2] != duel.labels) | (loss == "ce")
    assert led.sum() > 2

    def climbed(images):
        logits = duel.plain(images)
        if loss == "dlr":
            return dlr(logits, duel.labels)
        return nn.functional.cross_entropy(logits, duel.labels, reduction="none")

    torch.testing.assert_close(climbed(best), highest.double())
    torch.testing.assert_close(climbed(found)[led], highest.double()[led], rtol=1e-4, atol=0)
