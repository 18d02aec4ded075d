"""Guided mix-up: what the metrics decide, what each switch changes, and what it costs."""

from dataclasses import replace

import pytest
import torch
from conftest import CLASSES, Linear, tiny_fusion, tiny_specs
from torch import nn
from training_tools import TinyClips, batch, tiny_work

from robustav.classifier import Wrapped
from robustav.metrics.relative_density import balanced, relative_density
from robustav.training.guidance import (
    around,
    class_weights,
    clip_weights,
    convexity,
    mates,
    member_weights,
    members_of,
    memberships_at,
    outsiders,
    pick,
    with_none,
)
from robustav.training.guided import CONVEXITY, MEMBERS, OUTSIDE, WEIGHTS, GuidedMixup
from robustav.training.guided_fgsm import GuidedFGSM
from robustav.training.method import Work
from robustav.training.mixing import between, ratios

LOOKING = {"start": 0, "k": 2}  # the tiny set has classes of a dozen clips


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(method: GuidedMixup, **changes: object) -> Work:
    work = tiny_work(**changes)
    method.check(work.model)
    method.begin(work)
    method.begin_epoch(work)
    return work


# What the metrics say


def line_of_clips() -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes on a line, 0 .. 9 and 12 .. 21; clip 9 and clip 10 face one another."""
    latents = torch.cat([torch.arange(10.0), torch.arange(12.0, 22.0)])[:, None]
    return latents, torch.arange(20)[:, None] // 10 == torch.arange(2)


def test_density_is_the_metric_and_outside_the_nearest_others():
    latents, labels = line_of_clips()
    labels = with_none(labels.float())
    lie = around(latents, torch.arange(20), labels, 2, generator())
    chosen = balanced(labels[:, 0], generator())
    expected = relative_density(latents[chosen.members], latents[chosen.others], 2).float()
    torch.testing.assert_close(lie.density[:10][chosen.members], expected)
    assert lie.outside[9].tolist() == [10, 11, 12, 13, 14] and lie.outside[10].tolist() == [9, 8, 7, 6, 5]
    assert lie.density[9] < lie.density[4]


def test_clips_that_were_not_measured_have_neither():
    latents, labels = line_of_clips()
    rows = torch.arange(0, 20, 2)
    lie = around(latents[rows], rows, with_none(labels.float()), 2, generator())
    assert lie.density[1::2].isnan().all() and (lie.outside[1::2] == -1).all()
    assert lie.outside[0].tolist() == [10, 12, 14, 16, 18]
    assert lie.density[rows].isfinite().sum() >= 9


def test_a_class_too_small_for_its_neighbours_has_no_density():
    latents, labels = line_of_clips()
    lie = around(latents, torch.arange(20), with_none(labels.float()), 10, generator())
    assert lie.density.isnan().all() and (lie.outside != -1).all()


def test_of_two_labels_outside_means_without_that_label():
    latents, _ = line_of_clips()
    labels = torch.zeros(20, 2)
    labels[:10, 0] = 1
    labels[5:, 1] = 1
    members = members_of(with_none(labels))
    lie = around(latents, torch.arange(20), with_none(labels), 2, generator())
    first = ((members.clips == 7) & (members.classes == 0)).nonzero().item()
    second = ((members.clips == 7) & (members.classes == 1)).nonzero().item()
    assert lie.outside[first].tolist() == [10, 11, 12, 13, 14] and lie.outside[second].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("kind", ["soft", "hardened"])
def test_a_class_in_two_parts_is_less_convex(kind):
    compact = 0.1 * torch.randn(60, 2, generator=generator()) + torch.tensor([3.0, 0.0])
    halves = 0.1 * torch.randn(60, 2, generator=generator(1)) + torch.tensor([-3.0, 0.0])
    halves[30:, 1] += 4.0  # two ends, and the class is rejected between them
    labels = (torch.arange(120)[:, None] // 60 == torch.arange(2)).bool()

    def finish(parts: dict) -> torch.Tensor:
        z = parts["latent"]
        return torch.stack([z[:, 0], (z[:, 1] - 2).abs() - 1 - z[:, 0].clamp(min=0)], dim=1)

    found = convexity(
        torch.cat([compact, halves]), labels, finish, "multilabel", kind=kind, pairs=200, generator=generator()
    )
    assert found[0] > 0.9 and found[1] < 0.7


def test_a_class_that_is_not_recognised_has_no_convexity():
    latents, labels = line_of_clips()
    arguments = {"pairs": 20, "generator": generator()}
    never = convexity(
        latents, labels, lambda parts: parts["latent"] @ torch.zeros(1, 2) - 5, "multilabel", kind="soft", **arguments
    )
    assert never.tolist() == [0.0, 0.0]
    alone = convexity(latents, labels & False, lambda parts: parts["latent"], "multilabel", kind="soft", **arguments)
    assert alone.tolist() == [0.0, 0.0]


def test_classes_are_drawn_by_size_and_convexity():
    weights = class_weights(torch.tensor([400, 100, 100]), torch.tensor([0.5, 0.5, 0.9]), 0.5, 0.1)
    assert (weights[0] / weights[1]).item() == pytest.approx(2) and (weights[1] / weights[2]).item() == pytest.approx(3)
    assert weights.sum().item() == pytest.approx(1)


def test_sparse_clips_come_first_but_none_alone():
    density = torch.tensor([-100.0, 0.0, 1.0, 2.0, 3.0, 4.0, torch.nan])
    weights = clip_weights(density)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights[:-1].diff() < 0).all()
    low, median, high = density[:-1].quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert (weights[2] / weights[4]).item() == pytest.approx(float((2 / (high - low)).exp()), rel=1e-5)
    assert (weights[0] / weights[-1]).item() == pytest.approx(10)
    assert (weights[2] / weights[-1]).item() == pytest.approx(float(((median - 1) / (high - low)).exp()), rel=1e-5)
    assert clip_weights(torch.full((4,), torch.nan)).tolist() == [0.25] * 4
    assert clip_weights(torch.ones(4)).tolist() == [0.25] * 4


def test_members_are_drawn_by_class_then_clip():
    members = members_of(torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]]).bool())
    weights = member_weights(members, torch.full((5,), torch.nan), torch.tensor([0.6, 0.1]), 0.0, 0.1)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 2 / 9, 2 / 9, 2 / 9]))
    drawn = pick(weights, torch.rand(30_000, generator=generator()))
    torch.testing.assert_close(drawn.bincount() / 30_000, weights, atol=0.01, rtol=0)


def test_partners_within_and_outside_a_class():
    members = members_of(torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]]).bool())
    uniform = torch.rand(500, generator=generator())
    for chosen, expected in ((0, {1, 2}), (1, {0, 2}), (3, {1}), (4, {3})):
        assert set(mates(members, torch.full((500,), chosen), uniform).tolist()) == expected
    outside = torch.tensor([[3, -1], [3, -1], [3, -1], [0, 2], [-1, -1]])
    assert set(outsiders(members, outside, torch.full((500,), 3), uniform).tolist()) == {0, 2}
    assert set(outsiders(members, outside, torch.full((500,), 0), uniform).tolist()) == {3}
    assert set(outsiders(members, outside, torch.full((500,), 4), uniform).tolist()) == {-1}


def test_a_given_clip_stands_for_one_of_its_labels():
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool()
    members = members_of(labels)
    rows = torch.tensor([1, 0, 2]).repeat(200)
    chosen = memberships_at(members, labels[rows], rows, torch.rand(600, generator=generator()))
    assert torch.equal(members.clips[chosen], rows)
    assert members.classes[chosen][rows == 1].bincount(minlength=3)[1:].min() > 70


# What a step is made of


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_a_batch_is_pairs_of_as_many_clips(size, label_kind):
    method = GuidedMixup(**LOOKING)
    work = started(method, label_kind=label_kind)
    given = batch(work, *range(size))
    drawn = method.draw(work, given.rows)
    assert drawn.rows.shape == drawn.partner.shape == drawn.alpha.shape == (size,)
    assert torch.equal(drawn.partner[drawn.partner], torch.arange(size))
    assert (drawn.partner == torch.arange(size)).sum() == size % 2
    assert torch.equal(drawn.alpha, drawn.alpha[drawn.partner])
    assert method.train_step(work, given).isfinite()


def test_all_switches_off_is_mixup_of_the_loops_clips():
    method = GuidedMixup(anchor="uniform", partner="random", ratio="fixed", intra=0.0, place="input")
    work = started(method)
    given = batch(work)
    drawn = method.draw(work, given.rows)
    assert torch.equal(drawn.rows, given.rows) and (drawn.alpha == 0.4).all()
    assert torch.equal(drawn.uniform[:, 0], drawn.uniform[:, 1])
    mixed = method.mix(work, drawn, given, "input")
    ratio = ratios(0.4, drawn.uniform[:, 0])
    for m, x in mixed.parts.items():
        torch.testing.assert_close(x, between(given.inputs[m], given.inputs[m][drawn.partner], ratio))
    torch.testing.assert_close(mixed.targets, between(given.targets, given.targets[drawn.partner], ratio))
    assert work.cost.forwards == 0


def test_partners_are_of_the_class_or_the_nearest_outside_it():
    inside, outside = (GuidedMixup(**LOOKING, intra=share) for share in (1.0, 0.0))
    work = started(inside, label_kind="multiclass")
    labels = work.data.targets.argmax(1)
    for _ in range(20):
        drawn = inside.draw(work, torch.arange(6))
        assert torch.equal(labels[drawn.rows[:3]], labels[drawn.rows[3:]]) and (drawn.alpha == 1).all()
        drawn = outside.draw(work, torch.arange(6))
        for anchor, partner in zip(drawn.rows[:3], drawn.rows[3:], strict=True):
            member = (work.memory[MEMBERS[0]] == anchor).nonzero().item()
            assert partner in work.memory[OUTSIDE][member]
            assert labels[anchor] != labels[partner]


def test_anchors_follow_the_weights_or_the_loop():
    method = GuidedMixup(**LOOKING)
    work = started(method)
    work.memory[WEIGHTS] = torch.zeros_like(work.memory[WEIGHTS]).index_fill(0, torch.tensor([5]), 1.0)
    assert (method.draw(work, torch.arange(6)).rows[:3] == work.memory[MEMBERS[0]][5]).all()
    assert torch.equal(replace(method, anchor="uniform").draw(work, torch.arange(6)).rows[:3], torch.arange(3))
    assert torch.equal(replace(method, partner="random").draw(work, torch.arange(6)).rows[3:], torch.arange(3, 6))


def test_classes_that_are_not_convex_are_mixed_little():
    method = GuidedMixup(**LOOKING, intra=0.0)
    work = started(method)
    work.memory[CONVEXITY] = torch.tensor([0.0, 0.25, 0.5, 1.0])
    seen = {round(a, 3) for _ in range(20) for a in method.draw(work, torch.arange(6)).alpha.tolist()}
    assert seen == {0.0, 0.1, 0.2, 0.4}
    fixed = replace(method, ratio="fixed")
    assert {round(a, 3) for _ in range(20) for a in fixed.draw(work, torch.arange(6)).alpha.tolist()} == {0.4}


@pytest.mark.parametrize("settings", [{}, {"place": "input", "per_modality": True}], ids=str)
def test_random_pairs_have_the_very_same_ratios(settings):
    method = GuidedMixup(**LOOKING, **settings)
    work = started(method)
    work.memory[CONVEXITY] = torch.tensor([0.0, 0.25, 0.5, 1.0])
    for seed in range(5):
        work.generator.manual_seed(seed)
        guided = method.draw(work, torch.arange(6))
        work.generator.manual_seed(seed)
        control = replace(method, random_pairs=True).draw(work, torch.arange(6))
        assert torch.equal(ratios(guided.alpha, guided.uniform), ratios(control.alpha, control.uniform))
        assert torch.equal(guided.partner, control.partner)
        assert torch.equal(control.rows, torch.arange(6)) and not torch.equal(guided.rows, control.rows)


def test_modalities_have_ratios_of_their_own():
    method = GuidedMixup(**LOOKING, place="input", per_modality=True, label_weight=0.75, ratio="fixed")
    work = started(method)
    given = batch(work)
    drawn = method.draw(work, given.rows)._replace(partner=torch.tensor([3, 4, 5, 0, 1, 2]))
    mixed = method.mix(work, drawn, given, "input")
    by_modality = ratios(drawn.alpha, drawn.uniform)
    assert not torch.allclose(by_modality[:, 0], by_modality[:, 1])
    for number, m in enumerate(sorted(given.inputs)):
        own, other = given.inputs[m], given.inputs[m][drawn.partner]
        torch.testing.assert_close(mixed.parts[m], between(own, other, by_modality[:, number]))
    share = 0.75 * by_modality[:, 0] + 0.25 * by_modality[:, 1]
    torch.testing.assert_close(mixed.targets, between(given.targets, given.targets[drawn.partner], share))


@pytest.mark.parametrize("place", ["input", "features", "latent"])
def test_mixes_at_the_place(place):
    method = GuidedMixup(**LOOKING, place=place)
    work = started(method)
    before = work.cost.forwards
    mixed = method.mixed(work, batch(work))
    assert mixed.place == place
    assert set(mixed.parts) == ({"latent"} if place == "latent" else set(work.model.specs))
    assert work.cost.forwards - before == (0 if place == "input" else 6)


def test_the_segment_adversary_takes_the_worst_ratio():
    method = GuidedMixup(**LOOKING, place="input")
    work = started(method)
    given = batch(work)
    drawn = method.draw(work, given.rows)

    def loss_of(made: GuidedMixup) -> torch.Tensor:
        mixed = made.mix(work, drawn, given, "input")
        with work.crafting(), torch.no_grad():
            return work.loss(work.trace(mixed.parts).logits, mixed.targets)

    plain, before = loss_of(method), work.cost.forwards
    worst = loss_of(replace(method, segment=4))
    assert work.cost.forwards - before == 4 * 6 + 6
    assert (worst >= plain - 1e-6).all() and (worst > plain + 1e-4).any()
    assert work.model.training and all(p.requires_grad for p in work.model.parameters())


@pytest.mark.parametrize("place", ["input", "features", "latent"])
def test_noise_is_so_many_distances_between_neighbours_long(place):
    method = GuidedMixup(**LOOKING, place=place, noise=0.1)
    work = started(method, budgets={})
    given = batch(work)
    drawn = method.draw(work, given.rows)
    work.model.eval()
    quiet = replace(method, noise=0.0).mix(work, drawn, given, place)
    noisy = [method.mix(work, drawn, given, place) for _ in range(100)]
    for name, x in quiet.parts.items():
        unit = float(work.memory[f"guidance/unit/{place}/{name}"])
        lengths = torch.stack([(each.parts[name] - x).flatten(1).norm(dim=1) for each in noisy])
        assert lengths.square().mean().sqrt().item() == pytest.approx(0.1 * unit, rel=0.1)
        assert unit > 0


def test_there_is_no_noise_before_the_first_look():
    method = GuidedMixup(start=1, place="input", noise=1.0)
    work = started(method)
    given = batch(work)
    drawn = method.draw(work, given.rows)
    quiet = replace(method, noise=0.0).mix(work, drawn, given, "input")
    assert all(torch.equal(x, quiet.parts[m]) for m, x in method.mix(work, drawn, given, "input").parts.items())


def test_mixed_inputs_stay_in_range():
    method = GuidedMixup(**LOOKING, place="input", noise=20.0)
    work = started(method)
    for m, x in method.mixed(work, batch(work)).parts.items():
        work.model.specs[m].check(m, x.detach())


# When it looks, and what that costs


def test_looks_on_time_and_counts_it():
    method = GuidedMixup(start=1, refresh_every=2, measured=20, k=2, place="input")
    work = tiny_work()
    method.begin(work)
    cost, seen = [], []
    for work.epoch in range(5):
        method.begin_epoch(work)
        cost.append(work.cost.forwards)
        seen.append(int((work.memory[OUTSIDE][:, 0] != -1).sum()))
    assert cost == [0, 20, 20, 40, 40]
    assert seen[0] == 0 and 20 <= seen[1] < len(work.memory[WEIGHTS])
    everything = replace(method, measured=0, start=0)
    assert started(everything).cost.forwards == 24 and started(replace(everything, measured=9999)).cost.forwards == 24


def test_without_metrics_there_is_nothing_to_look_at():
    method = GuidedMixup(anchor="uniform", partner="random", ratio="fixed", start=0)
    assert started(method).cost.forwards == 0
    assert started(replace(method, noise=1.0)).cost.forwards == 24
    assert started(replace(method, ratio="metric")).cost.forwards == 24


def test_looking_leaves_models_as_they_were():
    work = tiny_work()
    before = {key: value.clone() for key, value in work.averaged.state_dict().items()}
    method = GuidedMixup(**LOOKING, noise=1.0)
    method.begin(work)
    method.begin_epoch(work)
    assert not work.averaged.training and work.model.training
    assert all(torch.equal(value, before[key]) for key, value in work.averaged.state_dict().items())
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in work.memory.values())


def test_before_the_first_look_clips_of_a_class_are_alike():
    work = tiny_work(label_kind="multiclass")
    GuidedMixup().begin(work)
    torch.testing.assert_close(work.memory[WEIGHTS], torch.full((24,), 1 / 24))
    assert (work.memory[CONVEXITY] == 1).all()
    drawn = [GuidedMixup(intra=0.0).draw(work, torch.arange(6)) for _ in range(60)]
    assert {row for each in drawn for row in each.rows.tolist()} == set(range(24))


@pytest.mark.parametrize("convexity", ["hardened", "soft"])
def test_training_is_fixed_by_its_generator(convexity):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)
        method = GuidedMixup(**LOOKING, noise=0.5, segment=2, convexity=convexity)
        work = started(method, generator=generator(seed), model=tiny_fusion())
        for _ in range(4):
            method.train_step(work, batch(work))
        return torch.cat([p.flatten() for p in work.model.parameters()]).detach()

    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))


def test_clips_without_labels_are_drawn_too():
    method = GuidedMixup(**LOOKING)
    work = started(method)
    unlabelled = (work.data.targets.sum(1) == 0).nonzero().flatten().tolist()
    drawn = {row for _ in range(60) for row in method.draw(work, torch.arange(6)).rows[:3].tolist()}
    assert unlabelled and set(unlabelled) <= drawn


# One adversarial step on top


@pytest.mark.parametrize(
    ("settings", "forwards", "backwards"),
    [({}, 12, 12), ({"share": 0.5}, 9, 9), ({"steps": 2}, 18, 18), ({"place": "latent"}, 12, 12)],
    ids=str,
)
def test_the_step_costs_its_share(settings, forwards, backwards):
    method = GuidedFGSM(**LOOKING, **settings)
    work = started(method)
    before = work.cost.forwards
    method.train_step(work, batch(work))
    assert (work.cost.forwards - before, work.cost.backwards) == (forwards, backwards)


def test_the_step_climbs_the_loss_of_the_mixed_label():
    method = GuidedFGSM(**LOOKING, start_noise=0.0)
    work = started(method)
    mixed = method.mixed(work, batch(work))
    points = method.stepped(work, mixed.parts, mixed.targets)

    def loss(inputs: dict) -> torch.Tensor:
        with work.crafting(), torch.no_grad():
            return work.loss(work.trace(inputs).logits, mixed.targets)

    assert (loss(points) > loss(mixed.parts)).all()
    for m, x in points.items():
        work.model.specs[m].check(m, x)
        assert (x - mixed.parts[m]).abs().max().item() == pytest.approx(0.05, rel=1e-4)
    noisy = replace(method, start_noise=2.0).stepped(work, mixed.parts, mixed.targets)
    assert 0.1 < (noisy["audio"] - mixed.parts["audio"]).abs().max().item() <= 0.15 + 1e-6


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_step_goes_by_each_clips_own_soft_label(share):
    specs = {"audio": tiny_specs()["audio"]}
    work = tiny_work(Linear(specs, 1), data=TinyClips(24, "multilabel", specs, ("one",)))
    weights = work.model.weights["audio"]
    inputs = {"audio": (torch.logit(torch.tensor(0.7)) * weights / weights.square().sum()).repeat(6, 1)}
    targets = torch.tensor([[0.6], [0.8], [0.6], [0.9], [0.1], [1.0]])
    points = GuidedFGSM(start_noise=0.0, share=share).stepped(work, inputs, targets)
    moved = points["audio"] - inputs["audio"]
    expected = 0.05 * (0.7 - targets).sign() * weights.sign()
    attacked = moved.abs().amax(1) > 0
    assert attacked.sum() == 6 * share
    torch.testing.assert_close(moved[attacked], expected[attacked])


def test_only_a_share_is_attacked_and_only_where_there_is_a_budget():
    method = GuidedFGSM(**LOOKING, share=0.5)
    work = started(method)
    work.budgets = {"audio": work.budgets["audio"]}
    given = batch(work)
    points = method.stepped(work, given.inputs, given.targets)
    assert torch.equal(points["visual"], given.inputs["visual"])
    assert (points["audio"] != given.inputs["audio"]).any(1).sum() == 3
    with pytest.raises(ValueError, match="`budgets` must name at least one modality"):
        method.check_budgets(work.model, {})


def test_a_look_that_finds_no_density_is_refused_and_one_that_finds_some_says_how_many():
    method = GuidedMixup(**{**LOOKING, "k": 2})
    work = started(method)
    assert 0 < work.memory["guidance/known_density"] <= 1
    with pytest.raises(ValueError, match="in epoch 1: no class has a density, which takes more than k = 40 clips"):
        started(GuidedMixup(**{**LOOKING, "k": 40}))
    assert started(GuidedMixup(**{**LOOKING, "k": 40, "anchor": "uniform"})).memory["guidance/known_density"] == 0


def test_a_network_that_tells_no_clips_apart_is_named():
    work = tiny_work()
    for model in (work.model, work.averaged):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    method = GuidedMixup(**LOOKING)
    method.begin(work)
    with pytest.raises(ValueError, match=r"guided mix-up could not measure the latents of .* lower `learning_rate`"):
        method.begin_epoch(work)


def test_at_the_latent_clips_are_attacked_before_they_are_mixed(monkeypatch):
    for place, soft in (("input", True), ("latent", False)):
        method = GuidedFGSM(**LOOKING, place=place, ratio="fixed", intra=0.0, alpha_across=5.0)
        work, caught = started(method), []
        monkeypatch.setattr(
            GuidedFGSM,
            "stepped",
            lambda self, work, inputs, targets, caught=caught: (caught.append(targets), inputs)[1],
        )
        method.losses(work, batch(work))
        monkeypatch.undo()
        assert bool(((caught[0] > 0) & (caught[0] < 1)).any()) is soft


# What cannot be


def wrapped(latent: str | None) -> Wrapped:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(64 + 96, 8), nn.Linear(8, 3)

        def forward(self, inputs: dict) -> torch.Tensor:
            return self.head(self.body(torch.cat([inputs[m].flatten(1) for m in sorted(inputs)], 1)).tanh())

    torch.manual_seed(0)
    return Wrapped(Both(), specs=tiny_specs(), classes=CLASSES, label_kind="multilabel", latent=latent)


def test_a_wrapped_network_needs_a_named_latent():
    with pytest.raises(ValueError, match="`place` 'any' mixes latents, and this wrapped network's latent is not known"):
        GuidedMixup().check(wrapped(None))
    with pytest.raises(
        ValueError, match="guided mix-up measures latents, and this wrapped network's latent is not known"
    ):
        GuidedMixup(place="input").check(wrapped(None))
    GuidedMixup(place="input", anchor="uniform", partner="random", ratio="fixed").check(wrapped(None))
    with pytest.raises(ValueError, match="`place` 'features' needs an encoder a modality"):
        GuidedMixup(place="features").check(wrapped("head"))
    method = GuidedMixup(**LOOKING)
    work = started(method, model=wrapped("head"))
    assert {method.mixed(work, batch(work)).place for _ in range(20)} == {"input", "latent"}


def test_one_modality_has_all_of_the_label():
    specs = {"audio": tiny_specs()["audio"]}
    model = Wrapped(
        nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)),
        specs=specs,
        classes=CLASSES,
        label_kind="multilabel",
        call=lambda network, inputs: network(inputs["audio"]),
        latent="2",
    )
    method = GuidedMixup(**LOOKING, place="input", per_modality=True, label_weight=0.2)
    work = started(method, model=model, data=TinyClips(24, "multilabel", specs))
    assert method._label_weights(1).tolist() == [1.0]
    assert method._label_weights(3).tolist() == pytest.approx([0.2, 0.4, 0.4])
    assert method.train_step(work, batch(work)).isfinite()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": "head"}, "`place` must be one of"),
        ({"alpha": 0.0}, "`alpha` must be a number above 0, got 0"),
        ({"alpha_across": -1.0}, "`alpha` must be a number above 0, got -1"),
        ({"refresh_every": 0}, "`refresh_every` must be at least 1, got 0"),
        ({"start": -1}, "`start` must be at least 0, got -1"),
        ({"measured": -1}, "`measured` must be at least 0, got -1"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"pairs": 0}, "`pairs` must be at least 1, got 0"),
        ({"segment": 1}, r"`segment` must be 0 \(off\) or at least 2"),
        ({"noise": -0.5}, "`noise` must not be negative, got -0.5"),
        ({"class_floor": 0.0}, "`class_floor` must be above 0, or convex classes are never drawn, got 0"),
        ({"intra": 1.5}, r"`intra` must lie in \[0, 1\], got 1.5"),
        ({"anchor": "random"}, r"`anchor` must be one of \['metric', 'uniform'\], got 'random'"),
        ({"partner": "nearest"}, r"`partner` must be one of \['metric', 'random'\], got 'nearest'"),
        ({"ratio": "beta"}, r"`ratio` must be one of \['metric', 'fixed'\], got 'beta'"),
        ({"convexity": "hard"}, r"`convexity` must be one of \['hardened', 'soft'\], got 'hard'"),
        ({"per_modality": True}, "`per_modality` needs a place where modalities are apart, got place='any'"),
        ({"label_weight": 0.2}, "`label_weight` 0.2 goes with `per_modality`, which is off"),
        ({"random_pairs": True, "anchor": "uniform"}, "`random_pairs` replaces anchors and partners"),
        ({"random_pairs": True, "partner": "random"}, "`random_pairs` replaces anchors and partners"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidedMixup(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, r"`share` must lie in \(0, 1\], got 0: for none, take guided-mixup"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"step_size": 0.0}, "`step_size` must be above 0 and `start_noise` not negative, got 0 and 2"),
        ({"intra": -1.0}, r"`intra` must lie in \[0, 1\], got -1"),
    ],
    ids=str,
)
def test_steps_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidedFGSM(**settings)
