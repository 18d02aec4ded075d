"""Square and RayS: the battery, closed forms, and that they see no more than they say."""

import dataclasses
import math

import pytest
import torch
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from test_attacks import LABELS, run, threat_of

from robustav import audit
from robustav.attacks import Noise
from robustav.attacks.ascent import look
from robustav.attacks.rays import RayS
from robustav.attacks.square import Box, Grid, Square, box_size, corner, gathered, stripes, tone
from robustav.classifier import InputSpec
from robustav.goals import Hide, Targeted, Untargeted
from robustav.losses import margin, top1_margin
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

ALL = [Square(12), Square(12, stop=False), RayS(25)]
EVERY = pytest.mark.parametrize("attack", ALL, ids=repr)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
SPECS = {"audio": InputSpec((8,), -9.0, 9.0, "amplitude"), "visual": InputSpec((3, 4), -9.0, 9.0, "pixel value")}
RADII = {"audio": 0.02, "visual": 0.05}


def budgets_of(norm):
    return {m: Budget(norm, radius, low=-9.0, high=9.0) for m, radius in RADII.items()}


def viewed(model, modalities):
    tally = Tally(6, modalities)
    return AttackView(model.requires_grad_(False), modalities, {}, tally), tally


class Led(Linear):
    """The one class of a linear model, predicted by a lead on the given clips."""

    def __init__(self, inputs, lead):
        super().__init__(SPECS)
        self.register_buffer("clean", super().classify(self.fuse(self.features(inputs)))[:1])
        self.lead = lead

    def classify(self, latent):
        return latent - self.clean + self.lead


@EVERY
@NORMS
@pytest.mark.parametrize("attacked", [("audio",), ("visual",), ("audio", "visual")], ids="+".join)
def test_stays_in_budget_and_leaves_the_rest_alone(attack, norm, attacked, fusion, inputs):
    threat, before = threat_of(norm, attacked), {m: x.clone() for m, x in inputs.items()}
    adversarial = run(attack, fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs) == [""] * 6
    for m in inputs:
        assert torch.equal(inputs[m], before[m])
        if m not in attacked:
            assert torch.equal(adversarial[m], inputs[m])


@pytest.mark.parametrize("attack", [Square(12, stop=False), RayS(25)], ids=repr)
@NORMS
def test_uses_a_box_of_its_own_for_each_modality(attack, norm, fusion):
    specs = tiny_specs()
    edges = {
        m: torch.where(x > x.median(), s.high, s.low)
        for (m, x), s in zip(batch_of(specs).items(), specs.values(), strict=True)
    }
    labels = torch.nn.functional.one_hot(fusion(edges).argmax(1), 3).float()
    adversarial = run(attack, fusion, edges, labels, threat_of(norm))
    assert audit.violations(edges, adversarial, threat_of(norm), specs) == [""] * 6
    assert (threat_of(norm).gauge(edges, adversarial) > 0.05).all()


@EVERY
@NORMS
def test_does_nothing_at_epsilon_zero(attack, norm, fusion, inputs):
    adversarial = run(attack, fusion, inputs, LABELS, threat_of(norm, epsilon=0.0))
    assert all(torch.equal(adversarial[m], inputs[m]) for m in inputs)


@EVERY
@NORMS
def test_does_not_depend_on_batch_mates(attack, norm, fusion, inputs):
    before = torch.get_rng_state()
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
            torch.testing.assert_close(one[m][0], whole[m][i], rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


@EVERY
@NORMS
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4), (1, 2, 3, 4), (2, 2, 1, 2, 2)], ids=str)
def test_takes_any_rank(attack, norm, shape):
    model = Linear({"audio": InputSpec(shape, -1.0, 1.0, "amplitude")})
    x, threat = {"audio": torch.zeros(2, *shape)}, ThreatModel({"audio": Budget(norm, 0.1)}, Hide(chosen=(0,)))
    adversarial = run(attack, model, x, torch.ones(2, 1), threat)
    assert audit.violations(x, adversarial, threat, model.specs) == ["", ""]


@EVERY
@NORMS
def test_padding_is_never_written_to(attack, norm, fusion, inputs):
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    threat = threat_of(norm).given(writable=writable)
    adversarial = run(attack, fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs, writable) == [""] * 6


@NORMS
def test_rays_do_not_write_to_padding_outside_the_budget_either(norm, fusion, inputs):
    threat = threat_of(norm).given(writable={"audio": torch.arange(64).expand(6, 64) < 40})
    found = RayS(10).smallest(fusion, inputs, LABELS, threat, draws=draws_for(0, "abcdef"))
    assert (threat.gauge(inputs, found) > 1).any()
    assert torch.equal(found["audio"][:, 40:], inputs["audio"][:, 40:])


@EVERY
def test_there_is_no_l1(attack, fusion, inputs):
    with pytest.raises(ValueError, match=r"norms \['l2', 'linf'\] for an attack that searches over signs, got 'l1'"):
        run(attack, fusion, inputs, LABELS, threat_of("l1"))


@pytest.mark.parametrize(("norm", "queries", "share"), [("linf", 200, 0.99), ("l2", 150, 0.65)])
def test_square_finds_the_best_attack_on_a_linear_model(norm, queries, share):
    """Hoelder; the linf optimum is a corner, which boxes reach one by one, and in l2 mass moves to where it counts."""
    model, x = Linear(SPECS), batch_of(SPECS, 2)
    threat = ThreatModel(budgets_of(norm))
    adversarial = run(Square(queries, stop=False), model, x, torch.ones(2, 1), threat)
    best = sum(RADII[m] * model.weights[m].norm(p={"linf": 1, "l2": 2}[norm]) for m in SPECS)
    moved = (model(x) - model(adversarial))[:, 0]
    assert (moved <= best * 1.0001).all()
    assert (moved >= best * share).all()


def test_square_beats_noise_and_never_falls(fusion, inputs):
    threat = threat_of("linf", epsilon=0.1).steered(top1_margin)
    noise = look(fusion, run(Noise(), fusion, inputs, LABELS, threat), LABELS, threat).loss
    view, tally = viewed(fusion, ("audio", "visual"))
    found = look(fusion, run(Square(40, stop=False), view, inputs, LABELS, threat), LABELS, threat).loss
    assert (found > noise).all()
    # What is returned has the largest loss of all that was looked at, among the points that are alike in reaching.
    torch.testing.assert_close(found.double(), tally.highest())


@pytest.mark.parametrize("attacked", [("audio",), ("audio", "visual")], ids="+".join)
def test_square_spends_exactly_its_queries(attacked, inputs):
    goal = Hide(chosen=(0,))
    x = {m: inputs[m] for m in attacked}
    view, tally = viewed(Linear({m: tiny_specs()[m] for m in attacked}), attacked)
    run(Square(17, stop=False), view, x, torch.ones(6, 1), threat_of("linf", attacked, goal))
    assert tally.forwards.tolist() == [17] * 6
    assert tally.backwards.tolist() == [0] * 6


def test_square_stops_at_the_first_success_of_each_clip(fusion, inputs):
    labels = torch.nn.functional.one_hot(fusion(inputs).argmax(1), 3).float()
    threat = threat_of("linf", epsilon=0.08)
    view, tally = viewed(fusion, ("audio", "visual"))
    adversarial = run(Square(60), view, inputs, labels, threat)
    reached = look(fusion, adversarial, labels, threat).reached
    assert torch.equal(reached, tally.ever_reached.bool())
    assert 0 < reached.sum() < 6
    assert (tally.forwards[~reached] == 60).all()
    assert (tally.forwards[reached] < 60).all()
    for i, cost in enumerate(tally.forwards.tolist()):
        assert int(tally.looks.max()) >= cost
        alone, own = AttackView(fusion, ("audio", "visual"), {}, Tally(1, ("audio", "visual"))), slice(i, i + 1)
        run(Square(60), alone, {m: x[own] for m, x in inputs.items()}, labels[own], threat, "abcdef"[i])
        assert alone.tally.forwards.tolist() == [cost]


@pytest.mark.parametrize(
    ("goal", "loss"),
    [
        (Untargeted(), top1_margin),
        (Untargeted(success="misclassified"), None),
        (Untargeted("multiclass"), margin),
        (Untargeted("multiclass", success="misclassified"), margin),
        (Untargeted("multiclass", success="label-set"), None),
        (Targeted("multiclass", target=1), None),
        (Hide(chosen=(0, 1)), None),
    ],
    ids=lambda given: getattr(given, "__name__", repr(given)),
)
def test_square_climbs_the_margin_that_decides(goal, loss, inputs):
    """Or else the goal's own loss."""
    model = tiny_fusion(goal.label_kind)
    labels = LABELS if goal.label_kind == "multilabel" else torch.arange(6) % 3
    threat = threat_of("linf", goal=goal).given(clean=model.trace(inputs))
    view, tally = viewed(model, ("audio", "visual"))
    adversarial = run(Square(3, stop=False), view, inputs, labels, threat)
    expected = look(model, adversarial, labels, threat.steered(loss) if loss else threat)
    torch.testing.assert_close(expected.loss[~expected.reached].double(), tally.highest()[~expected.reached])


def test_square_climbs_the_loss_that_is_asked_for(fusion, inputs):
    view, tally = viewed(fusion, ("audio", "visual"))
    adversarial = run(Square(5, loss="bce", stop=False), view, inputs, LABELS, threat_of("linf"))
    point = look(fusion, adversarial, LABELS, threat_of("linf"))
    assert torch.isclose(point.loss.double(), tally.highest()).any()
    with pytest.raises(ValueError, match=r"`loss` must be one of \['bce', .*\] for multilabel labels, got 'margin'"):
        run(Square(5, loss="margin"), fusion, inputs, LABELS, threat_of("linf"))


@pytest.mark.parametrize("shape", [(40,), (6, 9), (3, 8, 8), (4, 3, 6, 10), (3, 1, 20)], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.3, 0.01, 1e-6])
@pytest.mark.parametrize("least", [1, 3])
def test_boxes_hold_their_share(shape, share, least):
    """To the rounding of two sides, as far as one frame does; never outside."""
    grid = Grid.of(torch.zeros(50, *shape))
    assert math.prod(grid) == math.prod(shape)
    frames, height, width = box_size(grid, share, least)
    cells = Box.drawn(grid, (frames, height, width), torch.rand(50, 3)).inside(grid).flatten(1).sum(1)
    assert (cells == height * width).all()
    assert frames == 1 and min(least, grid.height) <= height and min(least, grid.width) <= width
    wanted = min(share * math.prod(grid.lengths), grid.height * grid.width)
    assert abs(height * width - wanted) <= max((height + width + 1) / 2, least**2)


def test_boxes_reach_every_cell():
    grid = Grid(3, 1, 4, 5)
    assert Box.drawn(grid, box_size(grid, 0.05), torch.rand(500, 3)).inside(grid).any(0).all()


@pytest.mark.parametrize("shape", [(12,), (6, 9), (2, 3, 4, 4)], ids=str)
def test_no_query_is_spent_on_the_point_that_is_there(shape):
    """In linf, a box whose signs are there already gets the others."""
    clean, budget = torch.zeros(40, *shape), Budget("linf", 0.1)
    x = clean + 0.1 * torch.ones(shape)
    y = corner(budget, clean, budget.project(clean, x), 0.01, torch.rand(40, 8 + 3))
    assert (y != budget.project(clean, x)).flatten(1).any(1).all()


@pytest.mark.parametrize("shape", [(40,), (9, 9), (2, 3, 8, 8)], ids=str)
def test_mass_moves_from_one_box_to_another(shape):
    """In l2, each channel keeps its mass: one box is emptied into the other, and the rest stays as it is."""
    clean, budget = torch.zeros(30, *shape), Budget("l2", 1.0)
    x = stripes(budget, clean, draws_for(0, [str(i) for i in range(30)]))
    luck = torch.rand(30, 8 + 3)
    y = gathered(budget, clean, x, 0.05, luck)
    grid = Grid.of(clean)
    size = box_size(grid, 0.05, 3)
    box, other = (Box.drawn(grid, size, luck[:, i : i + 3]).inside(grid) for i in (0, 3))
    before, after = x.reshape(-1, *grid), y.reshape(-1, *grid)
    assert (after[(other & ~box).expand_as(after)] == 0).all()
    rest = ~(box | other).expand_as(after)
    torch.testing.assert_close(after[rest], before[rest], rtol=1e-4, atol=1e-6)
    mass = [v.square().sum((1, 3, 4)) for v in (before, after)]
    torch.testing.assert_close(mass[1], mass[0], rtol=1e-3, atol=1e-5)
    assert (after - before).abs().flatten(1).amax(1).min() > 0.01


def test_waves_have_the_periods_they_should():
    grid = Grid(1, 1, 1, 64)
    wave = tone(grid, 32, torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.25]))[:, 0, 0, 0]
    torch.testing.assert_close(wave[0], (-1.0) ** torch.arange(64), rtol=0, atol=1e-4)
    assert wave[1].argmin() == 32


@NORMS
@pytest.mark.parametrize("shape", [(40,), (3, 4, 4), (2, 3, 4, 4)], ids=str)
def test_the_search_starts_at_the_edge_of_the_budget(norm, shape):
    clean, budget = torch.zeros(3, *shape), Budget(norm, 0.1)
    x = stripes(budget, clean, draws_for(0, "abc"))
    torch.testing.assert_close(budget.gauge(clean, x).float(), torch.ones(3), rtol=1e-4, atol=0)
    assert x.abs().amax() - x.abs().amin() < 1e-6
    if len(shape) > 1:
        assert torch.equal(x, x[..., :1, :].expand_as(x))


@pytest.mark.parametrize(("norm", "factor"), [("linf", 1.0), ("l2", None)])
@pytest.mark.parametrize("lead", [0.5, 2.0])
def test_rays_find_the_nearest_boundary_of_a_linear_model(norm, factor, lead):
    """At lead over dual norm of the weights; in l2, the best of all directions of signs."""
    x = {m: v[:1].expand(2, *v.shape[1:]) for m, v in batch_of(SPECS, 1).items()}
    weights = Linear(SPECS).weights
    rate = sum(
        RADII[m] * w.abs().sum() / (1 if norm == "linf" else w.numel() ** 0.5) for m, w in weights.items()
    ).item()
    model, threat = Led(x, lead * rate), ThreatModel(budgets_of(norm), Hide(chosen=(0,)))
    found = RayS(150).smallest(model, x, torch.ones(2, 1), threat, draws=draws_for(0, "ab"))
    assert look(model, found, torch.ones(2, 1), threat).reached.all()
    gauge = threat.gauge(x, found)
    assert (gauge >= lead * 0.999).all()
    assert (gauge <= lead * 1.01).all()
    called = run(RayS(150), model, x, torch.ones(2, 1), threat)
    assert audit.violations(x, called, threat, SPECS) == ["", ""]
    assert look(model, called, torch.ones(2, 1), threat).reached.tolist() == [lead < 1] * 2


def test_rays_see_nothing_but_verdicts(fusion, inputs):
    """A loss that is not a number changes nothing."""

    class Mute(Untargeted):
        def loss(self, trace, labels):
            return torch.full_like(trace.logits[:, 0], math.nan)

    plain = run(RayS(30), fusion, inputs, LABELS, threat_of("linf"))
    mute = run(RayS(30), fusion, inputs, LABELS, threat_of("linf", goal=Mute()))
    assert all(torch.equal(mute[m], x) for m, x in plain.items())


def test_rays_draw_closer_with_every_query_and_count_them(fusion, inputs):
    labels = torch.nn.functional.one_hot(fusion(inputs).argmax(1), 3).float()
    threat, before = threat_of("linf"), torch.full((6,), math.inf, dtype=torch.float64)
    for queries in (2, 5, 10, 20, 40):
        view, tally = viewed(fusion, ("audio", "visual"))
        found = RayS(queries).smallest(view, inputs, labels, threat, draws=draws_for(0, "abcdef"))
        assert tally.forwards.tolist() == [queries] * 6
        assert tally.backwards.tolist() == [0] * 6
        reached = look(fusion, found, labels, threat).reached
        now = torch.where(reached, threat.gauge(inputs, found), math.inf)
        assert (now <= before).all()
        before = now
    assert before.isfinite().all()


def test_rays_leave_a_clip_alone_that_has_nothing_to_find(inputs):
    """Because it reaches the goal as it is, or because nothing does."""
    specs = {"audio": tiny_specs()["audio"]}
    x = {"audio": inputs["audio"]}
    for lead, cost in ((-1e3, 1), (1e3, 9)):
        model = Linear(specs)
        model.classify = lambda latent, lead=lead: latent * 1e-3 + lead
        view, tally = viewed(model, ("audio",))
        threat = threat_of("linf", ("audio",), Hide(chosen=(0,)))
        found = RayS(9).smallest(view, x, torch.ones(6, 1), threat, draws=draws_for(0, "abcdef"))
        assert torch.equal(found["audio"], x["audio"])
        assert tally.forwards.tolist() == [cost] * 6


def test_rays_go_far_where_inputs_have_no_valid_range(inputs):
    spec = {"audio": InputSpec((8,), -math.inf, math.inf, "feature")}
    model, x = Linear(spec), {"audio": inputs["audio"][:, :8]}
    model.classify = lambda latent: latent + 1e3
    threat = ThreatModel({"audio": Budget("linf", 0.1, low=-math.inf, high=math.inf)}, Hide(chosen=(0,)))
    found = RayS(120).smallest(model, x, torch.ones(6, 1), threat, draws=draws_for(0, "abcdef"))
    best = (1e3 + (x["audio"] @ model.weights["audio"].T)[:, 0]) / (0.1 * model.weights["audio"].abs().sum())
    torch.testing.assert_close(threat.gauge(x, found).float(), best, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square(0), "`queries` must be at least 1, got 0"),
        (lambda: Square(share=0.0), "`share` must lie above 0 and at most at 1, got 0.0"),
        (lambda: Square(loss="hinge"), r"`loss` must be one of \['bce', .*\], or empty for a margin, got 'hinge'"),
        (lambda: RayS(1), "`queries` must be at least 2, the clean input and another, got 1"),
        (lambda: RayS(precision=0.0), "`precision` must lie between 0 and 1, got 0.0"),
    ],
)
def test_settings_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
def test_settings_are_frozen_and_what_is_known_of_an_attack_is_no_setting(attack):
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.queries = 3
    assert "knowledge" not in repr(attack)
    assert attack.survivors
    assert attack.knowledge in ("scores", "labels")
