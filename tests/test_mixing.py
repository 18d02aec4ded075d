"""The mix-up family: ratios, mixes and labels by closed forms, and what each setting changes."""

import math

import pytest
import torch
from conftest import CLASSES, Linear, batch_of, tiny_fusion, tiny_specs
from torch import nn
from training_tools import TinyClips, batch, tiny_work

from robustav.classifier import InputSpec, Wrapped, waveform
from robustav.threat import Budget
from robustav.training.method import Batch, Method
from robustav.training.mixing import between, draw_place, draw_ratios, mixed_at, places_of, ratios
from robustav.training.mixups import (
    METHODS,
    BetweenClass,
    CutMix,
    GaussianNoise,
    IntraClass,
    ManifoldMixup,
    Mixup,
    NoisyFeatureMixup,
    box,
    class_mates,
    heard,
)

EVERY = [made() for made in METHODS.values()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wrapped(latent: str | None) -> Wrapped:
    specs = {"audio": waveform(0.004)}
    network = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    return Wrapped(
        network,
        specs=specs,
        classes=CLASSES,
        label_kind="multilabel",
        call=lambda network, inputs: network(inputs["audio"]),
        latent=latent,
    )


def seen_by(method: Method, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[Batch, dict, torch.Tensor]:
    """The batch given, and the inputs and targets that the method made of it."""
    work = tiny_work(**changes)
    given, caught = batch(work), {}
    trace, loss = work.trace, work.loss
    monkeypatch.setattr(work, "trace", lambda inputs: (caught.update(inputs=inputs), trace(inputs))[1])
    monkeypatch.setattr(
        work, "loss", lambda logits, targets: (caught.update(targets=targets), loss(logits, targets))[1]
    )
    method.begin(work)
    method.losses(work, given)
    return given, caught["inputs"], caught["targets"]


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_costs_what_plain_training_costs(method, label_kind):
    work = tiny_work(label_kind=label_kind)
    method.check(work.model)
    method.begin(work)
    before = [p.clone() for p in work.model.parameters()]
    for _ in range(3):
        loss = method.train_step(work, batch(work))
        assert loss.isfinite() and loss.ndim == 0
    assert (work.cost.forwards, work.cost.backwards) == (18, 18)
    assert any(not torch.equal(p, q) for p, q in zip(before, work.model.parameters(), strict=True))


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_draws_from_the_generator_alone(method):
    def once(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        work = tiny_work(generator=generator(seed))
        return method.losses(work, batch(work))

    assert torch.equal(once(1, 10), once(1, 20))
    assert not torch.equal(once(1, 10), once(2, 10))


@pytest.mark.parametrize(
    "method",
    [made(place="input") if "place" in made.__dataclass_fields__ else made() for made in METHODS.values()],
    ids=repr,
)
def test_inputs_stay_in_range_and_labels_are_soft(method, monkeypatch):
    full = {m: torch.where(x > x.mean(), 1.0, float(m == "visual") - 1.0) for m, x in batch_of(tiny_specs()).items()}
    work = tiny_work()
    work.data._inputs = {m: x.repeat(4, *[1] * (x.ndim - 1)) for m, x in full.items()}
    given, inputs, targets = seen_by(method, monkeypatch, data=work.data)
    for m, spec in work.model.specs.items():
        spec.check(m, inputs[m].detach())
    assert ((targets >= 0) & (targets <= 1)).all() and targets.shape == given.targets.shape
    assert torch.equal(given.inputs["audio"], work.data.inputs(given.rows)["audio"])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_ratios_have_the_moments_of_a_beta_distribution(alpha):
    drawn = ratios(alpha, torch.rand(20_000, generator=generator()))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_ratios_rise_with_the_number_drawn_and_take_alpha_clip_by_clip():
    uniform = torch.tensor([0.3, 0.3, 0.9])
    drawn = ratios(torch.tensor([1.0, 1e-9, 0.4]), uniform)
    assert drawn[0].item() == pytest.approx(0.3)
    assert drawn[1].item() == pytest.approx(0, abs=1e-6) and drawn[2] > 0.9
    together = ratios(torch.tensor([1.0, 0.4]), torch.tensor([[0.3, 0.6], [0.3, 0.6]]))
    assert together.shape == (2, 2) and together[0, 0].item() == pytest.approx(0.3)


def test_one_ratio_a_batch_or_one_a_clip():
    assert len(set(draw_ratios(1.0, 6, generator(), per_clip=True).tolist())) == 6
    assert len(set(draw_ratios(1.0, 6, generator(), per_clip=False).tolist())) == 1


def test_a_mix_is_linear_between_two_clips():
    work = tiny_work(Linear(tiny_specs(), 3))
    given, partner, ratio = batch(work), torch.tensor([1, 0, 3, 2, 4, 5]), torch.linspace(0, 1, 6)
    logits = work.trace(given.inputs).logits
    for place in ("input", "features", "latent"):
        mixed = mixed_at(work, given, place, partner, ratio)
        assert mixed.place == place
        torch.testing.assert_close(mixed.targets, between(given.targets, given.targets[partner], ratio))
        rest = {
            "input": lambda parts: work.trace(parts).logits,
            "features": lambda parts: work.model.finish(parts).logits,
            "latent": lambda parts: work.model.classify(parts["latent"]),
        }[place]
        torch.testing.assert_close(rest(mixed.parts), between(logits, logits[partner], ratio), rtol=1e-4, atol=1e-4)


def test_mixup_keeps_labels_that_both_clips_have(monkeypatch):
    work = tiny_work()
    work.data.targets[:] = torch.tensor([1.0, 0.0, 0.0])
    *_, targets = seen_by(Mixup(), monkeypatch, data=work.data)
    assert torch.equal(targets, torch.tensor([[1.0, 0.0, 0.0]]).expand(6, 3))


@pytest.mark.parametrize("method", [Mixup(per_clip=False), Mixup(), Mixup(alpha=5.0)], ids=repr)
def test_mixup_settings_decide_the_ratios(method, monkeypatch):
    work = tiny_work()
    work.data._inputs = {m: torch.zeros_like(x) for m, x in work.data._inputs.items()}
    work.data._inputs["audio"] += torch.arange(24)[:, None] / 24
    given, inputs, _ = seen_by(method, monkeypatch, data=work.data)
    drawn = generator(7)
    partner = torch.randperm(6, generator=drawn)
    ratio = draw_ratios(method.alpha, 6, drawn, method.per_clip)
    expected = ratio * given.rows / 24 + (1 - ratio) * partner / 24
    torch.testing.assert_close(inputs["audio"][:, 0], expected)


def test_both_sounds_are_heard_by_their_share_however_loud():
    time = torch.arange(1600) / 1600
    low, high = torch.sin(2 * torch.pi * 40 * time)[None], torch.sin(2 * torch.pi * 200 * time)[None]

    def levels(mix: torch.Tensor) -> tuple[float, float]:
        spectrum = torch.fft.rfft(mix[0]).abs()
        return spectrum[40].item(), spectrum[200].item()

    for loudness in (0.01, 0.1, 0.5):
        first, second = levels(heard(loudness * low, 0.5 * high, torch.tensor([0.5])))
        assert first == pytest.approx(second, rel=1e-4)
    first, second = levels(heard(0.2 * low, 0.4 * high, torch.tensor([0.75])))
    assert first / second == pytest.approx(3, rel=1e-4)


def test_equally_loud_sounds_mix_at_equal_power():
    x, y = torch.randn(2, 1, 40_000, generator=generator()) * 0.1
    for ratio in (0.1, 0.5, 0.8):
        mix = heard(x, y, torch.tensor([ratio]))
        assert mix.square().mean().item() == pytest.approx(0.01, rel=0.05)


def test_a_silent_clip_is_mixed_by_the_plain_ratio():
    x, silence = torch.full((1, 100), 0.5), torch.zeros(1, 100)
    plain = 0.25 / math.hypot(0.25, 0.75)
    torch.testing.assert_close(heard(x, silence, torch.tensor([0.25])), plain * x)
    assert heard(silence, silence, torch.tensor([0.25])).abs().max() == 0


def test_a_sum_too_loud_is_turned_down_not_cut():
    x, y = torch.tensor([[1.0, -1.0, 0.5, 0.0]]), torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    mix = heard(x, y, torch.tensor([0.5]))
    assert mix.abs().max().item() == pytest.approx(1)
    assert mix[0, 2] / mix[0, 0] == pytest.approx(0.5)


def test_between_class_mixes_pictures_plainly(monkeypatch):
    given, inputs, targets = seen_by(BetweenClass(), monkeypatch)
    drawn = generator(7)
    partner = torch.randperm(6, generator=drawn)
    ratio = torch.rand(6, generator=drawn)
    torch.testing.assert_close(
        inputs["visual"], between(given.inputs["visual"], given.inputs["visual"][partner], ratio)
    )
    torch.testing.assert_close(targets, between(given.targets, given.targets[partner], ratio))
    assert not torch.allclose(inputs["audio"], between(given.inputs["audio"], given.inputs["audio"][partner], ratio))


def test_a_box_has_its_share_and_is_cut_at_the_edges():
    middle = torch.full((3, 2), 0.5)
    share = torch.tensor([0.0, 0.25, 1.0])
    for shape in ((100,), (4, 3, 10, 10)):
        inside = box(torch.Size(shape), share, middle).float().flatten(1).mean(1)
        torch.testing.assert_close(inside, share, atol=0.03, rtol=0)
    corner = box(torch.Size((100,)), torch.tensor([0.5]), torch.tensor([[0.0, 0.0]]))
    assert corner.sum() == 25 and corner[0, :25].all()
    picture = box(torch.Size((2, 3, 8, 8)), torch.tensor([0.25]), torch.tensor([[0.5, 0.0]]))
    assert picture.shape == (1, 1, 1, 8, 8) and picture[0, 0, 0, 2:6, :2].all() and picture.sum() == 8


def test_cutmix_pastes_and_labels_by_what_is_left(monkeypatch):
    work = tiny_work()
    work.data._inputs = {
        m: torch.arange(24.0).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x) / 24 for m, x in work.data._inputs.items()
    }
    work.data.targets = torch.eye(24)[:, :3]
    work.data.targets[:3] = torch.eye(3)
    given, inputs, targets = seen_by(CutMix(), monkeypatch, data=work.data)
    kept = []
    for m, x in inputs.items():
        own = x == given.inputs[m]
        partner = torch.randperm(6, generator=generator(7))
        assert torch.equal(torch.where(own, given.inputs[m], given.inputs[m][partner]), x)
        kept.append(own.float().flatten(1).mean(1))
    alone = partner == torch.arange(6)
    share = torch.stack(kept).mean(0)
    for clip in (0, 1, 2):
        if not alone[clip]:
            assert targets[clip, clip].item() == pytest.approx(share[clip].item(), abs=1e-6)


def test_class_mates_share_a_label():
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    drawn = torch.stack([class_mates(targets, generator(seed)) for seed in range(40)])
    assert set(drawn[:, 1].tolist()) == {0, 2}
    assert set(drawn[:, 0].tolist()) == {1} and set(drawn[:, 2].tolist()) == {1}
    assert set(drawn[:, 3].tolist()) == {3} and set(drawn[:, 4].tolist()) == {4}


def test_intra_class_keeps_the_label(monkeypatch):
    given, inputs, targets = seen_by(IntraClass(), monkeypatch, label_kind="multiclass")
    assert torch.equal(targets, given.targets)
    assert not torch.equal(inputs["audio"], given.inputs["audio"])


@pytest.mark.parametrize(("norm", "length"), [("linf", None), ("l2", 2), ("l1", 1)])
def test_noise_is_as_large_as_the_budget(norm, length):
    budget = Budget(norm, 0.1, low=-9, high=9)
    specs = {"audio": InputSpec((4000,), -9.0, 9.0, "amplitude", 16_000)}
    work = tiny_work(Linear(specs, 3), budgets={"audio": budget}, data=TinyClips(6, "multilabel", specs))
    x = torch.zeros(6, 4000)
    noise = GaussianNoise(radii=2.0)._noisy("audio", x, work)
    measured = noise.std().item() if length is None else noise.norm(p=length, dim=1).mean().item()
    assert measured == pytest.approx(0.2, rel=0.03)


def test_noise_leaves_alone_what_has_no_budget_unless_it_has_a_unit_of_its_own(monkeypatch):
    only = {"audio": Budget(epsilon=0.05)}
    given, inputs, _ = seen_by(GaussianNoise(), monkeypatch, budgets=only)
    assert torch.equal(inputs["visual"], given.inputs["visual"])
    moved = inputs["audio"] - given.inputs["audio"]
    assert moved.std().item() == pytest.approx(0.05, rel=0.1)
    given, inputs, _ = seen_by(GaussianNoise(sigma=0.01), monkeypatch, budgets=only)
    for m, x in inputs.items():
        assert (x - given.inputs[m]).std().item() == pytest.approx(0.01, rel=0.1)


def test_noise_of_an_snr_follows_each_clip():
    work = tiny_work(budgets={"audio": Budget("l2", snr_db=20.0)})
    x = torch.tensor([[0.5], [0.05]]).expand(2, 64)
    noise = torch.stack([GaussianNoise()._noisy("audio", x, work) - x for _ in range(200)])
    assert (noise[:, 0].norm(dim=1).mean() / noise[:, 1].norm(dim=1).mean()).item() == pytest.approx(10, rel=0.05)
    assert noise[:, 0].norm(dim=1).mean().item() == pytest.approx(0.1 * 0.5 * 8, rel=0.05)


def test_noisy_features_add_and_multiply():
    x = torch.tensor([[10.0, 0.0], [10.0, 0.0]]).expand(2, 2).repeat(500, 1)
    noisy = NoisyFeatureMixup(added=0.0, multiplied=0.3)._noisy(x, generator())
    assert noisy[:, 0].std().item() == pytest.approx(3, rel=0.1) and noisy[:, 1].abs().max() == 0
    noisy = NoisyFeatureMixup(added=0.2, multiplied=0.0)._noisy(x, generator()) - x
    assert noisy.std(0).tolist() == pytest.approx([1.0, 1.0], rel=0.1)


def test_any_place_is_one_of_the_models():
    model, drawn = tiny_fusion(), generator()
    places = [draw_place(model, "any", drawn) for _ in range(60)]
    assert set(places) == {"input", "features", "latent"} and min(map(places.count, places)) > 10
    assert draw_place(model, "latent", drawn) == "latent"
    assert places_of(wrapped("2")) == ("input", "latent") and places_of(wrapped(None)) == ("input",)


@pytest.mark.parametrize("place", ["input", "features", "latent"])
def test_manifold_mixup_mixes_where_it_is_told(place, monkeypatch):
    work = tiny_work()
    given = batch(work)
    drawn = generator(7)
    torch.rand((), generator=drawn)
    partner, uniform = torch.randperm(6, generator=drawn), torch.rand(6, generator=drawn)
    losses = ManifoldMixup(place=place).losses(work, given)
    again = tiny_work()
    mixed = mixed_at(again, given, place, partner, ratios(2.0, uniform))
    ends = {
        "input": lambda parts: again.trace(parts).logits,
        "features": lambda parts: again.model.finish(parts).logits,
        "latent": lambda parts: again.model.classify(parts["latent"]),
    }
    torch.testing.assert_close(losses, again.loss(ends[place](mixed.parts), mixed.targets))


def test_a_wrapped_network_says_what_is_missing():
    ManifoldMixup(place="latent").check(wrapped("2"))
    ManifoldMixup(place="input").check(wrapped(None))
    for place in ("latent", "any"):
        with pytest.raises(
            ValueError, match=f"`place` '{place}' mixes latents, and this wrapped network's latent is not"
        ):
            ManifoldMixup(place=place).check(wrapped(None))
    with pytest.raises(ValueError, match="`place` 'features' needs an encoder a modality"):
        NoisyFeatureMixup(place="features").check(wrapped("2"))
    work = tiny_work(wrapped("2").train())
    assert ManifoldMixup().train_step(work, batch(work)).isfinite()


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (Mixup, {"alpha": 0.0}, "`alpha` must be a number above 0, got 0"),
        (CutMix, {"alpha": math.inf}, "`alpha` must be a number above 0, got inf"),
        (IntraClass, {"alpha": -1.0}, "`alpha` must be a number above 0, got -1"),
        (
            ManifoldMixup,
            {"place": "head"},
            r"`place` must be one of \['any', 'input', 'features', 'latent'\], got 'head'",
        ),
        (NoisyFeatureMixup, {"added": -0.1}, "`added` and `multiplied` must not be negative, got -0.1 and 0.2"),
        (GaussianNoise, {"sigma": -1.0}, "`sigma` must not be negative and `radii` must be above 0, got -1 and 1"),
        (GaussianNoise, {"sigma": 0.1, "radii": 2.0}, "`sigma` 0.1 sets the noise, so `radii` 2 would do nothing"),
    ],
)
def test_settings_that_cannot_be(made, settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)
