"""torchattacks as oracle: where its threat model fits, the same attack finds the same point."""

import pytest
import torch
from torch import nn

from robustav import audit
from robustav.attacks import FGSM, PGD, MomentumFGSM
from robustav.attacks.ascent import look
from robustav.classifier import InputSpec, Wrapped
from robustav.goals import Untargeted
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("torchattacks")

BATCH = 8  # a power of two: their loss is the mean over the batch, ours the sum, and so both round alike
CLASSES = ("bell", "clap", "kick", "hiss")


def network() -> nn.Sequential:
    """Weights at three times their usual size: curved enough that steps of a whole radius overshoot."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, len(CLASSES)))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(3)
    return plain.eval()


def classifier(plain: nn.Module, shape: tuple[int, ...], low: float = 0.0) -> Wrapped:
    """The same weights as `plain`, with a declared range and a declared kind of labels."""
    return Wrapped(
        plain,
        specs={"visual": InputSpec(shape, low, 1.0, "pixel value" if low == 0 else "amplitude")},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["visual"]),
    )


class Duel:
    """One batch of pictures and one model, attacked by both sides from the clean point."""

    def __init__(self, norm: str = "linf", epsilon: float = 0.125, margin: float = 0.25) -> None:
        self.plain = network()
        self.model = classifier(self.plain, (3, 8, 8))
        self.images = margin + (1 - 2 * margin) * torch.rand(BATCH, 3, 8, 8)
        with torch.no_grad():
            self.labels = self.plain(self.images).argmax(1)
        self.threat = ThreatModel({"visual": Budget(norm, epsilon, low=0.0)}, Untargeted("multiclass"))

    def ours(self, attack):
        clean = {"visual": self.images}
        draws = draws_for(0, [f"clip {i}" for i in range(BATCH)])
        adversarial = attack(self.model, clean, self.labels, self.threat, draws=draws)
        assert audit.violations(clean, adversarial, self.threat, self.model.specs) == [""] * BATCH
        return adversarial["visual"]

    def theirs(self, attack):
        return attack(self.images, self.labels)

    def judge(self, images):
        return look(self.model, {"visual": images}, self.labels, self.threat)


@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.5])
def test_fgsm_is_theirs(epsilon):
    import torchattacks

    duel = Duel(epsilon=epsilon, margin=0.0)
    theirs = duel.theirs(torchattacks.FGSM(duel.plain, eps=epsilon))
    torch.testing.assert_close(duel.ours(FGSM()), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "relative_step", "steps"), [(8 / 255, 0.25, 10), (0.125, 0.1, 20), (0.125, 1.0, 1)]
)
def test_pgd_climbs_as_high_as_theirs(epsilon, relative_step, steps):
    import torchattacks

    duel = Duel(epsilon=epsilon)
    them = torchattacks.PGD(duel.plain, eps=epsilon, alpha=relative_step * epsilon, steps=steps, random_start=False)
    ours = duel.judge(duel.ours(PGD(steps, relative_step, random_start=False))).loss
    theirs = duel.judge(duel.theirs(them)).loss
    assert (ours > duel.judge(duel.images).loss).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [3, 4, 9])
def test_pgd_keeps_the_best_iterate_where_theirs_returns_the_last(steps):
    """Steps of three radii overshoot: the climb swings between corners, and the last one is not always the highest."""
    import torchattacks

    duel = Duel(epsilon=0.5, margin=0.0)
    them = torchattacks.PGD(duel.plain, eps=0.5, alpha=1.5, steps=steps, random_start=False)
    ours = duel.judge(duel.ours(PGD(steps, 3.0, random_start=False)))
    theirs = duel.judge(duel.theirs(them))
    assert (ours.reached | ~theirs.reached).all()
    assert (ours.loss >= theirs.loss * (1 - 1e-5))[ours.reached == theirs.reached].all()
    assert (ours.loss > theirs.loss + 0.01).any()


@pytest.mark.parametrize(("epsilon", "relative_step", "steps"), [(0.5, 0.2, 10), (0.1, 0.5, 4)])
def test_pgd_in_l2_climbs_as_high_as_theirs(epsilon, relative_step, steps):
    """They add 1e-10 to the gradient's length, and our radius leaves room for rounding, `sqrt(192) / 2^24` = 8e-7.

    Against lengths near 0.1 that is less than 1e-7 of a step and 8e-6 of the smaller radius. The points themselves may
    differ more, where two iterates are equally high and rounding decides which is the best.
    """
    import torchattacks

    duel = Duel("l2", epsilon)
    them = torchattacks.PGDL2(duel.plain, eps=epsilon, alpha=relative_step * epsilon, steps=steps, random_start=False)
    ours, theirs = duel.ours(PGD(steps, relative_step, random_start=False)), duel.theirs(them)
    assert (duel.judge(ours).loss > duel.judge(duel.images).loss).all()
    torch.testing.assert_close(duel.judge(ours).loss, duel.judge(theirs).loss, rtol=1e-5, atol=0)


def test_steps_in_l2_keep_their_length_where_the_gradient_is_tiny():
    """Where a model is sure of itself, all of the gradient is far shorter than the 1e-10 that they add."""
    import torchattacks

    duel = Duel("l2", 0.5)
    with torch.no_grad():
        duel.plain[-1].bias[0] += 50  # the other classes' probabilities are about e^-50 = 2e-22
    duel.labels = torch.zeros(BATCH, dtype=torch.long)
    them = torchattacks.PGDL2(duel.plain, eps=0.5, alpha=0.5, steps=1, random_start=False)
    moved = {
        who: (x - duel.images).flatten(1).norm(dim=1)
        for who, x in (("we", duel.ours(FGSM())), ("they", duel.theirs(them)))
    }
    torch.testing.assert_close(moved["we"], torch.full((BATCH,), 0.5), rtol=1e-5, atol=0)
    assert (moved["they"] < 1e-6).all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_momentum_climbs_as_high_as_theirs(decay):
    """They divide by the mean of the absolute gradient, we by the sum: a factor that no sign sees.

    With steps of epsilon / steps, neither side's path is ever projected on the ball.
    """
    import torchattacks

    epsilon, steps = 0.125, 8
    duel = Duel(epsilon=epsilon)
    them = torchattacks.MIFGSM(duel.plain, eps=epsilon, alpha=epsilon / steps, decay=decay, steps=steps)
    ours, theirs = duel.ours(MomentumFGSM(steps, decay)), duel.theirs(them)
    torch.testing.assert_close(duel.judge(ours).loss, duel.judge(theirs).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["FGSM", "PGD"])
def test_waveforms_stay_in_their_box_where_theirs_are_cut_to_that_of_pictures(name):
    """V4: torchattacks clamps to [0, 1] whatever the data, which erases the negative half of every waveform."""
    import torchattacks

    epsilon, steps = 1e-3, 4
    plain = nn.Linear(64, len(CLASSES)).eval()
    model = classifier(plain, (64,), low=-1.0)
    clean = {"visual": 1.9 * torch.rand(BATCH, 64) - 0.95}
    labels = plain(clean["visual"]).argmax(1)
    threat = ThreatModel({"visual": Budget("linf", epsilon, low=-1.0)}, Untargeted("multiclass"))
    settings = {} if name == "FGSM" else {"alpha": epsilon / 2, "steps": steps, "random_start": False}
    theirs = getattr(torchattacks, name)(plain, eps=epsilon, **settings)(clean["visual"], labels)
    attack = FGSM() if name == "FGSM" else PGD(steps, 0.5, random_start=False)
    ours = attack(model, clean, labels, threat, draws=draws_for(0, "abcdefgh"))

    assert audit.violations(clean, ours, threat, model.specs) == [""] * BATCH
    assert (threat.gauge(clean, ours) > 0.99).all()
    assert ((theirs - clean["visual"]).abs().amax(1) > 0.5).all()
    assert all(
        "length over budget is" in words for words in audit.violations(clean, {"visual": theirs}, threat, model.specs)
    )


def test_a_clip_without_labels_is_attacked_where_theirs_hand_it_back_untouched():
    """V4: multi-hot labels pass silently into a soft cross-entropy; without labels that is 0, whatever the scores."""
    import torchattacks

    duel = Duel()
    labels = nn.functional.one_hot(duel.labels, len(CLASSES)).float()
    labels[3] = 0
    theirs = torchattacks.PGD(duel.plain, eps=0.125, random_start=False)(duel.images, labels)
    assert torch.equal(theirs[3], duel.images[3])

    clean = {"visual": duel.images}
    threat = ThreatModel(duel.threat.budgets, Untargeted("multilabel"))
    threat.goal.check(labels, len(CLASSES))
    ours = PGD(random_start=False)(duel.model, clean, labels, threat, draws=draws_for(0, "abcdefgh"))
    assert (threat.gauge(clean, ours) > 0.99).all()
    assert (look(duel.model, ours, labels, threat).loss > look(duel.model, clean, labels, threat).loss).all()


def test_multi_hot_labels_of_a_multiclass_model_are_refused():
    duel = Duel()
    labels = nn.functional.one_hot(duel.labels, len(CLASSES)).float()
    with pytest.raises(
        ValueError, match=r"multiclass model must be class indices \[batch\], got torch.float32 \[8, 4\]"
    ):
        duel.threat.goal.check(labels, len(CLASSES))
