"""Minimum-norm attacks: closed forms and small programs on linear models, and what one run must tell of every epsilon."""

import math

import numpy as np
import pytest
import torch
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from scipy.optimize import linprog, minimize
from test_attacks import LABELS, run, threat_of

from robustav import audit
from robustav.attacks.ascent import look
from robustav.attacks.attack import Attack
from robustav.attacks.fab import FAB
from robustav.attacks.fmn import FMN
from robustav.attacks.minimum import LAST_PROJECTIONS, WAY_BACK, crossing
from robustav.attacks.pgd import PGD
from robustav.classifier import InputSpec, Trace
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.norms import NORMS
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

ALL = [FMN(20), FAB(6, aims=2), FAB(8, aims=None)]
EVERY = pytest.mark.parametrize("attack", ALL, ids=repr)
NORM = pytest.mark.parametrize("norm", list(NORMS))
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
SPECS = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude"), "visual": InputSpec((3, 8), -9.0, 9.0, "pixel value")}
CLOSE = 1.0015  # of the optimum: the hair's breadth of the way back is 1.0001, FMN's last shrinkage 1.001
MISTAKE = Untargeted(success="misclassified")


def smallest(attack, model, inputs, labels, threat, names="abcdefgh", seed=0):
    return attack.smallest(model, inputs, labels, threat, draws=draws_for(seed, names[: len(labels)]))


def linear_threat(norm, attacked, goal, low=-9.0, high=9.0):
    radii = {"audio": 0.02, "visual": 0.05}
    norms = norm if isinstance(norm, dict) else dict.fromkeys(radii, norm)
    return ThreatModel({m: Budget(norms[m], radii[m], low=low, high=high) for m in attacked}, goal)


def reached(model, inputs, labels, threat):
    return look(model, inputs, labels, threat).reached


# What one step of a ball can gain at most, where coordinates have little room


def best_gain(norm, w, radius, down, up):
    """The same by way of a solver that knows nothing of norms."""
    bounds = [
        (-d if math.isfinite(d) else None, u if math.isfinite(u) else None) for d, u in zip(down, up, strict=True)
    ]
    if norm == "linf":
        cut = [(max(-radius, -d), min(radius, u)) for d, u in zip(down, up, strict=True)]
        return -linprog(-w, bounds=cut).fun
    if norm == "l1":  # the step as a difference of two parts at or above 0
        parts = [(0, u) for _, u in bounds] + [(0, None if d is None else -d) for d, _ in bounds]
        return -linprog(np.r_[-w, w], A_ub=np.ones((1, 2 * len(w))), b_ub=[radius], bounds=parts).fun
    ball = {"type": "ineq", "fun": lambda d: radius**2 - d @ d, "jac": lambda d: -2 * d}
    options = {"maxiter": 500, "ftol": 1e-14}
    start = 1e-3 * radius * np.sign(w)
    found = minimize(lambda d: -w @ d, start, jac=lambda d: -w, bounds=bounds, constraints=ball, options=options)
    return -found.fun


@NORM
@pytest.mark.parametrize("seed", range(6))
def test_furthest_gains_what_a_solver_gains(norm, seed):
    generator = np.random.default_rng(seed)
    w = generator.normal(size=(4, 7))
    w[0, 2] = 0
    down, up = generator.uniform(0, 0.4, (2, 4, 7))
    down[1], up[2, :3], up[3] = np.inf, 0, np.inf
    radius = torch.tensor([0.2, 0.5, 1.0, 5.0], dtype=torch.float64)
    step = NORMS[norm].furthest(*map(torch.from_numpy, (w,)), radius, torch.from_numpy(down), torch.from_numpy(up))
    assert (NORMS[norm].length(step) <= radius * (1 + 1e-12)).all()
    assert (step <= torch.from_numpy(up)).all()
    assert (step >= -torch.from_numpy(down)).all()
    for row in range(4):
        gained = w[row] @ step[row].numpy()
        best = best_gain(norm, w[row], radius[row].item(), down[row], up[row])
        assert gained == pytest.approx(best, rel=1e-5 if norm == "l2" else 1e-9)
    assert step[0, 2] == 0


@NORM
def test_furthest_without_bounds_gains_the_dual_norm(norm):
    w = torch.randn(3, 4, 5)
    room = torch.full_like(w, math.inf)
    step = NORMS[norm].furthest(w, 0.3, room, room)
    assert step.dtype == w.dtype
    torch.testing.assert_close((w * step).flatten(1).sum(1), 0.3 * w.flatten(1).norm(p=DUAL[norm], dim=1))
    assert not NORMS[norm].furthest(w, 0.0, room, room).any()
    assert not NORMS[norm].furthest(w, 0.3, 0 * w, 0 * w).any()
    assert not NORMS[norm].furthest(0 * w, 0.3, room, room).any()


# Margins that cross zero where a goal is reached

CLEAN = Trace({}, torch.zeros(500, 2), torch.randn(500, 4, generator=torch.Generator().manual_seed(8)))
GOALS = [
    *(Untargeted("multiclass", success=success) for success in ("top1", "label-set", "misclassified")),
    *(Untargeted("multilabel", 0.3, success=success) for success in ("top1", "label-set", "misclassified")),
    *(PushLatent(kind, 0.7, success="label-set") for kind in ("multiclass", "multilabel")),
    *(Targeted(kind, target=2) for kind in ("multiclass", "multilabel")),
    Hide(threshold=0.4, chosen=(0, 2)),
    Inject(threshold=0.4, chosen=(0, 2)),
]


@pytest.mark.parametrize("goal", GOALS, ids=repr)
def test_a_margin_is_positive_exactly_where_the_goal_is_reached(goal):
    goal = goal.given(CLEAN)
    trace = Trace({}, CLEAN.latent, CLEAN.logits + torch.randn(500, 4))
    labels = torch.randint(4, (500,)) if goal.label_kind == "multiclass" else (torch.rand(500, 4) < 0.5).float()
    if goal.label_kind == "multilabel":  # one label at least, and one class that is none
        labels[:, 0], labels[:, 3] = 1, 0
    towards = crossing(goal, labels)
    margin = towards.margin(trace.logits, towards.labels)
    verdict = goal.reached(trace, labels)
    assert verdict.any()
    assert not verdict.all()
    assert torch.equal(margin > 0, verdict)
    torch.testing.assert_close(towards.ways(trace.logits, towards.labels).amax(1), margin)


def test_a_goal_without_such_a_margin_is_refused(linear, inputs):
    threat = threat_of("linf").steered(lambda logits, labels: logits.sum(1))
    with pytest.raises(
        ValueError, match=r"goals with a `success` rule and for \['Hide', 'Inject', 'Targeted'\], got Steered"
    ):
        run(FMN(), linear, inputs, torch.ones(6, 1), threat)


def test_a_changed_label_set_needs_the_clean_one(linear, inputs):
    threat = threat_of("linf", goal=Untargeted(success="label-set"))
    with pytest.raises(ValueError, match=r"call `threat.given\(clean=trace\)` first"):
        run(FMN(), linear, inputs, torch.ones(6, 1), threat)


# Linear models: the optimum is known


@EVERY
@pytest.mark.parametrize(
    "norm", ["linf", "l2", "l1", {"audio": "l2", "visual": "linf"}, {"audio": "l1", "visual": "l2"}], ids=str
)
@pytest.mark.parametrize("attacked", [("audio",), ("visual",), ("audio", "visual")], ids="+".join)
@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_finds_the_smallest_gauge_on_a_linear_model(attack, norm, attacked, label_kind):
    """Margin over the sum of radius times dual norm: methods E.3 (FAB returns M / ||w||_q), in any mix of norms."""
    goal = Untargeted(label_kind, success="misclassified")
    model, x = Linear(SPECS, classes=1 if label_kind == "multilabel" else 2), batch_of(SPECS, 4)
    model.label_kind = label_kind
    logits, threat = model(x).detach(), linear_threat(norm, attacked, goal)
    if label_kind == "multilabel":
        labels, margin = (logits >= 0).float(), logits[:, 0].abs()
        w = {m: model.weights[m][0] for m in attacked}
    else:
        labels, margin = logits.argmax(1), logits[:, 0].sub(logits[:, 1]).abs()
        w = {m: model.weights[m][0] - model.weights[m][1] for m in attacked}
    norms = {m: threat.budgets[m].norm for m in attacked}
    best = margin / sum(threat.budgets[m].epsilon * w[m].norm(p=DUAL[norms[m]]) for m in attacked)
    if any(norms[m] == "l1" for m in attacked):  # one coordinate moves: keep it from the end of the range
        x = {m: 0.05 * v for m, v in x.items()}
        best = best * 0.05
        logits = model(x)
    found = smallest(attack, model, x, labels, threat)
    assert reached(model, found, labels, threat).all()
    share = threat.gauge(x, found) / best
    assert (share >= 1 - 1e-4).all()
    assert (share <= CLOSE).all(), share
    assert all(torch.equal(found[m], x[m]) for m in SPECS if m not in attacked)


@NORM
def test_fab_finds_the_nearest_of_many_boundaries(norm):
    """The class that needs the smallest step is not always the one that scores next."""
    model, x = Linear(SPECS, classes=5), batch_of(SPECS, 8)
    model.label_kind = "multiclass"
    x = {m: 0.05 * v for m, v in x.items()}
    with torch.no_grad():
        model.weights["audio"][3] *= 6  # steep
    logits = model(x).detach()
    labels, threat = logits.argmax(1), linear_threat(norm, ("audio", "visual"), Untargeted("multiclass"))
    best, nearest = [], []
    for row, y in enumerate(labels.tolist()):
        gauges = {
            j: (
                (logits[row, y] - logits[row, j])
                / sum(
                    b.epsilon * (model.weights[m][y] - model.weights[m][j]).norm(p=DUAL[norm])
                    for m, b in threat.budgets.items()
                )
            ).item()
            for j in range(5)
            if j != y
        }
        nearest.append(min(gauges, key=gauges.get))
        best.append(gauges[nearest[-1]])
    second = logits.topk(2).indices[:, 1].tolist()
    assert nearest != second
    share = threat.gauge(x, smallest(FAB(10, aims=4), model, x, labels, threat)) / torch.tensor(best)
    assert (share >= 1 - 1e-4).all()
    assert (share <= CLOSE).all()
    alone = threat.gauge(x, smallest(FAB(10, aims=1), model, x, labels, threat)) / torch.tensor(best)
    assert (alone > CLOSE).any()


@NORM
def test_fab_with_one_aim_goes_for_the_class_that_is_nearest_to_crossing(norm):
    model, x = Linear(SPECS, classes=5), {m: 0.05 * v for m, v in batch_of(SPECS, 8).items()}
    logits, threat = model(x).detach(), linear_threat(norm, ("audio", "visual"), MISTAKE)
    dual = sum(b.epsilon * model.weights[m].norm(p=DUAL[norm], dim=1) for m, b in threat.budgets.items())
    nearest = logits.abs().argmin(1)
    gauge = threat.gauge(x, smallest(FAB(6, aims=1), model, x, (logits >= 0).float(), threat))
    assert (gauge <= (logits.abs() / dual).gather(1, nearest[:, None])[:, 0] * CLOSE).all()


def least_gauge(norm, w, radii, x, low, high, wanted):
    """The smallest t for which some step of lengths at most t times the radii gains `wanted`: by a solver."""
    sizes = {m: len(v) for m, v in w.items()}
    order, n = list(w), sum(sizes.values())
    weights, here = np.concatenate([w[m] for m in order]), np.concatenate([x[m] for m in order])
    if norm == "l2":
        ends = np.cumsum([sizes[m] for m in order])
        pieces = list(zip(order, [0, *ends[:-1]], ends, strict=True))
        constraints = [{"type": "ineq", "fun": lambda v: weights @ v[:n] - wanted}] + [
            {"type": "ineq", "fun": lambda v, a=a, b=b, r=radii[m]: (r * v[n]) ** 2 - v[a:b] @ v[a:b]}
            for m, a, b in pieces
        ]
        bounds = [*zip(low - here, high - here, strict=True), (0, None)]
        start = np.r_[0.5 * np.where(weights > 0, high - here, low - here), 50.0]
        options = {"maxiter": 500, "ftol": 1e-12}
        return minimize(lambda v: v[n], start, bounds=bounds, constraints=constraints, options=options).fun
    rows, sides = [np.r_[-weights, weights, 0]], [-wanted]  # step = up - down, and t
    for m, start in zip(order, np.cumsum([0, *[sizes[m] for m in order]]), strict=False):
        blocks = [[i] for i in range(start, start + sizes[m])] if norm == "linf" else [range(start, start + sizes[m])]
        for block in blocks:
            row = np.zeros(2 * n + 1)
            row[list(block)], row[[n + i for i in block]], row[-1] = 1, 1, -radii[m]
            rows.append(row)
            sides.append(0)
    bounds = [(0, v) for v in high - here] + [(0, v) for v in here - low] + [(0, None)]
    return linprog(np.r_[np.zeros(2 * n), 1], A_ub=np.array(rows), b_ub=sides, bounds=bounds).fun


@pytest.mark.parametrize(
    ("attack", "close"), [(FAB(20), CLOSE), (FAB(20, aims=None), CLOSE), (FMN(), CLOSE)], ids=lambda v: repr(v)
)
@NORM
def test_finds_the_smallest_gauge_where_the_valid_range_binds(attack, close, norm):
    """Inputs close to the ends of their range: the first coordinates to move have no room. Against a solver."""
    specs = {"audio": InputSpec((6,), -1.0, 1.0, "amplitude"), "visual": InputSpec((2, 4), -1.0, 1.0, "pixel value")}
    model = Linear(specs)
    w = {m: model.weights[m].detach()[0] for m in specs}
    edge = {m: w[m].sign().reshape(specs[m].shape) * -1 for m in specs}  # uphill is back where there is no room
    x = {m: (-0.97 * edge[m] * torch.rand(5, *specs[m].shape) ** 0.1).clamp(-1, 1) for m in specs}
    x = {m: v * torch.where(torch.rand_like(v) < 0.3, -1.0, 1.0) for m, v in x.items()}
    threat = linear_threat(norm, ("audio", "visual"), Inject(chosen=(0,)), low=-1.0, high=1.0)
    logits = model(x)[:, 0].detach()
    full = sum((w[m].abs().sum() for m in specs), torch.tensor(0.0))
    bias = -(logits + 0.6 * (full - logits))  # 60 % of what the range allows must be gained
    shifted = Shifted(specs, bias)
    found = smallest(attack, shifted, x, torch.ones(5, 1), threat)
    assert reached(shifted, found, torch.ones(5, 1), threat).all()
    gauge = threat.gauge(x, found)
    unbound = 0.6 * (full - logits) / sum(b.epsilon * w[m].norm(p=DUAL[norm]) for m, b in threat.budgets.items())
    assert (gauge > 1.05 * unbound).all()
    for row in range(5):
        radii = {m: b.epsilon for m, b in threat.budgets.items()}
        flat = {m: x[m][row].flatten().double().numpy() for m in specs}
        wanted = -(logits + bias)[row].item()
        best = least_gauge(norm, {m: v.double().numpy() for m, v in w.items()}, radii, flat, -1.0, 1.0, wanted)
        assert 1 - 1e-4 <= gauge[row].item() / best <= close


class Shifted(Linear):
    """A bias of its own for each clip, which a test gives; clips do not mix."""

    def __init__(self, specs, bias):
        super().__init__(specs)
        self.bias = bias

    def classify(self, latent):
        return latent + self.bias[:, None]


# What holds for any model


@EVERY
@NORM
def test_the_member_of_a_suite_stays_in_budget_and_the_smallest_point_in_range(attack, norm, fusion):
    specs = tiny_specs()
    edges = {m: torch.where(v > v.median(), specs[m].high, specs[m].low) for m, v in batch_of(specs).items()}
    before = {m: v.clone() for m, v in edges.items()}
    threat = threat_of(norm)
    assert audit.violations(edges, run(attack, fusion, edges, LABELS, threat), threat, specs) == [""] * 6
    found = smallest(attack, fusion, edges, LABELS, threat)
    room = ThreatModel({m: Budget("linf", 5.0, low=s.low, high=s.high) for m, s in specs.items()})
    assert audit.violations(edges, found, room, specs) == [""] * 6
    assert all(torch.equal(edges[m], before[m]) for m in edges)


@EVERY
@NORM
def test_does_nothing_at_epsilon_zero(attack, norm, fusion, inputs):
    threat = threat_of(norm, epsilon=0.0)
    for found in (run(attack, fusion, inputs, LABELS, threat), smallest(attack, fusion, inputs, LABELS, threat)):
        assert all(torch.equal(found[m], inputs[m]) for m in inputs)


@EVERY
@NORM
def test_one_modality_without_a_budget_leaves_it_to_the_other(attack, norm, fusion, inputs):
    threat = ThreatModel({m: Budget(norm, e, low=tiny_specs()[m].low) for m, e in (("audio", 0.0), ("visual", 0.1))})
    both = smallest(attack, fusion, inputs, LABELS, threat)
    one = smallest(attack, fusion, inputs, LABELS, ThreatModel({"visual": threat.budgets["visual"]}))
    assert torch.equal(both["audio"], inputs["audio"])
    torch.testing.assert_close(both["visual"], one["visual"], rtol=0, atol=1e-6)


@EVERY
@NORM
def test_does_not_depend_on_batch_mates(attack, norm, fusion, inputs):
    whole = smallest(attack, fusion, inputs, LABELS, threat_of(norm))
    for i in (0, 1, 3):
        one = {m: v[i : i + 1] for m, v in inputs.items()}
        alone = smallest(attack, fusion, one, LABELS[i : i + 1], threat_of(norm), "abcdef"[i])
        for m in inputs:
            torch.testing.assert_close(alone[m][0], whole[m][i], rtol=0, atol=1e-6)


@EVERY
def test_leaves_the_global_generator_and_the_model_alone(attack, fusion, inputs):
    state = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    before = torch.get_rng_state()
    run(attack, fusion, inputs, LABELS, threat_of("linf"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fusion.state_dict().items())
    assert all(p.grad is None for p in fusion.parameters())


@EVERY
@NORM
def test_padding_is_never_written_to(attack, norm, fusion, inputs):
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    threat = threat_of(norm).given(writable=writable)
    found = smallest(attack, fusion, inputs, LABELS, threat)
    assert torch.equal(found["audio"][:, 40:], inputs["audio"][:, 40:])
    assert not torch.equal(found["audio"], inputs["audio"])
    adversarial = run(attack, fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs, writable) == [""] * 6


@NORM
def test_padding_counts_as_no_room(norm):
    """The optimum of a linear model, of which half may not be written to, is that of the other half."""
    model, x = Linear({"audio": SPECS["audio"]}), {"audio": 0.05 * batch_of(SPECS, 4)["audio"]}
    writable = torch.arange(16).expand(4, 16) < 8
    threat = linear_threat(norm, ("audio",), MISTAKE).given(writable={"audio": writable})
    labels = (model(x) >= 0).float()
    best = model(x)[:, 0].abs() / (0.02 * model.weights["audio"][0, :8].norm(p=DUAL[norm]))
    for attack in ALL:
        share = threat.gauge(x, smallest(attack, model, x, labels, threat)) / best
        assert (share - 1).abs().max() < CLOSE - 1


@EVERY
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 2, 3, 4)], ids=str)
def test_takes_any_rank(attack, shape):
    specs = {"audio": InputSpec(shape, -1.0, 1.0, "amplitude")}
    threat = ThreatModel({"audio": Budget("l2", 0.1)}, Untargeted(success="misclassified"))
    x = {"audio": torch.full((2, *shape), 0.1)}
    model = Linear(specs)
    labels = (model(x) >= 0).float()
    found = smallest(attack, model, x, labels, threat)
    assert found["audio"].shape == x["audio"].shape
    assert reached(model, found, labels, threat).all()


@EVERY
def test_a_clip_that_is_broken_already_costs_a_look_and_comes_back_as_it_was(attack, fusion, inputs):
    labels = torch.nn.functional.one_hot(fusion(inputs).argmin(1), 3).float()
    tally = Tally(6, ("audio", "visual"))
    found = smallest(attack, AttackView(fusion, ("audio", "visual"), {}, tally), inputs, labels, threat_of("linf"))
    assert all(torch.equal(found[m], inputs[m]) for m in inputs)
    assert (tally.forwards.tolist(), tally.backwards.tolist()) == ([1] * 6, [0] * 6)


@EVERY
def test_a_clip_that_cannot_be_broken_comes_back_as_it_was(attack, fusion, inputs):
    """Every class is a label, so every top-1 is a hit. The member of a suite still shows that it tried."""
    threat = threat_of("linf")
    found = smallest(attack, fusion, inputs, torch.ones(6, 3), threat)
    assert all(torch.equal(found[m], inputs[m]) for m in inputs)
    assert (threat.gauge(inputs, run(attack, fusion, inputs, torch.ones(6, 3), threat)) > 0.5).all()


@EVERY
def test_a_detached_model_counts_as_zero_gradients_not_as_robust(attack, inputs):
    class Detached(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x).detach()

    model = Detached(tiny_specs()).requires_grad_(False)
    tally = Tally(6, ("audio", "visual"))
    view = AttackView(model, ("audio", "visual"), {}, tally)
    labels = (model(inputs) >= 0).float()
    run(attack, view, inputs, labels, threat_of("linf", goal=MISTAKE))
    assert tally.zero_gradients().tolist() == [1.0] * 6


@EVERY
@pytest.mark.parametrize("high", [1.0, math.inf])
def test_a_crossing_out_of_reach_is_no_error(attack, high):
    """Almost flat: the boundary is estimated at 1e20 radii and more."""
    specs = {"audio": InputSpec((16,), -high, high, "amplitude")}
    model = Shifted(specs, torch.full((3,), -1.0)).requires_grad_(False)
    model.weights["audio"].mul_(1e-20)
    x = {"audio": torch.rand(3, 16)}
    threat = ThreatModel({"audio": Budget("l2", 0.1, low=-high, high=high)}, Inject(chosen=(0,)))
    found = smallest(attack, model, x, torch.ones(3, 1), threat, "abc")
    lost = ~reached(model, found, torch.ones(3, 1), threat)
    assert lost.all() or high == math.inf
    assert torch.equal(found["audio"][lost], x["audio"][lost])
    inside = run(attack, model, x, torch.ones(3, 1), threat, "abc")
    assert audit.violations(x, inside, threat, specs) == [""] * 3


@EVERY
@NORM
def test_only_the_ratio_of_the_radii_matters(attack, norm, fusion, inputs):
    found = smallest(attack, fusion, inputs, LABELS, threat_of(norm))
    again = smallest(attack, fusion, inputs, LABELS, threat_of(norm).scaled(8.0))
    for m in inputs:
        torch.testing.assert_close(again[m], found[m], rtol=0, atol=1e-4)


def test_a_budget_by_signal_to_noise_ratio_gives_each_clip_its_radius():
    specs = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude")}
    model, x = Linear(specs), {"audio": batch_of(specs, 4)["audio"] * torch.tensor([1.0, 0.5, 0.1, 0.01])[:, None]}
    labels = (model(x) >= 0).float()
    threat = ThreatModel({"audio": Budget("l2", snr_db=30.0, low=-9.0, high=9.0)}, MISTAKE)
    radius = x["audio"].norm(dim=1) / 10**1.5
    best = model(x)[:, 0].abs() / (radius * model.weights["audio"][0].norm())
    for attack in ALL:
        share = threat.gauge(x, smallest(attack, model, x, labels, threat)) / best
        assert (share - 1).abs().max() < CLOSE - 1


# One run is the whole curve


@pytest.mark.parametrize("attack", [FMN(30), FAB(8, aims=2)], ids=repr)
@NORM
@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_one_run_tells_what_pgd_tells_at_every_epsilon(attack, norm, label_kind):
    """Clip by clip: what PGD breaks at an epsilon has a smallest gauge of at most that epsilon.

    No tolerance: the nearest that it comes to failing is 0.3 %, in l1.
    """
    model, x = tiny_fusion(label_kind), batch_of(tiny_specs(), 12)
    names = [f"clip {i}" for i in range(12)]
    labels = model(x).argmax(1)
    labels = labels if label_kind == "multiclass" else torch.nn.functional.one_hot(labels, 3).float()
    threat = threat_of(norm, goal=Untargeted(label_kind, loss_name="margin" if label_kind == "multiclass" else "top1"))
    found = attack.smallest(model, x, labels, threat, draws=draws_for(0, names))
    gauge = threat.gauge(x, found)
    assert reached(model, found, labels, threat).all()
    for epsilon in gauge.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist():
        scaled = threat.scaled(epsilon)
        broken = reached(model, PGD(20)(model, x, labels, scaled, draws=draws_for(0, names)), labels, threat)
        assert (gauge[broken] <= epsilon).all()


@pytest.mark.parametrize("attack", [FMN(30), FAB(8, aims=2)], ids=repr)
@NORM
def test_under_a_budget_it_reaches_what_has_a_smaller_gauge(attack, norm, fusion, inputs):
    labels = torch.nn.functional.one_hot(fusion(inputs).argmax(1), 3).float()
    gauge = threat_of(norm).gauge(inputs, smallest(attack, fusion, inputs, labels, threat_of(norm)))
    threat = threat_of(norm).scaled(gauge.median().item() * 1.0001)
    inside = run(attack, fusion, inputs, labels, threat)
    verdict = reached(fusion, inside, labels, threat)
    assert torch.equal(verdict, gauge <= gauge.median() * 1.0001)
    assert verdict.any()
    assert not verdict.all()
    assert (threat.gauge(inputs, inside)[~verdict] > 0.99).all()


@pytest.mark.parametrize(("few", "many"), [(FMN(3), FMN(30)), (FAB(1, aims=None), FAB(15, aims=None))], ids=repr)
def test_more_steps_find_smaller_points(few, many, fusion, inputs):
    threat = threat_of("l1", goal=Inject(chosen=(0, 1, 2)))
    few, many = (smallest(attack, fusion, inputs, LABELS, threat) for attack in (few, many))
    found = reached(fusion, few, LABELS, threat)
    assert (reached(fusion, many, LABELS, threat) | ~found).all()
    assert reached(fusion, many, LABELS, threat).all()
    assert (threat.gauge(inputs, many) <= threat.gauge(inputs, few) * 1.001)[found].all()
    assert not found.all()


@pytest.mark.parametrize(("make", "settings"), [(FMN, {}), (FAB, {"aims": 2}), (FAB, {"aims": None})])
def test_stop_saves_passes_and_loses_no_success(make, settings, fusion, inputs):
    threat, tallies, verdicts = threat_of("linf", epsilon=0.3), [], []
    for stop in (False, True):
        tallies.append(Tally(6, ("audio", "visual")))
        view = AttackView(fusion, ("audio", "visual"), {}, tallies[-1])
        found = run(make(20, **settings, stop=stop), view, inputs, LABELS, threat)
        assert audit.violations(inputs, found, threat, fusion.specs) == [""] * 6
        verdicts.append(reached(fusion, found, LABELS, threat))
    assert torch.equal(*verdicts)
    broken = verdicts[0] & ~reached(fusion, inputs, LABELS, threat)
    assert broken.any()
    assert (tallies[1].backwards[broken] < tallies[0].backwards[broken]).all()
    assert torch.equal(tallies[1].backwards[~broken], tallies[0].backwards[~broken])


def test_costs_what_they_say(fusion, inputs):
    labels = torch.nn.functional.one_hot(fusion(inputs).argmax(1), 3).float()
    for attack, forwards, backwards in (
        (FMN(7), 7 + 1, 7),
        (FAB(7, aims=None), 2 * 7, 7),
        (FAB(7, aims=2), 1 + 2 * 2 * 7, 2 * 7),
    ):
        tally = Tally(6, ("audio", "visual"))
        smallest(attack, AttackView(fusion, ("audio", "visual"), {}, tally), inputs, labels, threat_of("linf"))
        assert tally.forwards.tolist() == [1 + forwards + 2 * LAST_PROJECTIONS + WAY_BACK] * 6
        assert tally.backwards.tolist() == [backwards + LAST_PROJECTIONS] * 6


@pytest.mark.parametrize(
    "goal",
    [Targeted("multiclass", target=2), Hide(chosen=(0, 1)), Inject(chosen=(0, 1, 2)), PushLatent(success="label-set")],
    ids=repr,
)
@pytest.mark.parametrize("attack", [FMN(20), FAB(25, aims=1), FAB(25, aims=None)], ids=repr)
def test_reaches_every_goal(attack, goal, inputs):
    model = tiny_fusion(goal.label_kind)
    labels = model(inputs).argmax(1) if goal.label_kind == "multiclass" else LABELS
    threat = threat_of("l2", goal=goal).given(clean=model.trace(inputs))
    found = smallest(attack, model, inputs, labels, threat)
    assert reached(model, found, labels, threat).all()
    nearer = {m: inputs[m] + 0.99 * (found[m] - inputs[m]) for m in inputs}
    clean = reached(model, inputs, labels, threat)
    assert not reached(model, nearer, labels, threat)[~clean].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FMN(steps=0), "`steps` must be at least 1, got 0"),
        (lambda: FMN(relative_step=0.0), "`relative_step` must be above 0, got 0.0"),
        (lambda: FMN(gamma=1.0), "`gamma` must lie between 0 and 1, got 1.0"),
        (lambda: FAB(steps=0), "`steps` must be at least 1, got 0"),
        (lambda: FAB(aims=0), "`aims` must be at least 1, or None to follow the nearest class, got 0"),
        (lambda: FAB(largest_pull=1.5), r"`largest_pull` must lie in \[0, 1\], got 1.5"),
        (lambda: FAB(overshoot=0.9), "`overshoot` must be at least 1, got 0.9"),
        (lambda: FAB(backward=1.0), "`backward` must lie between 0 and 1, got 1.0"),
    ],
)
def test_settings_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@EVERY
def test_is_an_attack_that_says_what_it_does(attack):
    assert isinstance(attack, Attack)
    assert attack.roams
    assert attack.survivors
    assert repr(attack).startswith(type(attack).__name__ + "(")
