"""Expectation over transformation and BPDA: what random and gradient-free stages hide is found."""

import copy

import pytest
import torch
from conftest import Linear, batch_of, tiny_specs
from test_attacks import EPSILON, LABELS, run, threat_of
from torch import nn

from robustav import audit
from robustav.attacks import PGD, Restarts
from robustav.attacks.ascent import climb, look
from robustav.attacks.eot import EOT, Averaged
from robustav.attacks.square import Square
from robustav.bpda import straight_through
from robustav.classifier import InputSpec
from robustav.goals import Hide, PushLatent, Untargeted
from robustav.losses import top1_margin
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

SIZE = 64
SPECS = {"audio": InputSpec((SIZE,), -1.0, 1.0, "amplitude")}
ONES = torch.ones(6, 1)


def threat_to(model: Linear, share: float) -> tuple[ThreatModel, "Linear"]:
    """A threat that hides the one class of `model`, and the model shifted so that this takes `share` of the best attack."""
    budget = Budget("linf", 0.1)
    model.lead = share * 0.1 * model.weights["audio"].abs().sum().item()
    return ThreatModel({"audio": budget}, Hide(chosen=(0,))), model


class Shaken(Linear):
    """Every pass of every clip has weights of its own, far noisier than what they have in common."""

    stochastic = True
    lead = 0.0

    def encode(self, modality, x):
        shaken = self.weights[modality] + 6 * torch.randn(x.shape)
        return (x * shaken).sum(1, keepdim=True) + self.lead


class Rounding(nn.Module):
    def forward(self, x):
        return (20 * x).round() / 20


class Masked(Linear):
    """A quantiser before a linear model: the gradient is zero everywhere."""

    lead = 0.0

    def __init__(self, quantiser=None):
        super().__init__(SPECS)
        self.quantiser = quantiser or Rounding()

    def front_end(self, modality, raw):
        return self.quantiser(raw)

    def encode(self, modality, x):
        return super().encode(modality, x) + self.lead

    def surrogate(self):
        seen = copy.deepcopy(self)
        seen.quantiser = straight_through(self.quantiser)
        return seen


def reached(attack, seen, model, threat):
    """Which clips an attack on `seen` brings to the goal on `model`, whose weights' mean decides."""
    x = {"audio": torch.zeros(6, SIZE)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adversarial = run(attack, seen, x, ONES, threat)
    assert audit.violations(x, adversarial, threat, SPECS) == [""] * 6
    return look(model, adversarial, ONES, threat).reached


def test_averaging_finds_what_single_draws_hide():
    threat, model = threat_to(Shaken(SPECS), 0.6)
    steady = Linear(SPECS)
    steady.encode = lambda modality, x: x @ steady.weights[modality].T + model.lead
    attack = PGD(4, random_start=False)
    assert not reached(attack, model, steady, threat).any()
    assert reached(EOT(attack, 100), model, steady, threat).all()
    assert reached(EOT(Restarts(attack, 2), 100, at_once=30), model, steady, threat).all()


def test_a_masked_gradient_is_broken_by_bpda_and_by_random_search():
    """The reference's acceptance test 7."""
    threat, model = threat_to(Masked(), 0.5)
    tally = Tally(6, ("audio",))
    view = AttackView(model.requires_grad_(False), ("audio",), {}, tally)
    assert not reached(PGD(), view, model, threat).any()
    assert tally.zero_gradients().tolist() == [1.0] * 6
    assert reached(PGD(), model.surrogate(), model, threat).all()
    assert reached(Square(120), model, model, threat).all()


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_model_that_does_not_draw_is_attacked_as_without(at_once, fusion, inputs):
    threat = threat_of("linf")
    plain = run(PGD(3), fusion, inputs, LABELS, threat)
    averaged = run(EOT(PGD(3), 3, at_once), fusion, inputs, LABELS, threat)
    for m in inputs:
        torch.testing.assert_close(averaged[m], plain[m], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("at_once", "passes"), [(None, 1), (5, 1), (2, 2)])
def test_every_draw_is_counted_and_every_look_is_noted_once(at_once, passes, fusion, inputs):
    """With a bounded batch, a pass that wants a gradient takes place twice."""
    tally = Tally(6, ("audio",))
    view = AttackView(
        fusion.requires_grad_(False), ("audio",), {"visual": fusion.encode("visual", inputs["visual"])}, tally
    )
    run(EOT(PGD(3), 5, at_once), view, {"audio": inputs["audio"]}, LABELS, threat_of("linf", ("audio",)))
    assert tally.forwards.tolist() == [5 * (3 * passes + 1)] * 6
    assert tally.backwards.tolist() == [5 * 3] * 6
    assert tally.looks.tolist() == [4] * 6
    assert tally.zero_gradients().tolist() == [0.0] * 6


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_detached_model_counts_as_zero_gradients(at_once, inputs):
    class Detached(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x).detach()

    tally = Tally(6, ("audio", "visual"))
    view = AttackView(Detached(tiny_specs()).requires_grad_(False), ("audio", "visual"), {}, tally)
    run(EOT(PGD(2), 5, at_once), view, inputs, ONES, threat_of("linf"))
    assert tally.zero_gradients().tolist() == [1.0] * 6


def test_part_of_a_batch_is_counted_where_it_belongs(fusion, inputs):
    tally = Tally(6, ("audio",))
    view = AttackView(fusion, ("audio",), {"visual": fusion.encode("visual", inputs["visual"])}, tally)
    rows = torch.tensor([4, 1])
    part = Averaged(view, 3, 3).at(rows)
    trace = part.trace({"audio": inputs["audio"][rows]})
    torch.testing.assert_close(trace.logits, fusion(inputs)[rows])
    assert tally.forwards.tolist() == [0, 3, 0, 0, 3, 0]


def test_batches_hold_no_more_draws_than_allowed(inputs):
    sizes = []

    class Watched(Linear):
        def encode(self, modality, x):
            sizes.append(len(x))
            return super().encode(modality, x)

    run(EOT(PGD(1), 5, at_once=2), Watched(tiny_specs()), inputs, ONES, threat_of("linf"))
    assert set(sizes) == {12, 6}


def test_the_gradient_is_the_mean_over_draws():
    """For one class, whose score is the loss: draw by draw, with the same draws."""

    class Score(PushLatent):
        def loss(self, trace, labels):
            return trace.logits[:, 0]

    model, x = Shaken(SPECS), {"audio": torch.randn(2, SIZE)}
    threat = ThreatModel({"audio": Budget("linf", 0.1)}, Score())
    torch.manual_seed(4)
    point, gradients = climb(Averaged(model, 5, 5), x, torch.ones(2, 1), _judged_by_threshold(threat))
    torch.manual_seed(4)
    shaken = model.weights["audio"] + 6 * torch.randn(10, SIZE)
    torch.testing.assert_close(gradients["audio"], shaken.unflatten(0, (5, 2)).mean(0))
    torch.testing.assert_close(point.loss, (gradients["audio"] * x["audio"]).sum(1))


def _judged_by_threshold(threat):
    return ThreatModel(threat.budgets, type(threat.goal)(success="misclassified"))


def test_any_loss_and_any_goal_sees_the_mean_scores_and_latent():
    model, x = Shaken(SPECS), {"audio": torch.randn(2, SIZE)}
    trace = model.trace({"audio": torch.cat([x["audio"]] * 3)})
    for goal in (Untargeted(), PushLatent(success="misclassified")):
        threat = ThreatModel({"audio": Budget("linf", 0.1)}, goal).given(clean=trace)
        for one in (threat, threat.steered(top1_margin)):
            torch.manual_seed(4)
            seen = look(Averaged(model, 4, 4), x, torch.ones(2, 1), one.at(torch.tensor([0, 1])))
            torch.manual_seed(4)
            draws = model({m: v.repeat(4, 1) for m, v in x.items()}).unflatten(0, (4, 2)).mean(0)
            mean = trace._replace(latent=draws, logits=draws)
            by_hand = one.at(torch.tensor([0, 1])).goal.loss(mean, torch.ones(2, 1))
            torch.testing.assert_close(seen.loss, by_hand)


@pytest.mark.parametrize("inner", [Square(12), Square(12, stop=False), Restarts(PGD(2), 2)], ids=repr)
def test_goes_around_any_attack(inner, fusion, inputs):
    threat = threat_of("linf")
    averaged = run(EOT(inner, 2), fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, averaged, threat, fusion.specs) == [""] * 6
    for m, x in run(inner, fusion, inputs, LABELS, threat).items():
        torch.testing.assert_close(averaged[m], x, rtol=0, atol=1e-6)


def test_leaves_the_global_generator_alone_in_parts_too(fusion, inputs):
    before = torch.get_rng_state()
    run(EOT(PGD(2), 3, at_once=1), fusion, inputs, LABELS, threat_of("linf"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EOT(PGD(), 0), "`times` must be at least 1, got 0"),
        (lambda: EOT(PGD(), at_once=0), "`at_once` must be at least 1 draw, got 0"),
    ],
)
def test_settings_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    x = torch.randn(5, 7, requires_grad=True)
    for backward, slope in ((None, torch.ones(5, 7)), (nn.Tanh(), 1 - x.detach().tanh().square())):
        y = straight_through(Rounding(), backward)(x)
        assert torch.equal(y, Rounding()(x))
        torch.testing.assert_close(torch.autograd.grad((3 * y).sum(), x)[0], 3 * slope)


def test_straight_through_hides_what_a_stage_would_do_to_gradients():
    """A shattered gradient is not added to the stand-in's."""
    x = torch.randn(4, requires_grad=True)
    y = straight_through(nn.Softplus(beta=100))(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones(4))


def test_a_stand_in_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"`backward` must return what `module` returns, .* \[2, 3\], got .* \[2, 1\]"):
        straight_through(nn.Identity(), nn.Linear(3, 1))(torch.zeros(2, 3))


def test_the_budgets_of_the_battery_are_kept_by_averaged_attacks(fusion):
    specs = tiny_specs()
    for norm in EPSILON:
        x = batch_of(specs)
        adversarial = run(EOT(PGD(2), 2), fusion, x, LABELS, threat_of(norm))
        assert audit.violations(x, adversarial, threat_of(norm), specs) == [""] * 6
