"""Budgets and threat models: what may move, how far, and how it is written down."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import batch_of, tiny_specs
from hypothesis import given, settings
from hypothesis import strategies as st

from robustav.audit import excess
from robustav.classifier import Trace
from robustav.goals import Untargeted
from robustav.norms import NORMS
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel, parse_budget, parse_epsilons, snr_db

SPECS = tiny_specs()


@settings(max_examples=150, deadline=None)
@given(
    norm=st.sampled_from(list(NORMS)),
    epsilon=st.one_of(st.just(0.0), st.floats(1e-5, 10)),
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-4, 100),
    box=st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-0.25, 3.0), (-math.inf, math.inf)]),
)
def test_projection_lands_inside_ball_and_range_to_the_last_bit(norm, epsilon, seed, scale, box):
    """In float32, measured in float64, without any tolerance but that of the measurement."""
    low, high = box
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(3, 4, 7, generator=generator).clamp(low, high)
    budget = Budget(norm, epsilon, low=low, high=high)
    x = budget.project(clean, clean + scale * torch.randn(3, 4, 7, generator=generator))
    assert (budget.gauge(clean, x) <= 1 + 1e-9).all()
    assert ((low <= x) & (x <= high)).all()
    if epsilon == 0:
        assert torch.equal(x, clean)


@pytest.mark.parametrize("radius", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("norm", NORMS)
def test_long_inputs_stay_inside_too(norm, radius):
    """Ten frames of 224 x 224: the sums behind a length are long enough for their rounding to show."""
    clean = 0.1 * torch.randn(2, 1_505_280)
    budget = Budget(norm, radius, low=-10.0, high=10.0)
    x = budget.project(clean, clean + torch.randn(2, 1_505_280))
    assert (budget.gauge(clean, x) <= 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_idempotent_and_leaves_the_inside_alone(norm):
    clean = torch.rand(4, 9)
    budget = Budget(norm, 0.3, low=0.0, high=1.0)
    inside = budget.project(clean, clean + 0.01 * torch.randn(4, 9))
    torch.testing.assert_close(budget.project(clean, inside), inside, rtol=0, atol=1e-6)
    torch.testing.assert_close(budget.project(clean, clean), clean, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_gauge_is_length_over_radius_and_the_largest_modality_counts(norm):
    clean = batch_of(SPECS, 2)
    threat = ThreatModel({"audio": Budget(norm, 0.5), "visual": Budget(norm, 2.0, low=0.0)})
    moved = {m: x.clone() for m, x in clean.items()}
    moved["audio"][0, 0] += 0.25
    moved["visual"][1, 0, 0, 0, 0] += 0.125
    torch.testing.assert_close(threat.gauge(clean, moved), torch.tensor([0.5, 0.0625], dtype=torch.float64))
    assert threat.gauge(clean, clean).tolist() == [0, 0]


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.999), ("l2", 0.999), ("l1", 0.99)])
def test_rounding_costs_next_to_nothing_of_the_radius(norm, share):
    """Also where the radius is tiny beside the input's size: ten seconds of audio at an l1 radius of 0.01."""
    clean = 0.1 * torch.randn(2, 160_000)
    budget = Budget(norm, 0.01)
    far = budget.project(clean, budget.step(clean, clean, torch.randn(2, 160_000), 10.0))
    assert (budget.gauge(clean, far) <= 1).all()
    assert (budget.gauge(clean, far) > share).all()


@pytest.mark.parametrize("ratio", [-20.0, -3.0, 0.0, 5.0, 10.0, 30.0])
def test_loud_tones_keep_any_snr_that_is_asked_for(ratio):
    time = torch.arange(160_000) / 16_000
    clean = torch.stack([0.2 * torch.sin(2 * torch.pi * hertz * time) for hertz in (440, 1000)])
    budget = Budget("l2", snr_db=ratio)
    far = budget.project(clean, clean + 5 * torch.randn(2, 160_000))
    assert (excess(clean, far, budget) <= 1 + 1e-7).all()


def test_quiet_clips_get_the_snr_that_was_asked_for():
    clean = 1e-4 * torch.randn(2, 160_000)
    budget = Budget("l2", snr_db=60.0)
    far = budget.project(clean, clean + torch.randn(2, 160_000))
    torch.testing.assert_close(snr_db(clean, far), torch.full((2,), 60.0, dtype=torch.float64), rtol=0, atol=0.05)


def test_anything_is_infinitely_far_outside_an_empty_budget():
    clean = torch.zeros(2, 3)
    x = torch.tensor([[0.0, 0, 0], [0, 1e-3, 0]])
    assert Budget("linf", 0.0).gauge(clean, x).tolist() == [0, math.inf]


def test_scaling_scales_the_radius():
    threat = ThreatModel({"audio": Budget("linf", "4/255"), "visual": Budget("l2", snr_db=30.0, low=0.0)})
    half = threat.scaled(0.5)
    assert half.budgets["audio"].radius(torch.zeros(1)) == pytest.approx(2 / 255)
    clean = torch.rand(3, 5)
    torch.testing.assert_close(half.budgets["visual"].radius(clean), threat.budgets["visual"].radius(clean) / 2)
    by_clip = threat.scaled(torch.tensor([0.0, 1.0])).budgets if "visual" not in threat.budgets else None
    assert by_clip is None
    per_clip = Budget("linf", 0.1).scaled(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(per_clip.radius(torch.zeros(3, 1)), torch.tensor([0.0, 0.1, 0.2]))


def test_an_snr_budget_is_that_ratio_of_powers():
    """Printed SNR and budget are one definition; an independent computation agrees."""
    clean = 0.1 * torch.randn(4, 1000)
    budget = Budget("l2", snr_db=20.0)
    far = budget.project(clean, clean + torch.randn(4, 1000) * 5)
    power = (clean**2).mean(1) / ((far - clean) ** 2).mean(1)
    torch.testing.assert_close(10 * power.log10(), torch.full((4,), 20.0), rtol=0, atol=0.05)
    torch.testing.assert_close(snr_db(clean, far).float(), 10 * power.log10(), rtol=1e-4, atol=1e-4)


def test_snr_of_the_untouched_and_of_silence():
    clean = torch.tensor([[1.0, 0], [0, 0], [0, 0]])
    x = torch.tensor([[1.0, 0], [0, 0], [0.1, 0]])
    assert snr_db(clean, x)[:2].tolist() == [math.inf, math.inf]
    assert snr_db(clean, x)[2].item() == -math.inf


def test_silence_gets_no_snr_budget():
    clean = torch.zeros(1, 4)
    assert torch.equal(Budget("l2", snr_db=10.0).project(clean, torch.ones(1, 4)), clean)


def test_steps_of_l2_and_l1_are_not_spent_on_blocked_coordinates():
    clean = torch.tensor([[1.0, 0.0, 0.0]])
    gradient = torch.tensor([[100.0, 1.0, 0.0]])
    for norm in ("l2", "l1"):
        step = Budget(norm, 0.5).step(clean, clean, gradient, 1.0) - clean
        torch.testing.assert_close(step, torch.tensor([[0.0, 0.5, 0.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_inside_and_differ_by_sample(norm):
    clean = batch_of(SPECS, 3)
    threat = ThreatModel({"audio": Budget(norm, 0.2), "visual": Budget(norm, 0.1, low=0.0)})
    start = threat.start(clean, draws_for(0, "abc"))
    assert (threat.gauge(clean, start) <= 1).all()
    assert (threat.gauge(clean, start) > 0).all()
    delta = start["audio"] - clean["audio"]
    assert not torch.allclose(delta[0], delta[1])


def test_untouched_modalities_are_the_very_same_tensors():
    clean = batch_of(SPECS, 2)
    threat = ThreatModel({"audio": Budget("linf", 0.1)})
    for out in (
        threat.project(clean, clean),
        threat.step(clean, clean, clean),
        threat.start(clean, draws_for(0, "ab")),
    ):
        assert out["visual"] is clean["visual"]


@pytest.mark.parametrize(
    ("text", "epsilon", "snr", "norm"),
    [
        ("0.01", 0.01, None, "linf"),
        ("4/255", Fraction(4, 255), None, "linf"),
        ("1e-3", 0.001, None, "linf"),
        ("30dB", None, 30.0, "l2"),
        ("snr=30dB", None, 30.0, "l2"),
        ("snr=25.5", None, 25.5, "l2"),
        ("-5 db", None, -5.0, "l2"),
    ],
)
def test_budgets_as_people_write_them(text, epsilon, snr, norm):
    budget = parse_budget(text, SPECS["visual"])
    assert (budget.epsilon, budget.snr_db, budget.norm, budget.low) == (epsilon, snr, norm, 0.0)


def test_lists_of_epsilons():
    def written(texts):
        return [{m: b.snr_db or float(b.epsilon) for m, b in one.items()} for one in parse_epsilons(texts, SPECS)]

    assert written(["0.01"]) == [{"audio": 0.01, "visual": 0.01}]
    assert written(["0.001,0.01", "0.5"]) == [{"audio": e, "visual": e} for e in (0.001, 0.01, 0.5)]
    assert written(["audio=0.002,visual=1/2"]) == [{"audio": 0.002, "visual": 0.5}]
    assert written(["audio=0.002"]) == [{"audio": 0.002}]
    assert written(["snr=30dB"]) == [{"audio": 30.0, "visual": 30.0}]
    assert written(["audio=snr=30dB,visual=0.1"]) == [{"audio": 30.0, "visual": 0.1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ten", "epsilon must be a number or a fraction such as 4/255, got 'ten'"),
        ("1/0", "got '1/0'"),
        ("-0.1", "`epsilon` must be a finite number at or above 0 .*, got -0.1"),
        ("nan", "at or above 0 .*, got nan"),
        ("inf", "at or above 0 .*, got inf"),
        ("smell=0.1", r"names \['smell'\], but the model's modalities are \['audio', 'visual'\]"),
        ("audio=0.1,0.2", "one value a modality"),
        ("snr=30,20", "mixes ratios in dB with radii"),
        ("", "must be numbers"),
    ],
)
def test_epsilons_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_epsilons([text], SPECS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget("l3", 0.1), r"`norm` must be one of \['l1', 'l2', 'linf'\], got 'l3'"),
        (lambda: Budget("linf"), "either `epsilon` or `snr_db`, got epsilon=None and snr_db=None"),
        (lambda: Budget("l2", 0.1, snr_db=3.0), "either `epsilon` or `snr_db`"),
        (lambda: Budget("linf", snr_db=30.0), "goes with norm 'l2', got 30.0 with 'linf'"),
        (lambda: Budget("linf", 0.1, low=1.0, high=0.0), "`low` must be below `high`"),
        (lambda: Budget("linf", torch.ones(2, 2)), r"a number or \[batch\], got shape \[2, 2\]"),
        (lambda: Budget("linf", torch.tensor([0.1, -1.0])), "at or above 0 .*, got -1"),
        (lambda: ThreatModel({}), "at least one modality"),
    ],
)
def test_what_is_no_budget_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_budgets_are_printed_with_unit_fraction_and_level():
    assert Budget("linf", 0.01).words("amplitude") == "linf, 0.01 amplitude (-40.0 dBFS)"
    assert Budget("linf", "4/255").words("pixel value") == "linf, 4/255 = 0.0156863 pixel value"
    assert Budget("l2", snr_db=30.0).words("amplitude") == "l2, SNR at least 30 dB"


def test_a_ratio_of_powers_can_be_scaled_clip_by_clip():
    clean = torch.rand(3, 8) - 0.5
    budget, factor = Budget("l2", snr_db=20.0), torch.tensor([0.0, 0.5, 2.0])
    radius = clean.norm(dim=1) / 10
    torch.testing.assert_close(budget.scaled(factor).radius(clean), radius * factor)
    torch.testing.assert_close(budget.scaled(0.5).scaled(factor).radius(clean), radius * factor / 2)
    inside = budget.scaled(factor).project(clean, clean + 1)
    assert torch.equal(inside[0], clean[0])
    assert (excess(clean, inside, budget.scaled(factor))[1:] > 0.99).all()


def test_a_threat_to_some_clips_is_the_threat_to_each():
    clean = {"audio": torch.rand(4, 8) - 0.5}
    writable = {"audio": torch.rand(4, 8) > 0.5}
    epsilon, rows = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([3, 1, 1])
    trace = Trace({}, torch.rand(4, 2), torch.rand(4, 3))
    threat = ThreatModel({"audio": Budget("linf", epsilon)}).given(clean=trace, writable=writable)
    some = threat.at(rows)
    moved = {"audio": torch.ones(4, 8)}
    expected = threat.project(clean, moved)["audio"][rows]
    got = some.project({"audio": clean["audio"][rows]}, {"audio": moved["audio"][rows]})["audio"]
    assert torch.equal(got, expected)
    assert torch.equal(some.goal.clean.logits, trace.logits[rows])


def test_a_steered_threat_climbs_another_loss_for_the_same_success():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 0])
    trace = Trace({}, logits, logits)
    plain = ThreatModel({"audio": Budget("linf", 0.1)}, Untargeted("multiclass"))
    steered = plain.steered(lambda logits, labels, aim: logits.gather(1, aim[:, None])[:, 0], torch.tensor([2, 1]))
    assert steered.goal.loss(trace, labels).tolist() == [0.0, 3.0]
    assert steered.goal.reached(trace, labels).tolist() == plain.goal.reached(trace, labels).tolist() == [False, True]
    rows = torch.tensor([1])
    assert steered.at(rows).goal.loss(Trace({}, logits[rows], logits[rows]), labels[rows]).tolist() == [3.0]
