"""Published multi-modal defences: what each paper's parts must do, and the attacks that they declare."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import CLASSES, Linear, TinySamples, batch_of, tiny_fusion, tiny_specs
from torch import nn
from training_tools import batch, budgets, tiny_work

from robustav.attacks import APGD, PGD, Restarts
from robustav.audio import LogMel
from robustav.classifier import LateFusion, missing_adaptive, waveform
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.models.small import FramePairs, late
from robustav.plan import conditions
from robustav.randomness import draws_for
from robustav.report import build
from robustav.suites import with_settings
from robustav.threat import Budget, ThreatModel
from robustav.training.defences import METHODS, Defended
from robustav.training.defences.adaptive import Detour
from robustav.training.defences.crmt import (
    CRMT,
    SLOPES,
    EachMargin,
    MarginFusion,
    bound,
    estimated_slopes,
    margin_losses,
    orthonormal,
    radius,
    slopes_of_classes,
    slopes_of_encoders,
)
from robustav.training.defences.curriculum import AVCurriculum, SharedFrames, owners, pooled
from robustav.training.defences.dissimilarity import Aligned, DissimilarFusion, Dissimilarity, similarity
from robustav.training.defences.jacobian import (
    AroundTheSolve,
    JacobianFusion,
    RegularisedFusion,
    correction,
    damping,
)
from robustav.training.defences.lipschitz import convolution_norm, lipschitz_bounds, upper_bound
from robustav.training.defences.odd_one_out import GatedFusion, OddOneOut, ThroughTheGate

KINDS = pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
SHORT = {
    "dissimilarity": Dissimilarity(),
    "odd-one-out": OddOneOut(steps=2),
    "crmt": CRMT(second=0.5, probe=5),
    "jacobian-fusion": JacobianFusion(),
    "av-curriculum": AVCurriculum(steps=3),
}
EVERY = pytest.mark.parametrize("name", SHORT)


def wrapped(method, label_kind="multilabel"):
    torch.manual_seed(1)
    return method.wrapped(tiny_fusion(label_kind))


def trained(method, label_kind="multilabel", epochs=2, **changes):
    """A training of four steps an epoch, as the loop goes about it."""
    work = tiny_work(wrapped(method, label_kind), epochs=epochs, **changes)
    method.check(work.model)
    method.begin(work)
    losses = []
    for work.epoch in range(epochs):
        method.begin_epoch(work)
        for rows in torch.arange(24).split(6):
            losses.append(method.train_step(work, batch(work, *rows.tolist())))
    return work, losses


def test_the_table_holds_every_defence():
    assert list(METHODS) == list(SHORT)
    assert all(type(SHORT[name]) is made for name, made in METHODS.items())


@KINDS
@EVERY
def test_a_training_is_finite_repeatable_and_moves_every_weight_that_is_not_frozen(name, label_kind):
    (work, losses), (again, same) = (trained(SHORT[name], label_kind) for _ in range(2))
    before = wrapped(SHORT[name], label_kind).state_dict()
    assert all(loss.isfinite() for loss in losses)
    assert torch.equal(torch.stack(losses), torch.stack(same))
    assert all(torch.equal(x, again.model.state_dict()[key]) for key, x in work.model.state_dict().items())
    for key, parameter in work.model.named_parameters():
        if not (key.startswith("model.encoders") and key.endswith(".1.bias")):  # a batch norm takes it out again
            assert parameter.requires_grad != torch.equal(parameter, before[key]), key


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [
        ("dissimilarity", 48, 48),
        ("odd-one-out", 48 * (2 * 3 + 1), 48 * (2 * 3 + 1)),
        ("crmt", 48 + 5, 48 + 5 * len(CLASSES)),
        ("jacobian-fusion", 48, 48),
        ("av-curriculum", 24 * (1 + 1) + 24 * (3 + 1), 24 * (1 + 1) + 24 * (3 + 1)),
    ],
)
def test_every_pass_is_counted(name, forwards, backwards):
    work, _ = trained(SHORT[name])
    assert (work.cost.forwards, work.cost.backwards) == (forwards, backwards)


@EVERY
def test_weights_of_a_training_fit_the_model_that_is_wrapped_anew_and_scores_are_each_clips_own(name):
    work, _ = trained(SHORT[name])
    model = wrapped(SHORT[name])
    model.load_state_dict(work.model.state_dict())
    inputs = batch_of(tiny_specs(), 5)
    scores = model.eval()(inputs)
    torch.testing.assert_close(scores, work.model.eval()(inputs), rtol=1e-5, atol=1e-5)
    alone = torch.cat([model({m: x[i : i + 1] for m, x in inputs.items()}) for i in range(5)])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_defence_without_its_own_attack_has_no_robust_score(name):
    model = wrapped(SHORT[name])
    assert isinstance(model, Defended)
    (own,) = model.adaptive_attacks()
    assert missing_adaptive(model, ["pgd", own]) == ""
    assert f"was not attacked by {own}, which knows it" in missing_adaptive(model, ["pgd"])
    model.adaptive_attacks = dict
    assert "declares no attack that knows it: return one from `adaptive_attacks" in missing_adaptive(model, ["pgd"])
    assert missing_adaptive(tiny_fusion(), ["pgd"]) == ""


@KINDS
@EVERY
def test_adaptive_attacks_run_through_an_evaluation_and_stay_in_budget(name, label_kind, tmp_path):
    work, _ = trained(SHORT[name], label_kind)
    goal, model = Untargeted(label_kind), work.model
    attacks = {key: with_settings(attack, steps=3) for key, attack in model.adaptive_attacks().items()}
    attacks = {
        key: replace(attack, times=2) if isinstance(attack, Restarts) else attack for key, attack in attacks.items()
    }
    score = "mAP" if label_kind == "multilabel" else "hits"
    rows = conditions({"pgd": PGD(3), **attacks}, [budgets(model, 0.3)], goal, None, score)
    ledger = evaluate(model, TinySamples(8, label_kind), rows, goal, tmp_path, settings=Settings(probed=0))
    report = build([ledger])
    assert not report.failed
    table = report.table.set_index(["condition", "attacked"])
    for attacked in ("audio", "visual", "audio+visual"):
        (own,) = attacks
        assert 0 < table.loc[(own, attacked), "gauge"] <= 1


@EVERY
def test_adaptive_attacks_leave_other_modalities_alone_and_stop_at_a_success(name):
    model = wrapped(SHORT[name], "multiclass").eval().requires_grad_(False)
    inputs, labels = batch_of(tiny_specs(), 4), torch.tensor([0, 1, 2, 0])
    threat = ThreatModel({"audio": Budget("l2", 0.4)}, Untargeted("multiclass"))
    (attack,) = (with_settings(one, steps=4, stop=True) for one in model.adaptive_attacks().values())
    given = {m: x.clone() for m, x in inputs.items()}
    found = attack(model, given, labels, threat, draws=draws_for(0, "abcd"))
    assert torch.equal(found["visual"], inputs["visual"])
    assert torch.equal(given["audio"], inputs["audio"])
    assert (threat.gauge(inputs, found) <= 1).all()
    longer = with_settings(attack, stop=False)(model, given, labels, threat, draws=draws_for(0, "abcd"))
    clean, stopped, climbed = (model.trace(x) for x in (inputs, found, longer))
    assert (threat.goal.loss(climbed, labels) > threat.goal.loss(clean, labels)).all()
    assert torch.equal(threat.goal.reached(stopped, labels), threat.goal.reached(climbed, labels))
    if name != "av-curriculum":
        alone = attack.attack(model, given, labels, threat, draws=draws_for(0, "abcd"))
        assert (threat.goal.reached(climbed, labels) >= threat.goal.reached(model.trace(alone), labels)).all()
    assert threat.goal.reached(stopped, labels).any()


class Watcher:
    """An attack that returns what it was given, and remembers how many clips that were."""

    def __init__(self, stop):
        self.stop, self.sizes = stop, []

    def __call__(self, model, inputs, labels, threat, *, draws):
        self.sizes.append(len(labels))
        return inputs


@pytest.mark.parametrize(("stop", "sizes"), [(True, [3, 2, 2]), (False, [3, 3, 3])])
def test_a_clip_that_is_broken_is_tried_again_only_without_stop(stop, sizes):
    model, inputs = wrapped(Dissimilarity(), "multiclass").eval(), batch_of(tiny_specs(), 3)
    labels = model(inputs).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    watcher = Watcher(stop)
    threat = ThreatModel(budgets(model), Untargeted("multiclass"))
    Aligned(watcher)(model, inputs, labels, threat, draws=draws_for(0, "abc"))
    assert watcher.sizes == sizes


def test_an_adaptive_attack_chooses_its_own_loss():
    with pytest.raises(ValueError, match="`attack` is given its loss by the defence, got loss='bce': leave it out"):
        Aligned(APGD(loss="bce"))


def test_a_detour_is_climbed_and_the_goal_is_judged():
    goal = Untargeted("multiclass")
    detour = Detour("multiclass", goal=goal, way=lambda trace, labels, goal: trace.latent.sum(1))
    model, inputs, labels = tiny_fusion("multiclass"), batch_of(tiny_specs(), 3), torch.tensor([0, 1, 2])
    trace = model.trace(inputs)
    assert torch.equal(detour.loss(trace, labels), trace.latent.sum(1))
    assert torch.equal(detour.reached(trace, labels), goal.reached(trace, labels))
    assert detour.words(CLASSES) == goal.words(CLASSES)
    assert detour.given(trace).at(torch.tensor([1])).goal.clean.logits.shape == (1, 3)


@pytest.mark.parametrize("name", [name for name in SHORT if name != "av-curriculum"])
def test_what_a_model_lacks_is_said(name):
    one = LateFusion({"audio": nn.Linear(64, 4)}, nn.Linear(4, 3), specs={"audio": waveform(0.004)}, classes=CLASSES)
    with pytest.raises(ValueError, match=f"{name} compares modalities, and `model` reads only audio: choose one that"):
        SHORT[name].check(one)
    mapped = {"audio": nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 2, 8)), "visual": nn.Flatten()}
    maps = LateFusion(mapped, nn.Linear(2 * 57 + 96, 3), specs=tiny_specs(), classes=CLASSES)
    with pytest.raises(
        ValueError, match=rf"{name} needs one feature vector .* audio features of shape \[batch, 2, 57\]"
    ):
        SHORT[name].wrapped(maps)
    with pytest.raises(ValueError, match=f"`model` must be what `wrapped` of {name} returns, a .*, got LateFusion"):
        SHORT[name].begin(tiny_work())


def test_wrapping_leaves_the_mode_and_freezes_only_what_is_no_longer_read():
    model = tiny_fusion().train()
    MarginFusion(model)
    assert model.training and model.encoders["audio"][2].training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"head.weight", "head.bias"}


# Dissimilarity


def test_similarity_is_the_mean_cosine_of_all_pairs():
    a, b, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 5.0]]), torch.tensor([[0.0, -2.0]])
    assert similarity([a, b]).item() == pytest.approx(math.sqrt(0.5))
    assert similarity([a, b, c]).item() == pytest.approx((math.sqrt(0.5) + 0 - math.sqrt(0.5)) / 3, abs=1e-7)


def test_features_are_compared_at_one_length_and_an_equal_one_is_left_as_it_is():
    model = wrapped(Dissimilarity())
    assert isinstance(model.maps["audio"], nn.Linear) and isinstance(model.maps["visual"], nn.Identity)
    features = model.eval().features(batch_of(tiny_specs(), 2))
    assert features["audio"].shape == features["visual"].shape == (2, 20)


def test_the_weight_adds_the_cosine_and_training_lowers_it():
    methods = [Dissimilarity(0.0), Dissimilarity(20.0)]
    works = [tiny_work(wrapped(method)) for method in methods]
    for work in works:
        work.model.eval()
    plain, more = (method.losses(work, batch(work)) for method, work in zip(methods, works, strict=True))
    features = works[0].model.features(batch(works[0]).inputs)
    torch.testing.assert_close(more - plain, 20 * similarity([features["audio"], features["visual"]]))
    ends = []
    for method in methods:
        work, _ = trained(method, epochs=3)
        features = work.model.eval().features(batch_of(tiny_specs(), 12))
        ends.append(similarity([features["audio"], features["visual"]]).mean())
    assert ends[1] < ends[0] / 2
    with pytest.raises(ValueError, match="`weight` must be at or above 0, got -1"):
        Dissimilarity(-1)


def test_aligned_pulls_together_what_training_pushed_apart():
    model = wrapped(Dissimilarity()).eval().requires_grad_(False)
    inputs, labels = batch_of(tiny_specs(), 4), torch.zeros(4, 3)
    threat = ThreatModel(budgets(model, 0.3))
    found = []
    for way in Aligned(weights=(0.0, 1000.0)).ways(model, threat):
        there = replace(threat, goal=Detour(goal=threat.goal, way=way))
        latent = model.trace(APGD(10)(model, inputs, labels, there, draws=draws_for(0, "abcd"))).latent
        found.append(similarity(latent.chunk(2, dim=1)))
    assert (found[1] > found[0]).all()


# Odd one out


def test_the_gate_chooses_the_expert_and_each_expert_ignores_its_modality():
    model = wrapped(OddOneOut()).eval()
    inputs = {m: x.requires_grad_() for m, x in batch_of(tiny_specs(), 3).items()}
    latent = model.trace(inputs).latent
    experts = model.experts(latent)
    torch.testing.assert_close(experts[:, 2], model.model(inputs))
    for odd in range(3):
        gate = torch.full((3, 3), -100.0).index_fill(1, torch.tensor(odd), 100.0)
        scores = model.classify(torch.cat([latent[:, :-3], gate], dim=1))
        torch.testing.assert_close(scores, experts[:, odd])
    for odd, modality in enumerate(model.modalities):
        read = torch.autograd.grad(experts[:, odd].sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
        by_modality = dict(zip(inputs, read, strict=True))
        assert by_modality[modality] is None or not by_modality[modality].any()
        other = next(m for m in inputs if m != modality)
        assert by_modality[other].any()
    torch.testing.assert_close(model.classify(latent), (model.odd(latent).softmax(1)[:, :, None] * experts).sum(1))


def test_the_gate_learns_which_modality_was_planted():
    method = OddOneOut(steps=1, weight=3.0)
    work, _ = trained(method, epochs=20, budgets=budgets(tiny_fusion(), 0.5))
    work.model.eval()
    first = batch(work, *range(12))
    versions = [method._perturbed(work, first, m) for m in ("audio", "visual")] + [first.inputs]
    told = torch.stack([work.model.odd(work.model.trace(x).latent).argmax(1) for x in versions])
    right = (told == torch.arange(3)[:, None]).float().mean(1)
    assert (right > 0.7).all()
    for m, x in versions[0].items():
        assert torch.equal(x, first.inputs[m]) == (m != "audio")


def detector():
    """Scores that either half of the audio can flip, and a gate that sounds the alarm at the first half alone.

    Two classes; the second half counts a little less than the first. Once the alarm is sounded the audio is not read.
    """
    halves = torch.eye(2).repeat_interleave(32, dim=1) / 32
    audio = nn.Linear(64, 2, bias=False)
    audio.weight = nn.Parameter(halves)
    visual = nn.Sequential(nn.Flatten(), nn.Linear(96, 1))
    visual[1].weight, visual[1].bias = nn.Parameter(torch.zeros(1, 96)), nn.Parameter(torch.ones(1))
    top = nn.Linear(3, 2)
    top.weight = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0], [10.0, 8.0, -1.0]]))
    top.bias = nn.Parameter(torch.zeros(2))
    base = LateFusion(
        {"audio": audio, "visual": visual}, top, specs=tiny_specs(), classes=("no", "yes"), label_kind="multiclass"
    )
    model = GatedFusion(base, 2)
    with torch.no_grad():
        for parameter in [*model.gate.parameters(), *model.without.parameters()]:
            parameter.zero_()
        model.without["audio"][1].bias.copy_(torch.tensor([5.0, 0.0]))  # without the audio the answer is "no"
        model.without["visual"][1].bias.copy_(torch.tensor([5.0, 0.0]))
        model.gate[0].weight[0, 0], model.gate[0].weight[1, 0] = 1.0, -1.0
        model.gate[2].weight[0, 0] = 16000.0
        model.gate[2].bias.copy_(torch.tensor([0.0, -880.0, 880.0]))
    return model.eval().requires_grad_(False)


def test_through_the_gate_finds_what_an_ascent_on_the_scores_does_not():
    model = detector()
    inputs = {"audio": torch.zeros(4, 64), "visual": torch.zeros(4, 2, 3, 4, 4)}
    labels = torch.zeros(4, dtype=torch.long)
    threat = ThreatModel({"audio": Budget("linf", 0.2)}, Untargeted("multiclass"))
    draws = lambda: draws_for(0, "abcd")  # noqa: E731
    plain = PGD(40, random_start=False)(model, inputs, labels, threat, draws=draws())
    ours = ThroughTheGate(PGD(40, random_start=False))(model, inputs, labels, threat, draws=draws())
    assert not threat.goal.reached(model.trace(plain), labels).any()
    assert threat.goal.reached(model.trace(ours), labels).all()
    assert (threat.gauge(inputs, ours) <= 1).all()


def test_the_attack_leads_the_gate_to_experts_that_read_what_is_attacked():
    model, attack = detector(), ThroughTheGate()

    def experts(*attacked):
        threat = ThreatModel({m: Budget(epsilon=0.1) for m in attacked})
        return [way.args[1] for way in attack.ways(model, threat)]

    # 0 leaves out the audio, 1 the visual part, 2 nothing.
    assert (experts("audio"), experts("visual"), experts("audio", "visual")) == ([2, 1], [2, 0], [2, 0, 1])


def test_odd_one_out_needs_a_budget_for_every_modality():
    method = OddOneOut()
    with pytest.raises(ValueError, match=r"`eps` must cover every modality for odd-one-out, .* got none for visual"):
        method.check_budgets(tiny_fusion(), {"audio": Budget(epsilon=0.1)})
    with pytest.raises(ValueError, match="`hidden` must be above 0, got 0"):
        OddOneOut(hidden=0)


# CRMT


def linear_margins(label_kind="multiclass", isometric=False, seed=0):
    """Margin fusion of linear encoders: the distance to the boundary is known."""
    generator = torch.Generator().manual_seed(seed)
    encoders = {}
    for m, size in (("audio", 64), ("visual", 96)):
        weight = torch.randn(7, size, generator=generator, dtype=torch.float64)
        encoders[m] = nn.Sequential(nn.Flatten(), nn.Linear(size, 7))
        encoders[m][1].weight = nn.Parameter(2.5 * orthonormal(weight) if isometric else weight)
        encoders[m][1].bias = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
    head = nn.Linear(14, 3, dtype=torch.float64)
    model = MarginFusion(
        LateFusion(encoders, head, specs=tiny_specs(), classes=CLASSES, label_kind=label_kind).double()
    ).double()
    with torch.no_grad():
        for weight in model.weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        model.scales.copy_(torch.randn(2, 3, generator=generator, dtype=torch.float64))  # of either sign
        model.bias.copy_(torch.randn(3, generator=generator, dtype=torch.float64))
    return model.eval().requires_grad_(False)


def true_distance(model, inputs, targets):
    """Of a linear model, with the shortest perturbation: margin over the length of its gradient."""
    leaves = {m: x.detach().requires_grad_() for m, x in inputs.items()}
    logits = model(leaves)
    label = targets.argmax(1, keepdim=True)
    best, step = torch.full((len(targets),), math.inf, dtype=torch.float64), {}
    for rival in range(3):
        if model.label_kind == "multiclass":
            gap = (logits.gather(1, label) - logits[:, rival : rival + 1]).squeeze(1)
            possible = label.squeeze(1) != rival
        else:
            gap, possible = (2 * targets[:, rival] - 1) * logits[:, rival], torch.ones(len(targets), dtype=torch.bool)
        slopes = torch.autograd.grad(gap.sum(), list(leaves.values()), retain_graph=True)
        flat = torch.cat([slope.flatten(1) for slope in slopes], dim=1)
        distance = (gap / flat.norm(dim=1)).masked_fill(~possible, math.inf).detach()
        closer = distance < best
        best = torch.where(closer, distance, best)
        for m, slope in zip(leaves, slopes, strict=True):
            move = -slope / flat.norm(dim=1).reshape(-1, *[1] * (slope.ndim - 1))
            step[m] = torch.where(closer.reshape(-1, *[1] * (slope.ndim - 1)), move, step.get(m, move))
    return best, step


def double_batch(count=20):
    return {m: x.double() for m, x in batch_of(tiny_specs(), count).items()}


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_never_exceeds_the_distance_and_meets_it_where_encoders_are_isometric(label_kind, seed):
    inputs = double_batch()
    for isometric in (False, True):
        model = linear_margins(label_kind, isometric, seed)
        scores = model(inputs)
        likely = (
            torch.nn.functional.one_hot(scores.argmax(1), 3) if label_kind == "multiclass" else (scores > 0).long()
        ).double()
        constants = lipschitz_bounds(model.model)
        found, (distance, _) = bound(model, inputs, likely, constants), true_distance(model, inputs, likely)
        assert (found > 0).all()
        assert (found <= distance * (1 + 1e-9)).all()
        if isometric:
            assert constants == pytest.approx({"audio": 2.5, "visual": 2.5})
            torch.testing.assert_close(found, distance)
        wrong = bound(model, inputs, 1 - likely if label_kind == "multilabel" else likely.roll(1, 1), constants)
        assert (wrong < 0).all()


def test_a_step_as_long_as_a_tight_bound_reaches_the_boundary_and_no_shorter_one_does():
    model, inputs = linear_margins(isometric=True), double_batch()
    likely = torch.nn.functional.one_hot(model(inputs).argmax(1), 3).double()
    found, (_, step) = bound(model, inputs, likely, lipschitz_bounds(model.model)), true_distance(model, inputs, likely)
    for factor, flips in ((0.999, False), (1.001, True)):
        moved = {m: x + factor * found.reshape(-1, *[1] * (x.ndim - 1)) * step[m] for m, x in inputs.items()}
        assert ((model(moved).argmax(1) != likely.argmax(1)) == flips).all()


def test_encoders_bound_at_least_as_well_as_classes_and_the_sign_of_a_scale_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    scales, constants = torch.randn(2, 4, generator=generator), torch.rand(2, generator=generator)
    joint, each = slopes_of_encoders(scales, constants), slopes_of_classes(scales, constants[:, None].expand(2, 4))
    assert (joint.pair <= each.pair + 1e-6).all()
    torch.testing.assert_close(joint.alone, each.alone)
    for flipped in (
        slopes_of_encoders(-scales, constants),
        slopes_of_classes(scales.abs(), constants[:, None].expand(2, 4)),
    ):
        torch.testing.assert_close(flipped.alone, joint.alone)
    one = slopes_of_classes(torch.tensor([[2.0, -3.0]]), torch.tensor([[1.0, 10.0]]))
    assert one.pair[0, 1].item() == pytest.approx(2 + 30) and one.alone.tolist() == [2, 30]


def test_radius_by_hand():
    slopes = slopes_of_encoders(torch.ones(1, 3), torch.tensor([2.0]))
    logits, targets = torch.tensor([[1.0, 4.0, -2.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert radius(logits, targets, slopes, "multiclass").item() == pytest.approx(3 / math.sqrt(8))
    assert radius(logits, targets, slopes, "multilabel").item() == pytest.approx(-1 / 2)


def test_margin_losses_by_hand():
    scores = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]])
    targets = torch.tensor([[0.0, 1.0, 0.0]])
    gaps = [math.exp(x) for x in (-1, -2, 0, 3)]
    assert margin_losses(scores, targets, "multiclass").item() == pytest.approx(math.log(sum(gaps)))
    signed = [math.exp(x) for x in (1, -2, 0, 0, 0, 3)]
    assert margin_losses(scores, targets, "multilabel").item() == pytest.approx(math.log(sum(signed)))


def test_rows_are_orthonormal_also_under_autocast_and_have_a_gradient():
    weight = torch.randn(5, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = orthonormal(weight)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5))
    (slope,) = torch.autograd.grad(rows[:, 0].sum(), weight)
    assert slope.isfinite().all() and slope.any()
    torch.testing.assert_close(orthonormal(rows), rows)


def test_step_two_moves_the_scales_alone_and_makes_the_radius_larger():
    method = CRMT(second=0.5, probe=24)
    work = tiny_work(wrapped(method, "multiclass"), epochs=2)
    method.begin(work)
    method.begin_epoch(work)
    method.train_step(work, batch(work))
    assert SLOPES not in work.memory
    work.epoch = 1
    method.begin_epoch(work)
    kept, before = work.memory[SLOPES], copy.deepcopy(work.model.state_dict())
    first = method.losses(work, batch(work)).mean()

    def mean_radius():
        slopes = slopes_of_classes(work.model.scales, kept)
        logits = work.model.eval()(batch(work).inputs)
        work.model.train()
        return radius(logits, batch(work).targets, slopes, "multiclass").mean()

    before_step = mean_radius()
    torch.testing.assert_close(first, -before_step)
    for _ in range(5):
        method.train_step(work, batch(work))
    moved = {key for key, x in work.model.state_dict().items() if not torch.equal(x, before[key])}
    assert moved == {"scales"}
    assert mean_radius() > before_step
    method.begin_epoch(work)
    assert work.memory[SLOPES] is kept
    assert work.model.training


@pytest.mark.parametrize(("second", "epochs", "epoch", "expected"), [(0.25, 8, 5, False), (0.25, 8, 6, True)])
def test_step_two_is_the_last_part(second, epochs, epoch, expected):
    for share, there in ((second, expected), (0.0, False)):
        method = CRMT(second=share)
        work = tiny_work(wrapped(method), epochs=epochs, epoch=epoch)
        method.begin_epoch(work)
        assert (SLOPES in work.memory) == there
    for share, epochs in ((0.9, 4), (0.75, 2)):
        steps = [
            CRMT(second=share)._in_second(tiny_work(wrapped(CRMT()), epochs=epochs, epoch=e)) for e in range(epochs)
        ]
        assert steps == [False] + [True] * (epochs - 1)


def test_the_weight_adds_the_margins_loss():
    works = [tiny_work(wrapped(CRMT())) for _ in range(2)]
    plain, more = (CRMT(weight).losses(work, batch(work)) for weight, work in zip((0.0, 2.0), works, strict=True))
    model = works[0].model
    scores = model.scores(model.trace(batch(works[0]).inputs).latent)
    torch.testing.assert_close(more - plain, 2 * margin_losses(scores, batch(works[0]).targets, "multilabel"))


def test_estimates_stay_below_the_bound():
    model = MarginFusion(tiny_fusion()).eval()
    constants = lipschitz_bounds(model.model)
    found = estimated_slopes(model, batch_of(tiny_specs(), 10))
    assert found.shape == (2, 3) and (found > 0).all()
    assert all((row <= constants[m]).all() for m, row in zip(model.sizes, found, strict=True))
    linear = linear_margins(isometric=True)
    torch.testing.assert_close(estimated_slopes(linear, double_batch(2)), torch.full((2, 3), 2.5).double())


def test_each_margin_climbs_one_modality_alone():
    model = wrapped(CRMT(), "multiclass").eval()
    trace, labels, goal = model.trace(batch_of(tiny_specs(), 3)), torch.tensor([0, 1, 2]), Untargeted("multiclass")
    threat = ThreatModel({"visual": Budget(epsilon=0.1, low=0, high=1)}, goal)
    (attack,) = model.adaptive_attacks().values()
    (way,) = attack.ways(model, threat)
    alone = model.scales[1] * model.scores(trace.latent)[:, 1] + model.bias
    expected = goal.loss(trace, labels) + goal.loss(trace._replace(logits=alone), labels)
    torch.testing.assert_close(way(trace, labels, goal), expected)
    assert isinstance(attack, EachMargin)


def test_errors_of_crmt():
    with pytest.raises(ValueError, match="`second` must be at or above 0 and below 1, got 1"):
        CRMT(second=1)
    with pytest.raises(ValueError, match="`weight` must be at or above 0, got -1"):
        CRMT(weight=-1)
    with pytest.raises(ValueError, match="`probe` must be at least 1, got 0"):
        CRMT(probe=0)
    narrow = {"audio": nn.Linear(64, 2), "visual": nn.Flatten()}
    model = LateFusion(narrow, nn.Linear(98, 3), specs=tiny_specs(), classes=CLASSES)
    with pytest.raises(ValueError, match="as many features as classes, but `model` has 2 audio features for 3 classes"):
        CRMT().check(model)
    fusion, inputs, targets = MarginFusion(tiny_fusion()), batch_of(tiny_specs(), 2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"`lipschitz` must have a constant .* got none for \['visual'\]"):
        bound(fusion.eval(), inputs, targets, {"audio": 1.0})
    with pytest.raises(ValueError, match="`model` must be in eval mode for a bound"):
        bound(fusion.train(), inputs, targets, {"audio": 1.0, "visual": 1.0})


# Lipschitz bounds


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 2), (4, 3)])
def test_a_convolutions_bound_is_valid_and_close(size, stride):
    torch.manual_seed(size)
    layer = nn.Conv2d(2, 3, size, stride, size // 2, bias=False).double()
    dense = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), torch.zeros(1, 2, 18, 18).double())
    exact = torch.linalg.matrix_norm(dense.flatten(1), 2).item()
    found = convolution_norm(layer.weight.detach(), layer.stride)
    assert exact <= found <= 1.2 * exact
    line = nn.Conv1d(1, 4, 8, 4)
    dense = torch.autograd.functional.jacobian(lambda x: line(x).flatten(), torch.zeros(1, 1, 64)).flatten(1)
    exact = torch.linalg.matrix_norm(dense, 2).item()
    assert exact * (1 - 1e-5) <= upper_bound(line) <= 1.05 * exact


def jacobian_norm(module, x):
    rows = torch.autograd.functional.jacobian(lambda x: module(x).flatten(), x).reshape(-1, x.numel())
    return torch.linalg.matrix_norm(rows, 2).item()


def test_front_ends_are_bounded():
    pairs = torch.autograd.functional.jacobian(lambda x: FramePairs()(x).flatten(), torch.zeros(1, 6, 3, 1, 1))
    exact = torch.linalg.matrix_norm(pairs.reshape(-1, 18), 2).item()
    assert exact <= upper_bound(FramePairs()) <= 1.05 * exact
    mel = LogMel(window=64, hop=32, mels=8).double()
    largest = 0.0
    for level in (1e-4, 1e-3, 3e-3, 1e-2, 1e-1):
        torch.manual_seed(0)
        largest = max(largest, jacobian_norm(mel, level * torch.randn(1, 160).double()))
    assert largest <= upper_bound(mel) <= 4 * largest


def test_a_batch_norm_is_taken_with_what_it_follows():
    layer, norm = nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)
    layer.weight = nn.Parameter(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    norm.running_var.copy_(torch.tensor([9.0, 1.0]))
    norm.eps = 0.0
    assert upper_bound(nn.Sequential(layer, norm, nn.ReLU())) == pytest.approx(1)
    assert upper_bound(nn.Sequential(layer, nn.ReLU(), norm)) == pytest.approx(3)
    assert upper_bound(nn.Sequential(norm, layer)) == pytest.approx(3)
    assert upper_bound(nn.Sequential(nn.ReLU(), layer)) == pytest.approx(3)


def test_the_embedded_late_fusion_has_a_bound_and_others_are_refused():
    torch.manual_seed(0)
    specs = {"audio": waveform(0.2)}
    model = late(specs, ("a", "b")).eval()
    constants = lipschitz_bounds(model)
    inputs = batch_of(specs, 1)
    for m, x in inputs.items():
        other = x + 1e-3 * torch.randn_like(x)
        moved = (model.features({m: other})[m] - model.features({m: x})[m]).norm()
        assert 0 < moved <= constants[m] * (other - x).norm()
    with pytest.raises(ValueError, match=r"`module` must be made of AudioEncoder, .* for a bound, got GELU"):
        upper_bound(nn.Sequential(nn.GELU()))
    with pytest.raises(ValueError, match="`module` must have plain convolutions, padded with zeros, for a bound"):
        upper_bound(nn.Conv1d(2, 2, 3, groups=2))
    with pytest.raises(ValueError, match="batch norms with running statistics for a bound, got one without"):
        upper_bound(nn.BatchNorm1d(2, track_running_stats=False))


# Jacobian-regularised fusion


def problem(label_kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, generator=generator)
    jacobian = torch.randn(3, 4, 10, generator=generator)
    jacobian = jacobian / (jacobian @ jacobian.mT).diagonal(dim1=1, dim2=2).mean(1).sqrt()[:, None, None]
    if label_kind == "multiclass":
        p = logits.softmax(1)
        slope = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    else:
        slope = torch.diag_embed(logits.sigmoid() * (1 - logits.sigmoid()))
    return logits, jacobian, slope


@KINDS
def test_the_solve_meets_its_normal_equations_and_nothing_is_better(label_kind):
    logits, jacobian, slope = problem(label_kind)
    gamma, unit = 0.9, torch.eye(4)
    w = damping(logits, 7 * jacobian @ jacobian.mT, gamma, label_kind)  # whatever the scale
    residual = (1 - gamma) * (w - unit) + gamma * slope @ slope @ w @ (jacobian @ jacobian.mT)
    torch.testing.assert_close(residual, torch.zeros(3, 4, 4), atol=1e-6, rtol=0)

    def cost(w):
        fit, steep = (w - unit).square().sum((1, 2)), (slope @ w @ jacobian).square().sum((1, 2))
        return (1 - gamma) * fit + gamma * steep

    for _ in range(20):
        assert (cost(w) < cost(w + 1e-2 * torch.randn(3, 4, 4))).all()
    assert (cost(w) < cost(unit.expand(3, 4, 4))).all()


def test_the_solve_is_differentiated_exactly_also_where_eigenvalues_repeat():
    def by_factors(a, b):
        return correction(a @ a.mT, b @ b.mT)

    a, b = (torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(by_factors, (a, b))
    unit = torch.eye(3, dtype=torch.float64).expand(1, 3, 3).clone().requires_grad_()
    assert torch.autograd.gradcheck(by_factors, (unit, unit.detach().clone().requires_grad_()))


@KINDS
def test_without_gamma_posteriors_are_multiplied_and_the_prior_counts_once(label_kind):
    model = RegularisedFusion(tiny_fusion(label_kind), 0.0, "every").eval()
    model.prior.copy_(torch.tensor([0.5, -1.0, 2.0]))
    inputs = batch_of(tiny_specs(), 4)
    trace = model.trace(inputs)
    plain = model.uni_modal(trace.latent)
    by_hand = {m: model.heads[m](model.model.encoders[m](inputs[m])) for m in model.modalities}
    torch.testing.assert_close(plain, torch.stack(list(by_hand.values()), dim=1))
    torch.testing.assert_close(trace.logits, sum(by_hand.values()) - model.prior)


def test_the_jacobian_is_that_of_the_scores_by_the_raw_input_and_the_gradient_goes_through_the_solve():
    model = RegularisedFusion(tiny_fusion("multiclass"), 0.9, "every").double().eval()
    inputs = {m: x.double().requires_grad_() for m, x in batch_of(tiny_specs(), 1).items()}
    rows = torch.autograd.functional.jacobian(
        lambda x: model.heads["audio"](model.model.encoders["audio"](x)), inputs["audio"]
    ).reshape(3, -1)
    gram = model.encode("audio", inputs["audio"])[0, 3:].unflatten(0, (3, 3))
    torch.testing.assert_close(gram, rows @ rows.T)
    with torch.no_grad():
        assert not model.encode("audio", inputs["audio"]).requires_grad
    aim = model(inputs)[0, 0]
    slopes = dict(zip(inputs, torch.autograd.grad(aim, list(inputs.values())), strict=True))
    torch.manual_seed(0)
    for m, x in inputs.items():
        way = torch.randn_like(x)
        ends = [model({**inputs, m: x.detach() + sign * 1e-3 * way})[0, 0] for sign in (1, -1)]
        assert ((ends[0] - ends[1]) / 2e-3).item() == pytest.approx((slopes[m] * way).sum().item(), rel=2e-2, abs=1e-5)


def test_only_the_modality_asked_for_is_corrected_and_nothing_in_training():
    inputs = batch_of(tiny_specs(), 3)
    for modality, changed in (("every", [True, True]), ("audio", [True, False]), ("visual", [False, True])):
        torch.manual_seed(0)
        model = RegularisedFusion(tiny_fusion(), 0.9, modality).eval()
        corrected, plain = model.trace(inputs).latent.unflatten(1, (2, 2, 3)).unbind(1)
        assert [not torch.equal(corrected[:, i], plain[:, i]) for i in range(2)] == changed
        corrected, plain = model.train().trace(inputs).latent.unflatten(1, (2, 2, 3)).unbind(1)
        assert torch.equal(corrected, plain)


@KINDS
def test_the_prior_is_that_of_the_training_clips_and_each_modality_learns_alone(label_kind):
    method = JacobianFusion()
    work = tiny_work(wrapped(method, label_kind))
    method.begin(work)
    share = (work.data.targets.sum(0) + 1) / 26
    expected = share.logit() if label_kind == "multilabel" else (share / share.sum()).log()
    torch.testing.assert_close(work.model.prior, expected)
    torch.testing.assert_close(work.averaged.prior, expected)
    rare = torch.zeros(24).index_fill(0, torch.tensor([0, 1]), 1.0)  # as if two clips alone were drawn
    drawn = replace(work, weights=rare)
    method.begin(drawn)
    seen = (work.data.targets[:2].mean(0) * 24 + 1) / 26
    expected = seen.logit() if label_kind == "multilabel" else seen.log() - seen.sum().log()
    torch.testing.assert_close(drawn.model.prior, expected)
    work.model.eval()
    scores = work.model.uni_modal(work.model.trace(batch(work).inputs).latent)
    by_hand = sum(work.loss(scores[:, i], batch(work).targets) for i in range(2))
    torch.testing.assert_close(method.losses(work, batch(work)), by_hand)


def test_around_the_solve_climbs_as_if_nothing_were_corrected():
    model = RegularisedFusion(tiny_fusion("multiclass"), 0.9, "every").eval()
    trace, labels, goal = model.trace(batch_of(tiny_specs(), 3)), torch.tensor([0, 1, 2]), Untargeted("multiclass")
    around, both = (way(trace, labels, goal) for way in AroundTheSolve().ways(model, ThreatModel(budgets(model), goal)))
    plain = trace._replace(logits=model.joined(model.uni_modal(trace.latent)))
    through = goal.loss(trace, labels)
    torch.testing.assert_close(around, goal.loss(plain, labels))
    torch.testing.assert_close(both, through + around)
    assert not torch.allclose(through, around)


def test_by_features_the_jacobian_is_the_heads_weights():
    torch.manual_seed(0)
    model = RegularisedFusion(tiny_fusion(), 0.9, by="features").eval()
    inputs = batch_of(tiny_specs(), 3)
    weight = model.heads["visual"][-1].weight
    expected = (weight @ weight.T).flatten().expand(3, -1)
    torch.testing.assert_close(model.encode("visual", inputs["visual"])[:, 3:], expected)
    corrected, plain = model.trace(inputs).latent.unflatten(1, (2, 2, 3)).unbind(1)
    assert not torch.allclose(corrected, plain)


def test_errors_of_jacobian_fusion():
    with pytest.raises(ValueError, match=r"`by` must be one of \['input', 'features'\], got 'hidden'"):
        JacobianFusion(by="hidden")
    with pytest.raises(ValueError, match="`gamma` must be at or above 0 and below 1, got 1"):
        JacobianFusion(gamma=1)
    with pytest.raises(ValueError, match=r"`modality` must be one of \['every', 'audio', 'visual'\], got 'smell'"):
        JacobianFusion(modality="smell").check(tiny_fusion())


# Curriculum


def test_places_take_the_perturbation_of_the_nearest_sampled_piece():
    assert owners(8, 4, torch.tensor([3, 0])).tolist() == [0, 1, 0, 1, 6, 7, 6, 7]
    assert owners(5, 2, torch.tensor([1])).tolist() == [3, 4, 4, 3, 4]  # the last piece is short
    assert owners(6, 3, torch.arange(3)).tolist() == list(range(6))
    assert owners(3, 3, torch.tensor([0, 2])).tolist() == [0, 0, 2]


def test_the_gradient_of_what_is_shared_is_the_sum():
    delta, owner = torch.randn(2, 6, requires_grad=True), owners(6, 3, torch.tensor([1]))
    slope = torch.randn(2, 6)
    (expected,) = torch.autograd.grad((delta.index_select(1, owner) * slope).sum(), delta)
    torch.testing.assert_close(pooled(slope, owner), expected.index_select(1, owner))


def crafted(method, epoch=1, **changes):
    work = tiny_work(wrapped(method), epoch=epoch, **changes)
    first = batch(work)
    hidden = method._hidden(work, first)
    return work, first, hidden, method._craft(work, first, hidden)


def test_frames_share_a_perturbation_and_with_a_share_of_one_they_do_not():
    for share, shared in ((0.5, True), (1.0, False)):
        _, first, _, points = crafted(AVCurriculum(steps=3, share=share, mask=0.0), budgets=budgets(tiny_fusion(), 0.1))
        delta = {m: points[m] - first.inputs[m] for m in points}
        assert torch.allclose(delta["visual"][:, 0], delta["visual"][:, 1], atol=1e-6) == shared
        pieces = delta["audio"].unflatten(1, (8, 8))
        distinct = torch.unique((pieces[0] * 1e4).round(), dim=0)
        assert len(distinct) == (4 if shared else 8)
        for m, x in points.items():
            assert (delta[m].abs() <= 0.1 + 1e-6).all()
            assert (x >= first.inputs[m].new_tensor(-1.0 if m == "audio" else 0.0)).all()


def test_the_masked_stretch_is_that_of_all_modalities_and_no_attack_is_made_on_it():
    method = AVCurriculum(steps=2, mask=0.5, share=1.0)
    work, first, hidden, _ = crafted(method)
    count = {m: x.sum(1) for m, x in hidden.items()}
    assert ((count["audio"] - 32).abs() <= 1).all()
    early = hidden["audio"].float().argmax(1) < 16
    assert torch.equal(hidden["visual"][:, 0] & ~hidden["visual"][:, 1], early) or (count["visual"] == 1).all()
    middle = hidden["audio"][:, [16, 48]]
    assert torch.equal(middle, hidden["visual"])
    alone = replace(method, synchronous=False)
    again = alone._hidden(tiny_work(wrapped(alone), epoch=1), first)
    assert torch.equal(again["audio"], hidden["audio"])
    assert not torch.equal(again["audio"][:, [16, 48]], again["visual"])
    assert not method._hidden(tiny_work(wrapped(method), epoch=0), first)["audio"].any()
    del work


def test_the_attack_does_not_look_at_what_is_masked():
    method = AVCurriculum(steps=1, mask=0.5, share=1.0)
    work = tiny_work(wrapped(method), epoch=1)
    first = batch(work)
    hidden = {m: torch.ones(6, x.shape[1], dtype=torch.bool) for m, x in first.inputs.items()}
    points = method._craft(work, first, hidden)
    hidden["audio"][:] = False
    seen = method._craft(tiny_work(wrapped(method), epoch=1), first, hidden)
    corners = {m: ((x - first.inputs[m]).abs() > 0.0499).float().mean() for m, x in points.items()}
    assert corners["audio"] < 0.2 and corners["visual"] < 0.2  # where the random start put it
    assert ((seen["audio"] - first.inputs["audio"]).abs() > 0.0499).float().mean() > 0.5


def test_everything_rises_with_the_epochs_unless_told():
    method = AVCurriculum(steps=10)
    at = [tiny_work(wrapped(method), epochs=4, epoch=epoch) for epoch in range(4)]
    assert [method.steps_now(work) for work in at] == [1, 4, 7, 10]
    assert [replace(method, rising=False).steps_now(work) for work in at] == [10] * 4
    assert method.steps_now(tiny_work(wrapped(method), epochs=1)) == 10
    work = tiny_work(wrapped(method), epochs=2, epoch=0)
    easy, hard = (method._hidden(replace(work, epoch=epoch), batch(work)) for epoch in (0, 1))
    assert not easy["audio"].any() and hard["audio"].any()


def test_dropout_and_mask_each_change_what_is_learnt_from():
    plain = AVCurriculum(steps=1, mask=0.0, dropout=0.0)
    losses = []
    for method in (plain, plain, replace(plain, dropout=0.5), replace(plain, mask=0.5)):
        losses.append(method.losses(tiny_work(wrapped(method), epoch=1), batch(tiny_work())))
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])
    assert not torch.allclose(losses[0], losses[3])


def test_the_curriculum_takes_a_single_modality_and_scores_as_the_model_inside():
    specs = {"audio": waveform(0.004)}
    model = LateFusion({"audio": nn.Linear(64, 4)}, nn.Linear(4, 3), specs=specs, classes=CLASSES)
    method = AVCurriculum(steps=2)
    work = tiny_work(method.wrapped(model))
    method.begin(work)
    assert method.train_step(work, batch(work)).isfinite()
    inputs = batch_of(specs, 2)
    assert torch.equal(SharedFrames(model)(inputs), model(inputs))


def test_errors_of_the_curriculum():
    for wrong in ({"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match="`share` must be above 0 and at most 1, got"):
            AVCurriculum(**wrong)
    with pytest.raises(ValueError, match="`dropout` must be at or above 0 and below 1, got 1"):
        AVCurriculum(dropout=1.0)
    with pytest.raises(ValueError, match="`steps` must be above 0, got 0"):
        AVCurriculum(steps=0)
    with pytest.raises(ValueError, match="`budgets` must name at least one modality"):
        AVCurriculum().check_budgets(tiny_fusion(), {})


def test_a_linear_classifier_is_no_late_fusion_of_vectors_only_in_name():
    model = DissimilarFusion(Linear(tiny_specs(), 3))
    assert model.eval()(batch_of(tiny_specs(), 2)).shape == (2, 3)
