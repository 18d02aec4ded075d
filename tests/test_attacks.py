"""The battery: what must hold for every attack of the table, under every norm and goal."""

import dataclasses

import pytest
import torch
from conftest import Linear, batch_of, few_steps, tiny_fusion, tiny_specs

from robustav import audit
from robustav.attacks import APGD, FGSM, PGD, Aimed, MomentumFGSM, Noise, RayS, Restarts, Square, brief, trait
from robustav.attacks.ascent import Point, climb, look
from robustav.attacks.universal import Universal
from robustav.classifier import InputSpec
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

ALL = [
    *few_steps().values(),
    Restarts(PGD(steps=3), 2),
    PGD(steps=4, relative_step={"audio": 0.5, "visual": 0.3}),
    APGD(6, stop=True),
]
ASCENTS = [a for a in ALL if trait(a, "knowledge", "gradients") == "gradients" and not trait(a, "survivors", False)]
# From a random start, projected steps close in on the pole of an l2 ball by 1 / (1 + step) each: these take enough.
CONVERGED = [FGSM(), MomentumFGSM(), PGD(40, 0.25), Restarts(PGD(40, 0.25), 2), PGD(40, {"audio": 0.3, "visual": 0.25})]
EVERY = pytest.mark.parametrize("attack", ALL, ids=repr)
TAKEN = [
    (attack, norm)
    for norm in ("linf", "l2", "l1")
    for attack in ALL
    if not (norm == "l1" and isinstance(attack, Square | RayS))
]
EVERY_AND_NORMS = pytest.mark.parametrize(("attack", "norm"), TAKEN, ids=repr)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
MODES = pytest.mark.parametrize("attacked", [("audio",), ("visual",), ("audio", "visual")], ids="+".join)
EPSILON = {
    "linf": {"audio": 0.02, "visual": 0.03},
    "l2": {"audio": 0.1, "visual": 0.2},
    "l1": {"audio": 0.5, "visual": 0.8},
}
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])


def threat_of(norm, attacked=("audio", "visual"), goal=None, **changes):
    specs = tiny_specs()
    budgets = {
        m: Budget(norm, changes.get("epsilon", EPSILON[norm][m]), low=specs[m].low, high=specs[m].high)
        for m in attacked
    }
    return ThreatModel(budgets, goal or Untargeted())


def run(attack, model, inputs, labels, threat, names="abcdef", seed=0):
    return attack(model, inputs, labels, threat, draws=draws_for(seed, names[: len(labels)]))


@EVERY_AND_NORMS
@MODES
def test_stays_in_budget_and_leaves_the_rest_alone(attack, norm, attacked, fusion, inputs):
    threat = threat_of(norm, attacked)
    before = {m: x.clone() for m, x in inputs.items()}
    adversarial = run(attack, fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs) == [""] * 6
    for m in inputs:
        assert torch.equal(inputs[m], before[m]), "the attack wrote into its inputs"
        assert torch.equal(adversarial[m], inputs[m]) == (m not in attacked)


@EVERY_AND_NORMS
def test_uses_a_box_of_its_own_for_each_modality(attack, norm, fusion):
    """Inputs at the edge of their ranges, [-1, 1] and [0, 1]: V3, V4 and V14 of the defect catalogue."""
    specs = tiny_specs()
    edges = {
        m: torch.where(x > x.median(), s.high, s.low)
        for (m, x), s in zip(batch_of(specs).items(), specs.values(), strict=True)
    }
    adversarial = run(attack, fusion, edges, LABELS, threat_of(norm))
    assert audit.violations(edges, adversarial, threat_of(norm), specs) == [""] * 6
    moved = threat_of(norm).gauge(edges, adversarial) > 0.05
    spared = trait(attack, "survivors", False) or getattr(attack, "stop", False)
    assert moved.any() if spared else moved.all()  # a search leaves alone what is wrong already


@EVERY_AND_NORMS
def test_does_nothing_at_epsilon_zero(attack, norm, fusion, inputs):
    adversarial = run(attack, fusion, inputs, LABELS, threat_of(norm, epsilon=0.0))
    assert all(torch.equal(adversarial[m], inputs[m]) for m in inputs)


@EVERY
def test_leaves_the_model_and_the_global_generator_alone(attack, fusion, inputs):
    """V15: attacks that re-seed the global generator change everything after them."""
    state = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    before = torch.get_rng_state()
    run(attack, fusion, inputs, LABELS, threat_of("linf"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fusion.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in fusion.parameters())


@EVERY_AND_NORMS
def test_does_not_depend_on_batch_mates(attack, norm, fusion, inputs):
    """In float64: products of one row and of six round differently, on some processors more than on others."""
    fusion, inputs = fusion.double(), {m: x.double() for m, x in inputs.items()}
    whole = run(attack, fusion, inputs, LABELS, threat_of(norm))
    for i in (0, 3):
        one = run(
            attack,
            fusion,
            {m: x[i : i + 1] for m, x in inputs.items()},
            LABELS[i : i + 1],
            threat_of(norm),
            "abcdef"[i],
        )
        for m in inputs:
            torch.testing.assert_close(one[m][0], whole[m][i], rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 2, 3, 4)], ids=str)
def test_takes_any_rank(attack, shape):
    """V2: a batch of waveforms is no image, and the batch axis is never guessed."""
    specs = {"audio": InputSpec(shape, -1.0, 1.0, "amplitude")}
    model, labels = Linear(specs), torch.ones(2, 1)
    x = {"audio": torch.zeros(2, *shape)}
    adversarial = run(attack, model, x, labels, ThreatModel({"audio": Budget("linf", 0.1)}))
    assert adversarial["audio"].shape == x["audio"].shape


@pytest.mark.parametrize(
    ("attack", "share"), [*((attack, 0.998) for attack in CONVERGED), (PGD(), 0.97)], ids=lambda value: repr(value)
)
@NORMS
@pytest.mark.parametrize(
    "goal", [Untargeted(), Inject(chosen=(0,)), Hide(chosen=(0,))], ids=lambda goal: type(goal).__name__
)
def test_finds_the_best_attack_on_a_linear_model(attack, share, norm, goal):
    """Hoelder: the logit moves by at most epsilon times the dual norm of the weights, and that much it must move."""
    specs = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude"), "visual": InputSpec((3, 8), -9.0, 9.0, "pixel value")}
    model = Linear(specs)
    x = batch_of(specs, 4)
    budgets = {m: Budget(norm, e, low=-9.0, high=9.0) for m, e in (("audio", 0.02), ("visual", 0.05))}
    adversarial = run(attack, model, x, torch.ones(4, 1), ThreatModel(budgets, goal))
    dual = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
    best = sum(budgets[m].epsilon * model.weights[m].norm(p=dual) for m in specs)
    moved = (model(adversarial) - model(x))[:, 0] * (1 if isinstance(goal, Inject) else -1)
    assert (moved <= best * 1.0001).all()
    assert (moved >= best * share).all()


@NORMS
def test_one_full_step_of_pgd_is_fgsm(norm, fusion, inputs):
    """V7: n steps are n updates, the last one included."""
    threat = threat_of(norm)
    single = PGD(steps=1, relative_step=1.0, random_start=False)
    for m, x in run(single, fusion, inputs, LABELS, threat).items():
        assert torch.equal(x, run(FGSM(), fusion, inputs, LABELS, threat)[m])


def test_one_full_step_of_pgd_is_fgsm_even_where_it_overshoots():
    """Past the valley a full step ends higher up: without a random start the clean point is no way out."""

    class Valley(Linear):
        def front_end(self, modality, raw):
            return (raw - 0.1).square()

    model = Valley({"audio": InputSpec((4,), -1.0, 1.0, "amplitude")})
    with torch.no_grad():
        model.weights["audio"].fill_(1.0)
    x, threat = {"audio": torch.zeros(1, 4)}, ThreatModel({"audio": Budget("linf", 0.5)})
    single = run(PGD(1, 1.0, random_start=False), model, x, torch.ones(1, 1), threat)
    assert torch.equal(single["audio"], run(FGSM(), model, x, torch.ones(1, 1), threat)["audio"])
    assert (single["audio"] > 0.49).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_costs_what_it_says(steps, fusion, inputs):
    tally = Tally(6, ("audio",))
    view = AttackView(fusion, ("audio",), {"visual": fusion.encode("visual", inputs["visual"])}, tally)
    run(PGD(steps=steps), view, {"audio": inputs["audio"]}, LABELS, threat_of("linf", ("audio",)))
    assert (tally.forwards.tolist(), tally.backwards.tolist()) == ([steps + 1] * 6, [steps] * 6)
    assert tally.zero_gradients().tolist() == [0.0] * 6


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@NORMS
def test_more_steps_and_restarts_never_lose_a_success(label_kind, norm, inputs):
    """V8: the best restart is kept for each sample, not the last one and not the best on average."""
    model, goal = tiny_fusion(label_kind), Untargeted(label_kind)
    labels = model(inputs).argmax(1)
    labels = labels if label_kind == "multiclass" else torch.nn.functional.one_hot(labels, 3).float()
    threat = threat_of(norm, goal=goal, epsilon={"linf": 0.05, "l2": 0.3, "l1": 1.5}[norm])
    reached = torch.zeros(6, dtype=torch.bool)
    for steps in (1, 2, 4, 8, 16):
        now = look(model, run(PGD(steps, relative_step=0.4), model, inputs, labels, threat), labels, threat).reached
        assert (now | ~reached).all()
        reached = now
    reached, loss = torch.zeros(6, dtype=torch.bool), torch.full((6,), -torch.inf)
    for times in (1, 2, 5, 10):
        point = look(model, run(Restarts(PGD(2), times), model, inputs, labels, threat), labels, threat)
        assert (point.reached | ~reached).all()
        assert (point.loss >= loss - 1e-6)[point.reached == reached].all()
        reached, loss = point.reached, point.loss


def test_the_better_point_reaches_the_goal_or_climbs_higher():
    x, y = {"audio": torch.zeros(4, 1)}, {"audio": torch.ones(4, 1)}
    here = Point(x, torch.tensor([1.0, 1, 5, 1]), torch.tensor([False, True, False, True]))
    other = Point(y, torch.tensor([2.0, 2, 1, 0]), torch.tensor([False, False, True, True]))
    best = here.or_better(other)
    assert best.inputs["audio"].flatten().tolist() == [1, 0, 1, 0]
    assert best.loss.tolist() == [2, 1, 1, 1]
    assert best.reached.tolist() == [False, True, True, True]


@pytest.mark.parametrize("attack", [PGD(), MomentumFGSM()], ids=repr)
def test_iterative_attacks_beat_noise_and_a_single_step(attack, fusion, inputs):
    threat = threat_of("linf", epsilon=0.1)
    loss = [
        look(fusion, run(a, fusion, inputs, LABELS, threat), LABELS, threat).loss for a in (Noise(), FGSM(), attack)
    ]
    clean = look(fusion, inputs, LABELS, threat).loss
    assert (loss[2] >= loss[1] - 1e-5).all()
    assert (loss[1] > loss[0]).all()
    assert (loss[2] > clean).all()


@pytest.mark.parametrize(
    "goal",
    [Targeted("multiclass", target=2), Untargeted("multiclass"), Untargeted("multiclass", loss_name="margin")],
    ids=repr,
)
def test_a_large_budget_reaches_multiclass_goals(goal, inputs):
    model = tiny_fusion("multiclass")
    labels = model(inputs).argmax(1)
    threat = threat_of("linf", epsilon=2.0, goal=goal).given(clean=model.trace(inputs))
    reached = look(model, run(PGD(40), model, inputs, labels, threat), labels, threat).reached
    assert reached.all()


def test_fgsm_pushes_the_latent_though_the_distance_is_flat_at_the_clean_input(fusion, inputs):
    threat = threat_of("linf", goal=PushLatent()).given(clean=fusion.trace(inputs))
    adversarial = run(FGSM(), fusion, inputs, LABELS, threat)
    assert (fusion.trace(adversarial).latent - fusion.trace(inputs).latent).norm(dim=1).min() > 1e-3


def test_the_gradient_is_that_of_the_summed_bce(fusion, inputs):
    """V5: multi-hot labels are neither arg-maxed nor averaged over classes."""
    _, gradients = climb(fusion, inputs, LABELS, threat_of("linf"))
    leaves = {m: x.clone().requires_grad_() for m, x in inputs.items()}
    p = fusion(leaves).sigmoid()
    by_hand = -(LABELS * p.log() + (1 - LABELS) * (1 - p).log()).sum()
    by_hand.backward()
    for m in inputs:
        torch.testing.assert_close(gradients[m], leaves[m].grad, rtol=1e-4, atol=1e-7)


def test_padding_is_never_written_to(fusion, inputs):
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    for norm in EPSILON:
        threat = threat_of(norm).given(writable=writable)
        for attack in (attack for attack, taken in TAKEN if taken == norm):
            adversarial = run(attack, fusion, inputs, LABELS, threat)
            assert torch.equal(adversarial["audio"][:, 40:], inputs["audio"][:, 40:])
            assert trait(attack, "survivors", False) or not torch.equal(adversarial["audio"], inputs["audio"])
            assert audit.violations(inputs, adversarial, threat, fusion.specs, writable) == [""] * 6


def test_a_radius_may_differ_by_clip(fusion, inputs):
    radius = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    threat = ThreatModel({"audio": Budget("linf", radius, low=-1.0, high=1.0)})
    adversarial = run(PGD(), fusion, inputs, LABELS, threat)
    torch.testing.assert_close((adversarial["audio"] - inputs["audio"]).abs().amax(1), radius, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_sample(linear, inputs):
    class Root(Linear):
        def front_end(self, modality, raw):
            return raw.abs().sqrt()

    model = Root({"audio": tiny_specs()["audio"]})
    x = {"audio": inputs["audio"].clone()}
    x["audio"][2, 5] = 0
    with pytest.raises(FloatingPointError, match=r"gradient by 'audio' is not finite for samples \[2\]"):
        run(FGSM(), model, x, torch.ones(6, 1), ThreatModel({"audio": Budget("linf", 0.1)}))


@pytest.mark.parametrize("attack", [a for a in ASCENTS if not getattr(a, "stop", False)], ids=repr)
def test_a_detached_model_counts_as_zero_gradients_not_as_robust(attack, inputs):
    class Detached(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x).detach()

    tally = Tally(6, ("audio", "visual"))
    view = AttackView(Detached(tiny_specs()).requires_grad_(False), ("audio", "visual"), {}, tally)
    run(attack, view, inputs, torch.ones(6, 1), threat_of("linf"))
    assert tally.zero_gradients().tolist() == [1.0] * 6


def test_a_detached_branch_counts_as_zero_gradients(inputs):
    class OneEared(Linear):
        def encode(self, modality, x):
            features = super().encode(modality, x)
            return features.detach() if modality == "audio" else features

    tally = Tally(6, ("audio", "visual"))
    view = AttackView(OneEared(tiny_specs()), ("audio", "visual"), {}, tally)
    run(PGD(steps=3), view, inputs, torch.ones(6, 1), threat_of("linf"))
    assert tally.zero_gradients().tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(steps=0), "`steps` must be at least 1, got 0"),
        (lambda: PGD(relative_step=-1.0), "`relative_step` must be above 0, got -1.0"),
        (lambda: MomentumFGSM(decay=-0.5), "`decay` must not be negative, got -0.5"),
        (lambda: Restarts(PGD(), 0), "`times` must be at least 1, got 0"),
    ],
)
def test_settings_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_settings_are_frozen_and_the_repr_is_the_settings(attack):
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3
    assert repr(attack).startswith(type(attack).__name__ + "(")


def test_a_header_shows_the_settings_that_are_not_defaults():
    assert brief(PGD()) == "PGD()"
    assert brief(Restarts(APGD(7, stop=True), 3)) == "Restarts(attack=APGD(steps=7, stop=True), times=3)"
    assert brief(Aimed(aims=2)) == "Aimed(aims=2)"
    universal = Universal({"audio": torch.ones(3)})
    assert brief(universal) == repr(universal)
    assert repr(APGD(7)) != brief(APGD(7)), "a record keeps every setting"


def test_a_tally_counts_the_looks_of_each_clip():
    """One clip after another tells the same as all at once."""
    losses = torch.rand(30, 3).cumsum(0) * torch.tensor([1.0, 2.0, 3.0])
    together, alone, missed = Tally(3, ("audio",)), Tally(3, ("audio",)), torch.zeros(1, dtype=torch.bool)
    for row in losses:
        together.hear(torch.arange(3), row, missed.expand(3))
    for clip in range(3):
        for row in losses:
            alone.hear(torch.tensor([clip]), row[clip : clip + 1], missed)
    best = losses.cummax(0).values.double()
    expected = (best[-1] - best[-11]) / (best[-1] - losses.double().amin(0))
    torch.testing.assert_close(together.late_gain(), expected)
    torch.testing.assert_close(alone.late_gain(), expected)
    short = Tally(1, ("audio",))
    for row in losses[:19]:
        short.hear(torch.tensor([0]), row[:1], missed)
    assert short.late_gain().isnan().all()


def test_restarts_leave_alone_what_is_broken(inputs):
    model, goal = tiny_fusion("multiclass"), Untargeted("multiclass")
    labels, threat = model(inputs).argmax(1), threat_of("linf", goal=goal, epsilon=0.05)
    whole, stopped = Restarts(PGD(2), 4), Restarts(PGD(2), 4, stop=True)
    tally = Tally(6, ("audio", "visual"))
    view = AttackView(model, ("audio", "visual"), {}, tally)
    left = look(model, run(whole, model, inputs, labels, threat), labels, threat).reached
    right = look(model, run(stopped, view, inputs, labels, threat), labels, threat).reached
    assert torch.equal(left, right)
    assert 0 < left.sum() < 6
    assert len(set(tally.forwards.tolist())) > 1
    assert (tally.forwards[~left] == 4 * 4).all()
