"""APGD, its losses and its aimed variant: closed forms, scales that must not matter, and schedules worked out by hand."""

import math

import pytest
import torch
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from test_attacks import EPSILON, LABELS, run, threat_of

from robustav import audit
from robustav.attacks import FGSM, PGD
from robustav.attacks.aimed import Aimed
from robustav.attacks.apgd import APGD, Ascent, State, checks, gains
from robustav.attacks.ascent import Point, look
from robustav.classifier import Classifier, InputSpec
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.losses import LOSSES, aimed_margin, dlr, hinges, margin, ml_dlr, ranking_margin, targeted_dlr, top1_dlr
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
KINDS = pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
QUICK = [
    APGD(steps=8),
    APGD(steps=8, random_start=False),
    APGD(steps=8, loss="top1-dlr", stop=True),
    APGD(steps=4, loss="ml-dlr"),
    APGD(steps=4, loss="hinges"),
    Aimed(APGD(steps=5, stop=True), 2),
    Aimed(APGD(steps=5), 9),
]
EVERY = pytest.mark.parametrize("attack", QUICK, ids=repr)

LOGITS = torch.tensor([[2.0, -1, 0, 1], [-3, -2, -1, 4]])
HOT = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]])
DEGENERATE = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]])


# Losses


def test_dlr_by_hand():
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(dlr(LOGITS, labels), torch.tensor([(1 - 2) / (2 - 0), (4 + 2) / (4 + 2)]))
    towards = targeted_dlr(LOGITS, labels, torch.tensor([2, 3]))
    torch.testing.assert_close(towards, torch.tensor([(0 - 2) / (2 + 0.5), (4 + 2) / (4 + 2.5)]))


def test_multilabel_margins_by_hand():
    # The second clip has two labels: its scale reaches to the fourth score.
    torch.testing.assert_close(ml_dlr(LOGITS, HOT), torch.tensor([(1 - 2) / (2 - 0), (4 + 2) / (4 + 3)]))
    torch.testing.assert_close(top1_dlr(LOGITS, HOT), torch.tensor([(1 - 2) / (2 - 0), (4 + 1) / (4 + 3)]))
    aimed = aimed_margin(LOGITS, HOT, torch.tensor([1, 0]))
    torch.testing.assert_close(aimed, torch.tensor([(-1 - 2) / (2 - (0 - 1) / 2), (-3 + 1) / (4 + 3)]))


def test_margins_without_and_with_only_labels():
    """No labels: the best score. All: minus the worst, or the best, over the spread of all scores."""
    torch.testing.assert_close(ml_dlr(LOGITS, DEGENERATE), torch.tensor([2 / (2 - 1), 3 / (4 + 3)]))
    torch.testing.assert_close(top1_dlr(LOGITS, DEGENERATE), torch.tensor([2 / (2 - 1), -4 / (4 + 3)]))
    aimed = aimed_margin(LOGITS, DEGENERATE, torch.tensor([3, 0]))
    torch.testing.assert_close(aimed, torch.tensor([1 / (2 - (1 + 0) / 2), -4 / (4 + 3)]))
    assert hinges(LOGITS, DEGENERATE).tolist() == [-(0 + 2 + 1 + 0), -(0 + 0 + 0 + 5)]


def test_an_aim_of_any_rank_has_a_gradient():
    """Over the spread to one rank, the margin of the class that has it would be minus one, whatever its score."""
    logits, hot = torch.tensor([[5.0, 3, 2, 1, 0, -1]] * 5), torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 5)
    for labels in (hot, torch.tensor([[1.0, 1, 1, 1, 0, 0]] * 5)):
        leaf = logits.clone().requires_grad_()
        aimed_margin(leaf, labels, torch.tensor([1, 2, 3, 4, 5]))[labels[0, 1:] == 0].sum().backward()
        wrong = [i for i in range(5) if labels[0, i + 1] == 0]
        assert (leaf.grad[wrong].abs().amax(1) > 0.05).all()


def test_dlr_of_few_classes_is_the_plain_margin():
    """With two classes the ratio would be 1 or -1, and its gradient nothing."""
    labels, hot = torch.tensor([0, 1]), torch.tensor([[1.0, 0], [0, 1]])
    two = LOGITS[:, :2]
    torch.testing.assert_close(dlr(two, labels), margin(two, labels))
    torch.testing.assert_close(ml_dlr(two, hot), ranking_margin(two, hot))
    torch.testing.assert_close(top1_dlr(two, hot), ranking_margin(two, hot))
    three = LOGITS[:, :3]
    torch.testing.assert_close(targeted_dlr(three, labels, torch.tensor([2, 2])), torch.tensor([-2.0, 1.0]))
    assert not torch.allclose(dlr(three, labels), margin(three, labels))


def test_hinges_are_summed_over_all_pairs():
    """The second route holds every pair in memory."""
    logits, labels = 3 * torch.randn(40, 7), (torch.rand(40, 7) < 0.4).float()
    labels = labels[(both := labels.any(1) & ~labels.all(1))]
    logits = logits[both].requires_grad_()
    pairs = (1 + logits[:, :, None] - logits[:, None, :]).clamp(min=0)
    by_pairs = -(pairs * labels[:, :, None] * (1 - labels[:, None, :])).sum((1, 2))
    torch.testing.assert_close(hinges(logits, labels), by_pairs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (hinges(logits, labels), by_pairs))
    torch.testing.assert_close(ours, theirs)


def test_hinges_pull_on_a_model_that_is_sure_and_let_go_when_all_is_wrong():
    sure, wrong = torch.tensor([[80.0, -40, -50, -60]]), torch.tensor([[-9.0, 4, 5, 6]])
    for logits, pull in ((sure, [-3.0, 1, 1, 1]), (wrong, [0.0, 0, 0, 0])):
        logits.requires_grad_()
        assert torch.autograd.grad(hinges(logits, HOT[:1]).sum(), logits)[0].flatten().tolist() == pull


def test_hinges_of_many_classes_need_no_room_for_their_pairs():
    """2000 clips of 527 classes have 2.2 GB of pairs in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 527, generator=generator)
    labels = (torch.rand(2000, 527, generator=generator) < 0.01).float()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        hinges(logits.requires_grad_(), labels)
    assert sum(kept) < 20 * logits.nbytes


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_ratios_of_logits_do_not_care_about_their_unit(scale):
    torch.manual_seed(1)
    logits, labels, hot = torch.randn(30, 6), torch.randint(6, (30,)), (torch.rand(30, 6) < 0.4).float()
    aim = torch.randint(6, (30,))
    torch.testing.assert_close(dlr(scale * logits, labels), dlr(logits, labels))
    torch.testing.assert_close(targeted_dlr(scale * logits, labels, aim), targeted_dlr(logits, labels, aim))
    torch.testing.assert_close(ml_dlr(scale * logits, hot), ml_dlr(logits, hot))
    torch.testing.assert_close(top1_dlr(scale * logits, hot), top1_dlr(logits, hot))
    torch.testing.assert_close(aimed_margin(scale * logits, hot, aim), aimed_margin(logits, hot, aim))


def test_the_signs_of_dlr_are_those_of_the_verdict():
    torch.manual_seed(2)
    logits, labels, hot = torch.randn(200, 5), torch.randint(5, (200,)), (torch.rand(200, 5) < 0.4).float()
    assert torch.equal(dlr(logits, labels) > 0, logits.argmax(1) != labels)
    some = hot.any(1) & ~hot.all(1)
    lost = ~hot[some].gather(1, logits[some].argmax(1, keepdim=True)).squeeze(1).bool()
    assert torch.equal(top1_dlr(logits[some], hot[some]) > 0, lost)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["tied", "spread", "huge"])
def test_gradients_are_finite_everywhere(classes, kind):
    logits = {
        "tied": torch.ones(4, classes),
        "spread": torch.arange(4.0 * classes).reshape(4, classes),
        "huge": torch.ones(4, classes).index_fill(1, torch.tensor([0]), 1e5),
    }[kind].requires_grad_()
    hot = torch.zeros(4, classes)
    hot[1, 0], hot[2], hot[3, 1:] = 1, 1, 1
    labels, aim = torch.zeros(4, dtype=torch.long), torch.full((4,), classes - 1)
    values = [loss.value(logits, hot if loss.label_kind == "multilabel" else labels) for loss in LOSSES.values()]
    for value in [*values, targeted_dlr(logits, labels, aim), aimed_margin(logits, hot, aim)]:
        assert value.shape == (4,)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), logits, retain_graph=True)[0].isfinite().all()


# The schedule


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 33, 100, 1000])
def test_checks_come_sooner_and_sooner(steps):
    found = checks(steps)
    assert list(found) == sorted(set(found))
    assert list(torch.tensor(list(found.values())).cumsum(0)) == list(found)
    published = [0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99]
    assert list(found) == sorted({math.ceil(round(share * steps, 6)) for share in published})


def ascent(loss, **gradients):
    """A point at 0, of four clips."""
    inputs = {m: torch.zeros(4, 1) for m in gradients}
    return Ascent(Point(inputs, torch.tensor(loss), torch.zeros(4, dtype=torch.bool)), gradients)


def test_steps_are_halved_where_they_gain_too_seldom_or_the_best_stands_still():
    one = torch.ones(4, 1)
    state = State.begin(ascent([0.0, 0, 0, 0], audio=one))
    for loss in ([1.0, 1, -1, -2], [2.0, 0, -2, -1], [3.0, 2, -3, 0], [4.0, 3, -4, -1]):
        state = state.after(ascent(loss, audio=one))
    assert state.paces["audio"].gains.tolist() == [4, 3, 0, 2]
    state = state.checked(4)  # 3 of 4 is too seldom; the third clip never beat its start
    assert state.paces["audio"].size.tolist() == [2, 1, 1, 1]
    assert state.here.point.loss.tolist() == [4, 3, 0, 0]  # those start again from their best
    assert state.paces["audio"].gains.tolist() == [0, 0, 0, 0]
    for loss in ([3.0, 2, 0, 1], [4.0, 2.5, 0, 2], [4.0, 3, 0, 3], [4.0, 2, 0, 4]):
        state = state.after(ascent(loss, audio=one))
    state = state._replace(paces={"audio": state.paces["audio"]._replace(gains=torch.full((4,), 4.0))})
    state = state.checked(4)  # the first stood still at one length; the next two too, but were halved the last time
    assert state.paces["audio"].size.tolist() == [1, 1, 1, 1]
    assert state.paces["audio"].halved.tolist() == [True, False, False, False]


def test_gains_are_told_apart_by_modality():
    """The loss is `a + v^2`: of two steps by (-1, 2) only the visual part gains, though the whole does."""
    before, now = torch.zeros(4, 1), torch.tensor([[1.0], [-1], [2], [0]])
    visual = torch.tensor([[0.0], [2], [-1], [1]])
    here = Ascent(Point({"audio": before, "visual": before}, torch.zeros(4), torch.zeros(4).bool()), {})
    here = here._replace(gradients={"audio": torch.ones(4, 1), "visual": torch.zeros(4, 1)})
    loss = (now + visual.square()).flatten()
    there = Ascent(Point({"audio": now, "visual": visual}, loss, torch.zeros(4).bool()), {})
    there = there._replace(gradients={"audio": torch.ones(4, 1), "visual": 2 * visual})
    found = gains(here, there)
    assert found["audio"].tolist() == [True, False, True, False]
    assert found["visual"].tolist() == [False, True, True, True]
    alone = gains(
        here._replace(gradients={"audio": torch.ones(4, 1)}), there._replace(gradients={"audio": torch.ones(4, 1)})
    )
    assert alone["audio"].tolist() == (loss > 0).tolist()


class Uneven(Classifier):
    """One logit: the audio climbs a slope on which every step gains; the visual on a peak that large ones miss."""

    label_kind = "multilabel"

    def __init__(self, slope, peak):
        super().__init__()
        self.specs = {"audio": InputSpec((3,), -9.0, 9.0, "amplitude"), "visual": InputSpec((4,), -9.0, 9.0, "pixel")}
        self.classes, self.slope, self.peak = ("one",), slope, peak

    def encode(self, modality, x):
        return x

    def fuse(self, features):
        return torch.cat([self.audio(features["audio"])[:, None], self.visual(features["visual"])[:, None]], 1)

    def audio(self, x):
        """Rises ever more slowly away from the origin along a curved path."""
        return self.slope * (x[:, 0] - (x[:, 1] - x[:, 0].square()).square() - (x[:, 2] - x[:, 1] ** 3).square())

    def visual(self, x):
        return -self.peak * (x - torch.tensor([0.31, -0.17, 0.23, 0.05])).square().sum(1)

    def classify(self, latent):
        return latent.sum(1, keepdim=True)


@pytest.mark.parametrize(("slope", "peak"), [(1.0, 1e-4), (1e-4, 1.0)])
def test_one_modality_does_not_hold_back_the_other(slope, peak):
    """However little one of them counts, each ends where it ends alone."""
    model = Uneven(slope, peak)
    clean = {"audio": torch.zeros(1, 3), "visual": torch.zeros(1, 4)}
    budgets = {m: Budget("linf", 0.5, low=-9.0, high=9.0) for m in clean}

    def ends(*attacked):
        threat = ThreatModel({m: budgets[m] for m in attacked}, Inject(chosen=(0,)))
        given = {m: clean[m] for m in attacked}
        view = AttackView(model, attacked, {m: clean[m] for m in clean if m not in attacked}, Tally(1, attacked))
        found = run(APGD(50, random_start=False), view, given, torch.zeros(1, 1), threat, "a")
        return {m: getattr(model, m)(found[m]).item() for m in attacked}

    both = ends("audio", "visual")
    for m, size in (("audio", slope), ("visual", peak)):
        assert both[m] >= ends(m)[m] - 0.002 * size


# APGD


@NORMS
@KINDS
@pytest.mark.parametrize("attacked", [("audio",), ("audio", "visual")], ids="+".join)
def test_finds_the_best_attack_on_a_linear_model(norm, label_kind, attacked):
    """Hoelder: a difference of logits moves by at most epsilon times the dual norm of the difference of weights."""
    specs = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude"), "visual": InputSpec((3, 8), -9.0, 9.0, "pixel value")}
    multiclass = label_kind == "multiclass"
    model = Linear(specs, 2 if multiclass else 1)
    model.label_kind = label_kind
    x = batch_of(specs, 4)
    labels = torch.zeros(4, dtype=torch.long) if multiclass else torch.ones(4, 1)
    budgets = {m: Budget(norm, {"audio": 0.02, "visual": 0.05}[m], low=-9.0, high=9.0) for m in attacked}
    view = AttackView(model, attacked, {m: model.encode(m, x[m]) for m in x if m not in attacked}, Tally(4, attacked))
    threat = ThreatModel(budgets, Untargeted(label_kind))
    given = {m: x[m] for m in attacked}
    found = run(APGD(), view, given, labels, threat)
    dual = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]

    def score(logits):
        return logits[:, 0] - logits[:, 1] if multiclass else logits[:, 0]

    weights = {m: w[0] - w[1] if multiclass else w[0] for m, w in model.weights.items()}
    best = sum(budgets[m].epsilon * weights[m].norm(p=dual).item() for m in attacked)
    dropped = score(view(given)) - score(view(found))
    assert (dropped <= best * 1.0001).all()
    assert (dropped >= best * 0.999).all()


@NORMS
def test_the_last_step_counts(norm, linear, inputs):
    """One step of two radii from the clean point ends where a step of one does: it is scored, and returned."""
    found = run(APGD(1, random_start=False), linear, inputs, torch.ones(6, 1), threat_of(norm))
    full = run(FGSM(), linear, inputs, torch.ones(6, 1), threat_of(norm))
    for m, x in full.items():
        torch.testing.assert_close(found[m], x, rtol=0, atol=1e-5)


@KINDS
@NORMS
def test_climbs_higher_than_pgd_on_average(label_kind, norm, inputs):
    model, goal = tiny_fusion(label_kind), Untargeted(label_kind)
    labels = LABELS.argmax(1) if label_kind == "multiclass" else LABELS
    threat = threat_of(norm, goal=goal, epsilon={"linf": 0.1, "l2": 0.6, "l1": 3.0}[norm])
    ours, theirs = (
        look(model, run(attack, model, inputs, labels, threat), labels, threat) for attack in (APGD(40), PGD(40))
    )
    assert ours.loss.mean() >= theirs.loss.mean() * (1 - 1e-5)
    assert (ours.reached | ~theirs.reached).all()


@KINDS
@pytest.mark.parametrize("aimed", [False, True])
def test_logits_times_ten_thousand_hide_nothing_from_dlr(label_kind, aimed, inputs):
    """Cross-entropy and BCE are flat where a model is that sure; a ratio of logits decides as before."""
    plain, shouting = tiny_fusion(label_kind), tiny_fusion(label_kind)
    with torch.no_grad():
        for parameter in shouting.head.parameters():
            parameter.mul_(1e4)
    labels = plain(inputs).argmax(1)
    labels = labels if label_kind == "multiclass" else torch.nn.functional.one_hot(labels, 3).float()
    threat = threat_of("linf", goal=Untargeted(label_kind), epsilon=0.2)
    loss = "dlr" if label_kind == "multiclass" else "top1-dlr"
    attack = Aimed(APGD(20), 2) if aimed else APGD(20, loss=loss)

    def share(attack, model):
        return look(model, run(attack, model, inputs, labels, threat), labels, threat).reached

    assert share(attack, plain).any()
    assert torch.equal(share(attack, plain), share(attack, shouting))
    assert share(APGD(20), shouting).sum() < share(attack, shouting).sum()


@KINDS
@NORMS
@pytest.mark.parametrize("stop", [False, True])
def test_leaving_broken_clips_alone_breaks_the_same(label_kind, norm, stop, inputs):
    model = tiny_fusion(label_kind)
    labels = model(inputs).argmax(1)
    labels = labels if label_kind == "multiclass" else torch.nn.functional.one_hot(labels, 3).float()
    epsilon = {"linf": 0.05, "l2": 0.3, "l1": 1.5}[norm] * torch.tensor([0.0, 0.5, 1, 1, 2, 4])
    threat = threat_of(norm, goal=Untargeted(label_kind), epsilon=epsilon)
    attack = APGD(20, stop=stop)
    tally = Tally(6, ("audio", "visual"))
    view = AttackView(model, ("audio", "visual"), {}, tally)
    found = run(attack, view, inputs, labels, threat)
    assert audit.violations(inputs, found, threat, model.specs) == [""] * 6
    reached = look(model, found, labels, threat).reached
    assert 0 < reached.sum() < 6
    assert torch.equal(reached, tally.ever_reached.bool())
    full = look(model, run(APGD(20), model, inputs, labels, threat), labels, threat)
    assert torch.equal(full.reached, reached)
    cost = tally.forwards
    assert (cost[~reached] == 21).all()
    assert (tally.backwards[~reached] == 20).all()
    assert (cost[reached] < 21).any() if stop else (cost == 21).all()
    if stop:  # the first success, on the same way
        assert (look(model, found, labels, threat).loss <= full.loss + 1e-6).all()


def test_returns_a_point_that_reaches_the_goal_before_a_higher_one(inputs):
    """The declared rule is the label set, which margins of the top class do not know of."""
    model = tiny_fusion()
    goal = Untargeted(success="label-set")
    threat = threat_of("linf", goal=goal, epsilon=0.1).given(clean=model.trace(inputs))
    tally = Tally(6, ("audio", "visual"))
    view = AttackView(model, ("audio", "visual"), {}, tally)
    found = run(APGD(20, loss="top1-dlr"), view, inputs, LABELS, threat)
    assert torch.equal(look(model, found, LABELS, threat).reached, tally.ever_reached.bool())


def test_more_steps_of_a_converged_climb_lose_nothing(fusion, inputs):
    """Schedules of different lengths are different climbs: only their ends can be compared, and not to the last digit."""
    loss = [
        look(fusion, run(APGD(n), fusion, inputs, LABELS, threat_of("l2")), LABELS, threat_of("l2")).loss
        for n in (10, 100)
    ]
    assert (loss[1] >= loss[0] * (1 - 1e-4)).all()


@pytest.mark.parametrize("goal", [Inject(chosen=(1,)), Hide(chosen=(0, 1)), PushLatent(), Untargeted()], ids=repr)
def test_climbs_every_goal(goal, fusion, inputs):
    threat = threat_of("linf", goal=goal).given(clean=fusion.trace(inputs))
    found = look(fusion, run(APGD(20), fusion, inputs, LABELS, threat), LABELS, threat)
    assert (found.loss > look(fusion, inputs, LABELS, threat).loss + 1e-4).all()


# Aimed


class Tent(Classifier):
    """Three classes over one input: untargeted ascent runs up the near slope, which ends; success is the other way."""

    label_kind = "multiclass"

    def __init__(self):
        super().__init__()
        self.specs = {"audio": InputSpec((1,), -1.0, 1.0, "amplitude")}
        self.classes = ("here", "near", "far", "nowhere")

    def encode(self, modality, x):
        return x

    def fuse(self, features):
        x = features["audio"]
        return torch.cat([torch.ones_like(x), 0.9 - (x - 0.3).abs(), -4 * x - 1.9, x - 5], 1)

    def classify(self, latent):
        return latent


def test_tries_another_class_where_the_best_one_leads_nowhere():
    model, x, labels = Tent(), {"audio": torch.full((2, 1), 0.1)}, torch.zeros(2, dtype=torch.long)
    threat = ThreatModel({"audio": Budget("linf", 0.9)}, Untargeted("multiclass"))
    stuck = APGD(20, loss="dlr", random_start=False)
    assert not look(model, run(stuck, model, x, labels, threat), labels, threat).reached.any()
    for aims, reached in ((1, False), (2, True), (9, True)):
        attack = Aimed(APGD(20, random_start=False), aims)
        found = look(model, run(attack, model, x, labels, threat), labels, threat)
        assert found.reached.tolist() == [reached] * 2
    assert (run(Aimed(APGD(20), 9), model, x, labels, threat)["audio"] < 0).all()


def test_only_unbroken_clips_are_aimed_elsewhere_and_each_as_often_as_it_has_wrong_classes(inputs):
    """Three classes: a clip with one label has two aims, with two labels one, with three an only try."""
    model, x = tiny_fusion(), {m: x[:4] for m, x in inputs.items()}
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    tiny = threat_of("linf", goal=Untargeted(success="top1"), epsilon=1e-6)
    tally = Tally(4, ("audio", "visual"))
    scores = model(x)
    labels[0] = torch.nn.functional.one_hot(scores[0].argmax(), 3)
    labels[1] = 1 - torch.nn.functional.one_hot(scores[1].argmin(), 3)
    found = run(Aimed(APGD(5), 9), AttackView(model, ("audio", "visual"), {}, tally), x, labels, tiny)
    tries = torch.tensor([2, 1, 1, 1])  # the last clip has lost its top-1 hit from the beginning: once is enough
    assert tally.forwards.tolist() == (1 + 7 * tries).tolist()
    assert tally.backwards.tolist() == (5 * tries).tolist()
    assert audit.violations(x, found, tiny, model.specs) == [""] * 4


def test_more_aims_never_lose_a_success(inputs):
    for label_kind in ("multilabel", "multiclass"):
        model = tiny_fusion(label_kind)
        labels = model(inputs).argmax(1)
        labels = labels if label_kind == "multiclass" else torch.nn.functional.one_hot(labels, 3).float()
        threat = threat_of("l2", goal=Untargeted(label_kind), epsilon=0.25)
        one, two = (look(model, run(Aimed(APGD(8), n), model, inputs, labels, threat), labels, threat) for n in (1, 2))
        assert (two.reached | ~one.reached).all()
        assert (two.loss >= one.loss - 1e-6)[one.reached == two.reached].all()


# What must hold for every attack


@EVERY
@NORMS
def test_stays_in_budget_and_in_its_own_box(attack, norm, fusion, inputs):
    specs = tiny_specs()
    edges = {
        m: torch.where(x > x.median(), s.high, s.low) for (m, x), s in zip(inputs.items(), specs.values(), strict=True)
    }
    for clean in (inputs, edges):
        before = {m: x.clone() for m, x in clean.items()}
        found = run(attack, fusion, clean, LABELS, threat_of(norm))
        assert audit.violations(clean, found, threat_of(norm), fusion.specs) == [""] * 6
        assert all(torch.equal(clean[m], before[m]) for m in clean)
        assert (threat_of(norm).gauge(clean, found) > 0.05).all()


@EVERY
@NORMS
def test_does_nothing_at_epsilon_zero(attack, norm, fusion, inputs):
    found = run(attack, fusion, inputs, LABELS, threat_of(norm, epsilon=0.0))
    assert all(torch.equal(found[m], inputs[m]) for m in inputs)


@EVERY
def test_does_not_depend_on_batch_mates_or_the_global_generator(attack, fusion, inputs):
    """In float64: where a climb has come to its end, rounding decides which of many equal points is the best."""
    before, fusion = torch.get_rng_state(), fusion.double()
    inputs = {m: x.double() for m, x in inputs.items()}
    for norm in EPSILON:
        whole = run(attack, fusion, inputs, LABELS, threat_of(norm))
        for i in (0, 3):
            alone = {m: x[i : i + 1] for m, x in inputs.items()}
            one = run(attack, fusion, alone, LABELS[i : i + 1], threat_of(norm), "abcdef"[i])
            for m in inputs:
                torch.testing.assert_close(one[m][0], whole[m][i], rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


@EVERY
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)], ids=str)
def test_takes_any_rank_and_a_single_class(attack, shape):
    specs = {"audio": InputSpec(shape, -1.0, 1.0, "amplitude")}
    x = {"audio": torch.zeros(2, *shape)}
    found = run(attack, Linear(specs), x, torch.ones(2, 1), ThreatModel({"audio": Budget("linf", 0.1)}))
    assert found["audio"].shape == x["audio"].shape


def test_padding_is_never_written_to(fusion, inputs):
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    for attack in QUICK:
        threat = threat_of("l2").given(writable=writable)
        found = run(attack, fusion, inputs, LABELS, threat)
        assert audit.violations(inputs, found, threat, fusion.specs, writable) == [""] * 6
        assert not torch.equal(found["audio"], inputs["audio"])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_costs_what_it_says(steps, fusion, inputs):
    tally = Tally(6, ("audio", "visual"))
    run(APGD(steps), AttackView(fusion, ("audio", "visual"), {}, tally), inputs, LABELS, threat_of("linf"))
    assert (tally.forwards.tolist(), tally.backwards.tolist()) == ([steps + 1] * 6, [steps] * 6)
    assert tally.zero_gradients().tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APGD(steps=0), "`steps` must be at least 1, got 0"),
        (lambda: APGD(momentum=0.0), "`momentum` must be above 0 and at most 1, got 0.0"),
        (lambda: APGD(loss="hinge"), r"`loss` must be one of \['bce'.*, got 'hinge'"),
        (lambda: Aimed(aims=0), "`aims` must be at least 1, got 0"),
        (lambda: Aimed(APGD(loss="dlr")), "`attack` is given its loss by the aim, got loss='dlr'"),
    ],
)
def test_settings_are_checked_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("label_kind", "loss", "fitting"), [("multilabel", "dlr", "ml-dlr"), ("multiclass", "ml-dlr", "dlr")]
)
def test_a_loss_for_the_other_kind_of_labels_is_an_error_that_names_those_that_fit(label_kind, loss, fitting, inputs):
    threat = threat_of("linf", goal=Untargeted(label_kind))
    with pytest.raises(ValueError, match=rf"one of \[.*'{fitting}'.*\] for {label_kind} labels, got '{loss}'"):
        run(APGD(loss=loss), tiny_fusion(label_kind), inputs, LABELS, threat)


@pytest.mark.parametrize("goal", [Hide(chosen=(0,)), Inject(chosen=(0,)), Targeted(), PushLatent()], ids=repr)
def test_aims_are_for_an_untargeted_goal(goal, fusion, inputs):
    with pytest.raises(ValueError, match=rf"must be Untargeted .*, got {type(goal).__name__}: use APGD"):
        run(Aimed(), fusion, inputs, LABELS, threat_of("linf", goal=goal))


def test_the_defaults_are_the_published_ones():
    assert repr(APGD()) == "APGD(steps=100, loss='', momentum=0.75, random_start=True, stop=False)"
    assert (Aimed().aims, Aimed().attack.steps, Aimed.survivors) == (9, 100, True)
