"""Intervals: the fast bootstrap equals scikit-learn on each resample, intervals cover, tests give known p-values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.stats import binom, norm
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import average_precision_score, roc_auc_score

from robustav.metrics import intervals
from robustav.metrics.intervals import (
    MacroScores,
    bca_interval,
    bootstrap,
    bootstrap_weights,
    centred_interval,
    holm,
    mcnemar,
    paired_drop,
    percentile_interval,
    resample_classes,
    wilson,
)
from robustav.metrics.tagging import average_precision, d_prime, mean_average_precision, mean_roc_auc, roc_auc


def simulated(samples=60, classes=4, decimals=None, seed=0, share=0.3):
    generator = np.random.default_rng(seed)
    labels = generator.random((samples, classes)) < share
    scores = generator.normal(size=labels.shape) + labels
    return (scores if decimals is None else scores.round(decimals)), labels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    decimals=st.sampled_from([None, 1, 0]),
    share=st.sampled_from([0.05, 0.5, 0.95]),
    whole=st.booleans(),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_each_resample_equals_scikit_learn(seed, decimals, share, whole, dtype):
    scores, labels = simulated(25, 3, decimals, seed, share)
    scores = scores.astype(dtype)
    weights = bootstrap_weights(25, 4, seed=seed) * (1 if whole else np.random.default_rng(seed).random((4, 25)))
    classes = resample_classes(scores, labels, weights)
    for row, weight in enumerate(weights):
        for column in range(3):
            kinds = np.unique(labels[weight > 0, column])
            for ours, theirs, exists in [
                (classes.average_precision, average_precision_score, True in kinds),
                (classes.roc_auc, roc_auc_score, len(kinds) == 2),
            ]:
                if exists:
                    expected = theirs(labels[:, column], scores[:, column].astype(float), sample_weight=weight)
                    assert ours[row, column] == pytest.approx(expected, abs=1e-12, rel=0)
                else:
                    assert np.isnan(ours[row, column])


def test_weights_of_one_give_the_point_values():
    scores, labels = simulated(decimals=1)
    classes = resample_classes(scores, labels, np.ones((1, len(scores)), dtype=int))
    np.testing.assert_allclose(classes.average_precision[0], average_precision(scores, labels), atol=1e-12)
    np.testing.assert_allclose(classes.roc_auc[0], roc_auc(scores, labels), atol=1e-12)
    macro = bootstrap(scores, labels, np.ones((1, len(scores))))
    area = mean_roc_auc(scores, labels)
    np.testing.assert_allclose(np.ravel(macro), [mean_average_precision(scores, labels), area, d_prime(area)])


def test_a_class_is_dropped_only_from_the_resamples_that_lack_it():
    scores = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    labels = np.array([[1, 0], [0, 1], [1, 0]])
    macro = bootstrap(scores, labels, np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]]))
    # Both classes; then only the first has positives, and none has both kinds; then only the second.
    np.testing.assert_allclose(macro.map, [((1 + 2 / 3) / 2 + 1 / 2) / 2, 1, 1])
    np.testing.assert_allclose(macro.auc, [(1 / 2 + 1 / 2) / 2, np.nan, np.nan])
    np.testing.assert_allclose(macro.d_prime, [0, np.nan, np.nan])
    empty = bootstrap(scores, np.zeros_like(labels), np.ones((2, 3)))
    assert np.isnan(empty).all()


@pytest.mark.parametrize("decimals", [None, 0])
def test_unmoved_by_order_and_monotone_transformations(decimals):
    scores, labels = simulated(decimals=decimals)
    weights = bootstrap_weights(len(scores), 20, seed=0)
    expected = bootstrap(scores, labels, weights)
    order = np.random.default_rng(1).permutation(len(scores))
    np.testing.assert_allclose(bootstrap(scores[order], labels[order], weights[:, order]), expected, atol=1e-12)
    np.testing.assert_allclose(bootstrap(np.exp(scores), labels, weights), expected, atol=1e-12)
    np.testing.assert_allclose(bootstrap(scores, labels, weights / 7), expected, atol=1e-12)
    halved = np.tile(weights, (1, 2)) / 2
    twice = bootstrap(np.tile(scores, (2, 1)), np.tile(labels, (2, 1)), halved)
    np.testing.assert_allclose(twice, expected, atol=1e-12)


def test_constant_scores_give_the_base_rate_and_chance():
    _, labels = simulated()
    weights = bootstrap_weights(len(labels), 20, seed=0)
    classes = resample_classes(np.zeros(labels.shape), labels, weights)
    np.testing.assert_allclose(classes.average_precision, weights @ labels / len(labels))
    np.testing.assert_allclose(classes.roc_auc, 0.5)


def test_memory_limit_does_not_change_results(monkeypatch):
    scores, labels = simulated()
    weights = bootstrap_weights(len(scores), 50, seed=0)
    expected = bootstrap(scores, labels, weights)
    monkeypatch.setattr(intervals, "CHUNK_BYTES", 8 * intervals.ARRAYS_PER_CHUNK * len(scores) * 7)
    np.testing.assert_allclose(bootstrap(scores, labels, weights), expected, rtol=1e-13)
    monkeypatch.setattr(intervals, "CHUNK_BYTES", 1)
    np.testing.assert_allclose(bootstrap(scores, labels, weights), expected, rtol=1e-13)


def test_weights_are_draws_with_replacement():
    weights = bootstrap_weights(50, 2000, seed=3)
    assert weights.shape == (2000, 50) and (weights.sum(axis=1) == 50).all()
    # Each count is binomial(50, 1/50); 2000 x 50 of them pin the shares to within a few thousandths.
    shares = np.bincount(weights.ravel(), minlength=5)[:5] / weights.size
    np.testing.assert_allclose(shares, binom.pmf(range(5), 50, 1 / 50), atol=0.006)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.12)


def test_weights_depend_on_their_seed_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002  (it is the legacy state that must not move)
    weights = bootstrap_weights(10, 30, seed=3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.testing.assert_array_equal(bootstrap_weights(10, 30, seed=3), weights)
    np.testing.assert_array_equal(bootstrap_weights(10, 7, seed=3), weights[:7])
    assert (bootstrap_weights(10, 30, seed=4) != weights).any()
    assert bootstrap_weights(10, seed=3).shape == (1000, 10)


def test_paired_drop_is_tighter_than_unpaired():
    scores, labels = simulated(300)
    attacked = scores - 0.5 * labels + 0.1 * np.random.default_rng(1).normal(size=scores.shape)
    weights = bootstrap_weights(len(scores), 400, seed=0)
    clean, after = bootstrap(scores, labels, weights), bootstrap(attacked, labels, weights)
    paired = paired_drop(clean, after)
    unpaired = paired_drop(clean, bootstrap(attacked, labels, bootstrap_weights(len(scores), 400, seed=1)))
    assert paired.map.std() < 0.6 * unpaired.map.std()
    assert percentile_interval(paired.map).low > 0
    same = paired_drop(clean, clean)
    np.testing.assert_array_equal(np.ravel(same), 0)


def test_drop_of_an_infinite_d_prime_is_nan_and_left_out():
    perfect = MacroScores(np.ones(3), np.ones(3), np.array([np.inf, np.inf, 2.0]))
    drop = paired_drop(perfect, perfect)
    np.testing.assert_array_equal(drop.d_prime, [np.nan, np.nan, 0])
    assert percentile_interval(drop.d_prime) == (0, 0)


def test_percentile_interval_counts_from_both_ends():
    values = np.random.default_rng(0).permutation(999.0 * np.arange(1, 1000) / 999)
    assert percentile_interval(values) == (25, 975)
    assert percentile_interval(values, level=0.9) == (50, 950)
    assert percentile_interval(np.append(values, [np.nan, np.nan])) == (25, 975)
    assert percentile_interval(np.array([1.0, 3.0, np.inf])) == (1, np.inf)
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


def test_percentile_interval_of_d_prime_is_d_prime_of_the_interval():
    scores, labels = simulated()
    macro = bootstrap(scores, labels, bootstrap_weights(len(scores), 100, seed=0))
    np.testing.assert_allclose(percentile_interval(macro.d_prime), d_prime(np.array(percentile_interval(macro.auc))))


def test_centred_interval_moves_the_median_onto_the_point():
    values = np.arange(1, 1000) / 100
    np.testing.assert_allclose(centred_interval(4.0, values), (-0.75, 8.75), atol=1e-12)
    np.testing.assert_allclose(centred_interval(5.0, values), percentile_interval(values))
    np.testing.assert_allclose(centred_interval(5.0, np.append(values, np.nan)), percentile_interval(values))
    assert centred_interval(np.inf, values) == percentile_interval(values)
    assert centred_interval(1.0, np.array([1.0, np.inf, np.inf])) == (1.0, np.inf)
    assert np.isnan(centred_interval(1.0, np.array([np.nan]))).all()


def leave_one_out_means(sample):
    return (sample.sum() - sample) / (len(sample) - 1)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("turn", [1, -1])
def test_bca_interval_equals_scipy_on_the_same_resamples(level, turn):
    sample = turn * np.random.default_rng(0).exponential(size=25)
    generator = np.random.default_rng(1)
    theirs = scipy_bootstrap((sample,), np.mean, confidence_level=level, method="BCa", random_state=generator)
    values = theirs.bootstrap_distribution
    ours = bca_interval(sample.mean(), values, leave_one_out_means(sample), level)
    # They interpolate between neighbouring values: 1 or 2 of 9999 apart in the tails.
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.01)
    assert np.abs(np.subtract(percentile_interval(values, level), ours)).min() > 0.02


def test_bca_interval_shares_worked_out_by_hand():
    values = np.arange(1.0, 1000.0)
    jackknife = np.array([0.0, 0.0, 0.0, 3.0])  # distances 3/4 three times and -9/4
    acceleration = (3 * 27 - 729) / 64 / (6 * (108 / 16) ** 1.5)
    bias = norm.ppf(599.5 / 999)
    shares = [norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in norm.ppf([0.025, 0.975])]
    low, high = bca_interval(600.0, values, jackknife)
    assert low == np.floor(1000 * shares[0]) and high == np.ceil(1000 * shares[1])
    # The mirror image of everything is the mirror image of the interval.
    assert bca_interval(-600.0, -values, -jackknife) == (-high, -low)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_bca_interval_without_bias_or_skewness_is_the_percentile_interval(level):
    values = np.random.default_rng(0).permutation(np.arange(999.0))
    symmetric = np.array([1.0, 2.0, 3.0])
    for jackknife in (symmetric, np.full(5, 0.1), np.full(5, 1 / 3) + 1e-17, np.append(symmetric, np.nan)):
        assert bca_interval(499.0, values, jackknife, level) == percentile_interval(values, level)
    assert bca_interval(499.0, np.append(values, np.nan), symmetric, level) == percentile_interval(values, level)


def test_bca_interval_of_values_that_are_all_equal():
    assert bca_interval(2.0, np.full(50, 2.0), np.arange(5.0)) == (2, 2)
    assert np.isnan(bca_interval(2.5, np.full(50, 2.0), np.arange(5.0))).all()


def test_bca_interval_is_nan_where_its_corrections_cannot_be_told():
    values, jackknife = np.arange(99.0), np.arange(5.0)
    for point in (-1.0, 99.0, np.nan, np.inf):
        assert np.isnan(bca_interval(point, values, jackknife)).all()
    for nothing in (np.array([]), np.full(5, np.nan), np.full(5, np.inf)):
        assert np.isnan(bca_interval(50.0, values, nothing)).all()
    assert np.isnan(bca_interval(50.0, np.full(5, np.nan), jackknife)).all()
    assert np.isnan(bca_interval(50.0, np.array([]), jackknife)).all()


def test_bca_interval_stays_within_the_values_at_extremes():
    values, jackknife = np.arange(99.0), np.array([0.0] * 99 + [1.0])
    for point in (0.0, 98.0):
        for sign in (1, -1):
            low, high = bca_interval(point, values, sign * jackknife, level=1 - 1e-12)
            assert 0 <= low <= high <= 98
    assert bca_interval(98.0, values, -jackknife, level=1 - 1e-12).high == 98
    assert bca_interval(0.0, np.array([-np.inf, 0.0, np.inf]), jackknife) == (-np.inf, np.inf)


def test_bca_interval_of_a_skewed_mean_misses_less_on_the_long_side():
    samples = 20
    generator = np.random.default_rng(0)
    too_low = np.zeros(2)
    for run in range(300):
        sample = generator.exponential(size=samples)
        values = bootstrap_weights(samples, 399, seed=run) @ sample / samples
        intervals = bca_interval(sample.mean(), values, leave_one_out_means(sample)), percentile_interval(values)
        too_low += [high < 1 for low, high in intervals]
    bca, percentile = too_low / 300  # 0.025 would be right
    assert 0.02 < bca < percentile - 0.01


def test_bootstrap_intervals_cover():
    runs, samples, classes = 250, 200, 16
    separations = np.linspace(0.5, 2, classes)
    generator = np.random.default_rng(0)
    attacked_by = 0.4
    points, drop_points, macros, drops = [], [], [], []
    for run in range(runs):
        labels = generator.random((samples, classes)) < 0.04
        labels[0] = True  # of each class, so that no set lacks one
        noise = generator.normal(size=labels.shape)
        weights = np.vstack([np.ones((1, samples), dtype=int), bootstrap_weights(samples, 299, seed=run)])
        clean = bootstrap(noise + labels * separations, labels, weights)
        drop = paired_drop(clean, bootstrap(noise + labels * (separations - attacked_by), labels, weights))
        points.append(clean.map[0])
        drop_points.append(drop.map[0])
        macros.append(MacroScores(*(values[1:] for values in clean)))
        drops.append(drop.map[1:])
    true_auc = norm.cdf(separations / np.sqrt(2)).mean()

    def covered(ends, truth):
        return sum(low <= truth <= high for low, high in ends)

    # All but one in a thousand sets of runs would fall in these limits if the interval covered exactly 95 %.
    least, most = binom.ppf([0.0005, 0.9995], runs, 0.95)
    centred = [centred_interval(point, macro.map) for point, macro in zip(points, macros, strict=True)]
    assert least <= covered(centred, np.mean(points)) <= most
    centred_drops = [centred_interval(point, values) for point, values in zip(drop_points, drops, strict=True)]
    assert least <= covered(centred_drops, np.mean(drop_points)) <= most
    assert least <= covered([percentile_interval(macro.auc) for macro in macros], true_auc) <= most


def test_many_rare_classes_need_the_centred_interval():
    scores, labels = simulated(1000, 300, share=0.01)
    macro = bootstrap(scores, labels, bootstrap_weights(1000, 200, seed=0))
    point = mean_average_precision(scores, labels)
    assert point < percentile_interval(macro.map).low
    low, high = centred_interval(point, macro.map)
    assert low < point < high


def test_wilson_known_values():
    # Half-widths at one half: 6.9, 3.1 and 1.0 points at 200, 1000 and 10 000.
    low, high = wilson(np.array([100, 500, 5000]), np.array([200, 1000, 10_000]))
    np.testing.assert_allclose((high - low) / 2, [0.0686, 0.0309, 0.0098], atol=5e-5)
    assert wilson(0, 200).low == 0 and wilson(0, 200).high == pytest.approx(0.01885, abs=1e-5)
    assert wilson(200, 200).high == 1 and wilson(200, 200).low == pytest.approx(1 - 0.01885, abs=1e-5)
    assert wilson(0, 0) == (0, 1)


def test_wilson_ends_are_the_shares_that_a_score_test_just_rejects():
    successes, count = 13, 40
    for end in wilson(successes, count, level=0.9):
        distance = abs(successes / count - end) / np.sqrt(end * (1 - end) / count)
        assert distance == pytest.approx(norm.ppf(0.95))


@pytest.mark.parametrize("count", [30, 200])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_covers(count, level):
    shares = np.linspace(0.005, 0.995, 199)
    successes = np.arange(count + 1)
    low, high = wilson(successes, np.full(count + 1, count), level)
    inside = (low <= shares[:, None]) & (shares[:, None] <= high)
    coverage = (inside * binom.pmf(successes, count, shares[:, None])).sum(axis=1)
    assert coverage.mean() == pytest.approx(level, abs=0.01)  # exact, no simulation; counts are lumpy
    assert coverage.min() > level - 0.12


def test_mcnemar_known_values():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(7, 1) == mcnemar(1, 7)


def test_holm_known_values():
    # Times 4, 3, 2, 1 in rising order: 0.02, 0.03, 0.06 and 0.04, which must not fall below 0.06.
    np.testing.assert_allclose(holm(np.array([0.03, 0.005, 0.04, 0.01])), [0.06, 0.02, 0.06, 0.03])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])
    assert holm(np.array([])).shape == (0,)


def test_errors_name_what_is_wrong():
    scores, labels = simulated()
    weights = bootstrap_weights(len(scores), 5, seed=0)
    broken = scores.copy()
    broken[4, 1] = np.nan
    with pytest.raises(ValueError, match="`scores` must be finite, got nan first at sample 4, class 1"):
        bootstrap(broken, labels, weights)
    with pytest.raises((ValueError, TypeCheckError), match="weights"):
        bootstrap(scores, labels, weights[:, 1:])
    with pytest.raises((ValueError, TypeCheckError), match="weights"):
        bootstrap(scores, labels, weights[0])
    with pytest.raises(ValueError, match="`weights` must be finite and at least 0, got from -1"):
        bootstrap(scores, labels, weights - weights.max(axis=0, keepdims=True).clip(max=1))
    with pytest.raises(ValueError, match="`samples` and `resamples` must be at least 1, got 0 and 5"):
        bootstrap_weights(0, 5, seed=0)
    clean = bootstrap(scores, labels, weights)
    with pytest.raises(ValueError, match="same resamples, got 5 and 3"):
        paired_drop(clean, bootstrap(scores, labels, weights[:3]))
    with pytest.raises(ValueError, match="`successes` must lie between 0 and `count`, got 3 of 2"):
        wilson(3, 2)
    for level in (0.0, 95.0):
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1"):
            wilson(1, 2, level)
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1"):
            percentile_interval(clean.map, level)
        with pytest.raises(ValueError, match="`level` must lie between 0 and 1"):
            bca_interval(0.5, clean.map, clean.map, level)
    with pytest.raises(ValueError, match="`only_first` and `only_second` must be counts, got -1 and 2"):
        mcnemar(-1, 2)
    with pytest.raises(ValueError, match=r"`p_values` must lie in \[0, 1\]"):
        holm(np.array([0.1, np.nan]))
