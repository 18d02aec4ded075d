"""Claims of validity: null data rarely make one, planted relations do, and what runs through a control does not."""

from itertools import permutations

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.stats import binom, kstest, spearmanr

from robustav.metrics import validity
from robustav.metrics.correlation import partial_spearman, spearman
from robustav.metrics.intervals import (
    Interval,
    bca_interval,
    bootstrap_weights,
    centred_interval,
    holm,
    percentile_interval,
)
from robustav.metrics.validity import across, claim, class_draws, jackknife, permutation_p, two_level, within


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def repeated(values, resamples):
    """The values of the clips themselves in every resample: a bootstrap of classes alone."""
    return np.broadcast_to(values, (resamples, *values.shape))


def test_within_is_the_mean_over_the_models_that_have_a_coefficient():
    metric, target, controls = noise(4, 20, seed=1), noise(4, 20, seed=2), noise(4, 20, 2, seed=3)
    metric[2] = 1.0
    models = [0, 1, 3]
    assert within(metric, target) == pytest.approx(np.mean([spearmanr(metric[m], target[m]).statistic for m in models]))
    expected = np.mean([partial_spearman(metric[m], target[m], controls[m]) for m in models])
    assert within(metric, target, controls) == pytest.approx(expected)
    assert within(metric[0], target[0]) == pytest.approx(spearmanr(metric[0], target[0]).statistic)
    assert np.isnan(within(metric[2:3], target[2:3]))


def test_draws_of_classes_are_with_replacement_and_depend_on_their_seed_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002  (it is the legacy state that must not move)
    draws = class_draws(30, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert draws.shape == (2000, 30) and draws.min() == 0 and draws.max() == 29
    counts = np.bincount(np.apply_along_axis(np.bincount, 1, draws, minlength=30).ravel(), minlength=5)[:5]
    np.testing.assert_allclose(counts / draws.size, binom.pmf(range(5), 30, 1 / 30), atol=0.01)
    np.testing.assert_array_equal(class_draws(30, 7, seed=3), draws[:7])
    assert (class_draws(30, 7, seed=4) != draws[:7]).any()


def test_draws_of_classes_do_not_repeat_the_draws_of_clips():
    clips = bootstrap_weights(30, 50, seed=3)
    classes = np.apply_along_axis(np.bincount, 1, class_draws(30, 50, seed=3), minlength=30)
    assert not (clips == classes).all(axis=1).any()
    assert abs(np.corrcoef(clips.ravel(), classes.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("controls", [0, 2])
def test_two_level_draws_the_classes_of_the_same_resample(controls):
    metric, target, known = noise(2, 15, 12, seed=1), noise(2, 15, 12, seed=2), noise(2, 15, 12, controls, seed=3)
    draws = class_draws(12, 15, seed=0)
    values = two_level(metric, target, draws, known if controls else None)
    for row, places in enumerate(draws):
        each = [partial_spearman(metric[m, row, places], target[m, row, places], known[m, row, places]) for m in (0, 1)]
        assert values[row] == pytest.approx(np.mean(each), abs=1e-12)
    one = two_level(metric[1], target[1], draws, known[1] if controls else None)
    np.testing.assert_allclose(one, two_level(metric[1:], target[1:], draws, known[1:] if controls else None))


def test_drawing_every_class_once_gives_the_coefficient_itself():
    metric, target, known = noise(3, 1, 12, seed=1), noise(3, 1, 12, seed=2), noise(3, 1, 12, 2, seed=3)
    once = np.arange(12)[None, ::-1]
    assert two_level(metric, target, once)[0] == pytest.approx(within(metric[:, 0], target[:, 0]))
    assert two_level(metric, target, once, known)[0] == pytest.approx(within(metric[:, 0], target[:, 0], known[:, 0]))


def test_memory_limit_does_not_change_results(monkeypatch):
    metric, target, known = noise(2, 50, 12, seed=1), noise(2, 50, 12, seed=2), noise(2, 50, 12, 2, seed=3)
    draws = class_draws(12, 50, seed=0)

    def both():
        p = permutation_p(metric[:, 0], target[:, 0], shuffles=50, seed=0, controls=known[:, 0])
        return np.append(two_level(metric, target, draws, known), p)

    expected = both()
    for limit in (1, 8 * validity.ARRAYS_PER_CHUNK * 2 * 4 * 12 * 7):
        monkeypatch.setattr(validity, "CHUNK_BYTES", limit)
        np.testing.assert_allclose(both(), expected, rtol=1e-12)


def test_a_resample_of_too_few_different_classes_has_no_value():
    metric, target = noise(3, 6, seed=1), noise(3, 6, seed=2)
    draws = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 2, 2], [0, 1, 2, 3, 3, 3]])
    np.testing.assert_array_equal(np.isnan(two_level(metric, target, draws)), [True, False, False])
    known = noise(3, 6, 1, seed=3)
    np.testing.assert_array_equal(np.isnan(two_level(metric, target, draws, known)), [True, True, False])
    metric[1, 2] = np.nan  # present classes count
    np.testing.assert_array_equal(np.isnan(two_level(metric, target, draws)), [True, True, False])


def test_skipped_classes_are_left_out_of_every_step():
    metric, target, known = noise(14, seed=1), noise(14, seed=2), noise(14, 2, seed=3)
    metric[2], target[5], known[9, 1] = np.nan, np.nan, np.nan
    kept = np.delete(np.arange(14), [2, 5, 9])
    assert within(metric, target, known) == pytest.approx(within(metric[kept], target[kept], known[kept]))
    expected = permutation_p(metric[kept], target[kept], shuffles=99, seed=0, controls=known[kept])
    assert permutation_p(metric, target, shuffles=99, seed=0, controls=known) == expected
    draws = class_draws(14, 30, seed=0)
    values = two_level(repeated(metric, 30), repeated(target, 30), draws, repeated(known, 30))
    for value, places in zip(values, draws, strict=True):
        present = places[np.isin(places, kept)]
        enough = len(set(present)) >= 5
        assert np.isnan(value) != enough
        assert not enough or value == pytest.approx(
            partial_spearman(metric[present], target[present], known[present]), abs=1e-12
        )


def test_nothing_depends_on_the_scale_of_anything():
    metric, target, known = noise(12, seed=1), noise(12, seed=2), noise(12, 2, seed=3)
    others = np.exp(metric), np.arctan(target), np.column_stack([known[:, 0] ** 3, -known[:, 1]])

    def everything(metric, target, known):
        values = two_level(repeated(metric, 40), repeated(target, 40), class_draws(12, 40, seed=0), repeated(known, 40))
        return [*values, permutation_p(metric, target, shuffles=99, seed=0, controls=known)]

    np.testing.assert_allclose(everything(*others), everything(metric, target, known), atol=1e-10)


def test_across_has_models_for_units():
    metric, target, known = noise(8, 20, seed=1), noise(8, 20, seed=2), noise(8, 20, 1, seed=3)
    draws = class_draws(8, 20, seed=0)
    values, partial = across(metric, target, draws), across(metric, target, draws, known)
    for row, models in enumerate(draws):
        if len(set(models)) >= 4:
            assert values[row] == pytest.approx(spearman(metric[models, row], target[models, row]), abs=1e-12)
            expected = partial_spearman(metric[models, row], target[models, row], known[models, row])
            assert partial[row] == pytest.approx(expected, abs=1e-12)


def test_jackknife_leaves_out_each_unit_in_turn():
    values = noise(9)
    means = jackknife(lambda kept: values[kept].mean(), 9)
    np.testing.assert_allclose(means, (values.sum() - values) / 8)


def test_exact_p_of_few_classes():
    # 1 of 5! orders is as far as a perfect one, and 1 as far on the other side.
    assert permutation_p(np.arange(5), -np.arange(5), seed=0) == pytest.approx(2 / 120)
    metric, target = noise(6, seed=1), noise(6, seed=2)
    every = [abs(spearmanr(metric, target[list(order)]).statistic) for order in permutations(range(6))]
    expected = np.mean(np.array(every) >= abs(spearmanr(metric, target).statistic) - 1e-9)
    assert permutation_p(metric, target, seed=0) == permutation_p(metric, target, seed=1) == pytest.approx(expected)
    known = noise(6, 1, seed=3)
    fitted = np.column_stack([np.ones(6), spearman_ranks(known[:, 0])])
    hat = fitted @ np.linalg.pinv(fitted)
    ranked = spearman_ranks(target)
    observed, every = freedman_lane(metric, ranked, hat, range(6)), []
    for order in permutations(range(6)):
        every.append(freedman_lane(metric, ranked, hat, order))
    assert observed == pytest.approx(partial_spearman(metric, target, known))
    expected = np.mean(np.abs(every) >= abs(observed) - 1e-9)
    assert permutation_p(metric, target, seed=0, controls=known) == pytest.approx(expected)


def spearman_ranks(values):
    return np.argsort(np.argsort(values)) + 1.0


def freedman_lane(metric, ranked_target, hat, order):
    """The partial coefficient of one order, by making the target anew and regressing it, step by step."""
    remade = hat @ ranked_target + (ranked_target - hat @ ranked_target)[list(order)]
    first, second = (values - hat @ values for values in (spearman_ranks(metric), remade))
    return np.corrcoef(first, second)[0, 1]


def test_shuffled_p_approaches_the_exact_one(monkeypatch):
    metric, target, known = noise(7, seed=1), noise(7, seed=5), noise(7, 1, seed=3)
    for controls in (None, known):
        exact = permutation_p(metric, target, seed=0, controls=controls)
        with monkeypatch.context() as patch:
            patch.setattr(validity, "EXACT_UP_TO", 0)
            shuffled = permutation_p(metric, target, seed=0, controls=controls)
        assert shuffled == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


@pytest.mark.parametrize("setting", ["plain", "controls", "models"])
def test_p_is_uniform_on_null_data(setting):
    p_values = []
    for run in range(200):
        shared = noise(12, 1, seed=3 * run)
        models = (3,) if setting == "models" else ()
        metric, target = noise(*models, 12, seed=3 * run + 1), noise(*models, 12, seed=3 * run + 2)
        if setting == "models":  # the models resemble each other, and so do their coefficients
            metric, target = metric * 0.5 + noise(12, seed=10_000 + run), target * 0.5 + noise(12, seed=20_000 + run)
        if setting == "controls":
            metric, target = metric + 0.5 * shared[:, 0], target + 0.5 * shared[:, 0]
        controls = shared if setting == "controls" else None
        p_values.append(permutation_p(metric, target, shuffles=99, seed=run, controls=controls))
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) <= binom.ppf(0.999, 200, 0.05) / 200


def test_p_of_a_planted_relation_survives_holm_among_noise():
    target = noise(40, seed=0)
    metrics = [noise(40, seed=seed) for seed in range(1, 10)] + [np.exp(target + noise(40, seed=10))]
    p_values = np.array([permutation_p(metric, target, shuffles=2000, seed=0) for metric in metrics])
    adjusted = holm(p_values)
    assert p_values[-1] == pytest.approx(1 / 2001)
    np.testing.assert_array_equal(adjusted < 0.05, [False] * 9 + [True])


def test_p_leaves_out_models_without_a_coefficient_and_classes_without_a_value():
    metric, target = noise(3, 12, seed=1), noise(3, 12, seed=2)
    expected = permutation_p(metric[:2], target[:2], shuffles=99, seed=0)
    for nothing in (1.0, np.nan):
        metric[2] = nothing
        assert permutation_p(metric, target, shuffles=99, seed=0) == expected
    metric[0, 4] = np.nan
    kept = np.delete(np.arange(12), 4)
    expected = permutation_p(metric[:2, kept], target[:2, kept], shuffles=99, seed=0)
    assert permutation_p(metric, target, shuffles=99, seed=0) == expected
    assert np.isnan(permutation_p(metric[2], target[2], seed=0))
    assert np.isnan(permutation_p(metric[1, :2], target[1, :2], seed=0))
    assert np.isnan(permutation_p(metric[1, :5], target[1, :5], seed=0, controls=noise(5, 3)))


def interval_of_classes(metric, target, controls, seed, resamples=199):
    arrays = [repeated(values, resamples) for values in (metric, target, controls)]
    return percentile_interval(two_level(*arrays[:2], class_draws(len(metric), resamples, seed=seed), arrays[2]))


def test_null_data_make_a_claim_in_five_percent_of_the_runs():
    """Metric and target both follow two controls, and nothing else ties them together."""
    claims = {"percentile": 0, "bca": 0}
    kept = np.array([np.delete(np.arange(40), left_out) for left_out in range(40)])
    for run in range(120):
        controls = noise(40, 2, seed=3 * run)
        metric, target = (0.5 * controls.sum(axis=1) + noise(40, seed=3 * run + part) for part in (1, 2))
        arrays = [repeated(values, 199) for values in (metric, target, controls)]
        values = two_level(*arrays[:2], class_draws(40, 199, seed=run), arrays[2])
        without_each = partial_spearman(metric[kept], target[kept], controls[kept])  # `jackknife`, all at once
        claims["percentile"] += claim(percentile_interval(values)).predicts
        claims["bca"] += claim(bca_interval(within(metric, target, controls), values, without_each)).predicts
    for count in claims.values():
        assert binom.ppf(0.001, 120, 0.05) <= count <= binom.ppf(0.999, 120, 0.05)


def test_a_planted_relation_is_claimed_and_one_through_a_control_is_not():
    through_alone, through_partial = 0, 0
    for run in range(20):
        control, other, target = noise(60, 1, seed=3 * run), noise(60, seed=3 * run + 1), noise(60, seed=3 * run + 2)
        target = target + control[:, 0]
        through = control[:, 0] + 0.5 * other
        through_alone += claim(interval_of_classes(through, target, np.empty((60, 0)), run)).predicts
        through_partial += claim(interval_of_classes(through, target, control, run)).predicts
        rising = claim(interval_of_classes(np.exp(target), target + other, control, run))
        assert rising == (True, "predicts: the higher the metric, the higher the target")
        falling = claim(interval_of_classes(-target, target + other, control, run))
        assert falling == (True, "predicts: the higher the metric, the lower the target")
    assert through_alone == 20
    assert through_partial <= binom.ppf(0.999, 20, 0.05)


def test_clip_noise_counts_twice_and_the_centred_interval_allows_for_it():
    """Strong relation, noisy clips: what the docstring advises covers, the plain percentile interval does less so."""
    runs, classes, resamples, spread = 60, 80, 199, 0.7
    expected = 6 / np.pi * np.arcsin(0.9 / (1 + spread**2) / 2)  # of normal values with noise on both
    covered, shifts = np.zeros(3), []
    for run in range(runs):
        target = noise(classes, seed=5 * run)
        metric = 0.9 * target + np.sqrt(1 - 0.9**2) * noise(classes, seed=5 * run + 1)
        seen = [
            values + spread * noise(classes, seed=5 * run + 2 + part) for part, values in enumerate((metric, target))
        ]
        again = [
            values + spread * noise(resamples, classes, seed=-5 * run - part + 10**6)
            for part, values in enumerate(seen)
        ]
        draws = class_draws(classes, resamples, seed=run)
        values, point = two_level(*again, draws), within(*seen)
        shifts.append(np.median(values) - point)
        classes_alone = two_level(*(repeated(part, resamples) for part in seen), draws)
        intervals = [centred_interval(point, values), percentile_interval(classes_alone), percentile_interval(values)]
        covered += [low <= expected <= high for low, high in intervals]
    assert np.mean(shifts) < -0.1
    centred, alone, plain = covered
    assert centred >= binom.ppf(0.001, runs, 0.95) and alone >= binom.ppf(0.001, runs, 0.95)
    assert plain < centred


def test_an_interval_that_holds_zero_or_is_nan_claims_nothing():
    for interval in (Interval(-0.1, 0.2), Interval(0.0, 0.2), Interval(-0.2, 0.0), Interval(np.nan, np.nan)):
        assert claim(interval) == (False, "not shown to predict")
    assert claim(Interval(1e-9, 0.2)).predicts and claim(Interval(-0.2, -1e-9)).predicts


def test_errors_name_what_is_wrong():
    metric, target = noise(4, 6, seed=1), noise(4, 6, seed=2)
    draws = class_draws(6, 4, seed=0)
    with pytest.raises(ValueError, match="`classes` and `resamples` must be at least 1, got 0 and 4"):
        class_draws(0, 4, seed=0)
    with pytest.raises(ValueError, match="`draws` must number classes from 0 to 5, got from 0 to 6"):
        two_level(metric, target, np.where(draws == draws.max(), 6, draws))
    with pytest.raises(ValueError, match=r"`metric` must be \[\*model, resample, class\] and not empty, got \[4, 0\]"):
        two_level(metric[:, :0], target[:, :0], draws)
    with pytest.raises(ValueError, match=r"`draws` must be \[resample, class\] with 4 resamples.*got \[4, 0\]"):
        two_level(metric, target, draws[:, :0])
    for arguments in [(metric, target, draws[:3]), (metric[0], target[0], draws), (metric, target[:, 1:], draws)]:
        with pytest.raises((ValueError, TypeCheckError), match=r"draws|metric|target"):
            two_level(*arguments)
    with pytest.raises(ValueError, match="`shuffles` must be at least 1, got 0"):
        permutation_p(metric, target, shuffles=0, seed=0)
    with pytest.raises((ValueError, TypeCheckError), match="controls"):
        permutation_p(metric, target, seed=0, controls=noise(4, 5, 1))
