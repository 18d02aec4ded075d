"""The attack that solves: its linear problems against a solver of the whole, its verdicts against PGD, its rules."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from scipy.optimize import linprog
from test_attacks import LABELS, run, threat_of

from robustav import audit
from robustav.attacks import PGD
from robustav.attacks.ascent import Pursuit, look
from robustav.attacks.flips import FLIPS, flips
from robustav.attacks.mla_lp import MLALP, most_slack
from robustav.classifier import InputSpec, Trace
from robustav.goals import (
    Around,
    CorpusAP,
    Goal,
    Hide,
    Inject,
    PushLatent,
    Stealth,
    Steered,
    Targeted,
    TopK,
    Untargeted,
)
from robustav.losses import bce, top1_margin
from robustav.randomness import draws_for
from robustav.ranking import top_k_margin
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
MODES = pytest.mark.parametrize("attacked", [("audio",), ("audio", "visual")], ids="+".join)
GOALS = [
    Untargeted(),
    Untargeted(success="label-set"),
    Untargeted(success="misclassified"),
    Untargeted("multiclass"),
    Untargeted("multiclass", success="label-set"),
    PushLatent(),
    CorpusAP(threshold=0.3, success="misclassified"),
    Targeted(target=1),
    Hide(chosen=(0, 2), threshold=0.7),
    Hide(chosen="labels"),
    Inject(chosen=(1, 2), threshold=0.3),
    Stealth(chosen=(0, 1)),
    Stealth(chosen="labels"),
    TopK(k=2),
    TopK("multiclass", k=2),
    Steered(goal=TopK(k=1)),
]
EVERY_GOAL = pytest.mark.parametrize("goal", GOALS, ids=lambda goal: repr(goal).partition(", value=")[0])


@EVERY_GOAL
@pytest.mark.parametrize("rivals", [1, 3])
def test_the_slack_is_positive_exactly_where_the_goal_is_reached(goal, rivals):
    generator = torch.Generator().manual_seed(0)
    logits, clean = (torch.randn(200, 5, generator=generator) for _ in range(2))
    clean = torch.where(torch.rand(200, 5, generator=generator) < 0.8, logits, clean)
    labels = (torch.rand(200, 5, generator=generator) < 0.4).float()
    labels = labels[(some := labels.any(1) & ((1 - labels).sum(1) >= 2))]
    logits, clean = logits[some], clean[some]
    if goal.label_kind == "multiclass":
        labels = labels.argmax(1)
    goal = goal.given(Trace({}, clean, clean))
    reached = goal.reached(Trace({}, logits, logits), labels)
    found = flips(goal, logits, labels, rivals, 5)
    slack = [one.slack(scores) for one, scores in zip(found, logits.double().numpy(), strict=True)]
    assert torch.equal(torch.tensor(slack) > 0, reached)
    assert 0 < reached.float().mean() < 1


def test_the_slack_is_the_margin_that_others_climb_whatever_the_labels():
    """A second route, and clips without labels, with all classes for labels, and with too few rivals for the top k."""
    logits, labels = torch.randn(64, 4), torch.tensor([[i >> c & 1 for c in range(4)] for i in range(16)] * 4).float()
    for goal, margin in ((Untargeted(), top1_margin(logits, labels)), (TopK(k=3), top_k_margin(logits, labels, 3))):
        found = flips(goal, logits, labels, 2, 5)
        slack = [one.slack(scores) for one, scores in zip(found, logits.double().numpy(), strict=True)]
        torch.testing.assert_close(torch.tensor(slack), margin, rtol=1e-5, atol=1e-5)


def whole_problem(level, slopes, low, high, radius, norm):
    """The largest least row of `level + slopes @ delta`, all coordinates as variables of one linear programme."""
    rows, size = slopes.shape
    objective = np.append(np.zeros(2 * size), -1.0)  # delta = up - down
    above = np.hstack([-slopes, slopes, np.ones((rows, 1))])
    bounds = [(0, b) for b in high] + [(0, -a) for a in low] + [(None, None)]
    limits, rights = [above], [level]
    for part, bound in radius:
        if norm == "l1":
            limits.append(np.concatenate([part, part, [0.0]])[None])
            rights.append([bound])
        else:
            bounds[:-1] = [
                (0, min(limit[1], bound)) if inside else limit
                for limit, inside in zip(bounds[:-1], np.tile(part, 2), strict=True)
            ]
    solved = linprog(objective, A_ub=np.vstack(limits), b_ub=np.concatenate(rights), bounds=bounds, method="highs")
    assert solved.success
    return -solved.fun


@pytest.mark.parametrize("norm", ["linf", "l1"])
@MODES
@pytest.mark.parametrize("edge", [False, True], ids=["free", "at the edge"])
@pytest.mark.parametrize(
    "goal", [Untargeted(), Hide(chosen=(0, 1, 2)), TopK(k=2), Targeted(target=3)], ids=lambda goal: type(goal).__name__
)
def test_reaches_the_optimum_of_the_whole_linear_programme(norm, attacked, edge, goal):
    specs = {"audio": InputSpec((12,), -1.0, 1.0, "amplitude"), "visual": InputSpec((2, 4), 0.0, 1.0, "pixel value")}
    model, x = Linear(specs, classes=5), batch_of(specs, 3)
    if edge:
        x = {m: torch.where(v > v.median(), specs[m].high, v) for m, v in x.items()}
    radii = {"linf": {"audio": 0.3, "visual": 0.2}, "l1": {"audio": 1.5, "visual": 0.9}}[norm]
    threat = ThreatModel({m: Budget(norm, radii[m], low=specs[m].low, high=specs[m].high) for m in attacked}, goal)
    labels = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0]])
    names = sorted(attacked)
    clean, logits = torch.cat([x[m].flatten(1) for m in names], 1).double().numpy(), model(x)
    weights = torch.cat([model.weights[m] for m in names], 1).detach().double().numpy()
    low = np.concatenate([np.full(x[m][0].numel(), specs[m].low) for m in names])
    high = np.concatenate([np.full(x[m][0].numel(), specs[m].high) for m in names])
    parts = [(np.concatenate([np.full(x[n][0].numel(), float(n == m)) for n in names]), radii[m]) for m in names]
    adversarial = run(MLALP(steps=1), model, x, labels, threat)
    assert audit.violations(x, adversarial, threat, specs) == [""] * 3
    for i, flip in enumerate(flips(goal, logits, labels, 9, 9)):
        scores = logits[i].detach().double().numpy()
        best = max(
            whole_problem(
                way.weights @ scores[flip.classes] + way.offset,
                way.weights @ weights[flip.classes],
                low - clean[i],
                high - clean[i],
                parts,
                norm,
            )
            for way in flip.ways
        )
        gained = flip.slack(model(adversarial)[i].detach().double().numpy())
        assert best - 2e-3 <= gained <= best + 1e-4
        assert gained > flip.slack(scores) + 0.1


def test_reaches_the_optimum_of_two_rows_in_l2():
    """A second route: the smallest upper bound `weights @ level + radius * ||weights @ slopes||` over a fine grid."""
    specs = {"audio": InputSpec((20,), -99.0, 99.0, "amplitude")}
    model, x = Linear(specs, classes=2), batch_of(specs, 4)
    threat = ThreatModel({"audio": Budget("l2", 0.7, low=-99.0, high=99.0)}, Hide(chosen=(0, 1)))
    logits, slopes = model(x).detach(), model.weights["audio"].detach()
    share = torch.linspace(0, 1, 1001)[:, None]
    mixed = torch.cat([share, 1 - share], dim=1)
    best = (-mixed @ logits.T + 0.7 * (mixed @ slopes).norm(dim=1)[:, None]).amin(0)
    adversarial = run(MLALP(steps=1), model, x, torch.ones(4, 2), threat)
    torch.testing.assert_close((-model(adversarial)).amin(1).detach(), best, rtol=0, atol=2e-3)


def test_nothing_is_spent_on_what_cannot_be_written():
    specs = {"audio": InputSpec((20,), -99.0, 99.0, "amplitude")}
    model, x = Linear(specs), batch_of(specs, 2)
    writable = (torch.arange(20) < 7).expand(2, 20)
    threat = ThreatModel({"audio": Budget("l2", 0.7, low=-99.0, high=99.0)}).given(writable={"audio": writable})
    adversarial = run(MLALP(steps=1), model, x, torch.ones(2, 1), threat)
    best = 0.7 * model.weights["audio"][0, :7].norm()
    torch.testing.assert_close((model(x) - model(adversarial))[:, 0], best.expand(2), rtol=1e-3, atol=0)


@NORMS
def test_a_linear_model_has_one_solution_from_wherever_it_is_linearised(norm):
    model, x, attack = Linear(tiny_specs(), classes=3), batch_of(tiny_specs(), 3), MLALP()
    threat = threat_of(norm, goal=Hide(chosen=(0, 1, 2)))
    here = Pursuit(model, x, torch.ones(3, 3), threat, draws_for(0, "abc"))
    elsewhere = threat.project(x, {m: v + 0.01 * torch.randn_like(v) for m, v in x.items()})
    found = [model(attack._solve(here, attack._linearise(here, start))).amax(1) for start in (x, elsewhere)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3)
    assert (found[0] < model(x).amax(1) - 0.1).all()


def test_mixtures_beat_every_single_vertex():
    """Two rows that pull apart: each vertex gains for one what it loses for the other, and half of each is best."""
    gains = {0: np.array([1.0, -1.0]), 1: np.array([-1.0, 1.0])}

    def oracle(weights):
        row = int(weights.argmax())
        return {"audio": torch.tensor([[1.0 - 2 * row]])}, gains[row]

    value, mixed = most_slack(np.zeros(2), oracle, 10)
    assert value == pytest.approx(0)
    assert mixed["audio"].item() == pytest.approx(0)
    value, mixed = most_slack(np.array([0.0, 1.0]), oracle, 10)
    assert value == pytest.approx(0.5)
    assert mixed["audio"].item() == pytest.approx(0.5)
    assert most_slack(np.zeros(2), oracle, 10, floor=0.5) is None
    value, _ = most_slack(np.zeros(2), oracle, 1)
    assert value == -1, "cut short, it still is a point"


def pointed(label_kind="multilabel"):
    """The tiny fusion with steeper scores, so that linear steps overshoot."""
    model = tiny_fusion(label_kind)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


@pytest.mark.parametrize(
    ("goal", "epsilon"),
    [
        (Untargeted(), 0.04),
        (Untargeted(loss_name="top1"), 0.04),
        (Untargeted(success="label-set"), 0.02),
        (Untargeted(success="misclassified"), 0.02),
        (TopK(k=2), 0.1),
        (Hide(chosen="labels"), 0.1),
        (Stealth(chosen="labels"), 0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_succeeds_at_least_as_often_as_pgd_20(goal, epsilon, norm):
    model, x = pointed(), batch_of(tiny_specs(), 8)
    clean = model.trace(x)
    labels = torch.nn.functional.one_hot(clean.logits.argmax(1), 3).float()
    threat = threat_of(norm, goal=goal, epsilon=epsilon * (8 if norm == "l2" else 1)).given(clean=clean)
    names = "abcdefgh"
    ours = look(model, run(MLALP(steps=3), model, x, labels, threat, names), labels, threat).reached
    theirs = look(model, run(PGD(20), model, x, labels, threat, names), labels, threat).reached
    assert ours.sum() >= theirs.sum()
    assert ours.any()


@NORMS
@MODES
def test_stays_in_budget_and_leaves_the_rest_alone(norm, attacked, fusion, inputs):
    threat, before = threat_of(norm, attacked), {m: x.clone() for m, x in inputs.items()}
    adversarial = run(MLALP(steps=2), fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs) == [""] * 6
    for m in inputs:
        assert torch.equal(inputs[m], before[m])
        assert torch.equal(adversarial[m], inputs[m]) == (m not in attacked)


@NORMS
def test_keeps_to_the_box_and_to_what_is_writable(norm, fusion):
    specs = tiny_specs()
    edges = {m: torch.where(x > x.median(), specs[m].high, specs[m].low) for m, x in batch_of(specs).items()}
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    threat = threat_of(norm).given(writable=writable)
    adversarial = run(MLALP(steps=2), fusion, edges, LABELS, threat)
    assert audit.violations(edges, adversarial, threat, specs, writable) == [""] * 6
    assert (threat.gauge(edges, adversarial) > 0.05).all()


@NORMS
def test_does_nothing_at_epsilon_zero_and_nothing_to_the_model(norm, fusion, inputs):
    state = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    before = torch.get_rng_state()
    adversarial = run(MLALP(steps=2), fusion, inputs, LABELS, threat_of(norm, epsilon=0.0))
    assert all(torch.equal(adversarial[m], inputs[m]) for m in inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fusion.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in fusion.parameters())


@NORMS
@pytest.mark.parametrize("stop", [False, True])
def test_does_not_depend_on_batch_mates(norm, stop, fusion, inputs):
    attack = MLALP(steps=2, stop=stop)
    whole = run(attack, fusion, inputs, LABELS, threat_of(norm))
    for i in (0, 3):
        one = {m: x[i : i + 1] for m, x in inputs.items()}
        alone = run(attack, fusion, one, LABELS[i : i + 1], threat_of(norm), "abcdef"[i])
        for m in inputs:
            torch.testing.assert_close(alone[m][0], whole[m][i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 2, 3, 4)], ids=str)
def test_takes_any_rank_and_a_radius_for_each_clip(shape):
    specs = {"audio": InputSpec(shape, -1.0, 1.0, "amplitude")}
    radius = torch.tensor([0.1, 0.3])
    x, threat = {"audio": torch.zeros(2, *shape)}, ThreatModel({"audio": Budget("linf", radius)})
    adversarial = run(MLALP(steps=1), Linear(specs), x, torch.ones(2, 1), threat)["audio"]
    torch.testing.assert_close(adversarial.flatten(1).abs().amax(1), radius, rtol=1e-4, atol=0)


def test_each_clip_pays_for_the_scores_that_decide_for_it(fusion, inputs):
    tally = Tally(6, ("audio", "visual"))
    view = AttackView(fusion.requires_grad_(False), ("audio", "visual"), {}, tally)
    run(MLALP(steps=2, rivals=1), view, inputs, LABELS, threat_of("linf"))
    assert tally.forwards.tolist() == [1 + 2 * 4] * 6
    assert tally.backwards.tolist() == [2 * n for n in (2, 2, 2, 3, 1, 3)]  # labels, and a rival where there is one
    assert (tally.zero_gradients() <= 0).all()


def test_more_steps_never_lose_a_success():
    model, x = pointed(), batch_of(tiny_specs(), 8)
    labels = torch.nn.functional.one_hot(model(x).argmax(1), 3).float()
    threat = threat_of("linf", epsilon=0.03)
    reached = torch.zeros(8, dtype=torch.bool)
    for steps in (1, 2, 4):
        now = look(model, run(MLALP(steps), model, x, labels, threat, "abcdefgh"), labels, threat).reached
        assert (now | ~reached).all()
        reached = now


def test_stopping_leaves_a_clip_alone_from_its_first_success_on():
    model, x = pointed(), batch_of(tiny_specs(), 8)
    labels = torch.nn.functional.one_hot(model(x).argmax(1), 3).float()
    labels[:2] = labels[:2].roll(1, dims=1)  # lost before anything is attacked
    threat, tally = threat_of("linf", epsilon=0.05), Tally(8, ("audio", "visual"))
    view = AttackView(model.requires_grad_(False), ("audio", "visual"), {}, tally)
    stopped = run(MLALP(steps=3, stop=True), view, x, labels, threat, "abcdefgh")
    whole = run(MLALP(steps=3), model, x, labels, threat, "abcdefgh")
    here, there = (look(model, found, labels, threat).reached for found in (stopped, whole))
    assert torch.equal(here, there) and here[2:].any()
    assert all(torch.equal(stopped[m][:2], x[m][:2]) for m in x)
    assert tally.forwards[:2].tolist() == [1, 1]
    assert (tally.forwards[~here] == 1 + 3 * 4).all()
    assert audit.violations(x, stopped, threat, model.specs) == [""] * 8


def test_a_detached_model_counts_as_zero_gradients(inputs):
    class Detached(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x).detach()

    tally = Tally(6, ("audio", "visual"))
    view = AttackView(Detached(tiny_specs()).requires_grad_(False), ("audio", "visual"), {}, tally)
    found = run(MLALP(steps=1), view, inputs, torch.ones(6, 1), threat_of("linf"))
    assert tally.zero_gradients().tolist() == [1.0] * 6
    assert all(torch.equal(found[m], inputs[m]) for m in inputs)


def test_a_gradient_that_is_not_finite_is_an_error(inputs):
    class Root(Linear):
        def front_end(self, modality, raw):
            return raw.abs().sqrt()

    x = {"audio": inputs["audio"].clone()}
    x["audio"][2, 5] = 0
    model = Root({"audio": tiny_specs()["audio"]})
    with pytest.raises(FloatingPointError, match="gradient by 'audio' is not finite for 1 samples"):
        run(MLALP(steps=1), model, x, torch.ones(6, 1), ThreatModel({"audio": Budget("linf", 0.1)}))


def test_many_labels_are_refused_and_the_rivals_make_room(fusion, inputs):
    with pytest.raises(ValueError, match=r"`rows` must be at least 3, the number of scores that decide .* got 2"):
        run(MLALP(rows=2, rivals=1), fusion, inputs, LABELS, threat_of("linf"))
    some = {m: x[:3] for m, x in inputs.items()}
    run(MLALP(steps=1, rows=2, rivals=9), fusion, some, LABELS[:3], threat_of("linf"))


def test_goals_that_are_no_inequalities_are_refused(fusion, inputs):
    @dataclass(frozen=True)
    class Whim(Untargeted):
        pass

    with pytest.raises(ValueError, match="goal Whim is no set of linear inequalities"):
        run(MLALP(), fusion, inputs, LABELS, threat_of("linf", goal=Whim()))
    for goal in (Untargeted(success="label-set"), Stealth(chosen=(0,))):
        with pytest.raises(ValueError, match="compares with the clean prediction"):
            run(MLALP(), fusion, inputs, LABELS, threat_of("linf", goal=goal))


def test_every_goal_there_is_has_its_inequalities():
    def kinds(base):
        return {base, *(kind for child in base.__subclasses__() for kind in kinds(child))}

    ours = {kind for kind in kinds(Goal) if kind.__module__ == "robustav.goals"} - {
        Goal,
        Around,
    }  # the two that have no loss of their own
    assert ours == set(FLIPS)


def test_a_clip_of_which_nothing_is_asked_is_left_alone(fusion, inputs):
    threat, tally = threat_of("linf", goal=Hide(chosen="labels")), Tally(6, ("audio", "visual"))
    view = AttackView(fusion.requires_grad_(False), ("audio", "visual"), {}, tally)
    adversarial = run(MLALP(steps=1), view, inputs, LABELS, threat)
    assert [bool((adversarial["audio"][i] == inputs["audio"][i]).all()) for i in range(6)] == [False] * 4 + [
        True,
        False,
    ]
    assert tally.forwards.tolist() == [5, 5, 5, 5, 1, 5]


def test_steering_changes_nothing(fusion, inputs):
    threat = threat_of("linf")
    steered = run(MLALP(steps=1), fusion, inputs, LABELS, threat.steered(bce))
    for m, x in run(MLALP(steps=1), fusion, inputs, LABELS, threat).items():
        assert torch.equal(steered[m], x)


@pytest.mark.parametrize("name", ["steps", "rivals", "rows", "cuts"])
def test_settings_are_checked_when_made(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        MLALP(**{name: 0})
    assert MLALP.survivors and repr(MLALP()).startswith("MLALP(steps=10")
