"""Measures: every resample equals drawing clips again and rebuilding the pairs; skipped classes stay out of means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustav.geometry import measure as measure_module
from robustav.geometry.measure import MACRO, Measure, Score, gather, score
from robustav.metrics.convexity import mean_flip
from robustav.metrics.intervals import bootstrap_weights, percentile_interval

AT = {"metric": "m", "layer": "latent", "part": "fused"}


def units(seed, owners, clips=6, count=14):
    draw = np.random.default_rng(seed)
    return draw, draw.integers(clips, size=(count, owners)), bootstrap_weights(clips, 30, seed=seed)


def copied(clips, weights):
    """Which units a resample holds: each once for every way to pick its clips among the clips drawn."""
    drawn = np.repeat(np.arange(len(weights)), weights)
    rows = []
    for unit, owners in enumerate(clips):
        copies = 1
        for owner in owners:
            copies *= int((drawn == owner).sum())
        rows += [unit] * copies
    return rows


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), owners=st.sampled_from([1, 2]), nans=st.booleans())
def test_a_score_is_the_same_as_drawing_clips_and_rebuilding_their_pairs(seed, owners, nans):
    draw, clips, weights = units(seed, owners)
    numerator, denominator = draw.normal(size=14), draw.integers(0, 3, size=14).astype(float)
    if nans:
        numerator[draw.integers(14, size=2)] = np.nan
        denominator[draw.integers(14)] = np.nan
    found = score(numerator, denominator, clips, weights)
    present = ~np.isnan(numerator + denominator)
    assert found.units == present.sum()
    assert found.clips == len(set(clips[present].ravel()))
    assert found.value == pytest.approx(numerator[present].sum() / denominator[present].sum())
    expected = []
    for row in weights:
        held = [unit for unit in copied(clips, row) if present[unit]]
        below = denominator[held].sum()
        expected.append(numerator[held].sum() / below if below else np.nan)
    moved = np.array(expected) - found.value
    # Pairs vary too much when clips are drawn, so their resamples are pulled in, all by one factor.
    factor = np.nanstd(found.resampled) / np.nanstd(expected)
    assert factor == pytest.approx(1) if owners == 1 else 3**-0.5 - 1e-9 <= factor <= 1 + 1e-9
    np.testing.assert_allclose(found.resampled - found.value, factor * moved, atol=1e-9)


def test_a_segment_that_never_flips_adds_its_length_and_one_that_does_not_count_adds_nothing():
    distances, lengths = torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([4.0, 2.0, 9.0])
    numerator, denominator = (x.double().numpy() for x in mean_flip(distances, lengths))
    found = score(numerator, denominator, np.array([[0, 1], [1, 2], [3, 4]]), np.ones((2, 5), dtype=int))
    assert found.value == 3  # 1 + 2 gone, one rejection met
    assert (found.units, found.clips) == (2, 3)


@pytest.mark.parametrize(("clips", "pairs"), [(200, 100), (200, 1000), (60, 2000)])
def test_intervals_of_pairs_are_as_wide_as_they_should_be(clips, pairs):
    """Few pairs vary on their own, many by their clips; the spread must be right for both."""
    draw = np.random.default_rng(0)
    values, spreads = [], []
    for _ in range(150):
        of_clip = draw.normal(size=clips)
        owners = np.stack([draw.permutation(clips)[:2] for _ in range(pairs)])
        numerator = of_clip[owners].sum(1) + draw.normal(size=pairs)
        weights = draw.multinomial(clips, np.full(clips, 1 / clips), size=200)
        found = score(numerator, np.ones(pairs), owners, weights)
        values.append(found.value)
        spreads.append(found.resampled.std())
    assert np.mean(spreads) == pytest.approx(np.std(values), rel=0.15)


def test_a_score_does_not_depend_on_how_much_is_worked_on_at_once(monkeypatch):
    draw, clips, weights = units(3, 2)
    values = draw.normal(size=14)
    whole = score(values, np.ones(14), clips, weights)
    monkeypatch.setattr(measure_module, "CHUNK", 14 * 4)  # 30 resamples, four at a time
    parts = score(values, np.ones(14), clips, weights)
    np.testing.assert_allclose(whole.resampled, parts.resampled, atol=1e-14)
    assert whole.value == parts.value


def test_units_without_a_number_are_left_out_and_nothing_left_is_nan():
    weights = np.array([[1, 1, 1], [0, 3, 0], [0, 0, 3]])
    clips = np.array([[0], [1], [2]])
    found = score(np.array([1.0, np.nan, 3.0]), np.array([1.0, 1.0, np.inf]), clips, weights)
    assert found.value == 1
    assert (found.clips, found.units) == (1, 1)
    np.testing.assert_array_equal(found.resampled, [1, np.nan, np.nan])
    for numerator, denominator in ((np.full(3, np.nan), np.ones(3)), (np.ones(3), np.zeros(3)), (np.ones(0),) * 2):
        found = score(numerator, denominator, clips[: len(numerator)], weights)
        assert np.isnan(found.value)
        assert np.isnan(found.resampled).all()


def made(values, resampled=None, names=None, skipped=None, **at):
    values = np.asarray(values, dtype=float)
    names = names or tuple("abcdef"[: len(values)])
    resampled = np.tile(values, (3, 1)) if resampled is None else np.asarray(resampled, dtype=float)
    counts = np.arange(21, len(values) + 21)
    where = {**AT, "space": "", "setting": "", **at}
    return Measure(**where, names=names, values=values, resampled=resampled, clips=counts, units=2 * counts,
                   skipped=skipped or {})  # fmt: skip


def test_the_macro_mean_is_over_the_classes_that_were_not_skipped():
    measure = made([1, np.nan, 3], [[1, 9, 5], [2, 9, np.nan], [4, np.nan, 4]])
    assert measure.macro == 2
    np.testing.assert_array_equal(measure.macro_resampled, [3, 2.5, 4])  # a class that is lacking keeps its value
    nothing = made([np.nan, np.nan])
    assert np.isnan(nothing.macro)
    assert np.isnan(nothing.macro_resampled).all()


def test_a_class_without_end_is_not_skipped():
    """Half of a class's segments never flip: leaving it out would call the model less robust than it is."""
    measure = made([1, np.inf, np.nan], [[1, 2, 5], [1, np.inf, 5], [1, np.inf, 5]])
    assert measure.macro == np.inf
    np.testing.assert_array_equal(measure.macro_resampled, [1.5, np.inf, np.inf])


def test_gathering_puts_scores_and_reasons_in_order():
    one = Score(0.5, np.array([0.4, 0.6]), 3, 7)
    nothing = Score(float("nan"), np.full(2, np.nan), 0, 0)
    measure = gather(["a", "b", "c"], ["too few", one, nothing], 2, **AT, setting="k=3")
    assert (measure.metric, measure.layer, measure.part, measure.space) == ("m", "latent", "fused", "")
    assert (measure.setting, measure.names) == ("k=3", ("a", "b", "c"))
    np.testing.assert_array_equal(measure.values, [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(measure.resampled, [[np.nan, 0.4, np.nan], [np.nan, 0.6, np.nan]])
    np.testing.assert_array_equal(measure.clips, [0, 3, 0])
    np.testing.assert_array_equal(measure.units, [0, 7, 0])
    assert measure.skipped == {"a": "too few", "c": "nothing to measure: no pair or clip counts"}


def test_rows_have_each_class_with_its_interval_and_the_macro_mean_last():
    resampled = np.random.default_rng(0).normal(size=(200, 3))
    rows = made([1, np.nan, 3], resampled, skipped={"b": "too few"}, setting="k=3").rows()
    assert list(rows["class"]) == ["a", "b", "c", MACRO]
    np.testing.assert_array_equal(rows["value"], [1, np.nan, 3, 2])
    for i in range(3):
        ends = percentile_interval(resampled[:, i])
        assert (rows["low"][i], rows["high"][i]) == (ends.low, ends.high)
    ends = percentile_interval(resampled[:, [0, 2]].mean(1))
    assert (rows["low"][3], rows["high"][3]) == (ends.low, ends.high)
    assert list(rows["clips"][:3]) == [21, 22, 23] and np.isnan(rows["clips"][3])
    assert list(rows["units"]) == [42, 44, 46, 132]
    assert list(rows["skipped"]) == ["", "too few", "", "1 of 3 classes skipped"]
    assert set(rows["setting"]) == {"k=3"} and set(rows["metric"]) == {"m"} and set(rows["layer"]) == {"latent"}


def test_what_rests_on_few_clips_has_no_interval():
    resampled = np.random.default_rng(0).normal(size=(200, 3))
    few = made([1, 2, 3], resampled)
    few.clips[:] = [19, 20, 5]
    rows = few.rows()
    assert list(rows["low"].isna()) == [True, False, True, False]
    few.clips[1] = 19
    assert few.rows()["high"].isna().all()


def test_a_rare_class_does_not_leave_the_macro_mean_to_a_few_resamples():
    draw = np.random.default_rng(0)
    resampled = draw.normal(size=(1000, 3))
    resampled[:, 1:][draw.random((1000, 2)) < 0.9] = np.nan
    measure = made([0, 0, 0], resampled)
    assert np.isfinite(measure.macro_interval.low)
    assert np.isfinite(measure.interval(0).low)
    assert np.isnan(measure.interval(1).low)  # nine in ten resamples say nothing of it


def test_what_is_measured_of_a_set_is_a_single_row():
    rows = made([0.7], names=("all clips",)).rows()
    assert list(rows["class"]) == ["all clips"]
    assert list(made([0.7, 0.1]).rows()["skipped"]) == ["", "", ""]


@pytest.mark.parametrize(
    ("layer", "part", "where"),
    [
        ("features", "audio", "audio features"),
        ("latent", "fused", "latent"),
        ("norm", "norm", "norm"),
        ("logits", "", "logits"),
        ("features", "audio+visual", "audio+visual features"),
    ],
)
def test_a_place_is_named_by_layer_and_by_part_where_there_are_several(layer, part, where):
    assert made([1], layer=layer, part=part).where == where


def test_the_key_says_everything_that_tells_measures_apart():
    assert made([1]).key == "m at latent"
    assert made([1], space="unit").key == "m at latent (unit)"
    assert made([1], space="unit", setting="k=3").key == "m at latent (unit, k=3)"
    assert made([1], part="audio", setting="k=3").key == "m at audio latent (k=3)"
